"""One request as a handler sees it, and the answers a handler may give.

A handler takes the node and a call and returns an `Answer`, a `Download` or an `EventStream`; it
never touches ASGI. Every byte that leaves goes through `Call.reply` or `Call.write`, so the request
id is on all answers and none is given twice.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from typing import Any, TypeVar
from urllib.parse import parse_qsl, unquote_to_bytes

import msgspec
from starlette.types import Receive, Scope, Send

from perdure.core import codec
from perdure.core.errors import Invalid, PerdureError
from perdure.core.offload import off_loop

T = TypeVar("T")

CALL = "perdure.call"
"""Where the call stands in its ASGI scope."""

JSON = b"application/json"
OCTETS = b"application/octet-stream"
EVENTS = b"text/event-stream; charset=utf-8"

_PARSED_INLINE_BYTES_MAX = 256 * 1024
_QUERY_FIELDS_MAX = 64


class BodyTooLarge(Invalid):
    """The request body is over the limit; it was not read to its end."""

    code = "request_too_large"


class Disconnected(PerdureError):
    """The client went away before its request was complete; there is nobody to answer."""

    code = "disconnected"


class Answer(msgspec.Struct, frozen=True):
    """A whole response."""

    body: bytes
    status: int = 200
    headers: tuple[tuple[bytes, bytes], ...] = ()
    media: bytes = JSON


class EventStream(msgspec.Struct, frozen=True):
    """Groups of JSON events, sent as they come; the stream ends after the last. `left` is done
    when the client goes away before that. `framed` ones are server-sent events already, whole ones,
    of another grammar than that of responses. `farewell` is sent where the server stops before the
    last; without one, what such a stream of its kind always sends."""

    groups: AsyncGenerator[list[bytes], None]
    left: Callable[[], Awaitable[None]] | None = None
    framed: bool = False
    farewell: bytes | None = None
    headers: tuple[tuple[bytes, bytes], ...] = ()


class Download(msgspec.Struct, frozen=True):
    """Bytes sent as they come, `size_bytes` of them."""

    chunks: AsyncGenerator[bytes, None]
    size_bytes: int
    status: int = 200
    headers: tuple[tuple[bytes, bytes], ...] = ()
    media: bytes = OCTETS


class Principal(msgspec.Struct, frozen=True):
    """Who asks: the tenant whose things are seen, and the key's name, for limits and logs.
    `operator` came over the control socket; responses of `store_always` are stored whatever the
    request says."""

    tenant: str
    name: str
    operator: bool = False
    store_always: bool = False


class Call:
    """See the head of this file."""

    __slots__ = (
        "_headers",
        "_receive",
        "_send",
        "answered_s",
        "principal",
        "request_id",
        "scope",
        "status",
        "template",
    )

    def __init__(self, scope: Scope, receive: Receive, send: Send, request_id: str) -> None:
        self.scope = scope
        self.request_id = request_id
        self.template = "(none)"
        self.principal: Principal | None = None
        self.status = 0
        self.answered_s: float | None = None
        self._receive = receive
        self._send = send
        self._headers: dict[bytes, bytes] | None = None

    @property
    def tenant(self) -> str:
        """The tenant admitted for this call."""
        assert self.principal is not None, "the route is open, so nobody was admitted"
        return self.principal.tenant

    @property
    def headers(self) -> Mapping[bytes, bytes]:
        """Request headers by lower-case name; of a repeated one the last."""
        if self._headers is None:
            self._headers = dict(self.scope["headers"])
        return self._headers

    def text_header(self, name: bytes) -> str | None:
        """A header as text. Raises `Invalid` for bytes that are not printable ASCII."""
        value = self.headers.get(name)
        if value is None:
            return None
        text = value.decode("latin-1").strip()
        if not text.isascii() or not text.isprintable():
            raise Invalid(f"the header {name.decode()} is not printable ASCII.")
        return text

    def param(self, name: str) -> str:
        """A path parameter, decoded strictly: two spellings of invalid UTF-8 are not one id."""
        raw = self.scope.get("raw_path")
        if raw is not None and b"%" in raw:
            try:
                unquote_to_bytes(raw).decode()
            except UnicodeDecodeError:
                raise Invalid("the path is not UTF-8 after percent-decoding.") from None
        value: str = self.scope["path_params"][name]
        return value

    def query(self) -> dict[str, list[str]]:
        """The query string: every name with its values in order; `name[]` counts as `name`.

        Raises `Invalid` for text that is not UTF-8 or has too many fields.
        """
        raw: bytes = self.scope["query_string"]
        if not raw:
            return {}
        try:
            pairs = parse_qsl(
                raw.decode("ascii"),
                keep_blank_values=True,
                errors="strict",
                max_num_fields=_QUERY_FIELDS_MAX,
            )
        except ValueError as error:
            raise Invalid(f"the query string cannot be read: {error}.") from None
        found: dict[str, list[str]] = {}
        for name, value in pairs:
            found.setdefault(name.removesuffix("[]"), []).append(value)
        return found

    async def body(self, bytes_max: int) -> bytes:
        """The whole request body. Raises `BodyTooLarge` before more than `bytes_max` is kept."""
        announced = self.headers.get(b"content-length")
        if announced is not None and announced.isdigit() and int(announced) > bytes_max:
            raise _too_large(int(announced), bytes_max)
        message = await self._receive()
        if not message.get("more_body", False) and message["type"] == "http.request":
            whole: bytes = message.get("body", b"")
            if len(whole) > bytes_max:
                raise _too_large(len(whole), bytes_max)
            return whole
        parts: list[bytes] = []
        size_bytes = 0
        while True:
            if message["type"] == "http.disconnect":
                raise Disconnected("the client left before its request was complete.")
            parts.append(message.get("body", b""))
            size_bytes += len(parts[-1])
            if size_bytes > bytes_max:
                raise _too_large(size_bytes, bytes_max)
            if not message.get("more_body", False):
                return b"".join(parts)
            message = await self._receive()

    async def stream(self, bytes_max: int) -> AsyncGenerator[bytes, None]:
        """The request body as it arrives. Raises `BodyTooLarge` past `bytes_max`, before anything
        is read where the client announces more."""
        announced = self.headers.get(b"content-length")
        if announced is not None and announced.isdigit() and int(announced) > bytes_max:
            raise _too_large(int(announced), bytes_max)
        size_bytes = 0
        more = True
        while more:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise Disconnected("the client left before its request was complete.")
            part: bytes = message.get("body", b"")
            more = message.get("more_body", False)
            size_bytes += len(part)
            if size_bytes > bytes_max:
                raise _too_large(size_bytes, bytes_max)
            if part:
                yield part

    async def parse(self, body: bytes) -> Any:
        """The body as plain values, strictly parsed; None where there is none."""
        if not body:
            return None
        if len(body) > _PARSED_INLINE_BYTES_MAX:
            return await off_loop(codec.parse, body)
        return codec.parse(body)

    async def disconnected(self) -> None:
        """Return once the client is gone (or the answer is complete)."""
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def reply(self, answer: Answer) -> None:
        """Send a whole answer."""
        # A 304 has no body, and a length would be that of the body it spares (RFC 9110, 8.6).
        length = [(b"content-length", b"%d" % len(answer.body))] if answer.status != 304 else []
        await self._start(answer.status, answer.media, [*length, *answer.headers])
        await self._send({"type": "http.response.body", "body": answer.body})

    async def download(self, given: Download) -> None:
        """Send bytes until their end, or until the client has left."""
        async with aclosing(given.chunks) as chunks:
            headers = [(b"content-length", b"%d" % given.size_bytes), *given.headers]
            await self._start(given.status, given.media, headers)
            left = asyncio.ensure_future(self.disconnected())
            try:
                if self.scope["method"] != "HEAD":
                    async for chunk in chunks:
                        if left.done():
                            return
                        await self.write(chunk)
                await self.write(b"", last=True)
            finally:
                left.cancel()

    async def begin(self, headers: tuple[tuple[bytes, bytes], ...]) -> None:
        """Start an event stream."""
        await self._start(200, EVENTS, [(b"cache-control", b"no-store"), *headers])
        await self.write(b"")

    async def write(self, part: bytes, *, last: bool = False) -> None:
        """Send a part of an answer; it returns when the connection can take more."""
        await self._send({"type": "http.response.body", "body": part, "more_body": not last})

    async def _start(self, status: int, media: bytes, headers: list[tuple[bytes, bytes]]) -> None:
        self.status = status
        headers += ((b"content-type", media), (b"x-request-id", self.request_id.encode()))
        await self._send({"type": "http.response.start", "status": status, "headers": headers})


def _too_large(actual_bytes: int, bytes_max: int) -> BodyTooLarge:
    return BodyTooLarge(
        f"the request body has at least {actual_bytes} bytes, over the limit of {bytes_max}. "
        "Send less at once."
    )
