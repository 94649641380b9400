"""Opening a sqlite store: take the lock, refuse what must not be touched, recover, and only then
let anybody write; and the orderly way out.

A store that does not exist yet is built under a temporary name and renamed, so that a crash leaves
either no store or a whole one. After an unclean end the recovered log is checkpointed into synced
files before the first acknowledgement: the page cache may hold frames that never reached the disk.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path

import apsw
import msgspec

from perdure.core.clock import Clock
from perdure.core.disk import READ_ONLY, TEMPORARY, Disk, Lock
from perdure.core.engine import Recovered, Snapshot, Written
from perdure.core.errors import Damaged, Latched, Missing, StoreLocked, Unavailable
from perdure.core.layouts import Layout, Records
from perdure.core.mark import Mark, read_mark
from perdure.core.stored import Lacking, check_layouts, check_whole, newest
from perdure.core.values import Finding
from perdure.engines import sqlite_schema as schema
from perdure.engines.sqlite_driver import PAGE_BYTES, connect, connect_frozen, translating
from perdure.engines.sqlite_schema import SQL
from perdure.engines.sqlite_upgrade import (
    STEPS,
    Note,
    Steps,
    add_indexes,
    change_format,
    empty_log,
    written,
)
from perdure.engines.sqlite_wal import (
    FRAME_BYTES,
    PostMortem,
    advance,
    examine,
    read_stamp,
    stamp,
)

_LOOK = " It can be looked at as it is, but kept in use only where this user can write."


class Place(msgspec.Struct, frozen=True):
    """Where a store lies, and what to reach it with."""

    path: Path
    clock: Clock
    disk: Disk
    vfs: str | None = None
    steps: Steps = STEPS

    @property
    def format(self) -> int:
        """The one that stores are made in."""
        return newest(self.steps)

    def beside(self, suffix: str) -> Path:
        """A file that belongs to the store."""
        return self.path.with_name(self.path.name + suffix)

    def connect(self, *, read_only: bool = False) -> apsw.Connection:
        if read_only and not os.access(self.path.parent, os.W_OK):
            if not self.beside("-wal").exists():
                return connect_frozen(str(self.path), vfs=self.vfs)
            if not self.beside("-shm").exists():
                raise Unavailable(
                    f"{self.path} has a log, which cannot be read where nothing can be written. "
                    "Copy the store, log and all, to another place and look at the copy."
                )
        return connect(str(self.path), vfs=self.vfs, read_only=read_only)


class Store:
    """An open store: its lock, its own connection, and what was found in it."""

    def __init__(self, place: Place, lock: Lock, connection: apsw.Connection) -> None:
        self.place = place
        self.connection = connection
        self.lock = lock
        self.mark: Mark | None = None
        self.lacking = Lacking()
        self.written = Written(place.format, place.format)
        self.number = recovered_number(connection, place.path)
        self.store_id: str = connection.execute(SQL["fact"], ("store_id",)).get
        self.recovered = Recovered(clean=connection.execute(SQL["fact"], ("clean",)).get == 1)

    def reader(self) -> apsw.Connection:
        """A connection that cannot write. Collections that a store opened for reading only does
        not hold yet are empty ones to it."""
        connection = self.place.connect(read_only=True)
        if self.lacking.collections:
            connection.pragma("query_only", 0)
            for layout in self.lacking.collections:
                if isinstance(layout, Records):
                    connection.execute(schema.Table(layout).create("temp"))
            connection.pragma("query_only", 1)
        return connection

    def finish(self, number: int) -> None:
        """Mark the store clean, fold its log into the database, and let go of it."""
        assert self.mark is not None
        try:
            with translating(str(self.place.path)):
                if not _commit_facts(self.connection, number + 1, clean=1):
                    raise Latched(
                        f"{self.place.path}: another process has taken it over, as its lock file "
                        "was removed. All commits are there; nothing was written at this close."
                    )
                self._mark(self.mark, number + 1)
                self.connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
                self.connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 0)
        finally:
            self.release()

    def _mark(self, mark: Mark, number: int) -> None:
        try:
            mark.write(number)
        except OSError as error:
            raise Unavailable(
                f"{self.place.path}: the mark of the last commit cannot be written "
                f"({error.strerror}). All commits are there; opening it again closes it properly."
            ) from error

    def release(self) -> None:
        """Let go without writing anything."""
        self.connection.close()
        if self.mark is not None:
            self.mark.close()
        self.lock.release()


def open_store(
    place: Place,
    layouts: Sequence[Layout],
    *,
    read_only: bool,
    note: Note = lambda detail: None,
    copy_of: str | None = None,
    snapshots: Sequence[Snapshot] = (),
) -> Store:
    """Open, recover and take the store at `place`; made first where there is none. `note` is told
    what takes long. With `copy_of`, the id of another store, it is one that becomes its copy. An
    older one is upgraded, if it is as one of the `snapshots` has it.

    Raises `StoreLocked`, `NewerFormat`, `NeedsUpgrade`, `Invalid`, `Missing` (only when
    `read_only`), and `Damaged` where acknowledged commits are gone (when `read_only` that is a
    finding instead).
    """
    started_s = place.clock.monotonic_s()
    try:
        store = _open(place, layouts, note, copy_of, snapshots, read_only=read_only)
    except OSError as error:
        look = "" if read_only or error.errno not in READ_ONLY else _LOOK
        raise Unavailable(f"{place.path} cannot be opened: {error.strerror}.{look}") from error
    duration_s = place.clock.monotonic_s() - started_s
    store.recovered = msgspec.structs.replace(store.recovered, duration_s=duration_s)
    return store


def _open(
    place: Place,
    layouts: Sequence[Layout],
    note: Note,
    copy_of: str | None,
    snapshots: Sequence[Snapshot],
    *,
    read_only: bool,
) -> Store:
    where = str(place.path)
    if not read_only:
        place.disk.make_directory(place.path.parent)
    elif not place.path.exists():
        raise Missing(f"{where} does not exist, so there is nothing to read.")
    with ExitStack() as undo, translating(where):
        lock = place.disk.lock(place.beside(".lock"), shared=read_only)
        undo.callback(lock.release)
        if not read_only:
            lock.note(f"{os.getpid()}\n")  # at once: what is noted is of one that is dead
            if not place.path.exists() or place.path.stat().st_size == 0:
                _create(place, copy_of)
        schema.check_file(place.path, place.format)
        connection = place.connect(read_only=read_only)
        undo.callback(connection.close)
        store = Store(place, lock, connection)
        schema.check_format(where, connection.pragma("user_version"), place.format)
        becoming = connection.execute(SQL["fact"], ("copy_of",)).get
        check_whole(where, store.store_id, becoming, copy_of)
        store.lacking = check_layouts(
            connection.execute(SQL["layouts"]), where, layouts, writing=not read_only
        )
        store.written = written(connection, place.steps, store.lacking, store.number)
        store.recovered = _recover(store, read_only=read_only)
        if not read_only:
            store.written.require(where, store.store_id, snapshots)
            _take(store, note)
        undo.pop_all()
        return store


def _create(place: Place, copy_of: str | None) -> None:
    """Build an empty store and publish it under its name. A log without its database is not
    written over: it would be replayed into the new one."""
    log = place.beside("-wal")
    if log.exists() and log.stat().st_size:
        raise Damaged(
            str(place.path), f"it is gone, but {log.name} is still there. Bring the database back"
        )
    temporary = place.beside(TEMPORARY)
    for suffix in ("", "-wal", "-shm", "-journal"):
        place.disk.remove(place.beside(TEMPORARY + suffix))
    with closing(connect(str(temporary), vfs=place.vfs, create=True)) as connection:
        connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 0)
        connection.execute("BEGIN IMMEDIATE")
        connection.execute(SQL["create"])
        connection.pragma("application_id", schema.APPLICATION_ID)
        connection.pragma("user_version", place.format)
        connection.execute(SQL["set_fact"], ("store_id", copy_of or place.clock.new_id("store")))
        if copy_of is not None:
            connection.execute(SQL["set_fact"], ("copy_of", copy_of))
        connection.execute(SQL["set_fact"], ("clean", 1))
        connection.execute(SQL["first_stamp"], (stamp(0),))
        connection.execute("COMMIT")
        empty_log(connection)  # closing does so too, and tells nobody where that fails
    place.disk.replace(temporary, place.path)
    place.disk.sync_directory(place.path.parent)


def _recover(store: Store, *, read_only: bool) -> Recovered:
    """What SQLite recovered from the log, and whether that is all that was acknowledged."""
    place = store.place
    frames, cut, why = post_mortem(place, store.connection, store.store_id, store.number)
    # An orderly end leaves no log; the flag alone may never have reached the disk.
    clean = store.recovered.clean and frames == 0
    if not why:
        end = torn_end(place.path) if read_only and frames == 0 else ()
        return Recovered(clean, frames, cut, findings=end)
    if recovered_number(store.connection, place.path) != store.number:
        raise StoreLocked(str(place.path), 0)  # what looks lost was committed just now
    why += (
        ". Salvage the store or restore a backup; "
        f"if an older copy was put here on purpose, remove {place.beside('.mark').name}"
    )
    log = str(place.beside("-wal"))
    if not read_only:
        raise Damaged(log, why)
    return Recovered(clean, frames, findings=(Finding(log, why),))


def torn_end(path: Path) -> tuple[Finding, ...]:
    """That the file ends within a page, if it does. SQLite reads zeros for the rest of it, and no
    checksum is looked at."""
    if beyond := path.stat().st_size % PAGE_BYTES:
        why = f"it ends {beyond} bytes into a page, so it was cut. Salvage it or restore a backup"
        return (Finding(str(path), why),)
    return ()


def post_mortem(
    place: Place, connection: apsw.Connection, store_id: str, number: int
) -> tuple[int, tuple[Finding, ...], str]:
    """How many frames of the log SQLite recovered, what is cut off behind them, and which of the
    commits after `number` are gone though they were acknowledged; empty where none are. SQLite
    does not count where nothing can be written: then all frames are looked at, none as cut off."""
    log = place.beside("-wal")
    try:
        frames = max(0, connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_NOOP)[0])
        left = examine(log, frames)
    except apsw.ReadOnlyError:
        frames = log.stat().st_size // FRAME_BYTES
        left = PostMortem((), examine(log, 0).newest)
    lost = max(left.newest - 1, read_mark(place.beside(".mark"), store_id)) - number
    if lost <= 0:
        return frames, left.cut, ""
    return (
        frames,
        (),
        f"the log is damaged: at least {lost} of the commits acknowledged after commit {number} "
        "are gone, and with them which keys they changed",
    )


def _take(store: Store, note: Note) -> None:
    """Make what was recovered durable, then begin to own the store."""
    place, connection = store.place, store.connection
    if not store.recovered.clean:
        empty_log(connection)
    for finding in torn_end(place.path):  # no frame of the log made it whole
        raise Damaged(finding.where, finding.why)
    store.number += 1
    if not _commit_facts(connection, store.number, clean=0, begin=partial(_begin, store, note)):
        raise StoreLocked(str(place.path), 0)
    for records in store.lacking.indexes:
        add_indexes(connection, records, note)
    store.lacking = Lacking()
    store.written = Written(place.format, place.format)
    # SQLite ignores a failed sync of the directory that names its log; this one is not ignored.
    place.disk.sync_directory(place.path.parent)
    store.mark = Mark(place.disk, place.beside(".mark"), store.store_id)
    store.mark.write(store.number)


def _begin(store: Store, note: Note) -> None:
    """Let the store be of this release's format, with room for all collections."""
    change_format(store.connection, store.place.steps, note)
    for layout in store.lacking.collections:
        schema.add_layout(store.connection, layout)


def _commit_facts(
    connection: apsw.Connection,
    number: int,
    *,
    clean: int,
    begin: Callable[[], None] = lambda: None,
) -> bool:
    """Whether it was done: not where another process has written since the last commit."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        if not advance(connection, number):
            return False
        begin()
        connection.execute(SQL["set_fact"], ("clean", clean))
        connection.execute("COMMIT")
    finally:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
    return True


def recovered_number(connection: apsw.Connection, path: Path) -> int:
    """The number of the last commit that the database and its log hold."""
    found = connection.execute(SQL["stamp"]).get
    number = read_stamp(found) if isinstance(found, bytes) else None
    if number is None:
        raise Damaged(str(path), "its commit number is not as written")
    return number
