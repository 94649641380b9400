"""The driver of the sqlite engine: connections with the promise in force, and its errors in ours.

SQLite may decline a pragma without an error, and a store that quietly runs with a weaker setting
acknowledges what it can lose. So every setting is read back, and a connection on which one is not
in force is refused. Pages carry checksums through SQLite's own checksum VFS.
"""

from __future__ import annotations

import os
import threading
from types import TracebackType
from urllib.parse import quote

import apsw
import apsw.sqlite_extra

from perdure.core.disk import FULL
from perdure.core.errors import (
    Closed,
    Damaged,
    PerdureError,
    PromiseBroken,
    StorageFull,
    Unavailable,
)

CHECKSUM_VFS = "cksmvfs"
RESERVE_BYTES = 8
"""Room at the end of each page for its checksum."""

PAGE_BYTES = 4096
LOG_BYTES_KEPT = 64 * 1024 * 1024
"""A log that one large batch made longer is cut back to this."""

BUSY_MS = 5_000

_CACHE_KIB = 8 * 1024
_registering = threading.Lock()

_READ_FAILED = {apsw.SQLITE_IOERR_READ, apsw.SQLITE_IOERR_SHORT_READ, apsw.SQLITE_IOERR_DATA}


def connect_frozen(path: str, *, vfs: str | None = None) -> apsw.Connection:
    """A connection to a database without a log, where nothing can be written: SQLite does not look
    for a log there, nor need the shared memory that it cannot make."""
    register_checksums()
    flags = apsw.SQLITE_OPEN_READONLY | apsw.SQLITE_OPEN_URI
    connection = apsw.Connection(
        f"file:{quote(path)}?immutable=1", flags=flags, vfs=vfs or CHECKSUM_VFS
    )
    try:
        _require(connection, "page_size", PAGE_BYTES)
        _require(connection, "checksum_verification", 1)
        _force(connection, "cell_size_check", 1)
        _force(connection, "temp_store", 2)
        _force(connection, "query_only", 1)
    except BaseException:
        connection.close()
        raise
    return connection


def connect(
    path: str, *, vfs: str | None = None, read_only: bool = False, create: bool = False
) -> apsw.Connection:
    """A connection with every setting the promise needs read back. It never checkpoints by itself.

    Raises `PromiseBroken` where a setting is not in force.
    """
    register_checksums()
    flags = apsw.SQLITE_OPEN_READWRITE | (apsw.SQLITE_OPEN_CREATE if create else 0)
    connection = apsw.Connection(path, flags=flags, vfs=vfs or CHECKSUM_VFS)
    try:
        connection.set_busy_timeout(BUSY_MS)
        connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
        if create:
            connection.reserve_bytes(reserve=RESERVE_BYTES)
            _force(connection, "page_size", PAGE_BYTES)
            _force(connection, "journal_mode", "wal")
        _force(connection, "synchronous", 2)
        _force(connection, "wal_autocheckpoint", 0)
        _force(connection, "journal_size_limit", LOG_BYTES_KEPT)
        _force(connection, "cell_size_check", 1)
        _force(connection, "cache_size", -_CACHE_KIB)
        _force(connection, "temp_store", 2)
        _require(connection, "journal_mode", "wal")
        _require(connection, "page_size", PAGE_BYTES)
        _require(connection, "checksum_verification", 1)
        if read_only:
            _force(connection, "query_only", 1)
    except BaseException:
        connection.close()
        raise
    return connection


def translate(error: apsw.Error, where: str) -> Exception:
    """What a driver's error means to the caller; the error itself where it is a mistake of ours."""
    match error:
        case apsw.FullError():
            return StorageFull(
                f"{where}: no space left on the disk. The write was rolled back; "
                "it will work again once there is space."
            )
        case apsw.IOError() if _extended(error) == apsw.SQLITE_IOERR_DATA:
            return Damaged(where, "a page does not match its checksum")
        case apsw.CorruptError() | apsw.NotADBError():
            return Damaged(where, f"SQLite finds its file malformed: {error}")
        case apsw.ConnectionClosedError():
            return Closed(f"{where}: the store was closed.")
        case apsw.BusyError() | apsw.LockedError():
            return Unavailable(
                f"{where}: another program holds SQLite's own lock on the file. "
                "Close that program; only Perdure may have the store open."
            )
        case (
            apsw.IOError()
            | apsw.CantOpenError()
            | apsw.ReadOnlyError()
            | apsw.InterruptError()
            | apsw.NoLFSError()
        ):
            return Unavailable(f"{where}: SQLite could not use the file ({error}). Try again.")
    return error


def known_full(error: apsw.Error, connection: apsw.Connection) -> apsw.Error:
    """The error, as SQLite tells of a full disk where it is one. SQLite knows that by ENOSPC alone;
    a write that finds no room for another reason fails the same way and is undone the same way."""
    write_failed = isinstance(error, apsw.IOError) and _extended(error) == apsw.SQLITE_IOERR_WRITE
    if write_failed and connection.system_errno in FULL:
        return apsw.FullError(f"{error}: {os.strerror(connection.system_errno)}")
    return error


def leaves_doubt(error: apsw.Error) -> bool:
    """Whether an I/O error leaves it uncertain what is on the disk; a failed read does not."""
    return isinstance(error, apsw.IOError) and _extended(error) not in _READ_FAILED


def is_damage(error: Exception) -> bool:
    """Whether a read failed because what is stored is not what was written."""
    return isinstance(translate(error, "") if isinstance(error, apsw.Error) else error, Damaged)


class translating:  # noqa: N801 - reads as a statement: `with translating(where):`
    """Raise driver errors inside the block as ours."""

    def __init__(self, where: str) -> None:
        self._where = where

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(error, apsw.Error):
            meaning = translate(error, self._where)
            if isinstance(meaning, PerdureError):
                raise meaning from error


def _extended(error: apsw.Error) -> int:
    """SQLite's extended result code, which the driver's type stubs leave out."""
    return int(getattr(error, "extendedresult", 0))


def register_checksums() -> None:
    """Make the checksum VFS known without making it the default of the whole process."""
    with _registering:
        if CHECKSUM_VFS not in apsw.vfs_names():
            default = apsw.vfs_names()[0]
            loader = apsw.Connection(":memory:")
            apsw.sqlite_extra.load(loader, "cksumvfs")
            loader.close()
            apsw.set_default_vfs(default)


def _force(connection: apsw.Connection, pragma: str, value: str | int) -> None:
    connection.pragma(pragma, value)
    _require(connection, pragma, value)


def _require(connection: apsw.Connection, pragma: str, value: str | int) -> None:
    actual = connection.pragma(pragma)
    if str(actual) != str(value):
        raise PromiseBroken(
            f"{connection.filename}: SQLite runs with {pragma}={actual}, not {value}, so it could "
            "lose what it acknowledges. Check that the file system allows WAL (no network disk)."
        )
