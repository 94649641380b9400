"""A slow disk: a sync that does not come back for as long as one likes, and nobody is told of a
write before its own sync has. Who reads does not wait for it.

The syncs are held at a gate and let through one by one, so that no case depends on how fast the
machine is.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

from perdure.core.clock import SystemClock
from perdure.core.disk import Disk
from perdure.core.engine import Engine
from perdure.core.errors import PerdureError
from perdure.engines.blobs_local import LocalBlobs
from perdure.proving.crashstates import RecordingDisk, crash_states
from perdure.proving.drills.drill import Subject, Trial
from perdure.proving.drills.failures import opened
from perdure.proving.drills.opening import open_in
from perdure.proving.faults import SLOW_DISK
from perdure.proving.putter import BLOB_BYTES_MAX, chunks, content, digest_of
from perdure.proving.steps import NOTES, TENANT, Unsound, last_step, step, troubles
from perdure.proving.waiting import TooLate, wait_until
from perdure.proving.watched import HastyDisk, WatchedDisk

T = TypeVar("T")

_DEADLINE_S = 10.0
_WRITERS_MAX = 24
_STEPS_MAX = 6
_SYNCS_MAX = 4
"""A commit of its own, one for all that came meanwhile, and some room."""

_ALL = 1_000_000
_PUTS_MAX = 24
_AT_ONCE = 4
"""Of so many puts the syncs are held at once, at least."""


class Gate:
    """Where syncs wait to be let through; after the context all are."""

    def __init__(self) -> None:
        self.reached = 0
        self._passes = threading.Semaphore(0)

    def __enter__(self) -> Gate:
        return self

    def __exit__(self, *error: object) -> None:
        self.let(_ALL)

    def wait(self) -> None:
        """Be a sync: wait for a pass."""
        self.reached += 1
        self._passes.acquire()

    def let(self, syncs: int) -> None:
        """Let so many through, now or later."""
        self._passes.release(syncs)

    async def held(self, syncs: int = 1) -> None:
        """Until so many have come. Raises `TooLate`."""

        async def come() -> bool:
            return self.reached >= syncs

        await wait_until(come, _DEADLINE_S, f"sync number {syncs}")


class SlowEngine:
    """See `says`."""

    fault = SLOW_DISK
    says = (
        "a sync of the log is held while many writers commit: nobody is told before a sync that "
        "began after they asked, all who wait share the next one, and reads go on meanwhile; what "
        "a kill or a power cut leaves in the middle of it has every acknowledged step"
    )

    def __init__(self, subject: Subject = "engine") -> None:
        self.subject = subject

    def lacks(self) -> str | None:
        return None

    async def run(self, trial: Trial) -> None:
        async def judge(case: int, place: Path) -> list[str]:
            rng = trial.rng(case)
            writers, steps = rng.randrange(2, _WRITERS_MAX + 1), rng.randrange(_STEPS_MAX)
            slow = _SlowFiles(place) if self.subject == "files" else _SlowSqlite(place)
            return await _Commits(slow, writers, steps).judge()

        await trial.each(judge)


class _Slow(Protocol):
    """A store on a disk whose syncs of the log can be held."""

    async def opened(self) -> Engine:
        """The store."""
        ...

    def hold(self, gate: Gate | None) -> None:
        """From now on they wait there, or nowhere."""
        ...

    def died(self) -> Iterator[tuple[str, Callable[[], Awaitable[Engine]]]]:
        """What deaths at this moment leave, and how each is opened."""
        ...


class _SlowSqlite:
    """See `_Slow`."""

    def __init__(self, place: Path) -> None:
        self._place = place
        self._disk = WatchedDisk(hasty=True)

    async def opened(self) -> Engine:
        return await opened(self._place / "state.db", self._disk)

    def hold(self, gate: Gate | None) -> None:
        self._disk.watch = lambda call, suffix: (
            gate.wait() if gate is not None and (call, suffix) == ("sync", "-wal") else None
        )

    def died(self) -> Iterator[tuple[str, Callable[[], Awaitable[Engine]]]]:
        contents = self._disk.contents()
        for name, kept in (("cut", ()), ("killed", range(len(contents.loose)))):
            died = self._place / name
            died.mkdir()
            for file, data in contents.survivors(kept).items():
                (died / file).write_bytes(data)
            yield name, partial(opened, died / "state.db", WatchedDisk(hasty=True))


class _SlowFiles:
    """See `_Slow`. The log is the journal."""

    def __init__(self, place: Path) -> None:
        self._place = place
        self._disk = _GatedJournal()

    async def opened(self) -> Engine:
        return await open_in(self._place, "files", SystemClock(), self._disk)

    def hold(self, gate: Gate | None) -> None:
        self._disk.gate = gate

    def died(self) -> Iterator[tuple[str, Callable[[], Awaitable[Engine]]]]:
        steps = list(self._disk.steps)
        for number, state in enumerate(crash_states(steps, self._place, after=len(steps))):
            died = state.write(self._place / f"died-{number}")
            yield f"death {number}", partial(open_in, died, "files", SystemClock())


class _GatedJournal(RecordingDisk):
    gate: Gate | None = None

    def sync(self, fd: int, path: Path) -> None:
        if self.gate is not None and path.name == "journal":
            self.gate.wait()
        super().sync(fd, path)


class _Commits:
    """Writers who come while the sync of the first is held."""

    def __init__(self, slow: _Slow, writers: int, steps: int) -> None:
        self._slow = slow
        self._done = dict.fromkeys(range(writers), steps)
        self._begun = dict(self._done)
        self._wrong: list[str] = []

    async def judge(self) -> list[str]:
        """Let them commit; what did not hold."""
        engine = await self._slow.opened()
        for writer, steps in self._done.items():
            for number in range(1, steps + 1):
                await engine.commit(step(writer, number))
        with Gate() as gate:
            self._slow.hold(gate)
            await self._meet(engine, gate)
        self._slow.hold(None)
        self._wrong += await troubles(engine, self._done, self._done)
        await engine.close()
        return self._wrong

    async def _meet(self, engine: Engine, gate: Gate) -> None:
        first = self._commit(engine, 0)
        await gate.held()
        others = [self._commit(engine, writer) for writer in self._done if writer]
        await self._meanwhile(engine, [first, *others])
        gate.let(1)
        await _in_time(first, "the first commit")
        await gate.held(2)
        self._told_early(others)
        gate.let(_ALL)
        await _in_time(asyncio.gather(*others), "the other commits")
        if gate.reached > _SYNCS_MAX:
            self._wrong.append(f"{len(self._done)} commits took {gate.reached} syncs")

    def _commit(self, engine: Engine, writer: int) -> asyncio.Task[None]:
        self._begun[writer] += 1

        async def commit() -> None:
            await engine.commit(step(writer, self._begun[writer]))
            self._done[writer] = self._begun[writer]

        return asyncio.create_task(commit())

    def _told_early(self, commits: Iterable[asyncio.Task[None]]) -> None:
        early = sum(commit.done() for commit in commits)
        if early:
            self._wrong.append(f"{early} commits were acknowledged before their sync")

    async def _meanwhile(self, engine: Engine, commits: list[asyncio.Task[None]]) -> None:
        """While a sync is held: reads go on, and what a death leaves now has what was told."""

        async def read() -> None:
            for writer, least in self._done.items():
                last = await last_step(engine, writer)
                if not least <= last <= self._begun[writer]:
                    self._wrong.append(f"writer {writer}: {least} acknowledged, {last} there")
            await engine.scan(NOTES, (TENANT,), limit=1000)  # off the loop

        try:
            await _in_time(read(), "reading while a sync is held")
        except (Unsound, PerdureError) as error:
            self._wrong.append(f"reading while a sync is held: {error}")
        self._told_early(commits)
        for name, reopened in self._slow.died():
            try:
                left = await reopened()
            except PerdureError as error:
                self._wrong.append(f"{name} while a sync was held: {error}")
                continue
            found = await troubles(left, self._done, self._begun)
            self._wrong += [f"{name} while a sync was held: {it}" for it in found]
            await left.close()


class GatedDisk(HastyDisk):
    """A disk whose syncs wait at a gate, once it has one."""

    gate: Gate | None = None

    def sync(self, fd: int, path: Path) -> None:
        if self.gate is not None:
            self.gate.wait()


class SlowBlobs:
    """See `says`."""

    fault = SLOW_DISK
    subject: Subject = "blobs"
    says = (
        "the syncs of many blobs that are put at once are held: none is acknowledged or seen, "
        "stored ones are read meanwhile and others are not seen, however many wait, and when the "
        "disk goes on so do all of them"
    )

    def lacks(self) -> str | None:
        return None

    async def run(self, trial: Trial) -> None:
        async def judge(case: int, place: Path) -> list[str]:
            puts = trial.rng(case).randrange(1, _PUTS_MAX + 1)
            return await _puts(place / "blobs", puts)

        await trial.each(judge)


async def _puts(root: Path, puts: int) -> list[str]:
    disk = GatedDisk()
    blobs = await LocalBlobs.open(root, disk=disk, clock=SystemClock())
    stored = await blobs.put(chunks(0), size_bytes_max=BLOB_BYTES_MAX)
    wrong: list[str] = []
    looking = await LocalBlobs.open(root, disk=Disk(), clock=SystemClock(), read_only=True)

    async def read() -> None:
        for _ in range(puts):
            data = b"".join([chunk async for chunk in blobs.read(stored.digest)])
            if data != content(0):
                wrong.append("a stored blob is read as another")
        if (seen := {blob.digest async for blob in looking.list()}) != {stored.digest}:
            wrong.append(f"while syncs are held {seen} are seen")

    with Gate() as disk.gate:
        putting = [
            asyncio.create_task(blobs.put(chunks(number), size_bytes_max=BLOB_BYTES_MAX))
            for number in range(1, puts + 1)
        ]
        await disk.gate.held(min(puts, _AT_ONCE))
        await _in_time(read(), "reading a blob while syncs are held")
        if early := sum(put.done() for put in putting):
            wrong.append(f"{early} blobs were acknowledged before their sync")
    told = {blob.digest for blob in await _in_time(asyncio.gather(*putting), "the puts")}
    there = {blob.digest async for blob in blobs.list()} - {stored.digest}
    if not told == there == {digest_of(number) for number in range(1, puts + 1)}:
        wrong.append(f"{told} were acknowledged, {there} are there")
    await blobs.close()
    return wrong


async def _in_time(doing: Awaitable[T], what: str) -> T:
    """What comes of it. Raises `TooLate`."""
    try:
        return await asyncio.wait_for(doing, _DEADLINE_S)
    except TimeoutError:
        raise TooLate(f"{what} did not end within {_DEADLINE_S:g} s") from None
