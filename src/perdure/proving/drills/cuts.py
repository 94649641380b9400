"""Power cuts: every state that a disk may be left in, enumerated from what was written to it.

For the engine the writes are seen through SQLite's VFS. At each call, before it is made, the power
is cut, and of the writes that no sync covers yet none, all, the first few, all but one and some at
random reach the disk, and one may be torn. Stronger than a kill, and far cheaper.
"""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec

from perdure.core.clock import SystemClock
from perdure.core.errors import PerdureError
from perdure.engines.sqlite import SqliteEngine
from perdure.proving.drills.crashes import KilledServer
from perdure.proving.drills.drill import Subject, Trial
from perdure.proving.faults import POWER_CUT
from perdure.proving.paced import paced
from perdure.proving.steps import LAYOUTS, step, troubles
from perdure.proving.watched import (
    Contents,
    HastyDisk,
    WatchedDisk,
    Write,
    small_checkpoints,
)

_CHECKPOINTER = "perdure-checkpoint"
_WRITERS = 3
_STEPS = 8
_SECTOR_BYTES = 512
_MIDST_CALLS = 12
"""A checkpoint of so many calls or more is one in whose midst there may be a commit."""

_AGAIN = 25
"""Every so many cases the recovery is cut as well, at each of its own calls."""


class Moment(msgspec.Struct, frozen=True):
    """What the disk held at one call, and the steps acknowledged and begun by then."""

    contents: Contents
    marks: tuple[bytes, ...]
    """What the unsynced mark file may hold: what it held first, and what it holds now."""

    acknowledged: dict[int, int]
    begun: dict[int, int]


class State(msgspec.Struct, frozen=True):
    """One state that the disk may be left in."""

    moment: Moment
    kept: frozenset[int]
    torn: Write | None
    mark: bytes

    def write(self, place: Path) -> Path:
        """Make a directory hold this state; the path of the store in it."""
        for name, data in self.moment.contents.survivors(self.kept, self.torn).items():
            (place / name).write_bytes(data)
        (place / "state.db.mark").write_bytes(self.mark)
        return place / "state.db"


class Recording:
    """Steps committed over a watched disk, with the disk's contents at every call. `rng` decides
    which steps share a group, and what is committed while a checkpoint is under way. Use `run`."""

    def __init__(self, path: Path, rng: random.Random) -> None:
        self.moments: list[Moment] = []
        self._path = path
        self._rng = rng
        self.disk = WatchedDisk()
        self._mark = path.with_name(path.name + ".mark")
        self._first_mark = b""
        self._acknowledged = dict.fromkeys(range(_WRITERS), 0)
        self._begun = dict(self._acknowledged)
        self._calls_left = 0
        """Of a checkpoint, before a group is committed in its midst."""

    async def run(self, steps: int) -> list[Moment]:
        """Commit `steps` of each writer, in groups, and close in order."""
        await (await _opened(self._path)).close()
        self._first_mark = self._mark.read_bytes()
        groups = iter(self._groups(steps))
        with paced() as (requests, moves):
            engine = await _opened(self._path, self.disk)
            loop = asyncio.get_running_loop()

            async def commit(group: list[tuple[int, int]]) -> None:
                committing = [asyncio.create_task(self._step(engine, *step)) for step in group]
                await asyncio.sleep(0)
                await requests.turn()
                await asyncio.gather(*committing)

            async def called(thread: str) -> None:
                """Here, on the loop, so that whoever was answered before knows it by now."""
                self._note()
                if thread == _CHECKPOINTER:
                    self._calls_left -= 1
                    if self._calls_left == 0 and (group := next(groups, None)):
                        await commit(group)

            def noted(call: str, suffix: str) -> None:
                thread = threading.current_thread().name
                asyncio.run_coroutine_threadsafe(called(thread), loop).result()

            self.disk.watch = noted
            for group in groups:
                await commit(group)
                while moves.held:
                    self._calls_left = self._rng.randrange(_MIDST_CALLS)
                    await moves.turn()
            requests.let_go()
            moves.let_go()
            await engine.close()
        return self.moments

    def _groups(self, steps: int) -> list[list[tuple[int, int]]]:
        """The steps, each a writer and a number, that share one sync."""
        groups: list[list[tuple[int, int]]] = []
        for number in range(1, steps + 1):
            writers = self._rng.sample(range(_WRITERS), _WRITERS)
            while writers:
                size = self._rng.randint(1, len(writers))
                groups.append([(writer, number) for writer in writers[:size]])
                del writers[:size]
        return groups

    def _note(self) -> None:
        marks = tuple(dict.fromkeys((self._first_mark, self._mark.read_bytes())))
        acknowledged, begun = dict(self._acknowledged), dict(self._begun)
        self.moments.append(Moment(self.disk.contents(), marks, acknowledged, begun))

    async def _step(self, engine: SqliteEngine, writer: int, number: int) -> None:
        self._begun[writer] = number
        await engine.commit(step(writer, number))
        self._acknowledged[writer] = number


def states(moment: Moment, rng: random.Random) -> Iterator[State]:
    """The states that a cut at one moment may leave, each once."""
    loose = moment.contents.loose
    everything = frozenset(range(len(loose)))
    choices: list[tuple[frozenset[int], Write | None]] = [
        *((everything - {at}, None) for at in everything),
        *((frozenset(range(at)), None) for at in everything),
        *((frozenset(at for at in everything if rng.random() < 0.5), None) for _ in range(2)),
        (everything, None),
        *_torn(loose, everything, rng),
    ]
    for kept, torn in dict.fromkeys(choices):
        for mark in moment.marks:
            yield State(moment, kept, torn, mark)


def _torn(
    loose: tuple[Write, ...], everything: frozenset[int], rng: random.Random
) -> Iterator[tuple[frozenset[int], Write | None]]:
    """One write of which only some sectors came, the others all or none of them there."""
    for at in rng.sample(sorted(everything), min(2, len(everything))):
        write = loose[at]
        sectors = len(write.data) // _SECTOR_BYTES
        if sectors > 1:
            part = write.data[: rng.randrange(1, sectors) * _SECTOR_BYTES]
            torn = Write(write.name, write.offset, part)
            yield everything - {at}, torn
            yield frozenset(range(at)), torn


class CutEngine:
    """See `says`."""

    fault = POWER_CUT
    subject: Subject = "engine"
    says = (
        "at each of SQLite's calls, checkpoints and a log that starts over among them, its "
        "un-synced writes are lost from each one on, each one alone, all, two at random and torn "
        "at a sector; and some of recovery itself is cut in the same way"
    )

    def lacks(self) -> str | None:
        return None

    async def run(self, trial: Trial) -> None:
        real = trial.home / "real"
        real.mkdir()
        with small_checkpoints():
            recording = Recording(real / "state.db", trial.rng("groups"))
            moments = await recording.run(_STEPS)
        found = [
            state for at, one in enumerate(moments) for state in states(one, trial.rng("cut", at))
        ]
        trial.rng("order").shuffle(found)
        trial.planned = len(found)
        trial.count("calls", len(moments))
        for case, state in enumerate(found, 1):
            if trial.over:
                return
            if trial.wants(case):
                with trial.place(case) as place:
                    trial.judged(case, await self._judge(trial, case, state, place), place)

    async def _judge(self, trial: Trial, case: int, state: State, place: Path) -> list[str]:
        moment = state.moment
        path = state.write(place)
        disk = WatchedDisk(hasty=True)
        cuts: list[Moment] = []
        mark = path.with_name(path.name + ".mark")
        if case % _AGAIN == 0:

            def noted(call: str, suffix: str) -> None:
                marks = (state.mark, mark.read_bytes())
                cuts.append(Moment(disk.contents(), marks, moment.acknowledged, moment.begun))

            disk.watch = noted
        wrong = await _reopened(path, moment, disk)
        for at, cut in enumerate(cuts):
            again = place / f"recovery-{at}"
            again.mkdir()
            kept = frozenset(
                number
                for number in range(len(cut.contents.loose))
                if trial.rng("recovery", case, at).random() < 0.5
            )
            left = State(cut, kept, None, cut.marks[at % 2]).write(again)
            wrong += [
                f"recovery cut at call {at}: {it}"
                for it in await _reopened(left, moment, WatchedDisk(hasty=True))
            ]
            trial.count("cuts of a recovery")
        return wrong


async def _reopened(path: Path, moment: Moment, disk: WatchedDisk) -> list[str]:
    """What does not hold when the owner comes back; only its opening is watched."""
    try:
        engine = await _opened(path, disk)
    except PerdureError as error:
        return [f"with {moment.acknowledged} acknowledged the store does not open: {error}"]
    disk.watch = lambda call, suffix: None
    wrong = await troubles(engine, moment.acknowledged, moment.begun)
    await engine.close()
    return wrong


async def _opened(path: Path, disk: WatchedDisk | None = None) -> SqliteEngine:
    return await SqliteEngine.open(
        str(path),
        LAYOUTS,
        clock=SystemClock(),
        disk=HastyDisk(),
        vfs=disk.name if disk is not None else None,
    )


class CutServer(KilledServer):
    """See `says`."""

    fault = POWER_CUT
    says = (
        "the server loses its power while clients use every surface: what it wrote and did not "
        "sync, through SQLite or by itself, is lost, kept or torn at random"
    )
    power = True
