"""`postgresql://`: the shared engine. Any number of processes, one store, in one schema.

Commits go to one task that groups them (`postgres_commit`), over a session of its own; reads share
a few sessions. Every row carries a checksum over all that identifies it, and every read looks at
it. Only the primary is asked: a standby may lack what was acknowledged.

A commit is as durable as the server makes it, so a server is refused whose settings say less than
we promise. A failed sync is the server's own end, and ours to see as a lost connection.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import asyncpg

from perdure.core import cursors, keys
from perdure.core.batch import NOTHING, Batch, layout_of, partition_of
from perdure.core.clock import Clock
from perdure.core.cursors import Position, Question
from perdure.core.deciding import Place
from perdure.core.disk import Disk
from perdure.core.engine import EngineStats, Progress, Recovered, Snapshot, Survives, Usage, Written
from perdure.core.errors import Closed, Damaged, Invalid, Latched, Unavailable
from perdure.core.keys import Key
from perdure.core.layouts import Column, Layout, Log, Records
from perdure.core.loading import Load
from perdure.core.rows import At, Row, Rows
from perdure.core.stored import Lacking, checked_record, checked_tip
from perdure.core.values import Committed, Entry, Finding, Page, Record, Tip, entry_sum
from perdure.engines.group import Outcome, Request
from perdure.engines.postgres_backup import back_up, restore
from perdure.engines.postgres_commit import Committer, Latch
from perdure.engines.postgres_driver import (
    SQL,
    Database,
    damage_at,
    parse,
    translating,
)
from perdure.engines.postgres_group import check_texts
from perdure.engines.postgres_points import Points
from perdure.engines.postgres_rows import read_rows
from perdure.engines.postgres_scan import count_rows, scan_page
from perdure.engines.postgres_schema import FORMAT, Table, choose_schema, open_schema
from perdure.engines.postgres_tail import Tails
from perdure.engines.postgres_verify import usage_of, verify_store

if TYPE_CHECKING:
    from perdure.engines.postgres_driver import Connection, Session

T = TypeVar("T")

_NUMBER_MAX = 2**63 - 1


class PostgresEngine:
    """See `core.engine.Engine`."""

    shared = True
    places_max: int | None = None
    survives = Survives(
        process_crash=True, power_cut=True, failed_sync=True, node_loss=True, damage=True
    )

    def __init__(
        self,
        database: Database,
        layouts: Sequence[Layout],
        store_id: str,
        lacking: Lacking,
        written: Written,
        disk: Disk,
    ) -> None:
        self.url = database.where
        self.store_id = store_id
        self.recovered = Recovered(clean=True)
        self.written = written
        self.stats = EngineStats()
        self._database = database
        self._layouts = tuple(layouts)
        self._disk = disk
        self._tables = {
            layout.name: Table(layout) for layout in layouts if isinstance(layout, Records)
        }
        self._absent = {layout.name for layout in lacking.collections}
        self._narrow = {records.name for records in lacking.indexes}
        self._logs = {layout.name for layout in layouts if isinstance(layout, Log)}
        self._points = Points(database)
        self._tails = Tails(database, store_id)
        self._latch = Latch()
        self._committer: Committer | None = None
        self._urgent: Committer | None = None
        self._backing_up = False
        self._closing: asyncio.Future[None] | None = None

    @classmethod
    async def open(
        cls,
        url: str,
        layouts: Sequence[Layout],
        *,
        clock: Clock,
        disk: Disk,
        read_only: bool = False,
        note: Callable[[str], None] = lambda detail: None,
        copy_of: str | None = None,
        snapshots: Sequence[Snapshot] = (),
    ) -> PostgresEngine:
        """See `engines.open_engine`. A server that is starting is waited for."""
        address = parse(url)
        database = Database(address, clock, read_only=read_only)
        session = await database.connect_for_long()
        try:
            with translating(database.where):
                await database.check_promise(session)
                await choose_schema(database, session, address.schema, read_only=read_only)
                await session.close()
                session = await database.connect_for_long()
                store_id, lacking, written = await open_schema(
                    *(database, session, layouts, clock, note, copy_of, snapshots),
                    read_only=read_only,
                )
                await session.close()
                engine = cls(database, layouts, store_id, lacking, written, disk)
                await database.open_pool()
                if not read_only:
                    session = await database.connect()
                    await engine._start_committer(session)
        except BaseException:
            session.terminate()
            await database.close()
            raise
        return engine

    @classmethod
    async def restore(
        cls,
        url: str,
        source: Path,
        layouts: Sequence[Layout],
        progress: Progress,
        *,
        clock: Clock,
        disk: Disk,
        check: Callable[[PostgresEngine], Awaitable[None]] | None = None,
    ) -> None:
        """See `engines.restore_engine`."""
        address = parse(url)

        async def look(held: Database, store_id: str) -> None:
            if check is not None:
                written = Written(FORMAT, FORMAT)
                await check(cls(held, layouts, store_id, Lacking(), written, disk))

        database = Database(address, clock, read_only=False)
        await restore(
            database, address.schema, source, layouts, progress, look, clock=clock, disk=disk
        )

    async def _start_committer(self, session: Connection) -> None:
        self._committer = self._make_committer(urgent=False)
        self._urgent = self._make_committer(urgent=True)
        await self._committer.begin(session)

    def _make_committer(self, *, urgent: bool) -> Committer:
        return Committer(
            self._database,
            self._layouts,
            store_id=self.store_id,
            stats=self.stats,
            settle=self._settle,
            latch=self._latch,
            urgent=urgent,
        )

    @property
    def latched(self) -> str | None:
        if self._committer is None:
            return "the store was opened for reading only"
        return self._latch.why

    def latched_for(self, log: Log[Any], stream: Key) -> str | None:
        return self.latched

    async def commit(self, batch: Batch) -> Committed:
        self._check_open()
        partition = partition_of(batch)
        if not batch:
            return Committed(())
        urgent = all(layout_of(op).urgent for op in batch.ops)
        committer = self._urgent if urgent else self._committer
        return await self._submit(committer, batch, partition)

    async def load(
        self, rows: Sequence[Row], *, complete: bool = False, under: Batch = NOTHING
    ) -> None:
        self._check_open()
        await self._submit(self._committer, under, None, Load(rows, complete))

    async def unload(self, rows: Sequence[Row], *, under: Batch = NOTHING) -> None:
        self._check_open()
        await self._submit(self._committer, under, None, Load(rows, unload=True))

    async def _submit(
        self,
        committer: Committer | None,
        batch: Batch,
        partition: str | None,
        load: Load | None = None,
    ) -> Committed:
        if committer is None:
            raise Latched(f"{self.url}: {self.latched}. Open it for writing.")
        check_texts(batch, load)
        future: asyncio.Future[Committed] = asyncio.get_running_loop().create_future()
        committer.submit(Request(batch, partition, future, load))
        return await future

    async def get(self, records: Records[T], key: Key) -> Record[T] | None:
        row = await self._points.get(self._table(records), place := keys.join(key))
        if row is None:
            return None
        _, version, checksum, value, attachment = row
        found = (version, checksum, value.encode(), attachment)
        return checked_record(records, keys.split(place), place, found)

    async def get_many(self, records: Records[T], keys: Sequence[Key]) -> list[Record[T] | None]:
        table = self._table(records)
        cursors.check_limit(len(keys))
        places = _places(keys)

        async def ask(session: Session) -> list[asyncpg.Record]:
            with damage_at(records.name):
                return await session.fetch(table.get_many, places)

        rows = await self._database.read(ask) if places else []
        found = {row[0]: table.record(row) for row in rows}
        return [found.get(place) for place in places]

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
        return await self._database.read(
            lambda session: scan_page(session, table, question, after, limit)
        )

    async def count(
        self, records: Records[Any], prefix: Key, *, index: str | None = None, group: int = 0
    ) -> dict[tuple[Column | None, ...], int]:
        table = self._table(records)
        question = Question(self.store_id, records.name, prefix, index)
        declared = cursors.check_question(records, question)
        cursors.check_group(records, declared, group)
        return await self._database.read(
            lambda session: count_rows(session, table, question, group)
        )

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
        place = keys.join(stream)
        where = f"{log.name} {keys.show(stream)}"
        first = min(max(after, 0), _NUMBER_MAX - 1) + 1
        last = min(first + limit - 1, _NUMBER_MAX)

        async def ask(session: Session) -> list[asyncpg.Record]:
            with damage_at(where):
                return await session.fetch(SQL["read"], log.name, place, first, last)

        rows = await self._database.read(ask)
        tip = _tip(log, stream, place, rows[0])
        cursors.check_position(log, stream, tip, after, incarnation)
        entries: list[Entry[T]] = []
        for seq in range(after + 1, min(tip.last, after + limit) + 1):
            found, checksum, text = rows[seq - first][5:] if seq - first < len(rows) else (0, 0, "")
            if found != seq:
                raise Damaged(f"{where} entry {seq}", "it is missing")
            value = text.encode()
            if entry_sum(log.name, place, tip.incarnation, seq, value) != checksum:
                raise Damaged(f"{where} entry {seq}", "it does not match its checksum")
            entries.append(Entry(seq, log.decode(stream, value)))
        return entries

    async def tip(self, log: Log[Any], stream: Key) -> Tip:
        self._check_log(log)
        place = keys.join(stream)

        async def ask(session: Session) -> list[asyncpg.Record]:
            return await session.fetch(SQL["tip"], log.name, place)

        (row,) = await self._database.read(ask)
        return _tip(log, stream, place, row)

    async def wait(self, log: Log[Any], stream: Key, after: int, *, timeout_s: float) -> Tip:
        place = (log.name, keys.join(stream))
        deadline_s = self._database.clock.monotonic_s() + timeout_s
        while True:
            waiter = self._tails.join(place, after)  # before looking, so that nothing slips between
            try:
                tip = await self.tip(log, stream)
                left_s = deadline_s - self._database.clock.monotonic_s()
                if tip.last > after or left_s <= 0:
                    return tip
                await asyncio.wait((waiter,), timeout=left_s)
            finally:
                self._tails.leave(place, waiter)
            if waiter.done() and (told := waiter.result()) is not None:
                return told

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

        async def ask(session: Session) -> list[asyncpg.Record]:
            return await session.fetch(SQL["streams"], log.name, low, high, limit + 1)

        places = [place for (place,) in await self._database.read(ask)]
        more = len(places) > limit and limit > 0
        return Page(
            [keys.split(place) for place in places[:limit]],
            cursors.pack(question, Position((), places[limit - 1])) if more else None,
        )

    async def verify(self) -> AsyncIterator[Finding]:
        self._check_open()
        async for finding in verify_store(self._database, self._layouts):
            yield finding
            self._check_open()

    async def usage(self) -> Usage:
        self._check_open()
        usage = await usage_of(self._database)
        self.stats.stored_size_bytes = usage.total_bytes
        return usage

    async def backup(self, into: Path, progress: Progress) -> Snapshot:
        self._check_open()
        if self._backing_up:
            raise Unavailable(f"{self.url}: a backup is under way already; wait for its end.")
        self._backing_up = True
        try:
            return await back_up(
                *(self._database, self.store_id, self._layouts, into, progress, self._disk),
                format=self.written.format,
            )
        finally:
            self._backing_up = False

    async def rows(self, *, after: At | None = None, partition: str | None = None) -> Rows:
        self._check_open()
        return await self._database.read(
            lambda session: read_rows(session, self._layouts, after, partition, self.url)
        )

    def announce(self, note: str) -> None:
        """Nobody is refused the store because of us."""

    async def close(self) -> None:
        if self._closing is None:
            self._closing = asyncio.ensure_future(self._close())
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        """Commits under way are finished, reads under way too."""
        for committer in (self._committer, self._urgent):
            if committer is not None:
                await committer.stop()
        await self._tails.close()
        await self._database.close()

    def _settle(self, outcomes: list[Outcome], tips: dict[Place, Tip]) -> None:
        """Answer those who committed, and wake those who wait for what they committed."""
        for future, outcome in outcomes:
            if future.done():
                continue
            if isinstance(outcome, Committed):
                future.set_result(outcome)
            else:
                future.set_exception(outcome)
        self._tails.wake(tips)

    def _table(self, records: Records[Any]) -> Table:
        self._check_open()
        table = self._tables.get(records.name)
        if table is None:
            raise Invalid(f"the store was opened without the collection {records.name}.")
        if records.name in self._narrow | self._absent:
            raise Invalid(
                f"{records.name} was written by an older Perdure and lacks a table or an index. It "
                "gets it when the store is opened for writing: start the server once."
            )
        return table

    def _check_log(self, log: Log[Any]) -> None:
        self._check_open()
        if log.name not in self._logs:
            raise Invalid(f"the store was opened without the collection {log.name}.")

    def _check_open(self) -> None:
        if self._closing is not None:
            raise Closed(f"{self.url} was closed.")


def _tip(log: Log[Any], stream: Key, place: str, row: asyncpg.Record) -> Tip:
    """The tip in a row that is there for every stream; one that was never written starts above
    every incarnation that a cursor may still name."""
    incarnation, first, last, checksum, floor = tuple(row)[:5]
    if incarnation is None:
        return Tip() if floor is None else Tip(floor)
    return checked_tip(log.name, stream, place, (incarnation, first, last, checksum))


def _places(wanted: Sequence[Key]) -> list[str]:
    return [keys.join(key) for key in wanted]
