"""A disk in trouble, for a whole process: under SQLite's checksums and in the disk module alike.

A `Trouble` counts the calls of some kinds, wherever they are made, and from its `n`th on they fail
or take long, so many times or for ever. `sqlite.*` are the calls of SQLite's files, `disk.*` those
of the disk module. A write that finds no space has written half of its bytes.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from pathlib import Path
from typing import Literal

import apsw
import msgspec

from perdure.core.disk import Disk, full_disk
from perdure.proving.watched import broken

Call = Literal[
    "sqlite.write",
    "sqlite.sync",
    "sqlite.truncate",
    "disk.create",
    "disk.write",
    "disk.overwrite",
    "disk.cut",
    "disk.sync",
    "disk.replace",
    "disk.directory",
    "disk.unlink",
    "disk.names",
]
CHANGES: tuple[Call, ...] = (
    "sqlite.write",
    "sqlite.truncate",
    "disk.create",
    "disk.write",
    "disk.overwrite",
    "disk.cut",
    "disk.replace",
    "disk.directory",
    "disk.unlink",
)
"""What a file system that is read-only refuses."""

_SQLITE = {
    "sqlite.write": apsw.SQLITE_IOERR_WRITE,
    "sqlite.sync": apsw.SQLITE_IOERR_FSYNC,
    "sqlite.truncate": apsw.SQLITE_IOERR_TRUNCATE,
}


class Trouble(msgspec.Struct, frozen=True, kw_only=True):
    """Which calls, counted together, and from which of them on; `times` is None for ever. With
    `delay_s` they take so long instead of failing with `errno`. `told` is a file that is made when
    the first of them is met. With `room_bytes` there is space for so many bytes more, and then none
    for any write of the disk module."""

    calls: tuple[Call, ...] = ()
    n: int = 1
    times: int | None = 1
    errno: int = errno.EIO
    delay_s: float = 0.0
    told: str | None = None
    room_bytes: int | None = None

    def __str__(self) -> str:
        if self.room_bytes is not None:
            return f"there is space for {self.room_bytes} bytes"
        what = f"takes {self.delay_s:g} s" if self.delay_s else errno.errorcode[self.errno]
        often = "and all after it" if self.times is None else f"{self.times} times"
        return f"{'|'.join(self.calls)} {self.n}: {what}, {often}"


class Refusing:
    """Meets calls with the trouble that is planned for them."""

    def __init__(self, trouble: Trouble) -> None:
        self.trouble = trouble
        self.disk = RefusingDisk(self)
        self.reached = False
        self._calls = 0
        self._taken_bytes = 0
        self._lock = threading.Lock()

    def mount(self) -> None:
        """Let every SQLite connection that this process opens from now on be met as well."""
        self._vfs = _RefusingVFS(self)

    def over(self) -> None:
        """Meet no call any more."""
        self.trouble = msgspec.structs.replace(self.trouble, calls=(), room_bytes=None)

    def meets(self, call: Call) -> bool:
        """Count a call that is about to be made; whether it is to fail. A slow one waits here."""
        trouble = self.trouble
        if call not in trouble.calls:
            return False
        with self._lock:
            self._calls += 1
            beyond = self._calls - trouble.n
            met = beyond >= 0 and (trouble.times is None or beyond < trouble.times)
            if met and not self.reached:
                self.reached = True
                if trouble.told is not None:
                    Path(trouble.told).touch()
        if met and trouble.delay_s:
            time.sleep(trouble.delay_s)
            return False
        return met

    def fits(self, size_bytes: int) -> int:
        """How many of the bytes of a write there is space for; they are taken."""
        if self.trouble.room_bytes is None:
            return size_bytes
        with self._lock:
            fits = min(size_bytes, self.trouble.room_bytes - self._taken_bytes)
            self._taken_bytes += fits
            self.reached = self.reached or fits < size_bytes
        return fits


class RefusingDisk(Disk):
    """The real disk, of which each call is met first."""

    def __init__(self, refusing: Refusing) -> None:
        self._refusing = refusing

    def open_new(self, path: Path) -> int:
        self._meet("disk.create", path)
        return super().open_new(path)

    def open_end(self, path: Path) -> int:
        self._meet("disk.create", path)
        return super().open_end(path)

    def cut(self, fd: int, size_bytes: int) -> None:
        if self._refusing.meets("disk.cut"):
            raise self._error()
        super().cut(fd, size_bytes)

    def write_all(self, fd: int, data: bytes, path: Path) -> None:
        if self._refusing.meets("disk.write"):
            super().write_all(fd, data[: len(data) // 2], path)
            self._fail(path)
        if (fits := self._refusing.fits(len(data))) < len(data):
            super().write_all(fd, data[:fits], path)
            self._fail(path)
        super().write_all(fd, data, path)

    def overwrite(self, fd: int, data: bytes, offset: int) -> None:
        if self._refusing.meets("disk.overwrite"):
            raise self._error()
        super().overwrite(fd, data, offset)

    def sync(self, fd: int, path: Path) -> None:
        self._meet("disk.sync", path)
        super().sync(fd, path)

    def replace(self, source: Path, target: Path) -> None:
        self._meet("disk.replace", target)
        super().replace(source, target)

    def add_directory(self, path: Path) -> None:
        if not path.exists():  # the system says that it is there before it says anything else
            self._meet("disk.directory", path)
        super().add_directory(path)

    def unlink(self, path: Path) -> None:
        if path.exists():
            self._meet("disk.unlink", path)
        super().unlink(path)

    def remove_directory(self, path: Path) -> bool:
        if path.exists() and not any(path.iterdir()):
            self._meet("disk.unlink", path)
        return super().remove_directory(path)

    def sync_directory(self, path: Path) -> None:
        if self._refusing.meets("disk.names"):
            raise self._error()
        super().sync_directory(path)

    def _meet(self, call: Call, path: Path) -> None:
        if self._refusing.meets(call):
            self._fail(path)

    def _fail(self, path: Path) -> None:
        with full_disk(path):
            raise self._error()

    def _error(self) -> OSError:
        code = self._refusing.trouble.errno
        return OSError(code, os.strerror(code))


class _RefusingVFS(apsw.VFS):
    """The default of the process, so that the checksum VFS is stacked upon it."""

    def __init__(self, refusing: Refusing) -> None:
        super().__init__("refusing", "unix", makedefault=True)
        self._refusing = refusing

    def xOpen(  # noqa: N802 - SQLite's names
        self, name: str | apsw.URIFilename | None, flags: list[int]
    ) -> apsw.VFSFile:
        return _RefusingFile(self._refusing, name, flags)

    def xGetLastError(self) -> tuple[int, str]:  # noqa: N802
        code = self._refusing.trouble.errno
        return code, os.strerror(code)


class _RefusingFile(apsw.VFSFile):
    def __init__(
        self, refusing: Refusing, name: str | apsw.URIFilename | None, flags: list[int]
    ) -> None:
        super().__init__("unix", name, flags)
        self._refusing = refusing

    def xWrite(self, data: bytes, offset: int) -> None:  # noqa: N802
        if self._refusing.meets("sqlite.write"):
            super().xWrite(data[: len(data) // 2], offset)
            raise self._error("sqlite.write")
        super().xWrite(data, offset)

    def xTruncate(self, size: int) -> None:  # noqa: N802
        if self._refusing.meets("sqlite.truncate"):
            raise self._error("sqlite.truncate")
        super().xTruncate(size)

    def xSync(self, flags: int) -> None:  # noqa: N802
        if self._refusing.meets("sqlite.sync"):
            raise self._error("sqlite.sync")
        super().xSync(flags)

    def _error(self, call: Call) -> apsw.Error:
        """As SQLite's own VFS says it."""
        if call == "sqlite.write" and self._refusing.trouble.errno == errno.ENOSPC:
            return apsw.FullError("as planned")
        return broken(_SQLITE[call])
