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

from perdure.core.errors import Damaged, Unavailable
from perdure.core.keys import show, split
from perdure.core.layouts import Layout
from perdure.core.stored import operation_sum, stored_records
from perdure.core.values import Finding, Tip, entry_sum, record_sum, tip_sum
from perdure.engines.sqlite_driver import translate
from perdure.engines.sqlite_schema import (
    SEQ_MAX,
    SQL,
    STREAM_SHIFT,
    Table,
)

Findings = Iterator[list[Finding]]
Judge = Callable[[apsw.Connection, tuple[str, ...]], Findings]

_STEP_ROWS = 500
_STRUCTURE_TRIES = 3
_ABOVE_TEXT = b""
"""SQLite sorts every blob after every text."""


def verify_store(
    connection: apsw.Connection, layouts: Sequence[Layout], where: str
) -> Iterator[list[Finding]]:
    """Findings of one step after another."""
    yield _structure(connection, where)
    for records in stored_records(_rows(connection, SQL["layouts"]), layouts):
        table = Table(records)
        yield from _walk(connection, table.name, ("key",), _record_judge(table))
    yield from _walk(connection, "streams", ("log", "key"), _judge_stream)
    yield from _strays(connection)
    yield from _walk(connection, "tombstones", ("collection", "key"), _judge_tombstone)
    yield from _walk(connection, "operations", ("id", "partition"), _judge_operation)


def _structure(connection: apsw.Connection, where: str) -> list[Finding]:
    """SQLite's own check: b-trees, free pages, and indexes against their tables."""
    for _ in range(_STRUCTURE_TRIES):
        try:
            lines = connection.execute("PRAGMA integrity_check(1000)").fetchall()
        except apsw.InterruptError:
            continue
        except apsw.Error as error:
            return [_unreadable(where, error)]
        return [Finding(where, str(line)) for (line,) in lines if line != "ok"]
    raise Unavailable(
        f"{where}: so much is written that its structure cannot be looked at in one piece. "
        "Verify it while less is written."
    )


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
                places = _rows(connection, sql, (*low, *high))
            except apsw.Error as error:
                yield [_unreadable(f"the keys of {table} past {'/'.join(low)!r}", error)]
                break
            if not places:
                return
            for place in places:
                yield from judge(connection, place)
            yield []  # a step ends here, whatever it found
            if direction == "ASC":
                low = places[-1]
            else:
                high = places[-1]


def _record_judge(table: Table) -> Judge:
    name = table.records.name
    sql = f"SELECT {table.row} FROM {table.name} WHERE key = ?"

    def judge(connection: apsw.Connection, place: tuple[str, ...]) -> Findings:
        try:
            for row in _rows(connection, sql, place):
                table.record(row)
        except apsw.Error as error:
            yield [_unreadable(f"{name} {show(split(place[0]))}", error)]
        except Damaged as damage:
            yield [Finding(damage.where, damage.why)]

    return judge


def _judge_stream(connection: apsw.Connection, place: tuple[str, ...]) -> Findings:
    """The tip, then every number it promises, then that nothing stands outside them."""
    seq = 0
    while True:
        connection.execute("BEGIN")
        try:
            found, seq, last = _judge_entries(connection, place, seq)
        except apsw.Error as error:
            found = [_unreadable(_show(place), error)]
            seq = last = 0
        finally:
            if connection.in_transaction:  # an I/O error ends it
                connection.execute("COMMIT")
        yield found
        if seq == last:
            return


def _judge_entries(
    connection: apsw.Connection, place: tuple[str, ...], after: int
) -> tuple[list[Finding], int, int]:
    """Findings in one step of a stream, the number it ends with, and the stream's last."""
    log, key = place
    row = _rows(connection, SQL["stream"], place)
    if not row:
        return [], 0, 0
    stream_id, incarnation, first, last, checksum = row[0]
    if tip_sum(log, key, Tip(incarnation, first, last)) != checksum:
        return [Finding(_show(place), "its tip does not match its checksum")], 0, 0
    seq = max(after, first - 1)
    end = min(seq + _STEP_ROWS, last)
    base = stream_id << STREAM_SHIFT
    entries = _entries(connection, base + seq + 1, base + end)
    found = [
        Finding(f"{_show(place)} entry {number}", why)
        for number in range(seq + 1, end + 1)
        if (why := _wrong_with(entries.get(base + number), place, incarnation, number))
    ]
    if end == last:
        bounds = {"low": base, "first": base + first, "last": base + last, "span": SEQ_MAX - last}
        ((outside,),) = _rows(connection, SQL["entries_outside"], bounds)
        if outside:
            found.append(Finding(_show(place), f"{outside} entries stand outside its numbers"))
    return found, end, last


def _entries(
    connection: apsw.Connection, low: int, high: int
) -> dict[int, tuple[int, bytes] | apsw.Error]:
    """Entries by id; where a page is damaged, each id by itself."""
    try:
        rows = _rows(connection, SQL["entries_between"], (low, high))
        return {id: (checksum, value) for id, checksum, value in rows}
    except apsw.Error:
        return {id: found for id in range(low, high + 1) if (found := _entry(connection, id))}


def _entry(connection: apsw.Connection, id: int) -> tuple[int, bytes] | apsw.Error | None:
    try:
        rows = _rows(connection, SQL["entries_between"], (id, id))
    except apsw.Error as error:
        return error
    return rows[0][1:] if rows else None


def _wrong_with(
    found: tuple[int, bytes] | apsw.Error | None,
    place: tuple[str, ...],
    incarnation: int,
    seq: int,
) -> str:
    """Why an entry is not as it was written; empty where it is."""
    if found is None:
        return "it is missing"
    if isinstance(found, apsw.Error):
        return _unreadable(_show(place), found).why
    if entry_sum(place[0], place[1], incarnation, seq, found[1]) != found[0]:
        return "it does not match its checksum"
    return ""


def _strays(connection: apsw.Connection) -> Findings:
    """Entries of streams that do not exist."""
    id = 0
    while True:
        try:
            row = _rows(connection, SQL["next_stream_of_entries"], (id,))
        except apsw.Error as error:
            yield [_unreadable("entries", error)]
            return
        if not row:
            return
        ((stream_id, known),) = row
        if not known:
            yield [Finding(f"entries of stream {stream_id}", "no such stream exists")]
        id = (stream_id + 1) << STREAM_SHIFT
        yield []


def _judge_tombstone(connection: apsw.Connection, place: tuple[str, ...]) -> Findings:
    try:
        rows = _rows(connection, SQL["tombstone"], place)
    except apsw.Error as error:
        yield [_unreadable(_show(place), error)]
        return
    collection, key = place
    if any(record_sum(collection, key, version, None, None) != found for version, found in rows):
        yield [Finding(_show(place), "its tombstone does not match its checksum")]


def _judge_operation(connection: apsw.Connection, place: tuple[str, ...]) -> Findings:
    where = f"operation {' of '.join(filter(None, place))}"
    try:
        rows = _rows(connection, SQL["operation"], place)
    except apsw.Error as error:
        yield [_unreadable(where, error)]
        return
    id, partition = place
    if any(
        operation_sum((id, partition), digest, numbers) != found for digest, numbers, found in rows
    ):
        yield [Finding(where, "it does not match its checksum")]


def _rows(connection: apsw.Connection, sql: str, values: Any = ()) -> list[Any]:
    """The rows of a short query; asked again where it was interrupted to let the log start over."""
    while True:
        try:
            return connection.execute(sql, values).fetchall()
        except apsw.InterruptError:
            continue


def _show(place: tuple[str, ...]) -> str:
    """Collection and key, for people."""
    return f"{place[0]} {show(split(place[1]))}"


def _unreadable(where: str, error: apsw.Error) -> Finding:
    meaning = translate(error, where)
    return Finding(where, meaning.why if isinstance(meaning, Damaged) else str(error), "unreadable")
