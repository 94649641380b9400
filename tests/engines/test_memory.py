"""The reference engine: what it adds to the rules that every engine is held to."""

from perdure.core.batch import append, put
from perdure.core.clock import SystemClock
from perdure.core.engine import Survives
from perdure.core.limits import OPERATION_KEPT_S
from perdure.core.values import Finding
from perdure.engines.memory import MemoryEngine
from perdure.proving.subject import EVENTS, FACTS, LAYOUTS, LateClock, Note

A = ("t", "a")


async def test_it_says_that_nothing_outlives_the_process() -> None:
    engine = MemoryEngine(LAYOUTS, SystemClock())
    assert engine.survives == Survives(damage=True)
    assert engine.recovered.clean


# proves C22
async def test_an_operation_id_is_forgotten_after_its_time() -> None:
    clock = LateClock()
    engine = MemoryEngine(LAYOUTS, clock)
    batch = append(EVENTS, A, [Note()]).named("op")
    await engine.commit(batch)
    clock.late_s = OPERATION_KEPT_S - 60
    assert (await engine.commit(batch)).numbers == (1,)
    clock.late_s = OPERATION_KEPT_S + 60
    assert (await engine.commit(batch)).numbers == (2,)


async def test_reading_what_does_not_exist_keeps_nothing() -> None:
    engine = MemoryEngine(LAYOUTS, SystemClock())
    for number in range(10):
        await engine.read(EVENTS, ("t", f"{number}"), limit=1)
    assert not engine._entries


async def test_verify_sees_a_hole() -> None:
    engine = MemoryEngine(LAYOUTS, SystemClock())
    await engine.commit(append(EVENTS, A, [Note(), Note(), Note()]) + put(FACTS, A, Note()))
    del engine._entries[("events", "t\x1fa")][2]
    assert [finding async for finding in engine.verify()] == [
        Finding("events t/a", "numbers have holes")
    ]
