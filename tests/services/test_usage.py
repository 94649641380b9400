"""Disk use by surface: what is measured, and how seldom."""

from __future__ import annotations

from collections.abc import AsyncIterator

from perdure.core.clock import SystemClock
from perdure.core.engine import Usage
from perdure.core.errors import Unavailable
from perdure.engines import open_blobs, open_engine
from perdure.engines.wrapping import Wrapping
from perdure.services.usage import Measuring
from perdure.surfaces.conversations import Conversation
from perdure.surfaces.state import LAYOUTS, PROMISES, State


class Clock(SystemClock):
    late_s = 0.0

    def now_s(self) -> float:
        return super().now_s() + self.late_s

    def monotonic_s(self) -> float:
        return super().monotonic_s() + self.late_s


class Slow(Wrapping):
    """An engine that takes its time to measure, or is too busy."""

    clock: Clock
    takes_s = 0.0
    asked = 0
    busy = False

    async def usage(self) -> Usage:
        self.asked += 1
        self.clock.late_s += self.takes_s
        if self.busy:
            raise Unavailable("too much is written.")
        return await super().usage()


async def chunked(data: bytes) -> AsyncIterator[bytes]:
    yield data


# proves R13
async def test_measuring_takes_a_hundredth_of_the_time_at_most() -> None:
    engine = Slow(await open_engine("memory://", LAYOUTS))
    clock = engine.clock = Clock()
    state = State(engine)
    blobs = await open_blobs("memory://")
    for data in (b"one", b"one", b"three"):
        await blobs.put(chunked(data), size_bytes_max=9)
    measuring = Measuring(state, blobs, clock)
    await measuring.measure()
    assert measuring.last is not None
    assert [one.surface for one in measuring.last.surfaces] == [
        promise.surface for promise in PROMISES
    ]
    assert (measuring.last.blobs, measuring.last.blobs_bytes) == (2, 8)
    await state.commit(state.conversations.create(("t", "c"), Conversation(1, {"a": "x" * 500})))
    await measuring.measure()
    assert engine.asked == 1
    clock.late_s += 601
    engine.takes_s = 30.0
    await measuring.measure()
    sizes = {one.surface: one.size_bytes for one in measuring.last.surfaces}
    assert (engine.asked, sizes["conversations"] > 500, sizes["responses"]) == (2, True, 0)
    clock.late_s += 2_900
    await measuring.measure()
    assert engine.asked == 2
    clock.late_s += 101
    engine.busy, before = True, measuring.last
    await measuring.measure()
    assert (engine.asked, measuring.last) == (3, before)
