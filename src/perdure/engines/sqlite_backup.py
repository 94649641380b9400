"""Copying a whole sqlite store, as it is at one moment, and making a store of such a copy.

The copy is made page by page through SQLite's own backup, whose source holds one snapshot from the
first page to the last: commits go on meanwhile, into a log that cannot start over before the
snapshot is let go. So the log grows by what is committed during the copy, and beyond a bound the
backup gives up rather than fill the disk.

A copy is a file of its own, with an empty log and no mark. A store that is made of one gets an id
of its own: marks and cursors of the store it was copied from are about commits that the copy may
not have, and must not be believed here.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

import apsw

from perdure.core.disk import TEMPORARY, Disk
from perdure.core.engine import Snapshot
from perdure.core.errors import Damaged, Invalid
from perdure.core.layouts import Layout
from perdure.core.stored import check_layouts
from perdure.engines import sqlite_schema as schema
from perdure.engines.sqlite_driver import (
    CHECKSUM_VFS,
    PAGE_BYTES,
    RESERVE_BYTES,
    connect,
    translating,
)
from perdure.engines.sqlite_recovery import Place, recovered_number
from perdure.engines.sqlite_schema import SQL
from perdure.engines.sqlite_upgrade import empty_log
from perdure.engines.sqlite_verify import verify_store

COPY = "perdure.db"
"""The one file of a backup."""

LOG_BYTES_MAX = 4 * 1024 * 1024 * 1024
"""How large the log may become while a backup holds it."""

_STEP_PAGES = 1_024
_CHUNK_BYTES = 4 * 1024 * 1024

Step = tuple[int, int]
"""Bytes done, and bytes in all."""


def backup_steps(
    source: apsw.Connection, into: Path, layouts: Sequence[Layout], *, disk: Disk, vfs: str | None
) -> Generator[Step | Snapshot, None, None]:
    """Copy what `source` sees now; steps, and at last what the copy holds. `source` is closed as
    soon as it is not needed any more, so that the log may start over."""
    target = into / COPY
    with closing(source):
        source.execute("BEGIN")
        snapshot = Snapshot(
            store_id=source.execute(SQL["fact"], ("store_id",)).get,
            number=recovered_number(source, target),
            format=source.pragma("user_version"),
        )
        with closing(_open_copy(target, vfs)) as copy, copy.backup("main", source, "main") as pages:
            while not pages.done:
                pages.step(_STEP_PAGES)
                total = pages.page_count
                yield (total - pages.remaining) * PAGE_BYTES, total * PAGE_BYTES
    disk.sync_file(target)
    disk.sync_directory(into)
    yield from _verify(target, layouts, vfs)
    yield snapshot


def restore_steps(
    place: Place, source: Path, layouts: Sequence[Layout]
) -> Generator[Step | Path, None, None]:
    """Make a store at `place` of the copy in `source`. It has its name, and so exists, only after
    all of it was verified and is durable. Last comes where it lies until then: whoever finds
    something wrong with it there goes no further.

    Raises `Invalid` where a store is already, `Damaged`, `NewerFormat`, `StoreLocked`.
    """
    taken = [path for path in (place.path, place.beside("-wal")) if path.exists()]
    if taken:
        raise Invalid(f"{taken[0]} exists. A backup is restored into an empty place only.")
    place.disk.make_directory(place.path.parent)
    temporary = place.beside(TEMPORARY)
    with ExitStack() as undo, translating(str(place.path)):
        lock = place.disk.lock(place.beside(".lock"))
        undo.callback(lock.release)
        for suffix in ("", "-wal", "-shm", ".lock"):
            undo.callback(place.disk.unlink, place.beside(TEMPORARY + suffix))
        yield from _copy_file(place.disk, source / COPY, temporary)
        schema.check_file(temporary, place.format)
        with closing(connect(str(temporary), vfs=place.vfs)) as copy:
            copy.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 0)
            schema.check_format(str(source), copy.pragma("user_version"), place.format)
            check_layouts(copy.execute(SQL["layouts"]), str(source), layouts)
            copy.execute(SQL["set_fact"], ("store_id", place.clock.new_id("store")))
            empty_log(copy)  # closing does so too, and tells nobody where that fails
        yield from _verify(temporary, layouts, place.vfs)
        yield temporary
        place.disk.sync_file(temporary)
        place.disk.replace(temporary, place.path)
        place.disk.sync_directory(place.path.parent)


def _open_copy(target: Path, vfs: str | None) -> apsw.Connection:
    """A database that no journal protects: until it is complete it is nobody's. Its first page is
    written at once, since the checksum VFS reads there that every page it writes gets a checksum.
    """
    flags = apsw.SQLITE_OPEN_READWRITE | apsw.SQLITE_OPEN_CREATE
    copy = apsw.Connection(str(target), flags=flags, vfs=vfs or CHECKSUM_VFS)
    copy.reserve_bytes(reserve=RESERVE_BYTES)
    copy.pragma("page_size", PAGE_BYTES)
    copy.pragma("journal_mode", "off")
    copy.pragma("synchronous", 0)
    copy.pragma("user_version", 1)
    return copy


def _copy_file(disk: Disk, source: Path, target: Path) -> Iterator[Step]:
    total = source.stat().st_size
    done = 0
    with disk.writing(target) as write:
        for chunk in disk.read_chunks(source, 0, _CHUNK_BYTES):
            write(chunk)
            done += len(chunk)
            yield done, total


def _verify(path: Path, layouts: Sequence[Layout], vfs: str | None) -> Iterator[Step]:
    """Walk the whole copy. Raises `Damaged` for the first thing that is not as it was written."""
    size_bytes = path.stat().st_size
    with closing(connect(str(path), vfs=vfs, read_only=True)) as copy:
        copy.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 0)
        for findings in verify_store(copy, layouts, str(path)):
            if findings:
                raise Damaged(findings[0].where, findings[0].why.splitlines()[0])
            yield size_bytes, size_bytes
