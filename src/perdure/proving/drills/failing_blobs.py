"""Blobs on a disk that fails: the N-th call of each kind, N rising until a story is not touched."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import itertools
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from perdure.core.clock import SystemClock
from perdure.core.errors import Missing, PerdureError, StorageFull, Unavailable
from perdure.engines.blobs_local import LocalBlobs
from perdure.proving.drills.blob_cuts import twins
from perdure.proving.drills.drill import Subject, Trial
from perdure.proving.faults import FAILED_SYNC, FULL_DISK, READ_ONLY, Fault
from perdure.proving.refusing import CHANGES, Call, Refusing, Trouble
from perdure.proving.watched import HastyDisk

_CHUNKS = 3


class Told:
    """What a user of blobs was told: the digests that are there for sure, those that are gone, and
    how it went with each put and drop."""

    def __init__(self) -> None:
        self.there: dict[str, bytes] = {}
        self.gone: set[str] = set()
        self.errors: list[Exception] = []

    async def put(self, blobs: LocalBlobs, data: bytes) -> None:
        self.gone.discard(digest_of(data))
        try:
            blob = await blobs.put(_chunks(data), size_bytes_max=10_000)
        except (PerdureError, OSError) as error:
            self.errors.append(error)
            return
        self.there[blob.digest] = data

    async def drop(self, blobs: LocalBlobs, data: bytes) -> None:
        self.there.pop(digest_of(data), None)
        try:
            await blobs.drop(digest_of(data))
        except (PerdureError, OSError) as error:
            self.errors.append(error)
            return
        self.gone.add(digest_of(data))

    async def judge(self, blobs: LocalBlobs) -> list[str]:
        """What of it does not hold in a store that can be read."""
        wrong = [f"not in our words: {it!r}" for it in self.errors if isinstance(it, OSError)]
        for digest, data in self.there.items():
            try:
                read = b"".join([chunk async for chunk in blobs.read(digest)])
            except PerdureError as error:
                wrong.append(f"{digest} was acknowledged, and reading it: {error}")
                continue
            if read != data:
                wrong.append(f"{digest} is not what was put")
        listed = {blob.digest async for blob in blobs.list()}
        wrong += [f"{digest} was dropped and is listed" for digest in self.gone & listed]
        for digest in self.gone:
            try:
                wrong += [f"{digest} was dropped and is read" async for _ in blobs.read(digest)]
            except Missing:
                continue
        return wrong


class FailingBlobs:
    """A story of puts and drops, some at once, in which one call fails or all from it on."""

    subject: Subject = "blobs"

    def __init__(
        self, fault: Fault, says: str, kinds: Sequence[tuple[tuple[Call, ...], int]]
    ) -> None:
        self.fault = fault
        self.says = says
        self._kinds = kinds

    def lacks(self) -> str | None:
        return None

    async def run(self, trial: Trial) -> None:
        case = 0
        untouched: set[tuple[object, ...]] = set()
        for n in itertools.count(1):
            kinds = [
                (calls, code, times)
                for calls, code in self._kinds
                for times in (1, None)
                if (calls, code, times) not in untouched
            ]
            if not kinds:
                return
            for calls, code, times in kinds:
                case += 1
                if trial.over or (trial.case is not None and case > trial.case):
                    return
                if not trial.wants(case):
                    continue
                trouble = Trouble(calls=calls, n=n, times=times, errno=code)
                with trial.place(case) as place:
                    reached, wrong = await _judge(place / "blobs", trouble)
                    if reached:
                        trial.judged(case, (f"{trouble}: {it}" for it in wrong), place)
                    else:
                        untouched.add((calls, code, times))


async def _judge(root: Path, trouble: Trouble) -> tuple[bool, list[str]]:
    """Whether the trouble was met, and what does not hold: while the disk fails, and after it."""
    one, other = twins(2)
    told = Told()
    blobs = await LocalBlobs.open(root, disk=HastyDisk(), clock=SystemClock())
    await told.put(blobs, one)
    await blobs.close()
    refusing = Refusing(trouble)
    try:
        blobs = await LocalBlobs.open(root, disk=refusing.disk, clock=SystemClock())
    except Unavailable as error:
        told.errors.append(error)
        blobs = await LocalBlobs.open(root, disk=HastyDisk(), clock=SystemClock(), read_only=True)
        wrong = await told.judge(blobs)
    else:
        await asyncio.gather(told.put(blobs, other), told.put(blobs, b"elsewhere, and longer"))
        await told.put(blobs, one)
        await told.drop(blobs, other)
        await told.put(blobs, other)
        wrong = await told.judge(blobs)
        refusing.over()
        if told.errors:
            await _works_again(blobs, told, wrong)
    await blobs.close()
    if trouble.errno in (errno.ENOSPC, errno.EFBIG):
        wrong += [f"no space, and {it!r}" for it in told.errors if not isinstance(it, StorageFull)]
    if refusing.reached and trouble.times is None and not told.errors:
        wrong.append("nothing was refused")
    wrong += await _reopened(root, told)
    return refusing.reached, wrong


async def _works_again(blobs: LocalBlobs, told: Told, wrong: list[str]) -> None:
    """A disk that works again is written to again, and nothing of what it refused lies about."""
    before = len(told.errors)
    await told.put(blobs, b"when it works again")
    wrong += [f"the disk works again, and a put got {error!r}" for error in told.errors[before:]]


async def _reopened(root: Path, told: Told) -> list[str]:
    blobs = await LocalBlobs.open(root, disk=HastyDisk(), clock=SystemClock())
    wrong = await told.judge(blobs)
    wrong += [f"verify: {found.where}: {found.why}" async for found in blobs.verify()]
    await blobs.close()
    return wrong


def digest_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


async def _chunks(data: bytes) -> AsyncIterator[bytes]:
    size = -(-len(data) // _CHUNKS)
    for start in range(0, len(data), size):
        yield data[start : start + size]


_EACH: tuple[Call, ...] = (
    "disk.create",
    "disk.write",
    "disk.sync",
    "disk.replace",
    "disk.directory",
    "disk.unlink",
    "disk.names",
)
_GROWING: tuple[Call, ...] = ("disk.create", "disk.write", "disk.sync", "disk.replace")

FAILING_BLOBS = (
    FailingBlobs(
        FAILED_SYNC,
        "each create, write, sync, rename, removal and directory sync under the blobs fails "
        "in turn, once or from then on: the put is refused and nothing half is seen, stored blobs "
        "are read, and when the disk works again so do puts",
        [((call,), errno.EIO) for call in _EACH],
    ),
    FailingBlobs(
        FULL_DISK,
        "each create, write, sync and rename finds no space or too large a file, half of the bytes "
        "written: the put is refused by name, its space is given back, stored blobs are read",
        [((call,), code) for call in _GROWING for code in (errno.ENOSPC, errno.EFBIG)],
    ),
    FailingBlobs(
        READ_ONLY,
        "from each call on nothing may be changed: puts and drops are refused, stored blobs are "
        "read, also by who opens the directory to look",
        [(CHANGES, errno.EROFS)],
    ),
)
