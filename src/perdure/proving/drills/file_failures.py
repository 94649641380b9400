"""A store of files on a disk that fails: the N-th call of each kind, N rising until a history is
not touched; and one that takes N bytes more, N being every number of bytes that a short history
writes."""

from __future__ import annotations

import asyncio
import errno
import itertools
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from perdure.core.batch import append, put, trim
from perdure.core.engine import Engine
from perdure.core.errors import Latched, PerdureError, StorageFull
from perdure.engines.files import FilesEngine
from perdure.proving.drills.damage import files_in, laid
from perdure.proving.drills.drill import Subject, Trial
from perdure.proving.faults import FAILED_SYNC, FULL_DISK, Fault
from perdure.proving.file_stories import (
    History,
    history,
    history_of,
    judge,
    opened,
    small_journals,
)
from perdure.proving.refusing import Call, Refusing, Trouble
from perdure.proving.subject import EVENTS, NOTES, Note, stored

_BATCHES = 10
_GROUP = 2
_EACH: tuple[Call, ...] = (
    "disk.create",
    "disk.write",
    "disk.overwrite",
    "disk.sync",
    "disk.replace",
    "disk.directory",
    "disk.unlink",
    "disk.names",
)
_GROWING: tuple[Call, ...] = ("disk.create", "disk.write")

_ROOMS = 16
"""So many numbers of bytes are gone through for each N of a call."""

_NOTE, _STREAM = ("default", "box", "1"), ("default", "s")
_SHORT = (
    put(NOTES, _NOTE, Note("open"), attachment=b"attached"),
    append(EVENTS, _STREAM, [Note(), Note()]),
    put(NOTES, _NOTE, Note("done")) + append(EVENTS, _STREAM, [Note()]),
    trim(EVENTS, _STREAM, 2),
)
"""Enough for every kind of file to be written, and for the journal to start over."""


_Kind = tuple[History, Callable[[int], Trouble]]
"""A history, and the N-th trouble that it meets."""


class FailingFiles:
    """See `says`. With `filling` the disk also takes every number of bytes and no more."""

    subject: Subject = "files"

    def __init__(
        self, fault: Fault, says: str, calls: Sequence[Call], code: int, *, filling: bool = False
    ) -> None:
        self.fault = fault
        self.says = says
        self._calls = calls
        self._code = code
        self._filling = filling

    def lacks(self) -> str | None:
        return None

    async def run(self, trial: Trial) -> None:
        """A case is a kind of trouble and its N. A kind that a history got past is done with."""
        kinds = await self._kinds(trial)
        done: set[int] = set()
        with small_journals(), trial.in_memory() as memory:
            for case in itertools.count(1) if trial.case is None else (trial.case,):
                if trial.over or len(done) == len(kinds):
                    return
                n, kind = divmod(case - 1, len(kinds))
                if kind in done or not trial.wants(case):
                    continue
                told, make = kinds[kind]
                place, trouble = memory / f"case-{case}", make(n)
                place.mkdir()
                life = _Life(told, place / "store", Refusing(trouble))
                wrong = await life.judge()
                if wrong:
                    shutil.copytree(place, trial.home / place.name)
                trial.disk.remove_tree(place)
                if life.refusing.reached:
                    troubles = (f"{trouble}: {it}" for it in wrong)
                    trial.judged(case, troubles, trial.home / place.name)
                else:
                    done.add(kind)

    async def _kinds(self, trial: Trial) -> list[_Kind]:
        told = await history(trial.rng("history"), _BATCHES)
        kinds: list[_Kind] = [
            (told, partial(_call, call, times, self._code))
            for call in self._calls
            for times in (1, None)
        ]
        if self._filling:
            short = await history_of(_SHORT)
            kinds += [(short, partial(_room, at, self._code)) for at in range(_ROOMS)]
        return kinds


def _call(call: Call, times: int | None, code: int, n: int) -> Trouble:
    return Trouble(calls=(call,), n=n + 1, times=times, errno=code)


def _room(at: int, code: int, n: int) -> Trouble:
    return Trouble(room_bytes=n * _ROOMS + at, errno=code)


class _Life:
    """A history over a disk that refuses, and what became of it."""

    def __init__(self, told: History, root: Path, refusing: Refusing) -> None:
        self.refusing = refusing
        self._told = told
        self._root = root
        self._acknowledged = 0
        self._begun = 0
        self._errors: list[PerdureError] = []

    async def judge(self) -> list[str]:
        """What does not hold: while the disk fails, when it works again, and after that."""
        await (await opened(self._root)).close()
        wrong: list[str] = []
        try:
            engine = await opened(self._root, self.refusing.disk)
        except PerdureError as error:
            if self._full and not isinstance(error, StorageFull):
                wrong.append(f"no space, and opening it got {error!r}")
        else:
            wrong += await self._live(engine)
        return wrong + await self._judge(self._root)

    async def _judge(self, root: Path) -> list[str]:
        return await judge(root, self._told, self._acknowledged, self._begun)

    async def _live(self, engine: FilesEngine) -> list[str]:
        batches = self._told.batches
        while self._begun < len(batches) and not self._errors:
            first, self._begun = self._begun, min(len(batches), self._begun + _GROUP)
            answers = await asyncio.gather(
                *map(engine.commit, batches[first : self._begun]), return_exceptions=True
            )
            for number, answer in enumerate(answers, first + 1):
                if isinstance(answer, PerdureError):
                    self._errors.append(answer)
                elif isinstance(answer, BaseException):
                    raise answer
                else:
                    self._acknowledged = number
            if first % (2 * _GROUP) and not self._errors:
                try:
                    await engine.usage()  # flushes
                except PerdureError as error:
                    self._errors.append(error)
        wrong = await self._reads(engine)
        self.refusing.over()
        wrong += await self._works_again(engine)
        killed = laid(files_in(self._root), self._root.with_name("killed"))
        wrong += [f"killed then: {it}" for it in await self._judge(killed)]
        try:
            await engine.close()
        except PerdureError as error:
            wrong.append(f"the disk works again, and closing the engine: {error}")
        return wrong

    async def _reads(self, engine: Engine) -> list[str]:
        found = await stored(engine)
        moments = self._told.moments[self._acknowledged : self._begun + 1]
        if any(moment.stored == found for moment in moments):
            return []
        return [f"reading on, {self._acknowledged} acknowledged: it is as after none of them"]

    async def _works_again(self, engine: FilesEngine) -> list[str]:
        """A full disk is written to again; one that failed is not believed again."""
        if not self._errors:
            return []
        number = min(self._acknowledged, len(self._told.batches) - 1)  # then it is a repeat
        full = self._full
        wrong = [
            f"no space, and a batch got {it!r}"
            for it in self._errors
            if full and not isinstance(it, StorageFull)
        ]
        try:
            answer = await engine.commit(self._told.batches[number])
        except PerdureError as error:
            if full or not isinstance(error, Latched):
                wrong.append(f"the disk works again, and a write got {error!r}")
            return wrong
        if not full:
            return [*wrong, "a write after the failure was acknowledged by the same engine"]
        self._acknowledged = max(self._acknowledged, number + 1)
        self._begun = max(self._begun, self._acknowledged)
        if answer != self._told.moments[number + 1].committed:
            wrong.append(f"batch {number + 1} was answered {answer}")
        return wrong

    @property
    def _full(self) -> bool:
        return self.refusing.trouble.errno == errno.ENOSPC


FAILING_FILES = (
    FailingFiles(
        FAILED_SYNC,
        "each create, write, overwrite, sync, rename, removal and directory sync of a store of "
        "files fails in turn, once or from then on: commits end typed, nothing more is "
        "acknowledged, reads go on, and a store that is reopened has all that was",
        _EACH,
        errno.EIO,
    ),
    FailingFiles(
        FULL_DISK,
        "each create and write of a store of files finds no space, half of the bytes written, or "
        "there is space for just so many bytes as lie before each byte that a history writes: the "
        "batch is refused by name, reads go on, nothing torn is left, and when there is space the "
        "same engine takes writes again",
        _GROWING,
        errno.ENOSPC,
        filling=True,
    ),
)
