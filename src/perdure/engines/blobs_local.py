"""Blobs in a directory: `ab/ab34...` is a published blob, `incoming/` holds bytes on their way.

Invariants
- A name under a fan-out directory is given to synced, complete bytes only, by one rename; when
  `put` returns, the fan-out directory and its own name in the root are synced too.
- Every `put` writes its bytes anew and renames over what is there, so an earlier write whose sync
  failed, or whose directory a power cut may still take, is never built upon.
- One process writes: it holds `lock`. So what lies in `incoming/` when it opens is nobody's, and
  is removed and reported. Reading needs no lock, since published bytes never change.
- Where several write, who drops a blob holds a lock on its file, from before the last look at who
  needs it until it is gone, also while it is stopped. A put looks for that lock after its claim: a
  dropper that it does not see has yet to look, and sees the claim.
- `owner` names the one store whose bytes these are. Another one would sweep them as nobody's, so it
  is refused while there are any.

Blocking work runs off the event loop, one chunk at a time; what writes, in threads of its own.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import threading
from collections.abc import AsyncIterable, AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path

from perdure.core.blobs import Blob, Publishing, absent, check_digest, check_range, unclaimed
from perdure.core.clock import Clock
from perdure.core.disk import TEMPORARY, Disk, Lock, Writer, translated
from perdure.core.errors import (
    Closed,
    Damaged,
    Invalid,
    LimitExceeded,
    Missing,
    StoreLocked,
    Unavailable,
)
from perdure.core.offload import off_loop, off_loop_to_write
from perdure.core.values import Finding

CHUNK_BYTES = 256 * 1024
_SHARED_WITHIN_S = 5.0
"""How long it may take the first of several to remove what a crash left. The others wait."""

_DROPPED_WITHIN_S = 2.0
"""How long who wants a blob waits for another process to drop it."""

_PAUSE_S = 0.02
_OWNER = "owner"
_ANOTHER_DIGEST = "its bytes have another digest"


class LocalBlobs:
    """See `core.blobs.Blobs`; made by `open`."""

    def __init__(self, root: Path, disk: Disk, clock: Clock, lock: Lock | None) -> None:
        self.url = f"file:///{root}"
        self.recovered: tuple[Finding, ...] = ()
        self._root = root
        self._incoming = root / "incoming"
        self._disk = disk
        self._clock = clock
        self._lock = lock
        self._shared = False
        self._closed = False
        self._making = threading.Lock()
        self._durable: set[str] = set()

    @classmethod
    async def open(
        cls,
        root: Path,
        *,
        disk: Disk,
        clock: Clock,
        read_only: bool = False,
        shared: bool = False,
        owner: str | None = None,
    ) -> LocalBlobs:
        """Take the directory for the store `owner`, made if need be, and remove what a crash left
        in `incoming/`; where it is `shared`, whoever opens it while nobody else has it does that.
        `read_only` takes no lock and changes nothing. Raises `StoreLocked`, and `Invalid` where it
        is another store's."""
        deadline_s = clock.monotonic_s() + _SHARED_WITHIN_S
        while True:
            try:
                return await off_loop(cls._open, root, disk, clock, read_only, shared, owner)
            except StoreLocked:
                if not shared or clock.monotonic_s() > deadline_s:
                    raise
            await clock.sleep(_PAUSE_S)

    @classmethod
    def _open(
        cls,
        root: Path,
        disk: Disk,
        clock: Clock,
        read_only: bool,
        shared: bool,
        owner: str | None,
    ) -> LocalBlobs:
        if read_only:
            return cls(root, disk, clock, None)
        with translated(root), ExitStack() as undo:
            disk.make_directory(root / "incoming")
            try:
                lock, alone = disk.lock(root / "lock"), True
            except StoreLocked:
                if not shared:
                    raise
                lock, alone = disk.lock(root / "lock", shared=True), False
            undo.callback(lock.release)
            lock.note(f"{os.getpid()}\n")
            blobs = cls(root, disk, clock, lock)
            if owner is not None:
                blobs._take(owner, alone=alone)
            if alone:
                blobs.recovered = tuple(_leftovers(blobs._incoming))
                for finding in blobs.recovered:
                    disk.remove(Path(finding.where))
            if shared:
                lock.share()
                blobs._shared = True
            undo.pop_all()
        return blobs

    async def put(
        self,
        chunks: AsyncIterable[bytes],
        *,
        size_bytes_max: int,
        publishing: Publishing = unclaimed,
    ) -> Blob:
        self._check_open()
        if self._lock is None:
            raise Invalid(f"{self.url} was opened for reading only.")
        name = self._clock.new_id("blob") + TEMPORARY
        arriving = _Arriving(self._disk, self._incoming / name)
        try:
            await off_loop_to_write(arriving.begin)
            async for chunk in chunks:
                if arriving.size_bytes + len(chunk) > size_bytes_max:
                    raise LimitExceeded(
                        "the blob, in bytes,", arriving.size_bytes + len(chunk), size_bytes_max
                    )
                await off_loop_to_write(arriving.add, chunk)
            blob = Blob(arriving.digest(), arriving.size_bytes)
            async with publishing(blob):
                self._check_open()
                if self._shared:
                    await self._require_undropped(blob.digest)
                await asyncio.shield(off_loop_to_write(self._publish, arriving, blob.digest))
        finally:
            await asyncio.shield(off_loop_to_write(arriving.discard))
        return blob

    async def size(self, digest: str) -> int | None:
        self._check_open()
        return await off_loop(_size, self._path(digest))

    async def read(
        self, digest: str, *, start: int = 0, size_bytes: int | None = None
    ) -> AsyncIterator[bytes]:
        self._check_open()
        check_range(start, size_bytes)
        path = self._path(digest)
        stored = await off_loop(_size, path)
        if stored is None:
            raise absent(digest)
        left = max(stored - start, 0)
        if size_bytes is not None:
            left = min(left, size_bytes)
        whole = left == stored
        seen = hashlib.sha256()
        chunks = self._disk.read_chunks(path, start, CHUNK_BYTES)
        while left:
            chunk = (await off_loop(_next, chunks, path))[:left]
            left -= len(chunk)
            seen.update(chunk)
            if not chunk or (whole and not left and seen.hexdigest() != digest):
                raise Damaged(f"the blob {digest}", _ANOTHER_DIGEST)
            yield chunk
        if whole and not stored and seen.hexdigest() != digest:
            raise Damaged(f"the blob {digest}", _ANOTHER_DIGEST)

    async def drop(self, digest: str) -> None:
        self._check_open()
        if self._lock is None:
            raise Invalid(f"{self.url} was opened for reading only.")
        await asyncio.shield(off_loop_to_write(self._remove, self._path(digest)))

    @asynccontextmanager
    async def dropping(self, digest: str) -> AsyncIterator[None]:
        lock = await off_loop_to_write(self._hold, self._path(digest)) if self._shared else None
        try:
            yield
        finally:
            if lock is not None:
                lock.release()

    async def list(self) -> AsyncIterator[Blob]:
        self._check_open()
        for folder in await off_loop(_fan_out, self._root):
            for blob in await off_loop(_blobs_in, folder):
                yield blob

    async def verify(self) -> AsyncIterator[Finding]:
        """While puts are under way their bytes are listed as leftovers too."""
        async for blob in self.list():
            finding = await off_loop(self._verify, blob.digest)
            if finding is not None:
                yield finding
        for finding in await off_loop(_leftovers, self._incoming):
            yield finding

    async def close(self) -> None:
        self._closed = True
        if self._lock is not None:
            self._lock.release()

    def _take(self, owner: str, *, alone: bool) -> None:
        """Be the one store that keeps its bytes here. Raises `Invalid` where another does."""
        path = self._root / _OWNER
        found = path.read_bytes().decode(errors="replace") if path.exists() else None
        if found == owner:
            return
        if found is not None and (not alone or any(map(_blobs_in, _fan_out(self._root)))):
            raise Invalid(
                f"{self.url} keeps the bytes of another store, {found}, and this one, {owner}, "
                "would remove them as nobody's. Name another directory with `data` or `blobs`. If "
                f"that store is gone for good, remove the file {_OWNER!r} there."
            )
        self._disk.write_file(path, owner.encode())

    async def _require_undropped(self, digest: str) -> None:
        """Wait while another process drops a blob. Raises `Unavailable`."""
        deadline_s = self._clock.monotonic_s() + _DROPPED_WITHIN_S
        while await off_loop_to_write(self._is_being_dropped, self._path(digest)):
            if self._clock.monotonic_s() > deadline_s:
                raise Unavailable(
                    f"another process began to remove the blob {digest} and stands still. "
                    "Wake it or end it, then try again."
                )
            await self._clock.sleep(_PAUSE_S)

    def _is_being_dropped(self, path: Path) -> bool:
        try:
            self._hold(path).release()
        except Missing:
            return False
        except StoreLocked:
            return True
        return False

    def _hold(self, path: Path) -> Lock:
        with translated(path):
            try:
                return self._disk.lock_existing(path)
            except FileNotFoundError:
                raise absent(path.name) from None

    def _publish(self, arriving: _Arriving, digest: str) -> None:
        path = self._path(digest)
        with translated(path):
            with self._making:
                if path.parent.name not in self._durable:
                    self._disk.make_directory(path.parent)
                    self._durable.add(path.parent.name)
            arriving.publish(path)

    def _remove(self, path: Path) -> None:
        with translated(path):
            self._disk.remove(path)

    def _verify(self, digest: str) -> Finding | None:
        path = self._path(digest)
        seen = hashlib.sha256()
        try:
            for chunk in self._disk.read_chunks(path, 0, CHUNK_BYTES):
                seen.update(chunk)
        except FileNotFoundError:
            return None  # dropped since it was listed
        except OSError as error:
            return Finding(f"the blob {digest}", str(error), "unreadable")
        if seen.hexdigest() == digest:
            return None
        return Finding(f"the blob {digest}", _ANOTHER_DIGEST)

    def _path(self, digest: str) -> Path:
        return self._root / check_digest(digest)[:2] / digest

    def _check_open(self) -> None:
        if self._closed:
            raise Closed(f"{self.url} was closed.")


class _Arriving:
    """Bytes on their way. A cancelled caller leaves while a thread still writes: whatever happens
    here happens under one lock, and nothing after `discard`."""

    def __init__(self, disk: Disk, path: Path) -> None:
        self._busy = threading.Lock()
        self._disk = disk
        self._path = path
        self._writer: Writer | None = None
        self._hash = hashlib.sha256()
        self._discarded = False
        self.size_bytes = 0

    def begin(self) -> None:
        with self._busy, translated(self._path):
            if not self._discarded:
                self._writer = self._disk.writer(self._path)

    def add(self, chunk: bytes) -> None:
        with self._busy, translated(self._path):
            if self._writer is not None:
                self._writer.write(chunk)
                self._hash.update(chunk)
                self.size_bytes += len(chunk)

    def digest(self) -> str:
        return self._hash.hexdigest()

    def publish(self, path: Path) -> None:
        with self._busy:
            if self._writer is not None:
                self._writer.publish(path)

    def discard(self) -> None:
        with self._busy, translated(self._path):
            self._discarded = True
            if self._writer is not None:
                self._writer.discard()
                self._writer = None


def _size(path: Path) -> int | None:
    with translated(path), suppress(FileNotFoundError):
        return path.stat().st_size
    return None


def _next(chunks: Iterator[bytes], path: Path) -> bytes:
    with translated(path), suppress(FileNotFoundError):
        return next(chunks, b"")
    raise absent(path.name)


def _leftovers(incoming: Path) -> list[Finding]:
    return [
        Finding(str(path), "bytes that were never published", "leftover")
        for path in sorted(incoming.glob("*" + TEMPORARY))
    ]


def _fan_out(root: Path) -> list[Path]:
    """The directories that published blobs lie in, in order."""
    paths = root.iterdir() if root.is_dir() else ()  # to look, nothing is made
    return sorted(path for path in paths if len(path.name) == 2 and path.is_dir())


def _blobs_in(folder: Path) -> list[Blob]:
    """What is published in one of them, in the order of digests."""
    names = sorted(path.name for path in folder.iterdir() if path.name.startswith(folder.name))
    sizes = ((name, _size(folder / name)) for name in names)
    return [Blob(name, size_bytes) for name, size_bytes in sizes if size_bytes is not None]
