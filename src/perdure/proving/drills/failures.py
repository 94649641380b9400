"""A disk that refuses: the N-th call of each kind fails, N rising until a run is not touched."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import apsw
import msgspec

from perdure.core.clock import SystemClock
from perdure.core.errors import Latched, PerdureError, StorageFull
from perdure.engines.sqlite import SqliteEngine
from perdure.proving.drills.drill import Subject, Trial
from perdure.proving.faults import FAILED_SYNC, FULL_DISK, Fault
from perdure.proving.steps import LAYOUTS, Unsound, last_step, step, troubles
from perdure.proving.waiting import TooLate, wait_until
from perdure.proving.watched import (
    DISK_FULL,
    SYNC_FAILED,
    WRITE_FAILED,
    HastyDisk,
    WatchedDisk,
    small_checkpoints,
)

_WRITERS = 2
_STEPS = 5
_LATCHES_S = 5.0
"""How long the thread that met a failure may take to say so."""


class Refusal(msgspec.Struct, frozen=True):
    """Which call on which file fails, with what: the `n`th, or every one from there on. A `short`
    write fails when half of it is done."""

    call: str
    suffix: str
    error: apsw.Error
    n: int
    for_ever: bool
    short: bool = False

    def __str__(self) -> str:
        which = f"{self.call} {self.n} of state.db{self.suffix}"
        half = ", half written" if self.short else ""
        return which + (" and all after it" if self.for_ever else "") + half


class History:
    """Steps over a disk that refuses, and what became of each."""

    def __init__(self, path: Path, refusal: Refusal) -> None:
        self.disk = WatchedDisk(hasty=True)
        self.disk.short = refusal.short
        self.acknowledged = dict.fromkeys(range(_WRITERS), 0)
        self.begun = dict(self.acknowledged)
        self.errors: list[PerdureError] = []
        self.reached = False
        self._path = path
        self._refusal = refusal
        self._calls = 0

    @property
    def synced(self) -> bool:
        """Whether it is syncs that are refused."""
        return self._refusal.call == "sync"

    async def run(self) -> tuple[SqliteEngine, list[str]]:
        """Commit, whatever happens; the engine, and what did not hold while it was open."""
        engine = await opened(self._path, self.disk)
        self.disk.watch = self._refuse
        for _ in range(_STEPS):
            await asyncio.gather(*(self._step(engine, who) for who in range(_WRITERS)))
        self.disk.watch = lambda call, suffix: None
        wrong: list[str] = []
        for who, least in self.acknowledged.items():
            try:
                last = await last_step(engine, who)
            except (Unsound, PerdureError) as error:
                wrong.append(f"reading on, writer {who}: {error}")
                continue
            if not least <= last <= self.begun[who]:
                wrong.append(f"reading on, writer {who}: {least} acknowledged, {last} there")
        return engine, wrong

    async def _step(self, engine: SqliteEngine, writer: int) -> None:
        number = self.acknowledged[writer] + 1
        self.begun[writer] = number
        try:
            await engine.commit(step(writer, number))
            self.acknowledged[writer] = number
        except PerdureError as error:
            self.errors.append(error)

    def _refuse(self, call: str, suffix: str) -> None:
        if (call, suffix) != (self._refusal.call, self._refusal.suffix):
            return
        self._calls += 1
        if self._calls == self._refusal.n or (
            self._refusal.for_ever and self._calls > self._refusal.n
        ):
            self.reached = True
            raise self._refusal.error


class FailedCalls:
    """See `says`."""

    fault: Fault = FAILED_SYNC
    subject: Subject = "engine"
    says = (
        "every write, sync and truncation of SQLite's files fails in turn, once or from then on, "
        "writes also when half of them is done: "
        "commits end typed, nothing more is acknowledged, reads go on, and a store that is "
        "reopened has all that was"
    )
    calls: tuple[tuple[str, str, apsw.Error], ...] = (
        ("sync", "-wal", SYNC_FAILED),
        ("write", "-wal", WRITE_FAILED),
        ("sync", "", SYNC_FAILED),
        ("write", "", WRITE_FAILED),
        ("truncate", "", WRITE_FAILED),
        ("truncate", "-wal", WRITE_FAILED),
    )

    def lacks(self) -> str | None:
        return None

    async def run(self, trial: Trial) -> None:
        case = 0
        clean: set[tuple[str, str, bool, bool]] = set()
        with small_checkpoints():
            for refusal in self._refusals(clean):
                case += 1
                if trial.over or (trial.case is not None and case > trial.case):
                    return
                if not trial.wants(case):
                    continue
                with trial.place(case) as place:
                    history = History(place / "state.db", refusal)
                    wrong = await self._judge(history, place / "state.db")
                    if history.reached:
                        trial.judged(case, (f"{refusal}: {it}" for it in wrong), place)
                    else:
                        clean.add((refusal.call, refusal.suffix, refusal.for_ever, refusal.short))

    def _refusals(self, clean: set[tuple[str, str, bool, bool]]) -> Iterator[Refusal]:
        """The first call of each kind, then the second, up to runs that are not touched."""
        for n in itertools.count(1):
            left = [
                Refusal(call, suffix, error, n, for_ever, short)
                for call, suffix, error in self.calls
                for for_ever in (False, True)
                for short in ((False, True) if call == "write" else (False,))
                if (call, suffix, for_ever, short) not in clean
            ]
            if not left:
                return
            yield from left

    async def _judge(self, history: History, path: Path) -> list[str]:
        engine, wrong = await history.run()
        wrong += await self._afterwards(history, engine)
        try:
            await engine.close()
        except PerdureError as error:
            wrong += self._badly_closed(error)
        engine = await opened(path, WatchedDisk(hasty=True))
        wrong += await troubles(engine, history.acknowledged, history.begun)
        await engine.close()
        return wrong

    async def _afterwards(self, history: History, engine: SqliteEngine) -> list[str]:
        """A disk that failed is not believed again, though it works by now. A sync that failed
        stands for all that was written before it, whoever asked for it, and whatever was answered
        meanwhile; a write that failed does where something was refused."""
        if not history.reached or not (history.errors or history.synced):
            return []
        if not history.errors:
            try:
                await wait_until(partial(_is_latched, engine), _LATCHES_S, "a latch")
            except TooLate:
                return ["a sync failed, nothing was refused, and it is not latched"]
        try:
            await engine.commit(step(_WRITERS, 1))
        except Latched:
            return []
        except PerdureError as error:
            return [f"a write after the failure got {error!r}, and not that it is latched"]
        return ["a write after the failure was acknowledged by the same engine"]

    def _badly_closed(self, error: PerdureError) -> list[str]:
        return [f"a disk that works again, and closing the engine: {error}"]


class FullDisk(FailedCalls):
    """See `says`."""

    fault = FULL_DISK
    says = (
        "SQLite finds no space at each of its writes in turn, or for half of it, once or from then "
        "on: the batch is "
        "refused by name, and when there is space the same engine takes writes again"
    )
    calls = (("write", "-wal", DISK_FULL),)

    async def _afterwards(self, history: History, engine: SqliteEngine) -> list[str]:
        wrong = [
            f"a batch without space got {error!r}"
            for error in history.errors
            if not isinstance(error, StorageFull)
        ]
        if engine.latched is not None:
            wrong.append(f"it is latched: {engine.latched}")
        if history.begun != history.acknowledged and not history.errors:
            wrong.append("a batch is neither acknowledged nor refused")
        try:
            await engine.commit(step(_WRITERS, 1))
        except PerdureError as error:
            wrong.append(f"there is space again, and a write got {error!r}")
        return wrong


async def _is_latched(engine: SqliteEngine) -> bool:
    return engine.latched is not None


async def opened(path: Path, disk: WatchedDisk) -> SqliteEngine:
    """An engine over a watched disk."""
    return await SqliteEngine.open(
        str(path), LAYOUTS, clock=SystemClock(), disk=HastyDisk(), vfs=disk.name
    )
