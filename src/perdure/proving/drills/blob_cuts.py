"""Power cuts under the blob store: every state that its directory may be left in, judged by what
was acknowledged."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

from perdure.core.clock import SystemClock
from perdure.engines.blobs_local import LocalBlobs
from perdure.proving.crashstates import RecordingDisk, State, crash_states
from perdure.proving.drills.drill import Subject, Trial
from perdure.proving.faults import POWER_CUT
from perdure.proving.watched import HastyDisk

Story = Callable[[LocalBlobs, RecordingDisk], Awaitable[None]]


def twins(count: int) -> list[bytes]:
    """Bytes whose digests share their first two characters, and so a fan-out directory."""
    found: dict[str, list[bytes]] = {}
    for number in range(10_000):
        data = f"some bytes, number {number}".encode()
        same = found.setdefault(hashlib.sha256(data).hexdigest()[:2], [])
        same.append(data)
        if len(same) == count:
            return same
    raise AssertionError("no twins")


async def put(blobs: LocalBlobs, disk: RecordingDisk, data: bytes) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        yield data[:10]
        yield data[10:]

    disk.mark(f"putting {hashlib.sha256(data).hexdigest()}")
    blob = await blobs.put(chunks(), size_bytes_max=1_000)
    disk.mark(f"put {blob.digest}")


async def drop(blobs: LocalBlobs, disk: RecordingDisk, data: bytes) -> None:
    digest = hashlib.sha256(data).hexdigest()
    disk.mark(f"dropping {digest}")
    await blobs.drop(digest)
    disk.mark(f"dropped {digest}")


async def put_and_drop(blobs: LocalBlobs, disk: RecordingDisk) -> None:
    one, other = twins(2)
    await put(blobs, disk, one)
    await put(blobs, disk, other)
    await put(blobs, disk, b"elsewhere, of more than ten bytes")
    await drop(blobs, disk, one)
    await put(blobs, disk, other)
    await drop(blobs, disk, b"never there")


async def at_once(blobs: LocalBlobs, disk: RecordingDisk) -> None:
    await asyncio.gather(*(put(blobs, disk, data) for data in twins(2)))


async def again(blobs: LocalBlobs, disk: RecordingDisk) -> None:
    """Bytes that are there already, dropped and put once more."""
    (data,) = twins(1)
    await put(blobs, disk, data)
    await put(blobs, disk, data)
    await drop(blobs, disk, data)
    await put(blobs, disk, data)


async def record(story: Story, disk: RecordingDisk, root: Path) -> None:
    blobs = await LocalBlobs.open(root / "blobs", disk=disk, clock=SystemClock())
    await story(blobs, disk)
    await blobs.close()


def promised(state: State) -> tuple[set[str], set[str]]:
    """Digests that must be there, and those that must not, by the acknowledgements before. A put
    or a drop that is under way may be there or not."""
    there: set[str] = set()
    gone: set[str] = set()
    for mark in state.marks:
        what, digest = mark.split()
        match what:
            case "put":
                there.add(digest)
            case "putting":
                gone.discard(digest)
            case "dropping":
                there.discard(digest)
            case "dropped":
                gone.add(digest)
    return there, gone


async def violations(state: State, root: Path) -> list[str]:
    """What an owner who opens the store after the cut would miss, or see and should not."""
    state.write(root)
    there, gone = promised(state)
    blobs = await LocalBlobs.open(root / "blobs", disk=HastyDisk(), clock=SystemClock())
    stored = {blob.digest async for blob in blobs.list()}
    findings = [finding async for finding in blobs.verify()]
    await blobs.close()
    return (
        [f"{digest} was acknowledged and is lost" for digest in there - stored]
        + [f"{digest} was dropped and is back" for digest in gone & stored]
        + [f"a half blob can be seen: {finding}" for finding in findings]
    )


STORIES: tuple[Story, ...] = (put_and_drop, at_once, again)


class CutBlobs:
    """See `says`. The disk is the one that is asked; a proof may give one that does less."""

    fault = POWER_CUT
    subject: Subject = "blobs"
    says = (
        "after each step of puts and drops, some of them at once: what is not synced of a file is "
        "there, absent or cut in its middle, in every combination with the un-synced names, of "
        "which the last six count"
    )

    def __init__(self, disk: Callable[[], RecordingDisk] = RecordingDisk) -> None:
        self._disk = disk

    def lacks(self) -> str | None:
        return None

    async def run(self, trial: Trial) -> None:
        found: list[State] = []
        for story in STORIES:
            real = trial.home / story.__name__
            real.mkdir()
            disk = self._disk()
            await record(story, disk, real)
            found += crash_states(disk.steps, real)
        trial.rng("order").shuffle(found)
        trial.planned = len(found)
        for case, state in enumerate(found, 1):
            if trial.over:
                return
            if trial.wants(case):
                with trial.place(case) as place:
                    trial.judged(case, await violations(state, place), place)
