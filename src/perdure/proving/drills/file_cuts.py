"""Power cuts under a store of files: every state that its directory may be left in, by every call
of the disk module, and some of a recovery cut in the same way.

What a store does after a cut is decided by what recovery makes of it. So each state is recovered,
and of those that recovery leaves alike, byte for byte and in memory, one goes on with its history
and speaks for the others; some of the others go on as well.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import msgspec
import xxhash

from perdure.core.clock import SystemClock
from perdure.core.errors import PerdureError
from perdure.engines import files_recovery
from perdure.engines.files import FilesEngine
from perdure.proving.crashstates import RecordingDisk, State, Step, crash_states
from perdure.proving.drills.drill import Subject, Trial
from perdure.proving.faults import POWER_CUT
from perdure.proving.file_stories import (
    History,
    history,
    history_of,
    judge,
    opened,
    short_histories,
    small_journals,
)
from perdure.proving.subject import LAYOUTS
from perdure.proving.watched import HastyDisk

_SHORT = 2
"""Of histories of so many batches or fewer all states are judged, with the files brought up to date
after each batch and without."""

_LONG_EVERY = 5
"""Every so many stories one is long."""

_BATCHES = 10
_GROUP_MAX = 3
_MIDST_STEPS = 12
"""In the midst of so many steps of the files' thread another group may be committed."""

_STATES_MAX = 100
"""Of one long history so many states are judged, and then those of another: each meets other
moments."""

_ON_EVERY = 20
"""Every so many cases go on, whatever is known of what recovery left of them."""

_AGAIN_EVERY = 400
"""Every so many cases the recovery is cut as well."""

_AGAIN_STATES = 20


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
    """A history committed over a disk that is recorded. `groups` says how many batches share each
    commit. `flushes` says whether the files are brought up to date after it, and then in the midst
    of which of their steps another group comes (0: none; None: the files wait)."""

    def __init__(
        self, told: History, disk: Met, groups: Iterator[int], flushes: Iterator[int | None]
    ) -> None:
        self._told = told
        self._disk = disk
        self._groups = groups
        self._flushes = flushes
        self._begun = 0

    async def run(self, root: Path) -> None:
        engine = await opened(root, self._disk)
        loop = asyncio.get_running_loop()
        self._disk.meet = lambda: asyncio.run_coroutine_threadsafe(
            self._commit(engine), loop
        ).result()
        while self._begun < len(self._told.batches):
            await self._commit(engine)
            if (left := next(self._flushes)) is not None:
                self._disk.left = left
                await engine.usage()  # flushes
                self._disk.left = 0
        self._disk.mark("closing")
        await engine.close()

    async def _commit(self, engine: FilesEngine) -> None:
        first = self._begun
        self._begun = min(len(self._told.batches), first + next(self._groups))
        self._disk.mark(f"begun {self._begun}")
        await asyncio.gather(*map(engine.commit, self._told.batches[first : self._begun]))
        self._disk.mark(f"done {self._begun}")


class _Short(NamedTuple):
    """A short history by its number, and after which of its batches the files are written."""

    number: int
    flushes: tuple[int | None, ...]


class CutFiles:
    """See `says`. The disk is the one that is asked; a proof may give one that does less."""

    fault = POWER_CUT
    subject: Subject = "files"
    says = (
        "every combination of un-synced bytes and names that a store of files may be left in, "
        "after each step of its journal, files and manifest: of every history of two operations "
        "or one, and of long ones in which groups are committed while files are written; recovery "
        "itself is cut in the same way"
    )

    def __init__(self, disk: Callable[[], Met] = Met) -> None:
        self._disk = disk

    def lacks(self) -> str | None:
        return None

    async def run(self, trial: Trial) -> None:
        """One history after another, without end. Of a short one all states are judged."""
        case = 0
        shorts = _shorts(trial.rng("short"))
        with small_journals(), trial.in_memory() as memory:
            for number in itertools.count(1):
                short = None if number % _LONG_EVERY == 1 else next(shorts, None)
                told, states = await self._states(trial, memory, number, short)
                judging = _Judging(told, memory)
                for state in states:
                    case += 1
                    if trial.over or (trial.case is not None and case > trial.case):
                        return
                    if trial.wants(case):
                        wrong = await self._judge(trial, case, judging, state)
                        kept = trial.home / f"case-{case}"
                        if wrong:
                            state.write(kept)
                        trial.judged(case, wrong, kept)
                trial.count("short histories" if short else "long histories")

    async def _states(
        self, trial: Trial, memory: Path, number: int, short: _Short | None
    ) -> tuple[History, list[State]]:
        """The states of a history; of a short one those from its first commit on, for the
        making of a store is the same in all."""
        real = memory / f"story-{number}"
        disk = self._disk()
        disk.make_directory(real)
        first, rng = len(disk.steps), trial.rng("groups", number)
        if short is None:
            told = await history(trial.rng("history", number), _BATCHES)
            groups, flushes = _at_random(rng)
        else:
            batches = next(itertools.islice(short_histories(_SHORT), short.number, None))
            told = await history_of(batches)
            groups, flushes = itertools.repeat(1), iter(short.flushes)
        await _Story(told, disk, groups, flushes).run(real / "store")
        steps = disk.steps[first:]
        begun = next(at for at, step in enumerate(steps) if step.mark.startswith("begun"))
        found = list(crash_states(steps, real, after=begun if short else 0))
        trial.disk.remove_tree(real)
        rng.shuffle(found)
        return told, found if short else found[:_STATES_MAX]

    async def _judge(self, trial: Trial, case: int, judging: _Judging, state: State) -> list[str]:
        least, most = _promised(state)
        wrong = [*await judging.judge(state, least, most, on=case % _ON_EVERY == 0)]
        if case % _AGAIN_EVERY != 1 or wrong:
            return wrong
        recovering = judging.home / "recovery"
        state.write(recovering)
        disk = self._disk()
        disk.adopt(recovering)
        sound = len(disk.steps)
        await (await opened(recovering / "store", disk)).close()
        cuts = list(crash_states(disk.steps, recovering, after=sound))
        trial.disk.remove_tree(recovering)
        for cut in trial.rng("recovery", case).sample(cuts, min(_AGAIN_STATES, len(cuts))):
            trial.count("cuts of a recovery")
            again = await judging.judge(cut, least, most, on=False)
            wrong += [f"recovery cut: {it}" for it in again]
        return wrong


class _Judging:
    """What an owner who opens a store after a cut would miss, or see and should not: of the states
    of one history."""

    def __init__(self, told: History, home: Path) -> None:
        self.home = home
        self._told = told
        self._known: dict[tuple[bytes, int, int], tuple[str, ...]] = {}
        """By what recovery left, and what had been acknowledged and begun."""

    async def judge(self, state: State, least: int, most: int, *, on: bool) -> Sequence[str]:
        """What does not hold. With `on` the history is gone on with in any case."""
        with self._written(state) as root:
            try:
                left = _recovered(root)
            except PerdureError as error:
                return [f"with {least} acknowledged the store does not open: {error}"]
        at = (left, least, most)
        if on or at not in self._known:
            with self._written(state) as root:
                self._known[at] = tuple(await judge(root, self._told, least, most))
        return self._known[at]

    @contextmanager
    def _written(self, state: State) -> Iterator[Path]:
        """The store that a state is, for a while."""
        place = self.home / "state"
        try:
            yield state.write(place) / "store"
        finally:
            _DISK.remove_tree(place)


def _recovered(root: Path) -> bytes:
    """What recovery leaves of a store, in a few bytes: its files, and what is in memory."""
    place = files_recovery.Place(root, SystemClock(), _DISK)
    store = files_recovery.open_store(place, LAYOUTS, read_only=False, note=lambda detail: None)
    left = xxhash.xxh3_128()
    for folder, folders, names in os.walk(root):
        folders.sort()
        for name in sorted(names):
            data = Path(folder, name).read_bytes()
            left.update(f"{folder}/{name} {len(data)}\n".encode())
            left.update(data)
    left.update(msgspec.msgpack.encode((store.state.manifest(), store.recovered.findings)))
    store.release()
    return left.digest()


_DISK = HastyDisk()


def _shorts(rng: random.Random) -> Iterator[_Short]:
    """Every short history with every choice of when its files are written, in some order."""
    found = [
        _Short(number, (*flushes, None))
        for number, batches in enumerate(short_histories(_SHORT))
        for flushes in itertools.product((0, None), repeat=len(batches) - 1)
    ]
    rng.shuffle(found)
    return iter(found)


def _at_random(rng: random.Random) -> tuple[Iterator[int], Iterator[int | None]]:
    groups = (rng.randint(1, _GROUP_MAX) for _ in itertools.count())
    flushes = (
        rng.randrange(1, _MIDST_STEPS) if rng.random() < 0.7 else None for _ in itertools.count()
    )
    return groups, flushes


def _promised(state: State) -> tuple[int, int]:
    """The last batch that was acknowledged, and the last that was begun."""
    numbers = {"done": 0, "begun": 0}
    for mark in state.marks:
        what, _, number = mark.partition(" ")
        if number:
            numbers[what] = int(number)
    return numbers["done"], numbers["begun"]
