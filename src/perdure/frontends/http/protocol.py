"""The connection: what a socket may do before, between and after requests.

uvicorn's protocol has no limit on how slowly or how long a request's head may arrive; here every
wait of a connection has an end. A timer exists only while a request is incomplete, so a request
that arrives whole costs nothing. What one connection can make this process hold is bounded too:
the size and number of its headers, and how many requests it may send ahead of their answers.
"""

from __future__ import annotations

import asyncio
from typing import Any, cast

import msgspec
from uvicorn._types import ASGI3Application
from uvicorn.config import Config as UvicornConfig
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from perdure.frontends.http.journal import AccessLog
from perdure.services.config import Limits
from perdure.wire.errors import ErrorBody, ErrorDetail

_LINGER_BYTES_MAX = 1024 * 1024 * 1024
"""How much of a body is read and thrown away after its request was refused, so that an honest
client gets to read why."""

_HEADERS_MAX = 128
"""Of a head that has not ended. Each costs many times the bytes it is sent in."""

_AHEAD_MAX = 16
"""Requests that may wait behind the one being answered. Of the smallest ones, thousands fit into
what is read at once, and each costs many times its bytes."""

_PROGRESS_BYTES = 4096
"""How much of a body must come in every `limits.read_timeout_s`, however often some of it does."""

_LAST_REQUEST_S = 0.5
"""How long a server that stops waits for what may be on its way over a connection it has accepted
and nothing was asked on yet."""

_CONTINUE = b"HTTP/1.1 100"

_PHRASES = {400: b"Bad Request", 408: b"Request Timeout", 431: b"Headers Too Large"}
_PHRASES[503] = b"Service Unavailable"


class _Joined:
    """What an answer is written to: its head waits for the first part of its body, which follows
    at once, so that the two leave in one segment."""

    __slots__ = ("_head", "_transport", "is_closing")

    def __init__(self, transport: asyncio.Transport) -> None:
        self._head: bytes | None = None
        self._transport = transport
        self.is_closing = transport.is_closing

    def write(self, data: bytes) -> None:
        if self._head is None and not data.startswith(_CONTINUE):
            self._head = data
        elif self._head:
            self._transport.write(self._head + data)
            self._head = b""
        else:
            self._transport.write(data)

    def flush(self) -> None:
        """Send a head whose answer has no body."""
        if self._head:
            self._transport.write(self._head)
            self._head = b""

    def close(self) -> None:
        self.flush()
        self._transport.close()


class _TooFarAhead(Exception):
    """Raised into the parser to make it stop."""


class ConnectionStats(msgspec.Struct):
    """Connections refused or dropped since the start, by why."""

    over_limit: int = 0
    late: int = 0
    malformed: int = 0
    stalled: int = 0
    upgrades: int = 0


class Connection(HttpToolsProtocol):
    """One connection; `limits`, `stats` and `log` are set on the subclass that `bounded` makes."""

    limits: Limits
    stats: ConnectionStats
    log: AccessLog
    transport: asyncio.Transport

    def __init__(
        self,
        config: UvicornConfig,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._timer: asyncio.TimerHandle | None = None
        self._stall: asyncio.TimerHandle | None = None
        self._in_head = False
        self._head_bytes = 0
        self._ended_one = False
        self._discarded_bytes = 0
        self._awaited_bytes = 0
        self._answered: RequestResponseCycle | None = None
        self._closing = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(cast(asyncio.Transport, transport))
        if len(self.connections) > self.limits.connections_max:
            self.stats.over_limit += 1
            self._refuse(503, "server_busy", "Too many connections. Try again later.")
            return
        self._timer = self.loop.call_later(self.limits.head_timeout_s, self._head_late)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self._stop_stall()
        super().connection_lost(exc)
        if self._answered is not None and not self._answered.response_complete:
            self._answered.disconnected = True  # uvicorn tells only the request that came last
            self._answered.message_event.set()

    def data_received(self, data: bytes) -> None:
        self._ended_one = False
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._in_head and not self._ended_one:  # else the bytes belong to another request too
            self._head_bytes += len(data)
        if self._head_bytes > self.limits.head_bytes_max or (
            self._in_head and len(self.headers) > _HEADERS_MAX
        ):
            self._refuse(431, "headers_too_large", "The request's headers are too large.")
        else:
            self._watch()

    def on_message_begin(self) -> None:
        self._in_head = True
        super().on_message_begin()
        if len(self.pipeline) > _AHEAD_MAX:
            raise _TooFarAhead

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:  # fields behind a body are dropped: they could replace those before it
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._head_bytes = 0
        self._discarded_bytes = 0
        self._awaited_bytes = 0
        self._stop_timer()
        super().on_headers_complete()
        if self._asks_for_websocket():
            return  # there is no cycle: the answer is given once the head has been read
        if self.scope["method"] != "HEAD":
            self.cycle.transport = cast(asyncio.Transport, _Joined(self.transport))

    def shutdown(self) -> None:
        """Take no more requests than those that have begun to arrive, or may be about to, as this
        process has accepted the connection: nobody else could answer them."""
        if self.cycle is not None and not self._in_head:
            super().shutdown()
            return
        self._closing = True
        self._stop_timer()
        self._timer = self.loop.call_later(_LAST_REQUEST_S, self.transport.close)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._answered = cycle
        if self._closing:
            cycle.keep_alive = False
        super()._start_asgi_task(cycle, app)

    def on_body(self, body: bytes) -> None:
        self._awaited_bytes -= len(body)
        if self.cycle.response_complete:
            self._discarded_bytes += len(body)
            if self._discarded_bytes > _LINGER_BYTES_MAX:
                self.transport.close()
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._ended_one = True
        self._stop_timer()
        super().on_message_complete()

    def _asks_for_websocket(self) -> bool:
        return self.parser.should_upgrade() and self._should_upgrade()

    def _should_upgrade(self) -> bool:
        return self._get_upgrade() == b"websocket"

    def handle_websocket_upgrade(self) -> None:
        """Refuse: an answer to the request without the upgrade would be one to another question."""
        self.stats.upgrades += 1
        self._refuse(
            400,
            "websocket_not_supported",
            "This server does not speak WebSocket. Send the request as POST, with 'stream': true "
            "for events as they happen.",
        )

    def _unsupported_upgrade_warning(self) -> None:
        """Other upgrades are offers that a server may leave be (RFC 9110, section 7.8)."""

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stall = self.loop.call_later(self.limits.stall_timeout_s, self._stalled)

    def resume_writing(self) -> None:
        self._stop_stall()
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        self.stats.malformed += 1
        self._refuse(400, "invalid_request", msg)

    def _watch(self) -> None:
        """Start the timer that what is missing now needs: some of a body must come in every so
        long, a head must be there so long after its first byte, or after the last sign of a client
        that says nothing."""
        if self._incomplete():
            if self._awaited_bytes <= 0:
                self._await_body()
        elif not self._in_head and self.cycle is not None and not self.cycle.response_complete:
            self._stop_timer()
        elif self._timer is None:
            self._timer = self.loop.call_later(self.limits.head_timeout_s, self._head_late)

    def _await_body(self) -> None:
        self._stop_timer()
        self._awaited_bytes = _PROGRESS_BYTES
        self._timer = self.loop.call_later(self.limits.read_timeout_s, self._body_late)

    def _incomplete(self) -> bool:
        return self.cycle is not None and self.cycle.more_body and not self.cycle.response_complete

    def _head_late(self) -> None:
        self.stats.late += 1
        if self._in_head:
            self._refuse(408, "request_timeout", "The request's headers did not arrive in time.")
        else:
            self.transport.close()

    def _body_late(self) -> None:
        if self.flow.read_paused:
            self._await_body()  # it is this server that does not take more
            return
        self.stats.late += 1
        if self._incomplete() and not self.cycle.response_started:
            self._refuse(408, "request_timeout", "The request's body stopped arriving.")
        else:
            self.transport.close()

    def _stalled(self) -> None:
        """The client takes nothing: what is buffered for it will never be sent."""
        self.stats.stalled += 1
        self.transport.abort()

    def _refuse(self, status: int, code: str, message: str) -> None:
        """Answer without the application, which never sees this request, and hang up."""
        self._stop_timer()
        if self.transport.is_closing():
            return
        cycle = self._answered
        if cycle is not None and cycle.response_started and not cycle.response_complete:
            self.transport.close()  # nothing may stand in the middle of another answer
            return
        type = "invalid_request_error" if status < 500 else "server_error"
        body = msgspec.json.encode(ErrorBody(ErrorDetail(message=message, type=type, code=code)))
        request_id = self.log.refuse(status, code).encode()
        self.transport.write(
            b"HTTP/1.1 %d %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\n"
            b"x-request-id: %s\r\nconnection: close\r\n\r\n%s"
            % (status, _PHRASES[status], len(body), request_id, body)
        )
        self.transport.close()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _stop_stall(self) -> None:
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None


def bounded(limits: Limits, stats: ConnectionStats, log: AccessLog) -> type[Connection]:
    """The protocol class that keeps these limits, and counts and records what they cost."""
    own = {"limits": limits, "stats": stats, "log": log}
    return type("BoundedConnection", (Connection,), own)
