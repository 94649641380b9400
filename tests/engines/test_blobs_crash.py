"""Every state a power cut may leave a directory of blobs in, judged by what was acknowledged."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from perdure.core.clock import SystemClock
from perdure.core.disk import Disk
from perdure.engines.blobs_local import LocalBlobs
from perdure.proving.crashstates import RecordingDisk, State, crash_states

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
    root.mkdir()
    state.write(root)
    there, gone = promised(state)
    blobs = await LocalBlobs.open(root / "blobs", disk=Disk(), clock=SystemClock())
    stored = {blob.digest async for blob in blobs.list()}
    findings = [finding async for finding in blobs.verify()]
    await blobs.close()
    return (
        [f"{digest} was acknowledged and is lost" for digest in there - stored]
        + [f"{digest} was dropped and is back" for digest in gone & stored]
        + [f"a half blob can be seen: {finding}" for finding in findings]
    )


async def judge(story: Story, disk: RecordingDisk, root: Path) -> tuple[int, list[str]]:
    """How many states there are up to the first that breaks a promise, and what it breaks."""
    real, after = root / "real", root / "after"
    real.mkdir()
    after.mkdir()
    await record(story, disk, real)
    count = 0
    for state in crash_states(disk.steps, real):
        count += 1
        if found := await violations(state, after / f"{count}"):
            return count, found
    return count, []


# proves C3
# proves C4
@pytest.mark.parametrize("story", [put_and_drop, at_once, again])
async def test_no_power_cut_loses_a_blob_or_shows_half_of_one(story: Story, tmp_path: Path) -> None:
    count, found = await judge(story, RecordingDisk(), tmp_path)
    assert found == []
    assert count > 30


class ForgetsToSyncBytes(RecordingDisk):
    def sync(self, fd: int, path: Path) -> None:
        pass


class ForgetsToSyncNames(RecordingDisk):
    def sync_directory(self, path: Path) -> None:
        pass


class ForgetsToSyncNewDirectories(RecordingDisk):
    def make_directory(self, path: Path) -> None:
        for part in reversed([part for part in (path, *path.parents) if not part.exists()]):
            self.add_directory(part)


class WritesInPlace(RecordingDisk):
    """Copies the bytes under their name instead of renaming the file."""

    def replace(self, source: Path, target: Path) -> None:
        data = source.read_bytes()
        fd = self.open_new(target)
        self.write_all(fd, data, target)
        self.sync(fd, target)
        self.unlink(source)


@pytest.mark.parametrize(
    "planted",
    [ForgetsToSyncBytes, ForgetsToSyncNames, ForgetsToSyncNewDirectories, WritesInPlace],
)
async def test_a_disk_that_does_less_than_it_says_is_caught(
    planted: Callable[[], RecordingDisk], tmp_path: Path
) -> None:
    _, found = await judge(again, planted(), tmp_path)
    assert found
