"""A disk under SQLite that counts, fails and forgets: what proofs put below the engine.

It stands above the checksum VFS, and tells apart what was written and what was synced:
- `counts` says how often a file was read, written, synced or truncated;
- `refuse` makes a call fail, from then on or once, until `heal`;
- `contents` says what lies on the disk for sure, and which writes may be lost with the power.
"""

from __future__ import annotations

import errno
import itertools
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import apsw
import msgspec

from perdure.core.disk import Disk
from perdure.engines import sqlite_checkpoint
from perdure.engines.sqlite_driver import CHECKSUM_VFS, register_checksums

_names = itertools.count(1)


def broken(code: int, kind: type[apsw.Error] = apsw.IOError) -> apsw.Error:
    """What a VFS raises for SQLite's extended result `code`."""
    error = kind("as planned")
    error.extendedresult = code  # type: ignore[attr-defined]
    return error


SYNC_FAILED = broken(apsw.SQLITE_IOERR_FSYNC)
READ_FAILED = broken(apsw.SQLITE_IOERR_READ)
WRITE_FAILED = broken(apsw.SQLITE_IOERR_WRITE)
DISK_FULL = apsw.FullError("as planned")


class Write(msgspec.Struct, frozen=True):
    """Bytes at an offset of a file; a truncation is its offset and no bytes."""

    name: str
    offset: int
    data: bytes

    def apply(self, image: bytearray) -> None:
        """Let the bytes of the file be what this write makes of them."""
        if not self.data:
            del image[self.offset :]
            return
        image.extend(bytes(max(0, self.offset - len(image))))
        image[self.offset : self.offset + len(self.data)] = self.data


class Contents(msgspec.Struct, frozen=True):
    """What a disk holds at one moment: files as they were last synced, and the writes since, in
    their order, each of which may have reached it or not."""

    synced: Mapping[str, bytes]
    loose: tuple[Write, ...]

    def survivors(self, kept: Iterable[int] = (), torn: Write | None = None) -> dict[str, bytes]:
        """File names and their bytes after a power cut: the loose writes at the positions `kept`
        reached the disk, and then what is left of a torn one."""
        kept = set(kept)
        images = {name: bytearray(data) for name, data in self.synced.items()}
        for at, write in enumerate(self.loose):
            if at in kept:
                write.apply(images[write.name])
        if torn is not None:
            torn.apply(images[torn.name])
        return {name: bytes(image) for name, image in images.items()}


class WatchedDisk(apsw.VFS):
    """One of these a store; `name` is what the engine is opened with."""

    def __init__(self, *, hasty: bool = False) -> None:
        self.hasty = hasty
        """Syncs are only noted: for a store that no real power cut will meet."""
        self.short = False
        """A write that fails has written half of its bytes."""
        self.name = f"watched{next(_names)}"
        self.counts: Counter[tuple[str, str]] = Counter()
        self.watch: Callable[[str, str], None] = lambda call, suffix: None
        self.synced: dict[str, bytes] = {}
        self.loose: list[Write] = []
        self.errno = errno.EIO
        """What the system says of the last call that failed."""
        self.lock = threading.RLock()
        self._refused: dict[tuple[str, str], apsw.Error] = {}
        register_checksums()
        super().__init__(self.name, base=CHECKSUM_VFS)

    def refuse(self, call: str, suffix: str, error: apsw.Error) -> None:
        """Let `call` (read, write, sync, truncate) on the file of that suffix fail from now on."""
        self._refused[(call, suffix)] = error

    def heal(self) -> None:
        """Stop failing."""
        self._refused.clear()

    def contents(self) -> Contents:
        """What the disk holds now."""
        with self.lock:
            return Contents(dict(self.synced), tuple(self.loose))

    def xOpen(self, name: str | apsw.URIFilename | None, flags: list[int]) -> apsw.VFSFile:  # noqa: N802
        return _File(self, name, flags)

    def xGetLastError(self) -> tuple[int, str]:  # noqa: N802
        return self.errno, os.strerror(self.errno)

    def xDelete(self, name: str, sync: bool) -> None:  # noqa: N802
        super().xDelete(name, sync)
        with self.lock:
            self.synced.pop(Path(name).name, None)
            self.loose = [write for write in self.loose if write.name != Path(name).name]

    def called(self, call: str, path: Path) -> None:
        """A call is about to be made."""
        suffix = path.name.rpartition(".db")[2]
        self.counts[(call, suffix)] += 1
        self.watch(call, suffix)
        self.fail(call, suffix)

    def fail(self, call: str, suffix: str) -> None:
        """Raise what is planned for a call."""
        if error := self._refused.get((call, suffix)):
            raise error


@contextmanager
def small_checkpoints() -> Iterator[None]:
    """Checkpoints come early, so that some lie within a short history."""
    kept = sqlite_checkpoint.FEW_STEP_FRAMES, sqlite_checkpoint.FINISH_FRAMES
    sqlite_checkpoint.FEW_STEP_FRAMES, sqlite_checkpoint.FINISH_FRAMES = 12, 25
    try:
        yield
    finally:
        sqlite_checkpoint.FEW_STEP_FRAMES, sqlite_checkpoint.FINISH_FRAMES = kept


class HastyDisk(Disk):
    """The real disk without its syncs, for stores that are looked at once and thrown away."""

    def sync(self, fd: int, path: Path) -> None:
        pass

    def sync_directory(self, path: Path) -> None:
        pass


class _File(apsw.VFSFile):
    def __init__(
        self, disk: WatchedDisk, name: str | apsw.URIFilename | None, flags: list[int]
    ) -> None:
        shown = name.filename() if isinstance(name, apsw.URIFilename) else name
        self.path = Path(shown or "")
        self.disk = disk
        super().__init__(CHECKSUM_VFS, name, flags)
        with disk.lock:
            # What is there when the watch begins counts as synced.
            there = self.path.read_bytes() if self.path.exists() else b""
            disk.synced.setdefault(self.path.name, there)

    def xRead(self, amount: int, offset: int) -> bytes:  # noqa: N802
        suffix = self.path.name.rpartition(".db")[2]
        self.disk.counts[("read", suffix)] += 1
        self.disk.fail("read", suffix)
        return super().xRead(amount, offset)

    def xWrite(self, data: bytes, offset: int) -> None:  # noqa: N802
        try:
            self.disk.called("write", self.path)
        except apsw.Error:
            if self.disk.short:
                self._write(data[: len(data) // 2], offset)
            raise
        self._write(data, offset)

    def _write(self, data: bytes, offset: int) -> None:
        with self.disk.lock, self.path.open("rb") as file:
            super().xWrite(data, offset)
            file.seek(offset)  # as it is on the disk, with the page's checksum
            self.disk.loose.append(Write(self.path.name, offset, file.read(len(data))))

    def xTruncate(self, size: int) -> None:  # noqa: N802
        self.disk.called("truncate", self.path)
        with self.disk.lock:
            super().xTruncate(size)
            self.disk.loose.append(Write(self.path.name, size, b""))

    def xSync(self, flags: int) -> None:  # noqa: N802
        self.disk.called("sync", self.path)
        if not self.disk.hasty:
            super().xSync(flags)
        with self.disk.lock:
            image = bytearray(self.disk.synced[self.path.name])
            for write in self.disk.loose:
                if write.name == self.path.name:
                    write.apply(image)
            self.disk.synced[self.path.name] = bytes(image)
            self.disk.loose = [one for one in self.disk.loose if one.name != self.path.name]
