"""A whole node in this process, on each engine that can carry it, with a real upstream process."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import msgspec
import pytest

from perdure.proving.subjects import postgres_url
from perdure.proving.upstream import ScriptedUpstream
from perdure.services.config import load
from perdure.services.gateway import Started
from perdure.services.lifecycle import Node
from perdure.services.requests import Caller

_numbers = itertools.count()
_END_S = 60.0


def someone(**known: Any) -> Caller:
    """A caller of the default tenant whose request has not been sent before."""
    return Caller("default", **({"digest": f"digest{next(_numbers)}"} | known))


class Driver:
    """A node and the few things tests do with it."""

    def __init__(self, node: Node) -> None:
        self.node = node

    async def ask(self, said: Any, *, caller: Caller | None = None, **fields: Any) -> Started:
        body = {"model": "scripted", "input": said} | fields
        return await self.node.gateway.create(caller or someone(), body)

    async def answer(self, said: Any, **fields: Any) -> dict[str, Any]:
        """The terminal body."""
        started = await self.ask(said, **fields)
        return msgspec.json.decode(await self.node.gateway.finished(started))

    async def events(self, started: Started, after: int = -1) -> list[dict[str, Any]]:
        """All of them, to the end. Raises `TimeoutError` where that does not come."""
        async with asyncio.timeout(_END_S):
            return [
                msgspec.json.decode(event)
                async for group in self.node.gateway.events(started, after=after)
                for event in group
            ]

    async def conversation(self, *said: str) -> str:
        items = [{"role": "user", "content": text} for text in said]
        body = await self.node.conversations.create(someone(), {"items": items})
        return msgspec.json.decode(body)["id"]

    async def words(self, conversation_id: str) -> list[str]:
        """What was said in a conversation, in order."""
        owner = ("default", conversation_id)
        found = [
            msgspec.json.decode(item.attachment or b"")
            async for item in self.node.state.items.all(owner, "items")
        ]
        return ["".join(part["text"] for part in item["content"]) for item in found]


Open = Callable[..., Awaitable[Driver]]


@pytest.fixture
async def upstream() -> AsyncIterator[ScriptedUpstream]:
    async with ScriptedUpstream() as server:
        yield server


ENGINES = ["postgres"] if os.environ.get("SURFACES_ON") == "postgres" else ["memory", "sqlite"]
"""`make surfaces` runs every test here on PostgreSQL alone, which takes minutes."""


@pytest.fixture(params=ENGINES)
def engine_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A store that is there as long as the test: opened again, it is the same."""
    match request.param:
        case "memory":
            return "memory://"
        case "sqlite":
            return f"sqlite:///{tmp_path / 'perdure.db'}"
        case _:
            return postgres_url(tmp_path)


@pytest.fixture
async def opened(
    engine_url: str, upstream: ScriptedUpstream, tmp_path: Path
) -> AsyncIterator[Open]:
    """Opens nodes over one store; what is still open at the end is closed and verified."""
    async with AsyncExitStack() as stack:

        async def open(flags: dict[str, Any] | None = None, **made: Any) -> Driver:
            usual = {"engine": engine_url, "data": str(tmp_path), "upstream.url": upstream.url}
            config = load(environment={}, flags=usual | (flags or {}))
            node = Node(config, environment={}, **made)
            await node.open()
            stack.push_async_callback(_close, node)
            return Driver(node)

        yield open


async def _close(node: Node) -> None:
    if node.opened:
        findings = [finding async for finding in node.state.engine.verify()]
        await node.drain(0)
        await node.close()
        assert findings == []


@pytest.fixture
async def driver(opened: Open) -> Driver:
    return await opened()


def at(name: str, server: ScriptedUpstream, **more: Any) -> dict[str, Any]:
    return {"name": name, "url": server.url, **more}


Over = Callable[..., Awaitable[Driver]]


@pytest.fixture
async def over(tmp_path: Path) -> AsyncIterator[Over]:
    """Opens nodes over upstreams, and closes them at the end."""
    async with AsyncExitStack() as stack:

        async def open(*upstreams: dict[str, Any], **made: Any) -> Driver:
            flags = {"engine": "memory://", "data": str(tmp_path), "upstreams": list(upstreams)}
            node = Node(load(environment={}, flags=flags), environment={}, **made)
            await node.open()
            stack.push_async_callback(node.close)
            return Driver(node)

        yield open
