"""Server-sent events: durable events out, as fast as each client takes them.

Nothing is queued here. A client's events come from its own place in the log, and `Call.write`
waits while the connection's buffer (64 KiB) is full; what is larger is written in pieces. So a
slow reader costs one buffer and delays nobody. One that takes nothing for `limits.stall_timeout_s`
loses its connection (see `protocol`): the events are durable, and it resumes by sequence number.
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import msgspec
import structlog

from perdure.core.errors import PerdureError, Unavailable
from perdure.frontends.http.call import Call, EventStream
from perdure.wire.errors import body_of
from perdure.wire.events import ErrorEvent, encode_event, sse, sse_pieces, type_of

_log = structlog.get_logger("perdure.http")

HEARTBEAT = b": still here\n\n"
DONE = b"data: [DONE]\n\n"
"""What follows the last event; every SDK stops reading at it. A stream that was ended before its
last event does not get it."""

FAREWELL = b": the server is stopping; resume with starting_after\n\n"


PIECE_BYTES = 64 * 1024
"""More than this is not handed to a connection at once."""


class StreamStats(msgspec.Struct):
    """Streams open now, and what ended others before their last event."""

    open: int = 0
    disconnected: int = 0
    stopped: int = 0
    failed: int = 0


class _Head(msgspec.Struct):
    type: str
    sequence_number: int


_head = msgspec.json.Decoder(_Head)


class _Events:
    """Events on their way to one client. Those that leave in pieces are not to be spoken into, and
    after the last of them nothing is said."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self._turn = asyncio.Lock()
        self._ended = False
        self.whole = True

    async def send(self, types: list[str], group: list[bytes]) -> None:
        """Send a group; it returns when the connection can take more."""
        async with self._turn:
            if sum(memoryview(event).nbytes for event in group) <= PIECE_BYTES:
                parts = [sse(type, event) for type, event in zip(types, group, strict=True)]
                await self._call.write(b"".join(parts))
                return
            for type, event in zip(types, group, strict=True):
                self.whole = False
                for piece in sse_pieces(type, event, PIECE_BYTES):
                    await self._call.write(piece)
                self.whole = True

    async def show_life(self) -> None:
        """Send a comment, unless the client has yet to take what it was sent."""
        if not (self._turn.locked() or self._ended):
            async with self._turn:
                await self._call.write(HEARTBEAT)

    async def end(self, part: bytes) -> None:
        """Send the last part."""
        async with self._turn:
            self._ended = True
            await self._call.write(part, last=True)


class Streams:
    """Every open stream of a server, so that a stop can end them all."""

    def __init__(self, heartbeat_s: float) -> None:
        self._heartbeat_s = heartbeat_s
        self._pumps: set[asyncio.Task[None]] = set()
        self._stopping = False
        self.stats = StreamStats()

    async def end(self, within_s: float) -> None:
        """Let streams reach their last event, which may just have been written; then end the
        others where they are, in good form: their clients resume elsewhere or later."""
        self._stopping = True
        if self._pumps:
            await asyncio.wait(self._pumps, timeout=within_s)
        for pump in self._pumps:
            pump.cancel()

    async def serve(self, call: Call, stream: EventStream) -> None:
        """Send a stream to its end, or until its client leaves or the server stops."""
        await call.begin(stream.headers)
        events = _Events(call)
        pump = asyncio.create_task(self._pump(call, stream, events))
        watch = asyncio.create_task(self._watch(call, events))
        self._pumps.add(pump)
        self.stats.open += 1
        if self._stopping:
            pump.cancel()
        try:
            await asyncio.wait((pump, watch), return_when=asyncio.FIRST_COMPLETED)
            if pump.cancelled():
                self.stats.stopped += 1
                farewell = stream.farewell or (_CUT if stream.framed else FAREWELL)
                await events.end(farewell if events.whole else b"")
            elif not pump.done():
                self.stats.disconnected += 1
                if stream.left is not None:
                    await stream.left()
        finally:
            pump.cancel()
            watch.cancel()
            await asyncio.wait((pump, watch))
            await stream.groups.aclose()  # a pump that was cancelled before it began has not
            self._pumps.discard(pump)
            self.stats.open -= 1
        for task in (pump, watch):
            if not task.cancelled():
                task.result()

    async def _pump(self, call: Call, stream: EventStream, events: _Events) -> None:
        last = 0
        async with aclosing(stream.groups) as groups:
            try:
                async for group in groups:
                    if stream.framed:
                        await call.write(b"".join(group))
                        continue
                    heads = [_head.decode(event) for event in group]
                    last = heads[-1].sequence_number
                    await events.send([head.type for head in heads], group)
            except PerdureError as error:
                self.stats.failed += 1
                _log.warning("a stream ended early", request_id=call.request_id, code=error.code)
                await events.end(_framed(error) if stream.framed else _failure(error, last))
                return
        await events.end(b"" if stream.framed else DONE)

    async def _watch(self, call: Call, events: _Events) -> None:
        """Send a comment in every quiet period; return when the client has left."""
        while True:
            try:
                async with asyncio.timeout(self._heartbeat_s):
                    await call.disconnected()
                return
            except TimeoutError:
                await events.show_life()


def _framed(error: PerdureError) -> bytes:
    """The error as clients of chat completions expect it in a stream."""
    return b"data: %b\n\n" % msgspec.json.encode(body_of(error))


_CUT = _framed(Unavailable("the server is stopping, and this answer was not stored; ask again."))


def _failure(error: PerdureError, last: int) -> bytes:
    """The `error` event of OpenAI's stream grammar. It is not in the log, so it carries the
    number of the last one that is: resuming after it misses nothing."""
    detail = body_of(error).error
    event = ErrorEvent(
        message=detail.message, code=detail.code, param=detail.param, sequence_number=last
    )
    return sse(type_of(event), encode_event(event))
