"""What a group of batches has to know, what it writes, and both as SQL.

Places are read by one statement and written by one, however many tables they are in: an answer
takes longer to travel than to be worked out.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import asyncpg
import msgspec

from perdure.core.batch import Append, Batch, Put, RecordOp
from perdure.core.deciding import LogWrite, Place, RecordWrite
from perdure.core.errors import Damaged, Invalid
from perdure.core.keys import show, split
from perdure.core.loading import Load, Unloading
from perdure.core.rows import RecordRow, StreamRow
from perdure.core.stored import checked_tip, operation_sum
from perdure.core.values import Committed, entry_sum, record_sum, tip_sum
from perdure.engines.group import Effects, Known, Request
from perdure.engines.postgres_driver import SQL, damage_at
from perdure.engines.postgres_schema import Table, decoded_numbers

if TYPE_CHECKING:
    from perdure.engines.postgres_driver import Connection


def check_texts(batch: Batch, load: Load | None) -> None:
    """Raises `Invalid` for a value that is no text, so that it does not come as far as a
    transaction that others share."""
    for op in batch.ops:
        if isinstance(op, Put):
            _check_text(op.records.name, op.value)
        elif isinstance(op, Append):
            for value in op.entries:
                _check_text(op.log.name, value)
    for row in load.rows if load else ():
        if isinstance(row, RecordRow) and row.value is not None:
            _check_text(row.collection, row.value)
        elif isinstance(row, StreamRow):
            for value in row.values:
                _check_text(row.log, value)


def _check_text(collection: str, value: bytes) -> None:
    try:
        value.decode()
    except UnicodeDecodeError as error:
        raise Invalid(f"a value of {collection} is not UTF-8: {error}.") from None
    if b"\0" in value:
        raise Invalid(f"a value of {collection} holds a NUL, which JSON writes as \\u0000.")


class PostgresKnown(Known):
    """Also how the collections of records are shaped in the store by now."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: dict[str, str] = {}


class PostgresEffects(Effects):
    """See `Effects`."""

    def __init__(self) -> None:
        super().__init__()
        self.entries: dict[Place, dict[int, tuple[int, bytes]]] = defaultdict(dict)
        """The rows to add by stream and number, each with its incarnation."""
        self.forgotten: list[tuple[Place, int, int, int]] = []

    def add_entries(self, write: LogWrite) -> None:
        place, tip = (write.log.name, write.place), write.tip
        added = self.entries[place]
        if write.forget is not None:
            first, last = write.forget
            self.forgotten.append((place, write.before.incarnation, first, last))
            for seq in [seq for seq in added if seq <= last]:
                del added[seq]
        for seq, value in enumerate(write.entries, tip.last - len(write.entries) + 1):
            added[seq] = (tip.incarnation, value)

    def to_forget(self) -> int:
        """How many rows a sweep will find here some day: of what is deleted, and operation ids."""
        buried = sum(write.value is None for of in self.records.values() for write in of.values())
        dropped = sum(tip.last == 0 for tip in self.tips.values())
        return buried + dropped + len(self.operations)


class Statement:
    """Statements that write, made into one, so that they cost one answer. They see one snapshot
    and none the effects of another, which is right as no two of a group touch one row."""

    def __init__(self) -> None:
        self._parts: list[str] = []
        self._values: list[Any] = []

    def add(self, sql: str, *values: Any) -> None:
        """A part with its own `$1`, `$2`, ..."""
        self._parts.append(_shifted(sql, len(self._values)))
        self._values += values

    def add_rows(self, sql: str, rows: Iterable[tuple[Any, ...]]) -> None:
        """A part whose values are arrays: the columns of `rows`."""
        self.add(sql, *map(list, zip(*rows, strict=True)))

    async def write(self, session: Connection) -> None:
        named = ", ".join(f"w{at} AS ({sql})" for at, sql in enumerate(self._parts))
        await session.execute(f"WITH {named} SELECT 1", *self._values)

    async def read(self, session: Connection) -> list[asyncpg.Record]:
        with damage_at("what a commit touches"):
            return await session.fetch(" UNION ALL ".join(self._parts), *self._values)


@lru_cache(maxsize=4_096)
def _shifted(sql: str, by: int) -> str:
    return re.sub(r"\$(\d+)", lambda mark: f"${int(mark[1]) + by}", sql)


def _known(rows: list[asyncpg.Record]) -> PostgresKnown:
    """The facts in the rows that `_load` asked for, held to their checksums."""
    known = PostgresKnown()
    versions, tips = known.facts.versions, known.facts.tips
    for kind, name, key, a, b, c, d, e, text in rows:
        match kind:
            case 0:
                versions[(name, key)] = a
            case 1:
                if record_sum(name, key, a, None, None) != b:
                    raise Damaged(f"{name} {show(split(key))}", "its tombstone is not as written")
                known.buried.add((name, key))
                versions[(name, key)] = -a
            case 2:
                known.stream_ids[(name, key)] = a
                tips[(name, key)] = checked_tip(name, split(key), key, (b, c, d, e))
            case 3:
                known.facts.floors[name] = a
            case 5:
                known.shapes[name] = text
            case _:
                numbers = text.encode()
                if operation_sum((name, key), a, numbers) != b:
                    raise Damaged(f"operation {name}", "it is not as written")
                known.operations[(name, key)] = (a, Committed(decoded_numbers(text)))
    return known


def write_streams(statement: Statement, effects: PostgresEffects, ids: Mapping[Place, int]) -> None:
    """Add what a group writes to logs."""
    statement.add_rows(
        SQL["set_tips"],
        (
            (ids[place], *place, tip.incarnation, tip.first, tip.last, tip_sum(*place, tip))
            for place, tip in effects.tips.items()
        ),
    )
    if effects.forgotten:
        statement.add_rows(
            SQL["forget_entries"],
            (
                (ids[place], incarnation, first, last)
                for place, incarnation, first, last in effects.forgotten
            ),
        )
    rows = [
        (ids[place], incarnation, seq, entry_sum(*place, incarnation, seq, value), value.decode())
        for place, added in effects.entries.items()
        for seq, (incarnation, value) in added.items()
    ]
    if rows:
        statement.add_rows(SQL["add_entries"], rows)


async def load(
    session: Connection, tables: Mapping[str, Table], group: list[Request]
) -> PostgresKnown:
    """Read what the places of a group hold now. Raises `Damaged`."""
    records: dict[str, set[str]] = defaultdict(set)
    streams: dict[str, set[str]] = defaultdict(set)
    operations: set[str] = set()
    for request in group:
        for op in request.batch.ops:
            if isinstance(op, RecordOp):
                records[op.records.name].add(op.place)
            else:
                streams[op.log.name].add(op.place)
        if request.operation is not None:
            operations.add(request.operation[0])
    asked = Statement()
    for name in sorted(records):
        places = list(records[name])
        asked.add(tables[name].versions, name, places)
        asked.add(SQL["tombstones_at"], name, places)
    for name in sorted(streams):
        asked.add(SQL["tips_at"], name, list(streams[name]))
        asked.add(SQL["floor_at"], name)
    if records:
        asked.add(SQL["shapes_at"], list(records))
    if operations:
        asked.add(SQL["operations_at"], list(operations))
    return _known(await asked.read(session))


def write_records(
    statement: Statement, table: Table, writes: dict[str, RecordWrite], known: PostgresKnown
) -> None:
    """Add what a group writes to one collection."""
    name = table.records.name
    puts: list[tuple[Any, ...]] = []
    gone: list[tuple[Any, ...]] = []
    back: list[Place] = []
    for place, write in writes.items():
        checksum = record_sum(name, place, write.version, write.value, write.attachment)
        if write.value is None:
            gone.append((name, place, write.version, checksum))
            continue
        columns = table.index_columns(write.key, write.columns)
        text = write.value.decode()
        puts.append((place, write.version, checksum, *columns, text, write.attachment))
        if (name, place) in known.buried:
            back.append((name, place))
    if puts:
        statement.add_rows(table.put, puts)
    if back:
        statement.add_rows(SQL["unbury"], back)
    if gone:
        statement.add(table.delete, [place for _, place, _, _ in gone])
        statement.add_rows(SQL["bury"], gone)


def write_operations(statement: Statement, effects: PostgresEffects) -> None:
    """Add the operation ids of a group, with what they were answered."""
    rows = []
    for operation, digest, committed in effects.operations:
        numbers = msgspec.json.encode(committed.numbers)
        checksum = operation_sum(operation, digest, numbers)
        rows.append((*operation, digest, numbers.decode(), checksum))
    statement.add_rows(SQL["add_operations"], rows)


def remove(
    statement: Statement, tables: Mapping[str, Table], gone: Unloading, known: PostgresKnown
) -> None:
    """Add what unloading rows removes."""
    places: dict[str, list[str]] = defaultdict(list)
    for name, place in gone.records:
        places[name].append(place)
    for name, own in places.items():
        statement.add(tables[name].delete, own)
    if gone.tombstones:
        statement.add_rows(SQL["unbury"], gone.tombstones)
    streams = [(known.stream_ids[at], tip) for at, tip in gone.streams]
    if streams:
        forgotten = [(id, tip.incarnation, tip.first, tip.last) for id, tip in streams]
        statement.add_rows(SQL["forget_entries"], forgotten)
        statement.add(SQL["remove_streams"], [id for id, _ in streams])
    if gone.operations:
        statement.add_rows(SQL["remove_operations"], gone.operations)
