"""Walking everything a postgres store holds, and saying what is not as it was written.

Damage never ends the walk: each record, entry, tombstone and operation is judged by itself. Every
step is bounded in rows and in bytes and has a snapshot of its own, so that a walk holds nobody up.
What PostgreSQL keeps for itself (pages and indexes) it checks itself: with data checksums as it
reads, and with its own amcheck where an administrator asks.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any

import asyncpg

from perdure.core.engine import Usage
from perdure.core.errors import Damaged
from perdure.core.keys import show, split
from perdure.core.layouts import Layout
from perdure.core.stored import checked_tip, operation_sum, stored_records
from perdure.core.values import Finding, entry_sum, record_sum
from perdure.engines.postgres_driver import SQL, Database, damage_at
from perdure.engines.postgres_schema import Table

if TYPE_CHECKING:
    from perdure.engines.postgres_driver import Session


STEP_ROWS = 500
STEP_BYTES = 16 * 1024 * 1024

_LOG_TABLES = ("entries", "streams", "floors")

Rows = list[asyncpg.Record]


async def verify_store(database: Database, layouts: Sequence[Layout]) -> AsyncIterator[Finding]:
    """Findings, one after another."""
    stored = [(row[0], row[1], row[2]) for row in await _ask(database, SQL["layouts"])]
    for records in stored_records(stored, layouts):
        table = Table(records)
        async for sizes in _pages(database, table.sizes, ("",)):
            for places in chunks(sizes):
                for finding in await _judge_records(database, table, places):
                    yield finding
    async for page in _pages(database, SQL["walk_streams"], ("", "")):
        for log, key in page:
            async for finding in _judge_stream(database, log, key):
                yield finding
    async for page in _pages(database, SQL["walk_tombstones"], ("", "")):
        for collection, key, version, checksum in page:
            if record_sum(collection, key, version, None, None) != checksum:
                why = "its tombstone does not match its checksum"
                yield Finding(f"{collection} {show(split(key))}", why)
    async for page in _pages(database, SQL["walk_operations"], ("", "")):
        for id, partition, digest, numbers, checksum in page:
            if operation_sum((id, partition), digest, numbers.encode()) != checksum:
                where = " of ".join(filter(None, (f"operation {id}", partition)))
                yield Finding(where, "it does not match its checksum")
    async for page in _pages(database, SQL["walk_strays"], (-(1 << 63),)):
        for stream, known in page:
            if not known:
                yield Finding(f"entries of stream {stream}", "no such stream exists")


def chunks(sizes: Sequence[Any]) -> list[list[str]]:
    """Keys in groups whose rows have at most `STEP_BYTES`, or are one, of rows of key and size."""
    made: list[list[str]] = []
    left = 0
    for place, size_bytes in sizes:
        if not made or size_bytes > left:
            made.append([])
            left = STEP_BYTES
        made[-1].append(place)
        left -= size_bytes
    return made


async def usage_of(database: Database) -> Usage:
    """What the tables take, with their indexes and large values, dead rows included. Entries of all
    logs share one table, which is divided by the number of entries each log keeps."""
    entries: dict[str, int] = dict(map(tuple, await _ask(database, SQL["entries_by_log"])))
    taken: dict[str, int] = {}
    logs = other = 0
    names = {Table.name_of(name): name for name, _, _ in await _ask(database, SQL["layouts"])}
    for table, size_bytes in await _ask(database, SQL["sizes"]):
        if table in names:
            taken[names[table]] = size_bytes
        elif table in _LOG_TABLES:
            logs += size_bytes
        else:
            other += size_bytes
    for log, count in entries.items():
        taken[log] = logs * count // sum(entries.values())
    shared = logs - sum(taken[log] for log in entries)
    total = sum(taken.values()) + other + shared
    return Usage(taken, other_bytes=other + shared, free_bytes=0, total_bytes=total)


async def _judge_records(database: Database, table: Table, places: list[str]) -> list[Finding]:
    """What is wrong with the records there, looked at one by one where something is."""
    try:
        for row in await _ask(database, table.get_many, places):
            table.record(row)
    except Damaged as damage:
        if len(places) > 1:
            return [
                finding
                for place in places
                for finding in await _judge_records(database, table, [place])
            ]
        where = f"{table.records.name} {show(split(places[0]))}"
        return [Finding(where, damage.why, "damaged" if damage.where == where else "unreadable")]
    return []


async def _judge_stream(database: Database, log: str, key: str) -> AsyncIterator[Finding]:
    """The tip, then every number it promises, then that nothing stands outside them."""
    where = f"{log} {show(split(key))}"
    seq = 0
    while True:
        try:
            rows = await _ask(database, SQL["walk_entries"], log, key, seq, STEP_ROWS)
            if not rows:
                return  # it was forgotten meanwhile
            tip = checked_tip(log, split(key), key, tuple(rows[0])[:4])
        except Damaged as damage:
            yield Finding(where, damage.why)
            return
        seq = max(seq, tip.first - 1)
        last = min(seq + STEP_ROWS, tip.last)
        found = {row["seq"]: row for row in rows}
        for number in range(seq + 1, last + 1):
            row = found.get(number)
            if row is None:
                yield Finding(f"{where} entry {number}", "it is missing")
            elif row["entry_sum"] != entry_sum(
                log, key, tip.incarnation, number, row["value"].encode()
            ):
                yield Finding(f"{where} entry {number}", "it does not match its checksum")
        if outside := rows[0]["outside"]:
            yield Finding(where, f"{outside} entries stand outside its numbers")
        if last >= tip.last:
            return
        seq = last


async def _pages(database: Database, sql: str, start: tuple[Any, ...]) -> AsyncIterator[Rows]:
    """Pages of a table by its key, whose columns come first. Damage in the key's own index ends
    the table, and is said."""
    while rows := await _ask(database, sql, *start, STEP_ROWS):
        yield rows
        start = tuple(rows[-1])[: len(start)]


async def _ask(database: Database, sql: str, *values: Any) -> Rows:
    """The rows of a question. Raises `Damaged` where they cannot be read."""

    async def ask(session: Session) -> Rows:
        with damage_at(database.where):
            return await session.fetch(sql, *values)

    return await database.read(ask)
