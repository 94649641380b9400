"""`sqlite:///path`: the embedded engine. One file, one owner, every acknowledgement synced.

Commits go to one thread that groups them (`sqlite_commit`). Point reads run here, on the event
loop: they take microseconds and a thread hop costs more than they do. Scans leave the loop.
Every row carries a checksum over all that identifies it, and every read looks at it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any, TypeVar

import apsw

from perdure.core import cursors, keys
from perdure.core.batch import NOTHING, Batch, partition_of
from perdure.core.clock import Clock
from perdure.core.cursors import Position, Question
from perdure.core.deciding import Place as Touched
from perdure.core.disk import Disk
from perdure.core.engine import EngineStats, Progress, Recovered, Snapshot, Survives, Usage, Written
from perdure.core.errors import Closed, Damaged, Invalid, Latched, Unavailable
from perdure.core.keys import Key
from perdure.core.layouts import Column, Layout, Log, Records
from perdure.core.loading import Load
from perdure.core.offload import off_loop, steps_off_loop
from perdure.core.rows import At, Row, Rows
from perdure.core.stored import checked_record, checked_tip
from perdure.core.values import Committed, Entry, Finding, Page, Record, Tip, entry_sum
from perdure.engines import sqlite_backup
from perdure.engines.group import Outcome, Request
from perdure.engines.sqlite_checkpoint import Checkpointer
from perdure.engines.sqlite_commit import Committer
from perdure.engines.sqlite_driver import translate, translating
from perdure.engines.sqlite_recovery import Place, Store, open_store
from perdure.engines.sqlite_rows import read_rows
from perdure.engines.sqlite_scan import count_rows, scan_page
from perdure.engines.sqlite_schema import SEQ_MAX, SQL, Table, absent_tip
from perdure.engines.sqlite_upgrade import STEPS, Steps
from perdure.engines.sqlite_usage import usage_steps
from perdure.engines.sqlite_verify import verify_store
from perdure.engines.waiting import Waiting

T = TypeVar("T")
R = TypeVar("R")

_INLINE_MAX = 64
"""Most rows read on the event loop itself."""


class SqliteEngine:
    """See `core.engine.Engine`."""

    shared = False
    places_max: int | None = None
    survives = Survives(process_crash=True, power_cut=True, failed_sync=True, damage=True)

    def __init__(self, store: Store, layouts: Sequence[Layout], *, read_only: bool) -> None:
        self.url = f"sqlite:///{store.place.path}"
        self.store_id = store.store_id
        self.recovered: Recovered = store.recovered
        self.written: Written = store.written
        self.stats = EngineStats()
        self._store = store
        self._layouts = tuple(layouts)
        self._loop = asyncio.get_running_loop()
        self._tables = {
            layout.name: Table(layout) for layout in layouts if isinstance(layout, Records)
        }
        self._narrow = {records.name for records in store.lacking.indexes}
        self._logs = {layout.name for layout in layouts if isinstance(layout, Log)}
        self._readers: set[apsw.Connection] = set()
        self._idle: list[apsw.Connection] = []
        self._reading: set[asyncio.Future[Any]] = set()
        self._waiting = Waiting(store.place.clock)
        self._backing_up = False
        self._closing: asyncio.Future[None] | None = None
        self._reader = self._open_reader()
        self.stats.stored_size_bytes = store.place.path.stat().st_size
        self._committer = None if read_only else self._start_committer()

    @classmethod
    async def open(
        cls,
        path: str,
        layouts: Sequence[Layout],
        *,
        clock: Clock,
        disk: Disk,
        read_only: bool = False,
        vfs: str | None = None,
        note: Callable[[str], None] = lambda detail: None,
        copy_of: str | None = None,
        snapshots: Sequence[Snapshot] = (),
        steps: Steps = STEPS,
    ) -> SqliteEngine:
        """See `engines.open_engine`. `vfs` names the SQLite VFS to use in place of the checksum
        VFS, over which it must be built; `steps` lead to the format that is written."""
        place = Place(Path(path), clock, disk, vfs, steps)
        opening = asyncio.ensure_future(
            off_loop(
                open_store,
                place,
                layouts,
                read_only=read_only,
                note=note,
                copy_of=copy_of,
                snapshots=snapshots,
            )
        )
        try:
            store = await asyncio.shield(opening)
        except asyncio.CancelledError:
            await asyncio.wait((opening,))
            if opening.exception() is None:
                opening.result().release()
            raise
        try:
            return cls(store, layouts, read_only=read_only)
        except BaseException:
            store.release()
            raise

    @property
    def latched(self) -> str | None:
        if self._committer is None:
            return "the store was opened for reading only"
        return self._committer.latched

    def latched_for(self, log: Log[Any], stream: Key) -> str | None:
        return self.latched

    async def commit(self, batch: Batch) -> Committed:
        self._check_open()
        partition = partition_of(batch)
        if not batch:
            return Committed(())
        return await self._submit(batch, partition)

    async def load(
        self, rows: Sequence[Row], *, complete: bool = False, under: Batch = NOTHING
    ) -> None:
        self._check_open()
        await self._submit(under, None, Load(rows, complete))

    async def unload(self, rows: Sequence[Row], *, under: Batch = NOTHING) -> None:
        self._check_open()
        await self._submit(under, None, Load(rows, unload=True))

    async def _submit(
        self, batch: Batch, partition: str | None, load: Load | None = None
    ) -> Committed:
        if self._committer is None:
            raise Latched(f"{self.url}: {self.latched}. Open it for writing.")
        future: asyncio.Future[Committed] = self._loop.create_future()
        self._committer.submit(Request(batch, partition, future, load))
        return await future

    async def get(self, records: Records[T], key: Key) -> Record[T] | None:
        table = self._table(records)
        place = keys.join(key)
        try:
            row = self._reader.execute(table.get, (place,)).get
        except apsw.Error as error:
            raise translate(error, f"{records.name} {keys.show(key)}") from error
        return None if row is None else checked_record(records, keys.split(place), place, row)

    async def get_many(self, records: Records[T], keys: Sequence[Key]) -> list[Record[T] | None]:
        table = self._table(records)
        cursors.check_limit(len(keys))
        return await self._read(len(keys), _get_many, table, keys)

    async def scan(
        self,
        records: Records[T],
        prefix: Key,
        *,
        index: str | None = None,
        where: Sequence[Column] = (),
        limit: int,
        cursor: str | None = None,
        descending: bool = False,
        partial: bool = False,
    ) -> Page[Record[T]]:
        table = self._table(records)
        cursors.check_limit(limit)
        question = Question(self.store_id, records.name, prefix, index, tuple(where), descending)
        cursors.check_question(records, question)
        after = None if cursor is None else cursors.unpack(question, cursor)
        return await self._read(limit, scan_page, table, question, after, limit)

    async def count(
        self, records: Records[Any], prefix: Key, *, index: str | None = None, group: int = 0
    ) -> dict[tuple[Column | None, ...], int]:
        table = self._table(records)
        question = Question(self.store_id, records.name, prefix, index)
        declared = cursors.check_question(records, question)
        cursors.check_group(records, declared, group)
        return await self._off_loop(count_rows, table, question, group)

    async def read(
        self,
        log: Log[T],
        stream: Key,
        *,
        after: int = 0,
        incarnation: int | None = None,
        limit: int,
    ) -> list[Entry[T]]:
        self._check_log(log)
        cursors.check_limit(limit)
        return await self._read(limit, _read_entries, log, stream, after, incarnation, limit)

    async def tip(self, log: Log[Any], stream: Key) -> Tip:
        self._check_log(log)
        where = f"{log.name} {keys.show(stream)}"
        place = keys.join(stream)
        try:
            row = self._reader.execute(SQL["tip"], (log.name, place)).get
            if row is None:
                return absent_tip(self._reader, log.name)
        except apsw.Error as error:
            raise translate(error, where) from error
        return checked_tip(log.name, stream, place, row)

    async def wait(self, log: Log[Any], stream: Key, after: int, *, timeout_s: float) -> Tip:
        place = (log.name, keys.join(stream))
        return await self._waiting.wait(place, after, timeout_s, lambda: self.tip(log, stream))

    async def streams(
        self,
        log: Log[Any],
        prefix: Key,
        *,
        limit: int,
        cursor: str | None = None,
        partial: bool = False,
    ) -> Page[Key]:
        self._check_log(log)
        cursors.check_limit(limit)
        question = Question(self.store_id, log.name, prefix)
        low, high = keys.span(prefix)
        if cursor is not None:
            low = cursors.unpack(question, cursor).place
        rows = await self._off_loop(_stream_places, log, low, high, limit + 1)
        places = rows[:limit]
        more = len(rows) > limit and limit > 0
        return Page(
            [keys.split(place) for place in places],
            cursors.pack(question, Position((), places[-1])) if more else None,
        )

    async def verify(self) -> AsyncIterator[Finding]:
        self._check_open()
        for finding in self.recovered.findings:
            yield finding
        connection = self._open_reader()
        self._readers.add(connection)
        try:
            steps = verify_store(connection, self._layouts, str(self._store.place.path))
            while True:
                with translating(self.url):
                    found = await self._aside(next, steps, None)
                if found is None:
                    break
                for finding in found:
                    yield finding
                self._check_open()
        finally:
            self._readers.discard(connection)
            connection.close()

    async def usage(self) -> Usage:
        self._check_open()
        reader = self._open_reader()
        self._readers.add(reader)
        try:
            async with aclosing(steps_off_loop(usage_steps(reader), self._aside)) as steps:
                with translating(self.url):
                    async for found in steps:
                        if found is not None:
                            return found
                        self._check_open()
        finally:
            self._readers.discard(reader)
            reader.close()
        raise Closed(f"{self.url} was closed.")

    async def backup(self, into: Path, progress: Progress) -> Snapshot:
        self._check_open()
        if self._backing_up:
            raise Unavailable(f"{self.url}: a backup is under way already; wait for its end.")
        if self.recovered.findings:
            raise Damaged(self.recovered.findings[0].where, self.recovered.findings[0].why)
        self._backing_up = True
        if self._committer is not None:
            self._checkpointer.hold()
        try:
            return await self._back_up(into, progress)
        finally:
            self._backing_up = False
            if self._committer is not None:
                self._checkpointer.let_go()

    async def _back_up(self, into: Path, progress: Progress) -> Snapshot:
        source = self._open_reader()
        self._readers.add(source)
        place = self._store.place
        steps = sqlite_backup.backup_steps(
            source, into, self._layouts, disk=place.disk, vfs=place.vfs
        )
        try:
            async with aclosing(steps_off_loop(steps, self._aside)) as copying:
                with translating(self.url):
                    async for step in copying:
                        if isinstance(step, Snapshot):
                            return step
                        progress(*step)
                        self._check_open()
                        self._check_log_size()
        finally:
            self._readers.discard(source)
        raise Closed(f"{self.url} was closed.")

    def _check_log_size(self) -> None:
        size_bytes = self.stats.log_size_bytes
        if size_bytes > sqlite_backup.LOG_BYTES_MAX:
            raise Unavailable(
                f"{self.url}: so much was committed during this backup that the log has "
                f"{size_bytes} bytes. Back up while less is written."
            )

    async def rows(self, *, after: At | None = None, partition: str | None = None) -> Rows:
        self._check_open()
        return await self._off_loop(read_rows, self._layouts, after, partition, self.url)

    def announce(self, note: str) -> None:
        if self._committer is not None:
            self._store.lock.note(note)

    async def close(self) -> None:
        if self._closing is None:
            self._closing = asyncio.ensure_future(self._close())
            self._waiting.end()
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        """Commits under way are finished, reads under way too; then the store is let go."""
        if self._reading:
            await asyncio.wait(set(self._reading))
        await off_loop(self._let_go)

    def _let_go(self) -> None:
        committer = self._committer
        if committer is not None:
            committer.stop()
            self._checkpointer.close()
        self._reader.close()
        for reader in (*self._idle, *self._readers):
            reader.close()
        if committer is None or committer.latched:
            self._store.release()
        else:
            self._store.finish(committer.number)

    def _start_committer(self) -> Committer:
        store = self._store
        assert store.mark is not None
        with translating(str(store.place.path)):
            self._checkpointer = Checkpointer(
                store.place.connect(),
                store.place.path,
                self.stats,
                make_way=self._interrupt_readers,
                failed=self._latch,
            )
            return Committer(
                store.connection,
                self._checkpointer,
                self._layouts,
                store.mark,
                store.number,
                where=str(store.place.path),
                clock=store.place.clock,
                stats=self.stats,
                settle=self._settle_from_thread,
            )

    def _latch(self, why: str) -> None:
        if self._committer is not None:
            self._committer.latch(why)

    def _interrupt_readers(self) -> None:
        """End the reads that keep the log from starting over. Called by the committer's thread."""
        for reader in tuple(self._readers):
            with suppress(apsw.ConnectionClosedError):
                reader.interrupt()

    def _settle_from_thread(self, outcomes: list[Outcome], tips: dict[Touched, Tip]) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._settle, outcomes, tips)

    def _settle(self, outcomes: list[Outcome], tips: dict[Touched, Tip]) -> None:
        """Answer those who committed, and wake those who wait for what they committed."""
        for future, outcome in outcomes:
            if future.done():
                continue
            if isinstance(outcome, Committed):
                future.set_result(outcome)
            else:
                future.set_exception(outcome)
        self._waiting.tell(tips)

    def _open_reader(self) -> apsw.Connection:
        with translating(str(self._store.place.path)):
            return self._store.reader()

    async def _read(self, rows: int, function: Callable[..., R], *args: Any) -> R:
        """Run a read of at most `rows` rows: few on the loop, many off it."""
        if rows > _INLINE_MAX:
            return await self._off_loop(function, *args)
        with translating(self.url):
            return function(self._reader, *args)

    async def _off_loop(self, function: Callable[..., R], *args: Any) -> R:
        """Run `function(connection, *args)` in a thread, on a connection nobody else uses."""
        return await self._aside(self._with_reader, function, *args)

    async def _aside(self, function: Callable[..., R], *args: Any) -> R:
        """Run a read in a thread. It is finished before the store is closed, whoever waits."""
        reading = asyncio.ensure_future(off_loop(function, *args))
        self._reading.add(reading)
        reading.add_done_callback(self._reading.discard)
        return await asyncio.shield(reading)

    def _with_reader(self, function: Callable[..., R], *args: Any) -> R:
        with translating(self.url):
            try:
                reader = self._idle.pop()
            except IndexError:
                reader = self._open_reader()
            self._readers.add(reader)
            try:
                with suppress(apsw.InterruptError):  # it held the log: once more on the new one
                    return function(reader, *args)
                return function(reader, *args)
            finally:
                self._readers.discard(reader)
                self._idle.append(reader)

    def _table(self, records: Records[Any]) -> Table:
        self._check_open()
        table = self._tables.get(records.name)
        if table is None:
            raise Invalid(f"the store was opened without the collection {records.name}.")
        if records.name in self._narrow:
            raise Invalid(
                f"{records.name} was written by an older Perdure and lacks an index. It gets it "
                "when the store is opened for writing: start the server once."
            )
        return table

    def _check_log(self, log: Log[Any]) -> None:
        self._check_open()
        if log.name not in self._logs:
            raise Invalid(f"the store was opened without the collection {log.name}.")

    def _check_open(self) -> None:
        if self._closing is not None:
            raise Closed(f"{self.url} was closed.")


def _get_many(
    connection: apsw.Connection, table: Table, wanted: Sequence[Key]
) -> list[Record[Any] | None]:
    places = [keys.join(key) for key in wanted]
    if not places:
        return []
    rows = connection.execute(table.get_many, (apsw.carray(tuple(places)),)).fetchall()
    found = {row[0]: table.record(row) for row in rows}
    return [found.get(place) for place in places]


def _read_entries(
    connection: apsw.Connection,
    log: Log[T],
    stream: Key,
    after: int,
    incarnation: int | None,
    limit: int,
) -> list[Entry[T]]:
    place = keys.join(stream)
    asked = {
        "log": log.name,
        "key": place,
        "after": min(max(after, 0), SEQ_MAX),
        "limit": max(limit, 1),
    }
    rows: list[Any] = connection.execute(SQL["read"], asked).fetchall()
    if rows:
        tip = checked_tip(log.name, stream, place, rows[0][:4])
    else:
        tip = absent_tip(connection, log.name)
    cursors.check_position(log, stream, tip, after, incarnation)
    entries: list[Entry[T]] = []
    for seq in range(after + 1, min(tip.last, after + limit) + 1):
        row = rows[seq - after - 1] if seq - after <= len(rows) else (0, 0, b"")
        found, checksum, value = row[-3:]
        sound = entry_sum(log.name, place, tip.incarnation, seq, value) == checksum
        if found != seq or not sound:
            why = "it does not match its checksum" if found == seq else "it is missing"
            raise Damaged(f"{log.name} {keys.show(stream)} entry {seq}", why)
        entries.append(Entry(seq, log.decode(stream, value)))
    return entries


def _stream_places(
    connection: apsw.Connection, log: Log[Any], low: str, high: str, limit: int
) -> list[str]:
    return [place for (place,) in connection.execute(SQL["streams"], (log.name, low, high, limit))]
