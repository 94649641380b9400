"""What every kind of blobs must do, and what a directory of them must do besides."""

from __future__ import annotations

import asyncio
import hashlib
import os
import resource
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from perdure.core.blobs import Blob, Blobs
from perdure.core.clock import SystemClock
from perdure.core.disk import Disk, full_disk
from perdure.core.errors import (
    Closed,
    Conflict,
    Damaged,
    Invalid,
    LimitExceeded,
    Missing,
    StorageFull,
    StoreLocked,
    Unavailable,
)
from perdure.core.values import Finding
from perdure.engines import blobs_local, open_blobs
from perdure.engines.blobs_local import CHUNK_BYTES, LocalBlobs
from perdure.proving import hostile
from perdure.proving.s3 import Server

MANY = 1 << 40


async def chunks(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


async def put(blobs: Blobs, data: bytes) -> Blob:
    return await blobs.put(chunks(data[:3], data[3:]), size_bytes_max=MANY)


async def read(blobs: Blobs, digest: str, **wanted: int) -> bytes:
    return b"".join([chunk async for chunk in blobs.read(digest, **wanted)])


async def listed(blobs: Blobs) -> list[Blob]:
    return [blob async for blob in blobs.list()]


async def found(blobs: Blobs) -> list[Finding]:
    return [finding async for finding in blobs.verify()]


def files(root: Path) -> list[str]:
    return sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file())


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture(params=["memory", "file", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A place for blobs that nobody else has used."""
    match request.param:
        case "memory":
            return "memory://"
        case "file":
            return f"file:///{tmp_path / 'blobs'}"
        case _:
            server: Server = request.getfixturevalue("s3")
            return server.url(tmp_path.name)


@pytest.fixture
async def blobs(url: str) -> AsyncIterator[Blobs]:
    opened = await open_blobs(url)
    yield opened
    assert await found(opened) == []
    await opened.close()


@pytest.fixture
async def local(tmp_path: Path) -> AsyncIterator[LocalBlobs]:
    opened = await LocalBlobs.open(tmp_path, disk=Disk(), clock=SystemClock())
    yield opened
    await opened.close()


@pytest.mark.parametrize("data", [b"", b"x", b"hello world", bytes(range(256)) * 5_000])
async def test_bytes_come_back_under_their_digest(blobs: Blobs, data: bytes) -> None:
    blob = await put(blobs, data)
    assert blob == Blob(sha256(data), len(data))
    assert await blobs.size(blob.digest) == len(data)
    assert await read(blobs, blob.digest) == data


async def test_a_part_can_be_read_from_anywhere(blobs: Blobs) -> None:
    data = bytes(range(256)) * (3 * CHUNK_BYTES // 256) + b"end"
    digest = (await put(blobs, data)).digest
    for start in (0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, len(data) - 1, len(data), len(data) + 9):
        for size in (0, 1, CHUNK_BYTES, len(data), MANY):
            assert await read(blobs, digest, start=start, size_bytes=size) == data[start:][:size]
    for start, size in ((-1, 1), (0, -1)):
        with pytest.raises(Invalid):
            await read(blobs, digest, start=start, size_bytes=size)


async def test_equal_bytes_are_one_blob_and_blobs_are_listed_by_digest(blobs: Blobs) -> None:
    made = [await put(blobs, f"{number % 20}".encode()) for number in range(40)]
    assert await listed(blobs) == sorted(set(made), key=lambda blob: blob.digest)


async def test_what_was_dropped_is_missing(blobs: Blobs) -> None:
    kept, gone = await put(blobs, b"kept"), await put(blobs, b"gone")
    for _ in range(2):
        await blobs.drop(gone.digest)
    assert await listed(blobs) == [kept]
    assert await blobs.size(gone.digest) is None
    with pytest.raises(Missing, match=gone.digest):
        await read(blobs, gone.digest)
    await blobs.drop(sha256(b"never"))


# proves C18
async def test_a_blob_over_its_limit_is_refused_and_leaves_nothing(blobs: Blobs) -> None:
    with pytest.raises(LimitExceeded) as refused:
        await blobs.put(chunks(b"12345", b"67890"), size_bytes_max=9)
    assert (refused.value.actual, refused.value.limit) == (10, 9)
    assert await listed(blobs) == []
    await blobs.put(chunks(b"12345", b"6789"), size_bytes_max=9)


# proves C20
@pytest.mark.parametrize(
    "digest", [*hostile.LEGAL_NAMES.values(), *hostile.REFUSED_NAMES.values(), "A" * 64, "a" * 63]
)
async def test_a_digest_that_is_none_never_reaches_a_path(blobs: Blobs, digest: str) -> None:
    for ask in (blobs.size(digest), blobs.drop(digest), read(blobs, digest)):
        with pytest.raises(Invalid):
            await ask


async def test_an_upload_that_breaks_off_leaves_nothing(blobs: Blobs) -> None:
    async def breaks_off() -> AsyncIterator[bytes]:
        yield b"half"
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        await blobs.put(breaks_off(), size_bytes_max=MANY)
    assert await listed(blobs) == []


async def test_a_cancelled_upload_leaves_nothing(blobs: Blobs) -> None:
    started = asyncio.Event()

    async def stalls() -> AsyncIterator[bytes]:
        yield b"half"
        started.set()
        await asyncio.Event().wait()

    upload = asyncio.create_task(blobs.put(stalls(), size_bytes_max=MANY))
    await started.wait()
    upload.cancel()
    with pytest.raises(asyncio.CancelledError):
        await upload
    assert await listed(blobs) == []


# proves C4
async def test_a_claim_is_made_while_the_bytes_are_still_invisible(blobs: Blobs) -> None:
    seen: list[tuple[str, int | None]] = []

    @asynccontextmanager
    async def claim(blob: Blob) -> AsyncIterator[None]:
        seen.append(("before", await blobs.size(blob.digest)))
        yield
        seen.append(("after", await blobs.size(blob.digest)))

    await blobs.put(chunks(b"data"), size_bytes_max=MANY, publishing=claim)
    assert seen == [("before", None), ("after", 4)]


# proves C4
async def test_without_its_claim_nothing_is_published(blobs: Blobs) -> None:
    @asynccontextmanager
    async def lost(blob: Blob) -> AsyncIterator[None]:
        raise Conflict("claim", 0, 1)
        yield

    with pytest.raises(Conflict):
        await blobs.put(chunks(b"data"), size_bytes_max=MANY, publishing=lost)
    assert await listed(blobs) == []


async def test_after_closing_everything_says_so(url: str) -> None:
    closed = await open_blobs(url)
    digest = (await put(closed, b"x")).digest
    await closed.close()
    await closed.close()
    for ask in (
        put(closed, b"y"),
        closed.size(digest),
        read(closed, digest),
        closed.drop(digest),
        listed(closed),
        found(closed),
    ):
        with pytest.raises(Closed):
            await ask


@pytest.mark.parametrize("url", ["file://", "file:///", "sqlite:///x", "blobs", "memory://x", ""])
async def test_a_url_that_names_no_place_for_blobs_is_refused(url: str) -> None:
    with pytest.raises(Invalid, match="known forms"):
        await open_blobs(url)


# proves C7
# proves C8
@pytest.mark.parametrize("bit", range(0, 8 * 32, 5))
async def test_a_flipped_bit_is_named_and_the_rest_goes_on(local: LocalBlobs, bit: int) -> None:
    sound, hurt = await put(local, b"sound"), await put(local, bytes(32))
    path = Path(local.url.removeprefix("file:///")) / hurt.digest[:2] / hurt.digest
    data = bytearray(32)
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)
    with pytest.raises(Damaged, match=hurt.digest):
        await read(local, hurt.digest)
    assert await read(local, sound.digest) == b"sound"
    assert [finding.where for finding in await found(local)] == [f"the blob {hurt.digest}"]
    await put(local, bytes(32))
    assert await read(local, hurt.digest) == bytes(32)


# proves C7
@pytest.mark.parametrize("left", [b"", b"x" * CHUNK_BYTES, b"x" * (2 * CHUNK_BYTES + 1)])
async def test_a_blob_of_another_length_is_damaged_before_its_last_chunk(
    local: LocalBlobs, left: bytes
) -> None:
    blob = await put(local, b"x" * 2 * CHUNK_BYTES)
    (Path(local.url.removeprefix("file:///")) / blob.digest[:2] / blob.digest).write_bytes(left)
    given: list[bytes] = []

    async def keep() -> None:
        async for chunk in local.read(blob.digest):
            given.append(chunk)

    with pytest.raises(Damaged):
        await keep()
    assert sum(map(len, given)) < max(len(left), 1)


# proves C11
async def test_one_process_writes_and_many_may_look(tmp_path: Path) -> None:
    url = f"file:///{tmp_path}"
    owner = await open_blobs(url)
    blob = await put(owner, b"x")
    with pytest.raises(StoreLocked) as locked:
        await open_blobs(url)
    assert locked.value.holder == os.getpid()
    looking = await open_blobs(url, read_only=True)
    assert await read(looking, blob.digest) == b"x"
    for ask in (put(looking, b"y"), looking.drop(blob.digest)):
        with pytest.raises(Invalid, match="reading only"):
            await ask
    await owner.close()
    await (await open_blobs(url)).close()
    await looking.close()


# proves C11
async def test_of_several_that_start_at_once_the_first_cleans_up_and_the_others_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"file:///{tmp_path}"
    await (await open_blobs(url, shared=True)).close()
    (tmp_path / "incoming" / "blob_1.tmp").write_bytes(b"half")
    first = Disk().lock(tmp_path / "lock")
    opening = [asyncio.create_task(open_blobs(url, shared=True)) for _ in range(3)]
    await asyncio.wait(opening, timeout=0.1)
    assert not any(task.done() for task in opening)
    first.share()
    beside = [await task for task in opening]
    assert [blobs.recovered for blobs in beside] == [()] * 3
    for blobs in beside:
        await blobs.close()
    first.release()
    alone = await open_blobs(url)  # of a store that is not shared: it is its owner's for good
    monkeypatch.setattr(blobs_local, "_SHARED_WITHIN_S", 0.1)
    with pytest.raises(StoreLocked):
        await open_blobs(url, shared=True)
    await alone.close()


# proves C7
async def test_what_a_crash_left_is_removed_and_reported(tmp_path: Path) -> None:
    url = f"file:///{tmp_path}"
    blobs = await open_blobs(url)
    kept = await put(blobs, b"kept")
    await blobs.close()
    (tmp_path / "incoming" / "blob_1.tmp").write_bytes(b"half")
    looking = await open_blobs(url, read_only=True)
    assert [finding.kind for finding in await found(looking)] == ["leftover"]
    blobs = await open_blobs(url)
    where = str(tmp_path / "incoming" / "blob_1.tmp")
    assert [(finding.where, finding.kind) for finding in blobs.recovered] == [(where, "leftover")]
    assert await found(blobs) == []
    assert await listed(blobs) == [kept]
    await blobs.close()


class Failing(Disk):
    """Fails one kind of call."""

    def __init__(self, call: str, error: int) -> None:
        self.call = call
        self.error = error
        self.failing = False

    def _fail(self, call: str, path: Path) -> None:
        if self.failing and call == self.call:
            with full_disk(path):
                raise OSError(self.error, os.strerror(self.error))

    def open_new(self, path: Path) -> int:
        self._fail("open", path)
        return super().open_new(path)

    def write_all(self, fd: int, data: bytes, path: Path) -> None:
        self._fail("write", path)
        super().write_all(fd, data, path)

    def sync(self, fd: int, path: Path) -> None:
        self._fail("sync", path)
        super().sync(fd, path)

    def replace(self, source: Path, target: Path) -> None:
        self._fail("replace", target)
        super().replace(source, target)

    def sync_directory(self, path: Path) -> None:
        self._fail("sync_directory", path)
        super().sync_directory(path)

    def read_chunks(self, path: Path, start: int, chunk_bytes: int) -> Iterator[bytes]:
        self._fail("read", path)
        yield from super().read_chunks(path, start, chunk_bytes)


# proves C10
@pytest.mark.parametrize("call", ["open", "write", "sync", "replace"])
@pytest.mark.parametrize(("error", "kind"), [(28, StorageFull), (5, Unavailable)])
async def test_a_disk_that_refuses_leaves_nothing_and_works_again_later(
    tmp_path: Path, call: str, error: int, kind: type[Unavailable]
) -> None:
    disk = Failing(call, error)
    blobs = await LocalBlobs.open(tmp_path, disk=disk, clock=SystemClock())
    old = await put(blobs, b"old")
    disk.failing = True
    with pytest.raises(kind):
        await put(blobs, b"new")
    assert await read(blobs, old.digest) == b"old"
    assert await listed(blobs) == [old]
    disk.failing = False
    assert not list((tmp_path / "incoming").iterdir())
    await put(blobs, b"new")
    await blobs.close()


async def test_a_failed_sync_of_names_is_not_acknowledged(tmp_path: Path) -> None:
    disk = Failing("sync_directory", 5)
    blobs = await LocalBlobs.open(tmp_path, disk=disk, clock=SystemClock())
    blob = await put(blobs, b"x")
    disk.failing = True
    for ask in (put(blobs, b"x"), put(blobs, b"other"), blobs.drop(blob.digest)):
        with pytest.raises(Unavailable):
            await ask
    await blobs.close()


async def test_a_disk_that_cannot_be_read_is_unavailable_and_not_damage(tmp_path: Path) -> None:
    disk = Failing("read", 5)
    blobs = await LocalBlobs.open(tmp_path, disk=disk, clock=SystemClock())
    blob = await put(blobs, b"x")
    disk.failing = True
    with pytest.raises(Unavailable):
        await read(blobs, blob.digest)
    assert [finding.kind for finding in await found(blobs)] == ["unreadable"]
    await blobs.close()


async def test_memory_stays_flat_while_a_large_blob_passes(local: LocalBlobs) -> None:
    part = os.urandom(1 << 20)

    async def large() -> AsyncIterator[bytes]:
        for _ in range(96):
            yield part

    await put(local, b"warm")
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    blob = await local.put(large(), size_bytes_max=MANY)
    read_bytes = 0
    async for chunk in local.read(blob.digest):
        read_bytes += len(chunk)
    assert read_bytes == 96 << 20
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib
    assert grown_kib < 24 * 1024


async def test_uploads_of_the_same_bytes_at_once_are_one_blob(blobs: Blobs) -> None:
    made = await asyncio.gather(*(put(blobs, b"the same" * 1000) for _ in range(12)))
    assert len(set(made)) == 1
    assert await listed(blobs) == [made[0]]


async def test_nothing_but_blobs_lies_in_the_directory(tmp_path: Path) -> None:
    blobs = await open_blobs(f"file:///{tmp_path}")
    blob = await put(blobs, b"x")
    await blobs.close()
    assert files(tmp_path) == sorted([f"{blob.digest[:2]}/{blob.digest}", "lock"])


async def test_a_directory_keeps_the_bytes_of_one_store(tmp_path: Path) -> None:
    """Another store knows nobody who needs them, and would sweep them."""
    url = f"file:///{tmp_path}/blobs"
    await (await open_blobs(url, owner="store_0")).close()
    first = await open_blobs(url, owner="store_1")  # nothing was kept here
    blob = await put(first, b"x")
    await first.close()
    for shared in (False, True):
        with pytest.raises(Invalid, match=r"another store, store_1, and this one, store_2"):
            await open_blobs(url, owner="store_2", shared=shared)
    looking = await open_blobs(url, owner="store_2", read_only=True)
    assert await looking.size(blob.digest) == 1
    shared_one = await open_blobs(url, owner="store_1", shared=True)
    await shared_one.drop(blob.digest)
    with pytest.raises(Invalid, match="another store"):  # who has it may put some at any moment
        await open_blobs(url, owner="store_2", shared=True)
    await shared_one.close()
    await (await open_blobs(url, owner="store_2")).close()
