"""The access log: one JSON line a request, without anything a user wrote.

A line names the route's template, never the path; ids and query strings stay out. Lines are
gathered for a moment and written together, so a log costs one system call for many requests.
"""

from __future__ import annotations

import asyncio
from typing import BinaryIO

import msgspec

from perdure.core.clock import Clock
from perdure.frontends.http.call import Call

_FLUSH_S = 0.2
_LINES_MAX = 512

_encode = msgspec.json.Encoder().encode


class Line(msgspec.Struct, omit_defaults=True):
    """One request. One that was refused before it reached a route says why, by its `code`."""

    at_s: float
    request_id: str
    method: str
    route: str
    status: int
    duration_ms: float
    caller: str | None = None
    code: str | None = None
    event: str = "request"


class AccessLog:
    """Writes lines to `out`; None writes nothing."""

    def __init__(self, out: BinaryIO | None, clock: Clock) -> None:
        self._out = out
        self._clock = clock
        self._lines: list[bytes] = []
        self._flush: asyncio.TimerHandle | None = None

    def add(self, call: Call, duration_s: float) -> None:
        """Record one request that was answered (status 0: that could not be)."""
        if self._out is None:
            return
        line = Line(
            at_s=round(self._clock.now_s(), 3),
            request_id=call.request_id,
            method=call.scope["method"],
            route=call.template,
            status=call.status,
            duration_ms=round(duration_s * 1000, 3),
            caller=None if call.principal is None else call.principal.name,
        )
        self._write(line)

    def refuse(self, status: int, code: str) -> str:
        """Record a request that the connection refused; returns the id that it is given."""
        request_id = self._clock.new_id("req")
        if self._out is not None:
            at_s = round(self._clock.now_s(), 3)
            self._write(Line(at_s, request_id, "(none)", "(none)", status, 0.0, code=code))
        return request_id

    def _write(self, line: Line) -> None:
        self._lines.append(_encode(line))
        if len(self._lines) >= _LINES_MAX:
            self.flush()
        elif self._flush is None:
            self._flush = asyncio.get_running_loop().call_later(_FLUSH_S, self.flush)

    def flush(self) -> None:
        """Write what was gathered."""
        if self._flush is not None:
            self._flush.cancel()
            self._flush = None
        if self._out is not None and self._lines:
            self._out.write(b"\n".join(self._lines) + b"\n")
            self._out.flush()
            self._lines.clear()
