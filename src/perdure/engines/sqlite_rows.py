"""All rows of a sqlite store as they are, and what is there in the places of rows to be loaded.

A row that does not match its checksum is not given out, and ends the walk: a store that took it
over would give it a checksum that matches.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import apsw
import msgspec

from perdure.core.errors import Damaged
from perdure.core.keys import show, split
from perdure.core.layouts import Layout, Records
from perdure.core.loading import Present
from perdure.core.rows import (
    EVERYTHING,
    At,
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
    fill,
    sections,
    span_of,
)
from perdure.core.stored import checked_tip, operation_sum
from perdure.core.values import Committed, entry_sum, record_sum
from perdure.engines.sqlite_schema import SQL, STREAM_SHIFT, Table, incarnations


def read_rows(
    connection: apsw.Connection,
    layouts: Sequence[Layout],
    after: At | None,
    partition: str | None,
    where: str,
) -> Rows:
    """One page, of one moment."""
    connection.execute("BEGIN")
    try:
        stored = [name for name, _, _ in connection.execute(SQL["layouts"])]
        check_known(stored, layouts, where)
        there = [layout for layout in layouts if layout.name in stored]
        walk = _Walk(connection, there, after, partition)
        return fill(
            row for section in sections(there, after, partition) for row in walk.section(section)
        )
    finally:
        if connection.in_transaction:
            connection.execute("ROLLBACK")


class _Walk:
    """A walk along the order of rows, which asks for no more than is taken."""

    def __init__(
        self,
        connection: apsw.Connection,
        layouts: Sequence[Layout],
        after: At | None,
        partition: str | None,
    ) -> None:
        self._connection = connection
        self._logs = sorted(layout.name for layout in layouts if not isinstance(layout, Records))
        self._after = after
        self._partition = partition

    def section(self, section: Section) -> Iterator[Row]:
        layout = section.layout
        if section.kind is Kind.FLOORS:
            for log in self._logs:
                found = self._connection.execute(SQL["fact"], (incarnations(log),)).get
                if found is not None and (not self._after or At(Kind.FLOORS, log) > self._after):
                    yield FloorRow(log, found)
        elif layout is None:
            yield from self._operations()
        elif section.kind is Kind.STREAMS:
            yield from self._streams(layout, section)
        elif section.kind is Kind.TOMBSTONES:
            yield from self._tombstones(layout, section)
        elif isinstance(layout, Records):
            yield from self._records(Table(layout), section)

    def _records(self, table: Table, section: Section) -> Iterator[Row]:
        name = table.records.name
        part = f"FROM {table.name} WHERE key >= ? AND key < ? ORDER BY key"
        for span in self._spans(table.records, section.low, f"SELECT key {part} LIMIT 1"):
            sql = f"SELECT key, version, sum, value, attachment {part}"
            for row in self._connection.execute(sql, (span.low, span.high)):
                place, version, checksum, value, attachment = row
                if record_sum(name, place, version, value, attachment) != checksum:
                    raise _damaged(name, place, "it does not match its checksum")
                yield RecordRow(name, place, version, value, attachment)

    def _tombstones(self, layout: Layout, section: Section) -> Iterator[Row]:
        part = "FROM tombstones WHERE collection = ? AND key >= ? AND key < ? ORDER BY key"
        for span in self._spans(layout, section.low, f"SELECT key {part} LIMIT 1", layout.name):
            asked = (layout.name, span.low, span.high)
            for row in self._connection.execute(f"SELECT key, version, sum {part}", asked):
                place, version, checksum = row
                if record_sum(layout.name, place, version, None, None) != checksum:
                    raise _damaged(layout.name, place, "its tombstone is not as written")
                yield RecordRow(layout.name, place, version)

    def _streams(self, layout: Layout, section: Section) -> Iterator[Row]:
        part = "FROM streams WHERE log = ? AND key >= ? AND key < ? ORDER BY key"
        for span in self._spans(layout, section.low, f"SELECT key {part} LIMIT 1", layout.name):
            asked = (layout.name, span.low, span.high)
            for row in self._connection.execute(
                f"SELECT key, id, incarnation, first, last, sum {part}", asked
            ):
                begun = section.number if row[0] == section.low else 0
                yield from self._stream(layout, tuple(row), begun)

    def _stream(self, layout: Layout, row: tuple[Any, ...], begun: int) -> Iterator[Row]:
        """A stream's entries above `begun`, which is 0 where none was given yet."""
        place, id, *stored = row
        tip = checked_tip(layout.name, split(place), place, tuple(stored))
        start = (layout.name, place, tip.incarnation, tip.first)
        if tip.last < tip.first and not begun:
            yield StreamRow(*start, tip.last)
        base, seq = id << STREAM_SHIFT, max(tip.first - 1, begun)
        for at, checksum, value in self._connection.execute(
            SQL["entries_between"], (base + seq + 1, base + tip.last)
        ):
            sound = entry_sum(layout.name, place, tip.incarnation, seq + 1, value) == checksum
            if at != base + seq + 1 or not sound:
                raise _damaged(layout.name, place, f"its entry {seq + 1} is not as written")
            yield StreamRow(*start, seq, (value,))
            seq += 1
        if seq != tip.last:
            raise _damaged(layout.name, place, f"its entry {seq + 1} is missing")

    def _operations(self) -> Iterator[Row]:
        after = self._after
        begin = (after.name, after.place) if after and after.kind == Kind.OPERATIONS else ("", "")
        for row in self._connection.execute(SQL["operations_after"], begin):
            id, partition, digest, numbers, checksum = row
            if operation_sum((id, partition), digest, numbers) != checksum:
                raise Damaged(f"operation {id}", "it is not as written")
            if self._partition in (None, partition):
                answered = msgspec.json.decode(numbers, type=tuple[int, ...])
                yield OperationRow(id, partition, digest, answered)

    def _spans(self, layout: Layout, low: str, first: str, *named: str) -> Iterator[Span]:
        """The stretches of keys from `low` on that are wanted; `first` finds the next key."""
        if self._partition is None:
            yield Span(low, EVERYTHING.high)
            return
        begin: str | None = low
        while begin is not None:
            found = self._connection.execute(first, (*named, begin, EVERYTHING.high)).get
            if found is None:
                return
            span = span_of(layout, self._partition, begin, found)
            yield span
            begin = span.beyond


def find_present(
    connection: apsw.Connection, tables: Mapping[str, Table], rows: Sequence[Row]
) -> tuple[Present, dict[tuple[str, str], int]]:
    """What is there in the places of `rows`, and the ids of the streams among it."""
    present, ids = Present(), dict[tuple[str, str], int]()
    for row in rows:
        match row:
            case RecordRow() if row.collection in tables:
                place = (row.collection, row.place)
                named = tables[row.collection].name
                sql = f"SELECT version, sum FROM {named} WHERE key = ?"
                for version, checksum in connection.execute(sql, (row.place,)):
                    present.records[place] = (version, checksum)
                for version, checksum in connection.execute(SQL["tombstone"], place):
                    present.records[place] = (-version, checksum)
            case StreamRow():
                place = (row.log, row.place)
                for id, *stored in connection.execute(SQL["stream"], place):
                    present.tips[place] = checked_tip(
                        row.log, split(row.place), row.place, tuple(stored)
                    )
                    ids[place] = id
                    base = id << STREAM_SHIFT
                    asked = (base + row.after + 1, base + row.tip.last)
                    for at, checksum, _ in connection.execute(SQL["entries_between"], asked):
                        present.entries[(place, at - base)] = checksum
            case OperationRow():
                for digest, numbers, _ in connection.execute(
                    SQL["operation"], (row.id, row.partition)
                ):
                    done = Committed(msgspec.json.decode(numbers, type=tuple[int, ...]))
                    present.operations[(row.id, row.partition)] = (digest, done)
    return present, ids


def _damaged(collection: str, place: str, why: str) -> Damaged:
    return Damaged(f"{collection} {show(split(place))}", why)
