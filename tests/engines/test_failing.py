"""The failing engine fails where it was told to, once, and leaves what it should."""

import asyncio
import signal
import subprocess
import sys

import pytest

from perdure.core.batch import Batch, append, put
from perdure.core.clock import SystemClock
from perdure.core.errors import CommitUnknown, StorageFull
from perdure.engines.failing import (
    Edge,
    Failing,
    Fault,
    hanging,
    raising,
    unknown_committed,
    unknown_lost,
)
from perdure.engines.memory import MemoryEngine
from perdure.proving.subject import EVENTS, FACTS, LAYOUTS, Note

A = ("t", "a")
ONE = append(EVENTS, A, [Note()])


def memory() -> MemoryEngine:
    return MemoryEngine(LAYOUTS, SystemClock())


async def last(engine: MemoryEngine | Failing) -> int:
    return (await engine.tip(EVENTS, A)).last


async def test_without_faults_it_counts_commits_that_are_not_empty() -> None:
    engine = Failing(memory())
    for batch in (ONE, Batch(), ONE):
        await engine.commit(batch)
    assert engine.commits == 2


@pytest.mark.parametrize("at", [1, 2, 3])
async def test_before_the_commit_is_not_done_and_after_it_is(at: int) -> None:
    full = raising(StorageFull("as planned"))
    for edge, kept in ((Edge.BEFORE, at - 1), (Edge.AFTER, at)):
        engine = Failing(memory(), [Fault(edge, full, at)])
        for number in range(1, at + 1):
            if number == at:
                with pytest.raises(StorageFull):
                    await engine.commit(ONE)
            else:
                await engine.commit(ONE)
        assert await last(engine) == kept
        await engine.commit(ONE)
        assert await last(engine) == kept + 1


async def test_a_fault_without_a_number_is_at_every_commit() -> None:
    engine = Failing(memory(), [unknown_committed()])
    for number in (1, 2):
        with pytest.raises(CommitUnknown):
            await engine.commit(ONE)
        assert await last(engine) == number
    engine.faults = [unknown_lost()]
    with pytest.raises(CommitUnknown):
        await engine.commit(ONE)
    assert await last(engine) == 2


async def test_a_callback_lets_the_commit_go_on() -> None:
    seen: list[int] = []
    engine = Failing(memory())

    async def note() -> None:
        seen.append(await last(engine))

    engine.faults = [Fault(Edge.BEFORE, note), Fault(Edge.AFTER, note)]
    await engine.commit(ONE)
    assert seen == [0, 1]


async def test_a_commit_that_hangs_holds_up_nobody_else() -> None:
    engine = Failing(memory(), [Fault(Edge.AFTER, hanging(), at=1)])
    stuck = asyncio.create_task(engine.commit(put(FACTS, A, Note())))
    await asyncio.sleep(0)
    await engine.commit(ONE)
    assert not stuck.done()
    assert await engine.get(FACTS, A) is not None
    stuck.cancel()


PROGRAM = """
import asyncio
from perdure.core.batch import append
from perdure.core.clock import SystemClock
from perdure.engines.failing import Edge, Failing, Fault, killing
from perdure.engines.memory import MemoryEngine
from perdure.proving.subject import EVENTS, LAYOUTS, Note

async def main():
    engine = Failing(MemoryEngine(LAYOUTS, SystemClock()), [Fault(Edge.AFTER, killing(), at=3)])
    for number in range(1, 9):
        await engine.commit(append(EVENTS, ("t", "a"), [Note()]))
        print(number, flush=True)

asyncio.run(main())
"""


def test_a_process_dies_at_exactly_the_planned_edge() -> None:
    ran = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, timeout=30)
    assert ran.returncode == -signal.SIGKILL
    assert ran.stdout.split() == [b"1", b"2"]
