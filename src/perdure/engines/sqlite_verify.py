"""Walking everything a sqlite store holds, and saying what is not as it was written.

Damage never ends the walk: each record, entry, tombstone and operation is judged by itself. Rows
are found through their key's index and read one by one; where that index cannot be followed any
further, the walk goes on from its other end. `verify_store` yields after every bounded step, each
in a snapshot of its own, so that a walk does not keep the log from starting over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import apsw
import msgspec

from perdure.core.errors import Damaged
from perdure.core.keys import show, split
from perdure.core.layouts import Layout, Records
from perdure.core.values import Finding, Tip, entry_sum, record_sum, tip_sum
from perdure.engines.sqlite_driver import translate
from perdure.engines.sqlite_schema import SEQ_MAX, SQL, STREAM_SHIFT, Table, operation_sum

Findings = Iterator[list[Finding]]
Judge = Callable[[apsw.Connection, tuple[str, ...]], Findings]

_STEP_ROWS = 500
_ABOVE_TEXT = b""
"""SQLite sorts every blob after every text."""


def verify_store(
    connection: apsw.Connection, layouts: Sequence[Layout], where: str
) -> Iterator[list[Finding]]:
    """Findings of one step after another."""
    yield _structure(connection, where)
    for table in _tables(connection, layouts):
        yield from _walk(connection, table.name, ("key",), _record_judge(table))
    yield from _walk(connection, "streams", ("log", "key"), _judge_stream)
    yield from _strays(connection)
    yield from _walk(connection, "tombstones", ("collection", "key"), _judge_tombstone)
    yield from _walk(connection, "operations", ("id", "partition"), _judge_operation)


def _structure(connection: apsw.Connection, where: str) -> list[Finding]:
    """SQLite's own check: b-trees, free pages, and indexes against their tables."""
    try:
        lines = [line for (line,) in connection.execute("PRAGMA integrity_check(1000)")]
    except apsw.Error as error:
        return [_unreadable(where, error)]
    return [Finding(where, line) for line in lines if line != "ok"]


def _tables(connection: apsw.Connection, layouts: Sequence[Layout]) -> Iterator[Table]:
    """Every collection of records in the store. One that nobody declared is held to its checksums
    only, as its index columns cannot be told from its value."""
    declared = {layout.name: layout for layout in layouts if isinstance(layout, Records)}
    rows: list[Any] = connection.execute(SQL["layouts"]).fetchall()
    for name, _, shape in rows:
        key, indexes = msgspec.json.decode(shape)
        if indexes is not None:
            yield Table(declared.get(name) or Records(name, Any, key=tuple(key)))


def _walk(
    connection: apsw.Connection, table: str, columns: tuple[str, ...], judge: Judge
) -> Findings:
    names, marks = ", ".join(columns), ", ".join("?" * len(columns))
    low: tuple[Any, ...] = ("",) * len(columns)
    high: tuple[Any, ...] = (_ABOVE_TEXT,) * len(columns)
    for direction in ("ASC", "DESC"):
        order = ", ".join(f"{column} {direction}" for column in columns)
        sql = (
            f"SELECT {names} FROM {table} WHERE ({names}) > ({marks}) AND ({names}) < ({marks}) "
            f"ORDER BY {order} LIMIT {_STEP_ROWS}"
        )
        while True:
            try:
                places: list[Any] = connection.execute(sql, (*low, *high)).fetchall()
            except apsw.Error as error:
                yield [_unreadable(f"the keys of {table} past {'/'.join(low)!r}", error)]
                break
            if not places:
                return
            for place in places:
                yield from judge(connection, place)
            if direction == "ASC":
                low = places[-1]
            else:
                high = places[-1]


def _record_judge(table: Table) -> Judge:
    name = table.records.name
    sql = f"SELECT {table.row} FROM {table.name} WHERE key = ?"

    def judge(connection: apsw.Connection, place: tuple[str, ...]) -> Findings:
        try:
            row = connection.execute(sql, place).get
            if row is not None:
                table.record(row)
        except apsw.Error as error:
            yield [_unreadable(f"{name} {show(split(place[0]))}", error)]
        except Damaged as damage:
            yield [Finding(damage.where, damage.why)]

    return judge


def _judge_stream(connection: apsw.Connection, place: tuple[str, ...]) -> Findings:
    """The tip, then every number it promises, then that nothing stands outside them."""
    log, key = place
    where = f"{log} {show(split(key))}"
    seq = 0
    while True:
        connection.execute("BEGIN")
        try:
            row = connection.execute(SQL["stream"], place).get
            if row is None:
                return
            stream_id, incarnation, first, last, checksum = row
            tip = Tip(incarnation, first, last)
            if tip_sum(log, key, tip) != checksum:
                yield [Finding(where, "its tip does not match its checksum")]
                return
            seq = max(seq, first - 1)
            end = min(seq + _STEP_ROWS, last)
            base = stream_id << STREAM_SHIFT
            entries = _entries(connection, base + seq + 1, base + end)
            if end == last:
                outside = connection.execute(
                    SQL["entries_outside"],
                    {"low": base, "first": base + first, "last": base + last, "span": SEQ_MAX},
                ).get
        except apsw.Error as error:
            yield [_unreadable(where, error)]
            return
        finally:
            connection.execute("COMMIT")
        yield [
            Finding(f"{where} entry {number}", why)
            for number in range(seq + 1, end + 1)
            if (why := _wrong_with(entries, base, log, key, incarnation, number))
        ]
        if end == last:
            if outside:
                yield [Finding(where, f"{outside} entries stand outside its numbers")]
            return
        seq = end


def _entries(
    connection: apsw.Connection, low: int, high: int
) -> dict[int, tuple[int, bytes] | apsw.Error]:
    """Entries by id; where a page is damaged, each id by itself."""
    try:
        rows = connection.execute(SQL["entries_between"], (low, high))
        return {id: (checksum, value) for id, checksum, value in rows}
    except apsw.Error:
        return {id: found for id in range(low, high + 1) if (found := _entry(connection, id))}


def _entry(connection: apsw.Connection, id: int) -> tuple[int, bytes] | apsw.Error | None:
    try:
        row = connection.execute(SQL["entries_between"], (id, id)).get
    except apsw.Error as error:
        return error
    return None if row is None else (row[1], row[2])


def _wrong_with(
    entries: dict[int, tuple[int, bytes] | apsw.Error],
    base: int,
    log: str,
    key: str,
    incarnation: int,
    seq: int,
) -> str:
    found = entries.get(base + seq)
    if found is None:
        return "it is missing"
    if isinstance(found, apsw.Error):
        return _unreadable(log, found).why
    if entry_sum(log, key, incarnation, seq, found[1]) != found[0]:
        return "it does not match its checksum"
    return ""


def _strays(connection: apsw.Connection) -> Findings:
    """Entries of streams that do not exist."""
    id = 0
    while True:
        try:
            row = connection.execute(SQL["next_stream_of_entries"], (id,)).get
        except apsw.Error as error:
            yield [_unreadable("entries", error)]
            return
        if row is None:
            return
        stream_id, known = row
        if not known:
            yield [Finding(f"entries of stream {stream_id}", "no such stream exists")]
        id = (stream_id + 1) << STREAM_SHIFT
        yield []


def _judge_tombstone(connection: apsw.Connection, place: tuple[str, ...]) -> Findings:
    collection, key = place
    where = f"{collection} {show(split(key))}"
    try:
        row = connection.execute(SQL["tombstone"], place).get
    except apsw.Error as error:
        yield [_unreadable(where, error)]
        return
    if row is not None and record_sum(collection, key, row[0], None, None) != row[1]:
        yield [Finding(where, "its tombstone does not match its checksum")]


def _judge_operation(connection: apsw.Connection, place: tuple[str, ...]) -> Findings:
    where = f"operation {' of '.join(filter(None, place))}"
    try:
        row = connection.execute(SQL["operation"], place).get
    except apsw.Error as error:
        yield [_unreadable(where, error)]
        return
    if row is not None and operation_sum((place[0], place[1]), row[0], row[1]) != row[2]:
        yield [Finding(where, "it does not match its checksum")]


def _unreadable(where: str, error: apsw.Error) -> Finding:
    meaning = translate(error, where)
    return Finding(where, meaning.why if isinstance(meaning, Damaged) else str(error), "unreadable")
