"""Reading a damaged sqlite database as far as it can be read.

It is read from a copy, so that whatever SQLite does, the damaged one stays as it was found, and a
part that the disk refuses to read costs that part only. Two connections look at the copy. One holds
SQLite to its page checksums. Where it fails, the other reads the page as it is: one flipped bit
harms one row of the many in a page, and each row has a checksum of its own. Nothing is believed for
having been read; whoever asks holds each row to its checksum.

Only what SQLite finds by its trees is read. Pages are not searched for rows: in free room lie rows
that were deleted or replaced, and they match their checksums too.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import apsw

from perdure.core.errors import Damaged, PromiseBroken
from perdure.engines.sqlite_driver import CHECKSUM_VFS, PAGE_BYTES, connect, register_checksums
from perdure.engines.sqlite_recovery import Place

UNREADABLE = (apsw.Error, UnicodeDecodeError)
"""What a damaged page may raise: a text whose bytes changed need not be one any more."""

Point = tuple[Any, ...]

_STEP_ROWS = 500
_COPY_BYTES = 1024 * 1024
_HEAD = b"SQLite format 3\0" + bytes((0x10, 0, 2, 2, 8, 64, 32, 32))
"""The first bytes of every store, up to where its changes are counted."""


class Rescue:
    """The copy of a damaged database, open for reading."""

    def __init__(self, copy: Place) -> None:
        """Raises `Damaged` where SQLite cannot even tell which tables there are."""
        self.copy = copy
        self.doubted: set[str] = set()
        """What could not be read in whole with every page as it was written."""
        self.strict: apsw.Connection | None = None
        register_checksums()
        self.lenient = apsw.Connection(
            str(copy.path), flags=apsw.SQLITE_OPEN_READWRITE, vfs=CHECKSUM_VFS
        )
        try:
            self.lenient.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
            self.lenient.pragma("checksum_verification", 0)
            self.lenient.pragma(
                "writable_schema", 1
            )  # a table that is not understood hides no other
            self.lenient.pragma("query_only", 1)
            names = self.lenient.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")
            self.tables = {name for (name,) in names}
        except UNREADABLE as error:
            self.close()
            raise Damaged(
                str(copy.path), f"not even the list of its tables can be read ({error})"
            ) from error
        try:
            self.strict = connect(str(copy.path), read_only=True)
        except (apsw.Error, PromiseBroken):
            self.doubted.add("sqlite_schema")

    def close(self) -> None:
        """Let go of the copy."""
        for connection in (self.strict, self.lenient):
            if connection is not None:
                connection.close()

    def rows(self, part: str, sql: str, values: Any = ()) -> list[Any]:
        """The rows of a short query. `part` is doubted unless every page read is as written."""
        if self.strict is not None:
            try:
                return self.strict.execute(sql, values).fetchall()
            except UNREADABLE:
                pass
        self.doubted.add(part)
        return self.lenient.execute(sql, values).fetchall()

    def walk(
        self, part: str, table: str, order: tuple[str, ...], columns: str, low: Point, high: Point
    ) -> Iterator[list[Any]]:
        """The rows between two places, by `order`, the first of their columns: from the low end
        until that leads no further, then from the high end. `part` is doubted if a gap is left."""
        names, marks = ", ".join(order), ", ".join("?" * len(order))
        for direction in ("ASC", "DESC"):
            by = ", ".join(f"{column} {direction}" for column in order)
            sql = (
                f"SELECT {columns} FROM {table} WHERE ({names}) > ({marks}) "
                f"AND ({names}) < ({marks}) ORDER BY {by} LIMIT ?"
            )
            limit = _STEP_ROWS
            while True:
                found = self._step(part, sql, (*low, *high, limit), len(order), low, high)
                if found is None and limit == 1:
                    break
                if found is None:
                    limit = 1
                    continue
                if not found:
                    return
                yield found
                limit = _STEP_ROWS
                if direction == "ASC":
                    low = found[-1][: len(order)]
                else:
                    high = found[-1][: len(order)]

    def _step(
        self, part: str, sql: str, values: Point, size: int, low: Point, high: Point
    ) -> list[Any] | None:
        """Rows whose places lie where they were asked for, each behind the one before, so that a
        tree that leads in a circle ends; None where there are none to be had."""
        try:
            found = self.rows(part, sql, values)
        except UNREADABLE:
            self.doubted.add(part)
            return None
        places = [_rank(place) for place in (low, *(row[:size] for row in found), high)]
        if "DESC" in sql:
            places[1:-1] = places[-2:0:-1]
        if all(map(operator.lt, places, places[1:])):
            return found
        self.doubted.add(part)
        return None


def _rank(place: Point) -> list[tuple[int, Any]]:
    """What sorts as SQLite does: whole numbers, then texts, then everything else."""
    return [
        (0, part)
        if isinstance(part, int)
        else (1, part.encode())
        if isinstance(part, str)
        else (2, 0)
        for part in place
    ]


def copy_damaged(source: Place, copy: Place) -> int:
    """Copy the files of a store; what the disk does not give is zeros there, and counted in bytes.
    A head that is not one of ours is made one, or SQLite would not look at the rest."""
    unread = 0
    for suffix in ("", "-wal", ".mark"):
        if source.beside(suffix).exists():
            with copy.disk.writing(copy.beside(suffix)) as write:
                unread += _copy(source.beside(suffix), write)
    with copy.path.open("rb") as file:
        head = file.read(len(_HEAD))
    if head != _HEAD:
        fd = copy.disk.open_fixed(copy.path, 0)
        try:
            copy.disk.overwrite(fd, _HEAD, 0)
        finally:
            os.close(fd)
    return unread


def _copy(path: Path, write: Callable[[bytes], None]) -> int:
    """Whole stretches, or page by page where the disk gives an error."""
    unread = 0
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size_bytes = os.fstat(fd).st_size
        for start in range(0, size_bytes, _COPY_BYTES):
            stretch = _given(fd, start, min(_COPY_BYTES, size_bytes - start))
            if stretch is not None:
                write(stretch)
                continue
            for at in range(start, min(start + _COPY_BYTES, size_bytes), PAGE_BYTES):
                page_bytes = min(PAGE_BYTES, size_bytes - at)
                page = _given(fd, at, page_bytes)
                unread += 0 if page else page_bytes
                write(page or bytes(page_bytes))
    finally:
        os.close(fd)
    return unread


def _given(fd: int, start: int, size_bytes: int) -> bytes | None:
    """Bytes of a file, None where the disk gives an error in their place."""
    try:
        return os.pread(fd, size_bytes, start)
    except OSError:
        return None
