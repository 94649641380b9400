"""All rows of a postgres store as they are, and what is there in the places of rows to be loaded.

A row that does not match its checksum is not given out, and ends the walk: a store that took it
over would give it a checksum that matches.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from perdure.core.deciding import Place
from perdure.core.errors import Damaged
from perdure.core.keys import show, split
from perdure.core.layouts import Layout, Records
from perdure.core.limits import PAGE_MAX
from perdure.core.loading import Present
from perdure.core.rows import (
    EVERYTHING,
    JUST_ABOVE,
    At,
    Filling,
    FloorRow,
    Kind,
    OperationRow,
    RecordRow,
    Row,
    Rows,
    Section,
    Span,
    StreamRow,
    check_known,
    sections,
    span_of,
)
from perdure.core.stored import checked_tip, operation_sum
from perdure.core.values import Committed, Tip, entry_sum, record_sum
from perdure.engines.postgres_driver import SQL, damage_at
from perdure.engines.postgres_schema import Table, decoded_numbers

if TYPE_CHECKING:
    import asyncpg

    from perdure.engines.postgres_driver import Session

_STREAMS = 100
"""How many streams are looked up at a time."""


async def read_rows(
    session: Session,
    layouts: Sequence[Layout],
    after: At | None,
    partition: str | None,
    where: str,
) -> Rows:
    """One page, of one moment."""
    async with session.transaction(isolation="repeatable_read", readonly=True):
        stored = {name for name, _, _ in await session.fetch(SQL["layouts"])}
        check_known(stored, layouts, where)
        there = [layout for layout in layouts if layout.name in stored]
        filling = Filling()
        walk = _Walk(session, filling, after, partition)
        for section in sections(there, after, partition):
            async for row in walk.section(section):
                if not filling.take(row):
                    return filling.page(whole=False)
        return filling.page(whole=True)


class _Walk:
    """A walk along the order of rows, which asks for no more than the page has room for."""

    def __init__(
        self, session: Session, filling: Filling, after: At | None, partition: str | None
    ) -> None:
        self._session = session
        self._filling = filling
        self._after = after
        self._partition = partition

    async def section(self, section: Section) -> AsyncIterator[Row]:
        layout = section.layout
        if section.kind is Kind.FLOORS:
            for log, incarnation in sorted(map(tuple, await self._session.fetch(SQL["floors"]))):
                if not self._after or At(Kind.FLOORS, log) > self._after:
                    yield FloorRow(log, incarnation)
        elif layout is None:
            async for row in self._operations():
                yield row
        elif section.kind is Kind.STREAMS:
            async for span in self._spans(layout, section.low, SQL["next_stream"], layout.name):
                async for row in self._streams(layout, span, section):
                    yield row
        elif section.kind is Kind.TOMBSTONES:
            async for span in self._spans(layout, section.low, SQL["next_tombstone"], layout.name):
                async for row in self._tombstones(layout, span):
                    yield row
        elif isinstance(layout, Records):
            table = Table(layout)
            async for span in self._spans(layout, section.low, table.next_key):
                async for row in self._records(table, span):
                    yield row

    async def _records(self, table: Table, span: Span) -> AsyncIterator[Row]:
        name, low = table.records.name, span.low
        while rows := await self._fetch(table.rows, low, span.high, *self._room()):
            for place, version, checksum, text, attachment in rows:
                value = text.encode()
                if record_sum(name, place, version, value, attachment) != checksum:
                    raise _damaged(name, place, "it does not match its checksum")
                yield RecordRow(name, place, version, value, attachment)
            low = rows[-1][0] + JUST_ABOVE

    async def _tombstones(self, layout: Layout, span: Span) -> AsyncIterator[Row]:
        low, most = span.low, self._room()[0]
        while rows := await self._fetch(
            SQL["rows_of_tombstones"], layout.name, low, span.high, most
        ):
            for place, version, checksum in rows:
                if record_sum(layout.name, place, version, None, None) != checksum:
                    raise _damaged(layout.name, place, "its tombstone is not as written")
                yield RecordRow(layout.name, place, version)
            low = rows[-1][0] + JUST_ABOVE

    async def _streams(self, layout: Layout, span: Span, section: Section) -> AsyncIterator[Row]:
        low = span.low
        while rows := await self._fetch(
            SQL["rows_of_streams"], layout.name, low, span.high, _STREAMS
        ):
            for id, place, *stored in rows:
                tip = checked_tip(layout.name, split(place), place, tuple(stored))
                begun = section.number if place == section.low else 0
                async for row in self._stream(layout.name, id, place, tip, begun):
                    yield row
            low = rows[-1][1] + JUST_ABOVE

    async def _stream(
        self, log: str, id: int, place: str, tip: Tip, begun: int
    ) -> AsyncIterator[Row]:
        """A stream's entries above `begun`, which is 0 where none was given yet."""
        start = (log, place, tip.incarnation, tip.first)
        if tip.last < tip.first and not begun:
            yield StreamRow(*start, tip.last)
        seq = max(tip.first - 1, begun)
        while seq < tip.last:
            rows = await self._fetch(
                SQL["rows_of_entries"], id, tip.incarnation, seq, tip.last, *self._room()
            )
            if not rows:
                raise _damaged(log, place, f"its entry {seq + 1} is missing")
            for number, checksum, text in rows:
                value = text.encode()
                sound = entry_sum(log, place, tip.incarnation, seq + 1, value) == checksum
                if number != seq + 1 or not sound:
                    raise _damaged(log, place, f"its entry {seq + 1} is not as written")
                yield StreamRow(*start, seq, (value,))
                seq += 1

    async def _operations(self) -> AsyncIterator[Row]:
        after = self._after
        begun = (after.name, after.place) if after and after.kind is Kind.OPERATIONS else ("", "")
        while rows := await self._fetch(SQL["walk_operations"], *begun, PAGE_MAX):
            for id, partition, digest, numbers, checksum in rows:
                if operation_sum((id, partition), digest, numbers.encode()) != checksum:
                    raise Damaged(f"operation {id}", "it is not as written")
                if self._partition in (None, partition):
                    yield OperationRow(id, partition, digest, decoded_numbers(numbers))
            begun = tuple(rows[-1])[:2]

    async def _spans(
        self, layout: Layout, low: str, first: str, *named: str
    ) -> AsyncIterator[Span]:
        """The stretches of keys from `low` on that are wanted; `first` finds the next key."""
        if self._partition is None:
            yield Span(low, EVERYTHING.high)
            return
        begin: str | None = low
        while begin is not None:
            found = await self._session.fetchval(first, *named, begin)
            if found is None:
                return
            span = span_of(layout, self._partition, begin, found)
            yield span
            begin = span.beyond

    def _room(self) -> tuple[int, int]:
        """What to ask for at a time, in rows and bytes: a little more than there is room for, so
        that what does not fit is seen."""
        return self._filling.left_rows + 1, max(self._filling.left_bytes, 0) + 1

    async def _fetch(self, sql: str, *values: Any) -> list[asyncpg.Record]:
        with damage_at("what is stored"):
            return await self._session.fetch(sql, *values)


async def find_present(
    session: Session, tables: Mapping[str, Table], rows: Sequence[Row]
) -> tuple[Present, dict[Place, int]]:
    """What is there in the places of `rows`, and the ids of the streams among it."""
    present, ids = Present(), dict[Place, int]()
    records: dict[str, list[str]] = defaultdict(list)
    streams: dict[str, list[StreamRow]] = defaultdict(list)
    for row in rows:
        if isinstance(row, RecordRow):
            records[row.collection].append(row.place)
        elif isinstance(row, StreamRow):
            streams[row.log].append(row)
    for name, places in records.items():
        if name in tables:
            live = await session.fetch(tables[name].present, places)
            gone = await session.fetch(SQL["present_tombstones"], name, places)
            for place, version, checksum in (*live, *gone):
                present.records[(name, place)] = (version, checksum)
    for log, stretches in streams.items():
        asked = [(row.place, row.after + 1, row.tip.last) for row in stretches]
        found = await session.fetch(
            SQL["present_entries"], log, *map(list, zip(*asked, strict=True))
        )
        for id, place, *stored, seq, checksum in found:
            here = (log, place)
            ids[here] = id
            present.tips[here] = checked_tip(log, split(place), place, tuple(stored))
            if seq is not None:
                present.entries[(here, seq)] = checksum
    operations = [row.id for row in rows if isinstance(row, OperationRow)]
    for id, partition, digest, numbers in await session.fetch(
        SQL["present_operations"], operations
    ):
        done = Committed(decoded_numbers(numbers))
        present.operations[(id, partition)] = (digest, done)
    return present, ids


def _damaged(collection: str, place: str, why: str) -> Damaged:
    return Damaged(f"{collection} {show(split(place))}", why)
