"""Power cuts under a store of files: every state that its directory may be left in, by every call
of the disk module, and some of a recovery cut in the same way."""

from __future__ import annotations

import asyncio
import itertools
import random
import threading
from collections.abc import Callable
from pathlib import Path

from perdure.engines.files import FilesEngine
from perdure.proving.crashstates import RecordingDisk, State, Step, crash_states
from perdure.proving.drills.drill import Subject, Trial
from perdure.proving.faults import POWER_CUT
from perdure.proving.file_stories import History, history, judge, opened, small_journals

_BATCHES = 10
_GROUP_MAX = 3
_MIDST_STEPS = 12
"""In the midst of so many steps of the files' thread another group may be committed."""

_STATES_MAX = 200
"""Of one history so many states are judged, and then those of another: each meets other moments."""

_AGAIN = 20
"""Every so many cases the recovery is cut as well."""

_AGAIN_STATES = 6


class Met(RecordingDisk):
    """Calls back in the midst of what the thread of the files does, before it goes on."""

    def __init__(self) -> None:
        super().__init__()
        self.left = 0
        self.meet: Callable[[], None] = lambda: None

    def _note(self, step: Step) -> None:
        super()._note(step)
        if threading.current_thread().name.startswith("perdure-apply"):
            self.left -= 1
            if self.left == 0:
                self.meet()


class _Story:
    """A history committed over a disk that is recorded; `rng` decides which batches share a group,
    when the files are brought up to date, and what is committed meanwhile."""

    def __init__(self, told: History, disk: Met, rng: random.Random) -> None:
        self._told = told
        self._disk = disk
        self._rng = rng
        self._begun = 0

    async def run(self, root: Path) -> None:
        engine = await opened(root, self._disk)
        loop = asyncio.get_running_loop()
        self._disk.meet = lambda: asyncio.run_coroutine_threadsafe(
            self._commit(engine), loop
        ).result()
        while self._begun < len(self._told.batches):
            await self._commit(engine)
            if self._rng.random() < 0.7:
                self._disk.left = self._rng.randrange(1, _MIDST_STEPS)
                await engine.usage()  # flushes
                self._disk.left = 0
        self._disk.mark("closing")
        await engine.close()

    async def _commit(self, engine: FilesEngine) -> None:
        first = self._begun
        self._begun = min(len(self._told.batches), first + self._rng.randint(1, _GROUP_MAX))
        self._disk.mark(f"begun {self._begun}")
        await asyncio.gather(*map(engine.commit, self._told.batches[first : self._begun]))
        self._disk.mark(f"done {self._begun}")


class CutFiles:
    """See `says`. The disk is the one that is asked; a proof may give one that does less."""

    fault = POWER_CUT
    subject: Subject = "files"
    says = (
        "every combination of un-synced bytes and names that a store of files may be left in, "
        "after each step of its journal, files and manifest, groups committed while files are "
        "written among them; recovery itself is cut in the same way"
    )

    def __init__(self, disk: Callable[[], Met] = Met) -> None:
        self._disk = disk

    def lacks(self) -> str | None:
        return None

    async def run(self, trial: Trial) -> None:
        """One history after another, without end: of each all states are found, some judged."""
        case = 0
        with small_journals():
            for number in itertools.count(1):
                told = await history(trial.rng("history", number), _BATCHES)
                for state in await self._states(trial, number, told):
                    case += 1
                    if trial.over or (trial.case is not None and case > trial.case):
                        return
                    if trial.wants(case):
                        with trial.place(case) as place:
                            trial.judged(case, await self._judge(trial, case, told, state), place)

    async def _states(self, trial: Trial, number: int, told: History) -> list[State]:
        real = trial.home / f"story-{number}"
        disk = self._disk()
        disk.make_directory(real)
        first = len(disk.steps)
        await _Story(told, disk, trial.rng("groups", number)).run(real / "store")
        found = list(crash_states(disk.steps[first:], real))
        trial.rng("order", number).shuffle(found)
        trial.count("histories")
        trial.count("states that there are of them", len(found))
        trial.disk.remove_tree(real)
        return found[:_STATES_MAX]

    async def _judge(self, trial: Trial, case: int, told: History, state: State) -> list[str]:
        least, most = _promised(state)
        place = trial.home / f"case-{case}"
        wrong = await _left(state, place / "first", told, least, most)
        if case % _AGAIN or wrong:
            return wrong
        recovering = place / "recovery"
        state.write(recovering)
        disk = self._disk()
        disk.adopt(recovering)
        sound = len(disk.steps)
        await (await opened(recovering / "store", disk)).close()
        cuts = list(crash_states(disk.steps, recovering, after=sound))
        chosen = trial.rng("recovery", case).sample(cuts, min(_AGAIN_STATES, len(cuts)))
        for at, cut in enumerate(chosen):
            trial.count("cuts of a recovery")
            again = await _left(cut, place / f"again-{at}", told, least, most)
            wrong += [f"recovery cut: {it}" for it in again]
        return wrong


async def _left(state: State, place: Path, told: History, least: int, most: int) -> list[str]:
    """What an owner who opens the store after the cut would miss, or see and should not."""
    return await judge(state.write(place) / "store", told, least, most)


def _promised(state: State) -> tuple[int, int]:
    """The last batch that was acknowledged, and the last that was begun."""
    numbers = {"done": 0, "begun": 0}
    for mark in state.marks:
        what, _, number = mark.partition(" ")
        if number:
            numbers[what] = int(number)
    return numbers["done"], numbers["begun"]
