"""A disk under SQLite that counts, fails and forgets: what tests put below the engine.

It stands above the checksum VFS, and tells apart what was written and what was synced:
- `counts` says how often a file was read, written, synced or truncated;
- `refuse` makes a call fail from then on, until `heal`;
- `survivors` says what a power cut now would leave of the store, un-synced writes gone; with
  `kept` some of those writes reach the disk anyway, in any order, as they may.
"""

from __future__ import annotations

import errno
import itertools
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import apsw

from perdure.engines.sqlite_driver import CHECKSUM_VFS, register_checksums

_names = itertools.count(1)

Write = tuple[int, bytes]
"""Offset and bytes; a truncation is its offset and no bytes."""


def broken(code: int, kind: type[apsw.Error] = apsw.IOError) -> apsw.Error:
    """What a VFS raises for SQLite's extended result `code`."""
    error = kind("as planned")
    error.extendedresult = code  # type: ignore[attr-defined]
    return error


SYNC_FAILED = broken(apsw.SQLITE_IOERR_FSYNC)
READ_FAILED = broken(apsw.SQLITE_IOERR_READ)
WRITE_FAILED = broken(apsw.SQLITE_IOERR_WRITE)
DISK_FULL = apsw.FullError("as planned")


class TestDisk(apsw.VFS):
    """One of these a test; `name` is what the engine is opened with."""

    __test__ = False

    def __init__(self) -> None:
        self.name = f"testdisk{next(_names)}"
        self.counts: Counter[tuple[str, str]] = Counter()
        self.synced: dict[str, bytes] = {}
        self.pending: dict[str, list[Write]] = {}
        self.watch: Callable[[str, str], None] = lambda call, suffix: None
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

    def survivors(self, kept: Iterable[int] = ()) -> dict[str, bytes]:
        """File names and their bytes after a power cut now. `kept` are the positions of un-synced
        writes that reached the disk all the same, counted over all files."""
        kept = set(kept)
        numbers = itertools.count()
        left = {}
        with self.lock:
            for name, durable in self.synced.items():
                image = bytearray(durable)
                for write in self.pending[name]:
                    if next(numbers) in kept:
                        _apply(image, write)
                left[name] = bytes(image)
        return left

    def xOpen(self, name: str | apsw.URIFilename | None, flags: list[int]) -> apsw.VFSFile:  # noqa: N802
        return _File(self, name, flags)

    def xGetLastError(self) -> tuple[int, str]:  # noqa: N802
        return self.errno, os.strerror(self.errno)

    def xDelete(self, name: str, sync: bool) -> None:  # noqa: N802
        super().xDelete(name, sync)
        self.synced.pop(Path(name).name, None)
        self.pending.pop(Path(name).name, None)

    def called(self, call: str, path: Path) -> None:
        suffix = path.name.rpartition(".db")[2]
        self.counts[(call, suffix)] += 1
        self.watch(call, suffix)
        self.fail(call, suffix)

    def fail(self, call: str, suffix: str) -> None:
        if error := self._refused.get((call, suffix)):
            raise error


class _File(apsw.VFSFile):
    def __init__(
        self, disk: TestDisk, name: str | apsw.URIFilename | None, flags: list[int]
    ) -> None:
        shown = name.filename() if isinstance(name, apsw.URIFilename) else name
        self.path = Path(shown or "")
        self.disk = disk
        super().__init__(CHECKSUM_VFS, name, flags)
        if self.path.name not in disk.synced:
            # What is there when the test begins counts as synced.
            disk.synced[self.path.name] = self.path.read_bytes() if self.path.exists() else b""
            disk.pending[self.path.name] = []

    def xRead(self, amount: int, offset: int) -> bytes:  # noqa: N802
        suffix = self.path.name.rpartition(".db")[2]
        self.disk.counts[("read", suffix)] += 1
        self.disk.fail("read", suffix)
        return super().xRead(amount, offset)

    def xWrite(self, data: bytes, offset: int) -> None:  # noqa: N802
        self.disk.called("write", self.path)
        with self.disk.lock, self.path.open("rb") as file:
            super().xWrite(data, offset)
            file.seek(offset)  # as it is on the disk, with the page's checksum
            self.disk.pending[self.path.name].append((offset, file.read(len(data))))

    def xTruncate(self, size: int) -> None:  # noqa: N802
        self.disk.called("truncate", self.path)
        with self.disk.lock:
            super().xTruncate(size)
            self.disk.pending[self.path.name].append((size, b""))

    def xSync(self, flags: int) -> None:  # noqa: N802
        self.disk.called("sync", self.path)
        with self.disk.lock:
            super().xSync(flags)
            image = bytearray(self.disk.synced[self.path.name])
            for write in self.disk.pending[self.path.name]:
                _apply(image, write)
            self.disk.synced[self.path.name] = bytes(image)
            self.disk.pending[self.path.name] = []


def _apply(image: bytearray, write: Write) -> None:
    offset, data = write
    if not data:
        del image[offset:]
        return
    image.extend(bytes(max(0, offset - len(image))))
    image[offset : offset + len(data)] = data
