"""Two owners: a second process comes to a store that has one, which works, is paused, or is dead.

The lock file of the store may have been removed or replaced under its owner. Then the second may
take over, but never may both write.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Literal

import msgspec

from perdure.core.clock import SystemClock
from perdure.core.disk import Disk
from perdure.core.engine import Engine
from perdure.core.errors import PerdureError, StoreLocked, Unavailable
from perdure.engines import open_engine, sqlite_driver
from perdure.engines.blobs_local import LocalBlobs
from perdure.proving.drills.drill import Subject, Trial, lock_in, url_in
from perdure.proving.faults import PROCESS_CRASH, TWO_OWNERS
from perdure.proving.putter import BLOB_BYTES_MAX, chunks, content, digest_of
from perdure.proving.steps import LAYOUTS, Unsound, last_step, troubles
from perdure.proving.waiting import TooLate

_WRITERS = 3
_ACKNOWLEDGED_MAX = 60
_MORE = 5
"""So many acknowledgements show that an owner goes on."""

_BUSY_MS = 300
_TRIES = 20
"""So often a second comes to a store whose owner is at work, to get in between two writes."""

_DEADLINE_S = 20.0
_LIVES = 4
_BLOBS_MAX = 12


class Owner:
    """A process that has a store, and tells what was acknowledged to it line by line."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.pid = process.pid
        self._process = process

    async def line(self) -> bytes:
        """The next line it says, empty at its end. Raises `TooLate`."""
        assert self._process.stdout is not None
        try:
            return await asyncio.wait_for(self._process.stdout.readline(), _DEADLINE_S)
        except TimeoutError:
            raise TooLate(f"the owner said nothing for {_DEADLINE_S:g} s") from None

    async def kill(self) -> list[bytes]:
        """End it, and hear what it said before; a line that was cut off says nothing."""
        with suppress(ProcessLookupError):
            self._process.kill()
        said = []
        while (line := await self.line()).endswith(b"\n"):
            said.append(line)
        await self._process.wait()
        return said


@asynccontextmanager
async def owner(*program: str) -> AsyncIterator[Owner]:
    """Such a process, once it says that it is ready. What it forked ends with the context."""
    alive, end = os.pipe()  # of our own: asyncio closes its pipe as soon as the first is dead
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", *program), stdin=alive, stdout=asyncio.subprocess.PIPE
    )
    os.close(alive)
    try:
        begun = Owner(process)
        first = await begun.line()
        assert first == b"ready\n", f"{program} said {first!r}"
        yield begun
    finally:
        os.close(end)
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


LockFile = Literal["kept", "removed", "replaced"]
_LOCK_FILES: tuple[LockFile, ...] = ("kept", "removed", "replaced")


class Meeting(msgspec.Struct, frozen=True):
    """How the owner is when the second comes, and what became of its lock file."""

    paused: bool
    lock: LockFile
    forked: bool

    def __str__(self) -> str:
        how = "paused" if self.paused else "at work"
        child = ", has a child" if self.forked else ""
        return f"the owner is {how}{child}, its lock file is {self.lock}"


_MEETINGS = [
    Meeting(paused, lock, forked)
    for lock, paused, forked in itertools.product(_LOCK_FILES, (False, True), (False, True))
]


class OwnedEngine:
    """See `says`. `program` is the writer; a proof may give one that is wrong."""

    fault = TWO_OWNERS
    says = (
        "a writer has the store, works or is paused and goes on, and may have forked a child: a "
        "second process is refused by the name of the first and gets in when that is killed. "
        "Where the lock file was removed or replaced it may take over, and then the first writes "
        "nothing more; what either was told is there"
    )

    def __init__(self, *program: str, subject: Subject = "engine") -> None:
        self.subject = subject
        self._program = program or ("perdure.proving.writer",)

    def lacks(self) -> str | None:
        return None

    async def run(self, trial: Trial) -> None:
        meetings = list(_MEETINGS)
        trial.rng("order").shuffle(meetings)
        trial.planned = len(meetings)
        for case, meeting in enumerate(meetings, 1):
            if trial.over:
                return
            if trial.wants(case):
                with trial.place(case) as place:
                    wrong = await self._meet(trial, case, place, meeting)
                    trial.judged(case, (f"{meeting}: {it}" for it in wrong), place)

    async def _meet(self, trial: Trial, case: int, place: Path, meeting: Meeting) -> list[str]:
        url, lock = url_in(place, self.subject), lock_in(place, self.subject)
        acknowledged = dict.fromkeys(range(_WRITERS), 0)
        fork = ("--fork",) * meeting.forked
        async with owner(*self._program, *fork, url, str(_WRITERS)) as first:
            for _ in range(trial.rng(case).randrange(1, _ACKNOWLEDGED_MAX)):
                note(acknowledged, [await first.line()])
            if meeting.lock == "removed":
                trial.disk.remove(lock)
            elif meeting.lock == "replaced":
                trial.disk.write_file(lock, b"")
            if meeting.paused:
                os.kill(first.pid, signal.SIGSTOP)
            second, wrong = await _second(url, first.pid, meeting)
            for _ in range(_TRIES):
                if second is None and not (wrong or meeting.paused or meeting.lock == "kept"):
                    note(acknowledged, [await first.line()])
                    second, wrong = await _second(url, first.pid, meeting)
            if meeting.paused:
                os.kill(first.pid, signal.SIGCONT)
            if second is not None:
                trial.count("taken over")
                return wrong + await _replaced(first, second, acknowledged)
            wrong += note(acknowledged, [await first.line() for _ in range(_MORE)])
            wrong += note(acknowledged, await first.kill())
            try:
                engine = await open_engine(url, LAYOUTS, clock=SystemClock())
            except PerdureError as error:
                return [*wrong, f"it was killed, and the next is not let in: {error}"]
            if engine.recovered.clean:
                wrong.append("it was killed, and the store says that it was closed")
            begun = {who: number + 1 for who, number in acknowledged.items()}
            wrong += await troubles(engine, acknowledged, begun)
            await engine.close()
        return wrong


async def _second(url: str, holder: int, meeting: Meeting) -> tuple[Engine | None, list[str]]:
    """Come to the store: the engine, if that is let in where it may be, and what is wrong. It has
    to find a moment in which the first does not write, and does not wait long for it."""
    kept = meeting.lock == "kept"
    try:
        with _impatient():
            engine = await open_engine(url, LAYOUTS, clock=SystemClock())
    except StoreLocked as locked:
        wrong = kept and locked.holder != holder
        return None, [f"the holder is {holder}, told was {locked}"] * wrong
    except Unavailable as error:
        return None, [f"it is refused without naming the holder: {error}"] * kept
    except PerdureError as error:
        return None, [f"it is told {error!r}"]
    if not kept:
        return engine, []
    await engine.close()
    return None, ["a second process opened the store beside its owner"]


@contextmanager
def _impatient() -> Iterator[None]:
    """Connections that are made here wait only shortly for another that writes."""
    kept, sqlite_driver.BUSY_MS = sqlite_driver.BUSY_MS, _BUSY_MS
    try:
        yield
    finally:
        sqlite_driver.BUSY_MS = kept


async def _replaced(first: Owner, second: Engine, acknowledged: dict[int, int]) -> list[str]:
    """The second has taken over: the first ends by a refusal, and wrote nothing after that."""
    try:
        there = {who: await last_step(second, who) for who in acknowledged}
    except (Unsound, PerdureError) as error:
        return [f"while the second has it: {error}"]
    said: list[bytes] = []
    while (line := await first.line()).endswith(b"\n") and not line.startswith(b"refused"):
        said.append(line)
        who, _, number = line.partition(b" ")
        if who.isdigit() and int(number) > there[int(who)]:
            break  # the second does not have it; what it has may have been told a moment later
    wrong = note(acknowledged, said)
    if line != b"refused latched\n":
        wrong.append(f"the one that was replaced went on and said {line!r}")
    wrong += await troubles(second, acknowledged, there)
    try:
        await second.close()
    except PerdureError as error:
        wrong.append(f"closing the second: {error}")
    return wrong


def note(acknowledged: dict[int, int], lines: Sequence[bytes]) -> list[str]:
    """Take down acknowledgements, the writer and its step; what it said besides is wrong."""
    wrong: list[str] = []
    for line in lines:
        who, _, number = line.partition(b" ")
        if who.isdigit():
            acknowledged[int(who)] = int(number)
        else:
            wrong.append(f"nobody took its place, and it ended: {line!r}")
    return wrong


class KilledBlobs:
    """See `says`."""

    fault = PROCESS_CRASH
    subject: Subject = "blobs"
    says = (
        "a process that puts blob after blob is killed in the middle of one, several times: every "
        "acknowledged blob is there and whole, nothing half is seen, and what it left is reported"
    )
    paused = False

    def lacks(self) -> str | None:
        return None

    async def run(self, trial: Trial) -> None:
        case = 0
        while not trial.over and case != trial.case:
            with trial.place(case + 1) as place:
                put = 0
                for _ in range(_LIVES):
                    case += 1
                    wrong, put = await self._live(trial, case, place / "blobs", put)
                    trial.judged(case, wrong, place)
                    if wrong or trial.over or case == trial.case:
                        break

    async def _live(self, trial: Trial, case: int, root: Path, put: int) -> tuple[list[str], int]:
        """One life of the process, of whose blobs `put` are there: what is wrong, and how many."""
        wrong: list[str] = []
        async with owner("perdure.proving.putter", str(root), str(put + 1)) as first:
            said = [await first.line() for _ in range(trial.rng(case).randrange(1, _BLOBS_MAX))]
            put = _last(put, said)
            if self.paused:
                os.kill(first.pid, signal.SIGSTOP)
            wrong += await self._beside(root, first.pid, put)
            if self.paused:
                os.kill(first.pid, signal.SIGCONT)
                said.append(await first.line())
            said += await first.kill()
        put = _last(put, said)
        wrong += [
            f"nobody took its place, and it said {line!r}" for line in said if not _told(line)
        ]
        try:
            blobs = await LocalBlobs.open(root, disk=Disk(), clock=SystemClock())
        except PerdureError as error:
            return [*wrong, f"it was killed, and the next is not let in: {error}"], put
        wrong += await _unsound(blobs, put, begun=put + 1)
        wrong += [f"verify: {found.where}: {found.why}" async for found in blobs.verify()]
        there = {blob.digest async for blob in blobs.list()}
        await blobs.close()
        trial.count("acknowledged blobs", put)
        return wrong, put + (digest_of(put + 1) in there)

    async def _beside(self, root: Path, holder: int, put: int) -> list[str]:
        return []


class OwnedBlobs(KilledBlobs):
    """See `says`."""

    fault = TWO_OWNERS
    says = (
        "while a process puts blobs, paused in the middle of one, a second is refused by the name "
        "of the first and may only look; the first goes on, and when it is killed the next gets in"
    )
    paused = True

    async def _beside(self, root: Path, holder: int, put: int) -> list[str]:
        """What a second process is told, and what one sees that only looks."""
        wrong: list[str] = []
        try:
            second = await LocalBlobs.open(root, disk=Disk(), clock=SystemClock())
            await second.put(chunks(0), size_bytes_max=BLOB_BYTES_MAX)
            await second.close()
            wrong.append("a second process opened the blobs beside their owner")
        except StoreLocked as locked:
            if locked.holder != holder:
                wrong.append(f"the holder is {holder}, told was {locked}")
        looking = await LocalBlobs.open(root, disk=Disk(), clock=SystemClock(), read_only=True)
        return wrong + await _unsound(looking, put)  # more may be there than it has told


def _told(line: bytes) -> bool:
    """Whether it says which blob was put."""
    return line.strip().isdigit()


def _last(put: int, said: Sequence[bytes]) -> int:
    """How many blobs were put, after it said that."""
    return max([put, *(int(line) for line in said if _told(line))])


async def _unsound(blobs: LocalBlobs, put: int, *, begun: int | None = None) -> list[str]:
    """What does not hold of blobs of which `put` were acknowledged and no more were `begun`."""
    listed = {blob.digest async for blob in blobs.list()}
    there = {digest_of(number): number for number in range(1, put + 1)}
    wrong = [f"blob {number} is lost" for digest, number in there.items() if digest not in listed]
    if begun is not None:
        unknown = listed - there.keys() - {digest_of(number) for number in range(put, begun + 1)}
        wrong += [f"{digest} is there, and nobody put it" for digest in unknown]
    for digest, number in there.items():
        if digest in listed:
            read = b"".join([chunk async for chunk in blobs.read(digest)])
            wrong += [f"blob {number} is not what was put"] * (read != content(number))
    return wrong
