"""What handlers are given: the node, and what serves it.

Handlers read requests through here, so what a request may be (its size, its name for idempotency,
its list parameters) is decided once.
"""

from __future__ import annotations

import hashlib
from typing import Any, Literal

import msgspec

from perdure.core import codec
from perdure.core.errors import Invalid
from perdure.core.values import Finding, Page, Record
from perdure.frontends.http.call import Answer, Call
from perdure.frontends.http.metrics import Exposition, RequestStats
from perdure.frontends.http.protocol import ConnectionStats
from perdure.frontends.http.sse import Streams
from perdure.services.lifecycle import Node
from perdure.services.listing import Listed
from perdure.services.requests import Caller
from perdure.services.stored import Stored
from perdure.surfaces.items import Item, body

RETRIES = b"x-stainless-retry-count"
"""How often official SDKs say they have sent a request before."""

encode = msgspec.json.encode


class ObjectList(msgspec.Struct, frozen=True, kw_only=True):
    """The envelope of lists that are Perdure's own: OpenAI's, and what is damaged beside it."""

    object: Literal["list"] = "list"
    data: list[msgspec.Raw]
    first_id: str | None
    last_id: str | None
    has_more: bool
    damaged: list[Finding]


class Service:
    """The node and everything around it that handlers need."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.limits = node.config.limits
        self.streams = Streams(self.limits.heartbeat_s)
        self.requests = RequestStats()
        self.connections = ConnectionStats()
        self.exposition: Exposition
        self.openapi: bytes

    @property
    def stored(self) -> Stored:
        return Stored(self.node.state, self.node.gateway, self.node.jobs)

    def not_ready(self) -> str | None:
        """Why requests cannot be served now, or None."""
        if self.node.opened:
            return None
        running = self.node.startup.phases[-1].name if self.node.startup.phases else "starting"
        return f"The server is not ready ({running}). See /v1/startup."

    async def named(self, call: Call) -> tuple[Caller, Any]:
        """Who sends this POST and how to know it again, and its parsed body.

        A digest is taken only where a repeat could ask for it: from a client that names its
        request, or one that says how often it has sent it.
        """
        sent = await call.body(self.limits.body_bytes_max)
        return self.caller(call, sent), await call.parse(sent)

    def caller(self, call: Call, sent: bytes) -> Caller:
        """Who sends a POST, known again by `sent`. Raises `Invalid` for an empty name."""
        key = call.text_header(b"idempotency-key")
        if key == "":
            raise Invalid("the header idempotency-key is empty; leave it out or name the request.")
        count = call.headers.get(RETRIES)
        digest = ""
        assert call.principal is not None
        if key is not None or count is not None:
            state = hashlib.sha256(f"{call.scope['path']}\0{call.principal.name}\0".encode())
            state.update(sent)
            digest = state.hexdigest()
        retried = count is not None and count.isdigit() and bool(count.strip(b"0"))
        return Caller(call.tenant, digest, key, retried, call.principal.store_always)


def listed(page: Page[Record[Item]]) -> Answer:
    """A page of items in the list envelope; every item goes out as the bytes it is kept as."""
    items = page.items
    return Answer(
        encode(
            {
                "object": "list",
                "data": [msgspec.Raw(body(item)) for item in items],
                "first_id": items[0].value.id if items else None,
                "last_id": items[-1].value.id if items else None,
                "has_more": page.cursor is not None,
            }
        )
    )


def listed_objects(found: Listed[Any], bodies: list[msgspec.Raw]) -> Answer:
    """A page of whole objects in the list envelope, with what could not be read by name."""
    ids = [record.key[-1] for record in found.items]
    return shown(
        ObjectList(
            data=bodies,
            first_id=ids[0] if ids else None,
            last_id=ids[-1] if ids else None,
            has_more=found.more,
            damaged=found.damaged,
        )
    )


def shown(value: Any) -> Answer:
    """A struct as an answer."""
    return Answer(codec.encode(value))
