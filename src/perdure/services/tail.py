"""Tails: following logs live, with one reader a stream however many follow it.

Only what an engine returns is ever handed on, so nothing is seen before it is durable. Followers
near the end share the recent entries in memory; one that is behind reads the engine itself.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable
from itertools import islice
from typing import Any

import msgspec

from perdure.core.engine import Engine
from perdure.core.errors import Latched, Missing, PerdureError
from perdure.core.keys import Key, show
from perdure.core.layouts import Log
from perdure.core.values import Entry
from perdure.services.supervisor import contained

Ended = Callable[[Entry[Any]], bool]

_Followed = tuple[str, Key, int | None]
"""A log, a stream of it, and the incarnation of that which is meant, if it matters."""

_RECENT_MAX = 512
_PAGE = 64
"""Entries read at once: few enough for an engine to read them without a thread."""

_WAIT_S = 10.0


class TailStats(msgspec.Struct):
    """Streams followed now, and followers of them."""

    streams: int = 0
    followers: int = 0


class _Stream:
    """The shared reader of one stream; it runs while anyone follows, up to the entry that ends
    the stream, whose number is then `final`."""

    def __init__(
        self,
        engine: Engine,
        log: Log[Any],
        key: Key,
        after: int,
        ended: Ended,
        incarnation: int | None,
    ) -> None:
        self._engine = engine
        self._log = log
        self._key = key
        self._ended = ended
        self._incarnation = incarnation
        self.final: int | None = None
        self.followers = 0
        self.last = after
        self.recent: deque[Entry[Any]] = deque(maxlen=_RECENT_MAX)
        self.moved = asyncio.Event()
        self.failure: PerdureError | None = None
        self.reader = asyncio.create_task(self._run())

    async def _run(self) -> None:
        try:
            await contained("following a log", self._read_on())
        except PerdureError as error:
            self.fail(error)

    async def _read_on(self) -> None:
        tip = await self._engine.tip(self._log, self._key)
        self.last = max(0, min(self.last, tip.last - 1))
        while self.final is None:
            tip = await self._engine.wait(self._log, self._key, self.last, timeout_s=_WAIT_S)
            if tip.last < self.last or self._incarnation not in (None, tip.incarnation):
                raise Missing(f"{self._log.name} {show(self._key)} was deleted.")
            if tip.last == self.last:
                if (why := self._engine.latched_for(self._log, self._key)) is not None:
                    raise Latched(f"{why}. Nothing more comes until a restart.")
                continue
            if entries := await self.read(self.last):
                self.recent.extend(entries)
                self.last = entries[-1].seq
                if self._ended(entries[-1]):
                    self.final = self.last
                self._wake()

    async def read(self, after: int) -> list[Entry[Any]]:
        """Entries above `after`, of this stream and of none that came in its place."""
        return await self._engine.read(
            self._log, self._key, after=after, incarnation=self._incarnation, limit=_PAGE
        )

    def fail(self, error: PerdureError) -> None:
        self.failure = error
        self._wake()

    def _wake(self) -> None:
        self.moved.set()
        self.moved = asyncio.Event()

    def after(self, seq: int) -> list[Entry[Any]] | None:
        """Recent entries above `seq`, or None where they are no longer all in memory. Entries are
        numbered without holes, so a number tells a place."""
        if not self.recent or self.recent[0].seq > seq + 1:
            return None if self.last > seq else []
        return list(islice(self.recent, max(0, seq + 1 - self.recent[0].seq), None))


class Tail:
    """Follows the logs of one engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._streams: dict[_Followed, _Stream] = {}
        self.stats = TailStats()

    async def follow(
        self,
        log: Log[Any],
        key: Key,
        *,
        after: int,
        ended: Ended,
        incarnation: int | None = None,
    ) -> AsyncGenerator[list[Entry[Any]], None]:
        """Entries above `after` in order, in groups as they become durable; it stops behind the
        entry that `ended` says is the last, whether or not `after` is beyond it. Raises what the
        engine raises, and what `fail` is told; and `Missing` or `CursorRefused`, where an
        `incarnation` is given, once the stream is not of that any more."""
        place = (log.name, key, incarnation)
        stream = self._streams.get(place)
        if stream is None or stream.failure is not None:
            stream = _Stream(self._engine, log, key, after, ended, incarnation)
            self._streams[place] = stream
            self.stats.streams += 1
        stream.followers += 1
        self.stats.followers += 1
        try:
            while True:
                moved = stream.moved
                entries = stream.after(after)
                if entries is None:
                    entries = await stream.read(after)
                if entries:
                    after = entries[-1].seq
                    yield entries
                elif stream.final is not None and after >= stream.final:
                    return
                elif stream.failure is not None:
                    raise stream.failure
                else:
                    await moved.wait()
        finally:
            self._leave(place, stream)

    def fail(self, log: Log[Any], key: Key, error: PerdureError) -> None:
        """Tell whoever follows now that nothing more will come, and why."""
        stream = self._streams.get((log.name, key, None))
        if stream is not None:
            stream.fail(error)

    def _leave(self, place: _Followed, stream: _Stream) -> None:
        stream.followers -= 1
        self.stats.followers -= 1
        if stream.followers == 0:
            stream.reader.cancel()
            self.stats.streams -= 1
            if self._streams.get(place) is stream:
                del self._streams[place]
