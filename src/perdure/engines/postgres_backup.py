"""Copying a whole postgres store, as it is at one moment, and making a store of such a copy.

A copy is one file of frames, each with its length and checksum: what the store is, then the rows of
its tables, in pieces, and last how many there were. It does not depend on the server's version, as
its own files would, and needs no rights but to read. One transaction sees one moment from the first
row to the last: commits go on meanwhile, and the server keeps the rows they replace until it ends.

A store is made of it in one transaction too: before its end there is none, whatever happens. It
gets an id of its own, as cursors of the store it was copied from are about commits that the copy
may not have. The server's own tools (pg_basebackup, archiving) bring back a later moment than the
last copy; they belong to whoever runs it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import xxhash

from perdure.core.clock import Clock
from perdure.core.disk import Disk
from perdure.core.engine import Progress, Snapshot
from perdure.core.errors import Damaged, Invalid, NewerFormat
from perdure.core.layouts import Layout, Records
from perdure.core.offload import off_loop
from perdure.core.stored import as_stored, check_layouts, stored_records
from perdure.engines.postgres_driver import SQL, Database, Held, quoted, translating
from perdure.engines.postgres_schema import (
    FORMAT,
    STREAM_IDS,
    Table,
    add_layout,
    choose_schema,
    create_store,
    holds_store,
    widen,
)
from perdure.engines.postgres_verify import STEP_BYTES, STEP_ROWS, verify_store

if TYPE_CHECKING:
    from perdure.engines.postgres_driver import Connection

COPY = "perdure.rows"
"""The one file of a backup."""

_HEAD_BYTES = 12
_CHUNK_BYTES = 4 * 1024 * 1024

_STATIC = {
    "floors": ("log",),
    "streams": ("id",),
    "entries": ("stream", "incarnation", "seq"),
    "tombstones": ("collection", "key"),
    "operations": ("id", "partition"),
}
"""Tables that every store has and that belong into a copy, with the columns of their keys."""


class Head(msgspec.Struct, frozen=True, tag="head"):
    """What the rows are of."""

    snapshot: Snapshot
    layouts: tuple[tuple[str, int, str], ...]


class Piece(msgspec.Struct, frozen=True, tag="rows"):
    """Some rows of a table."""

    table: str
    columns: tuple[str, ...]
    rows: list[list[Any]]


class End(msgspec.Struct, frozen=True, tag="end"):
    """How many rows there were; without it a file is not whole."""

    rows: int


Frame = Head | Piece | End
_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Frame] = msgspec.msgpack.Decoder(Frame)


async def back_up(
    database: Database,
    store_id: str,
    layouts: Sequence[Layout],
    into: Path,
    progress: Progress,
    disk: Disk,
    *,
    format: int,
) -> Snapshot:
    """Copy what is there now into the empty directory `into`, verified before and after."""
    target = into / COPY
    session = await database.connect_for_long()
    try:
        with translating(database.where):
            async with session.transaction(isolation="repeatable_read", readonly=True):
                held = Held(database, session)
                async for finding in verify_store(held, layouts):
                    raise Damaged(finding.where, finding.why)
                number = await session.fetchval(SQL["moment"])
                described = [tuple(row) for row in await session.fetch(SQL["layouts"])]
                head = Head(Snapshot(store_id, number, format), tuple(described))
                await _copy(session, head, target, progress, disk)
    finally:
        session.terminate()
    await off_loop(disk.sync_file, target)
    await off_loop(disk.sync_directory, into)
    await off_loop(_read_through, disk, target)
    return head.snapshot


async def restore(
    database: Database,
    schema: str | None,
    source: Path,
    layouts: Sequence[Layout],
    progress: Progress,
    check: Callable[[Database, str], Awaitable[None]],
    *,
    clock: Clock,
    disk: Disk,
) -> None:
    """Make a store of the copy in `source`. `check` is given the store as it will be, and its id.

    Raises `Invalid` where a store is already, `Damaged`, `NewerFormat`.
    """
    path = source / COPY
    session = await database.connect_for_long()
    try:
        with translating(database.where):
            await choose_schema(database, session, schema, read_only=False)
            await session.close()
            session = await database.connect_for_long()
            async with session.transaction():
                if await holds_store(session, database.where):
                    raise Invalid(
                        f"{database.where} holds a store. A backup is restored into an empty "
                        "schema only; name another with ?schema=NAME."
                    )
                facts = await create_store(session, database.where, clock)
                await _fill(session, path, layouts, progress, disk)
                held = Held(database, session)
                async for finding in verify_store(held, layouts):
                    raise Damaged(finding.where, finding.why)
                await check(held, facts["store_id"])
    finally:
        session.terminate()


async def _copy(
    session: Connection, head: Head, target: Path, progress: Progress, disk: Disk
) -> None:
    tables = [Table(records) for records in stored_records(head.layouts, ())]
    names = {Table.name_of(table.records.name): ("key",) for table in tables} | _STATIC
    sizes = dict(map(tuple, await session.fetch(SQL["sizes"])))
    total = sum(sizes[name] for name in names)
    done = rows = 0
    with disk.writing(target) as write:
        await off_loop(write, _framed(head))
        for name, key in names.items():
            async for piece in _pieces(session, name, key):
                frame = _framed(piece)
                await off_loop(write, frame)
                done, rows = done + len(frame), rows + len(piece.rows)
                progress(min(done, total), total)
        await off_loop(write, _framed(End(rows)))
    progress(total, total)


async def _pieces(session: Connection, table: str, key: tuple[str, ...]) -> AsyncIterator[Piece]:
    """All rows of a table by its key, in pieces bounded in rows and, but for one row, in bytes."""
    found = await session.fetch(SQL["columns"], quoted(table))
    columns = tuple(name for (name,) in found)
    wide = [name for name in ("value", "attachment", "numbers") if name in columns]
    size = " + ".join(f"coalesce(octet_length({name}), 0)" for name in wide) or "0"
    names, order = ", ".join(map(quoted, columns)), ", ".join(key)
    marks = [", ".join(f"${at + len(key) * turn + 1}" for at in range(len(key))) for turn in (0, 1)]
    first = f"SELECT {order}, {size} FROM {quoted(table)} ORDER BY {order} LIMIT {STEP_ROWS}"
    page = (
        f"SELECT {order}, {size} FROM {quoted(table)} WHERE ({order}) > ({marks[0]}) "
        f"ORDER BY {order} LIMIT {STEP_ROWS}"
    )
    rows = (
        f"SELECT {names} FROM {quoted(table)} "
        f"WHERE ({order}) >= ({marks[0]}) AND ({order}) <= ({marks[1]}) ORDER BY {order}"
    )
    places = await session.fetch(first)
    while places:
        for low, high in _bounds([(tuple(place[:-1]), place[-1]) for place in map(tuple, places)]):
            found = await session.fetch(rows, *low, *high)
            yield Piece(table, columns, [list(row) for row in found])
        places = await session.fetch(page, *tuple(places[-1])[:-1])


def _bounds(sizes: list[tuple[tuple[Any, ...], int]]) -> Iterator[tuple[Any, Any]]:
    """First and last key of each stretch whose rows have at most `STEP_BYTES`, or are one."""
    low = high = sizes[0][0]
    left = STEP_BYTES
    for place, size_bytes in sizes:
        if size_bytes > left and place != low:
            yield low, high
            low, left = place, STEP_BYTES
        high = place
        left -= size_bytes
    yield low, high


async def _fill(
    session: Connection, path: Path, layouts: Sequence[Layout], progress: Progress, disk: Disk
) -> None:
    total = (await off_loop(path.stat)).st_size
    done = 0
    declared = {layout.name: layout for layout in layouts}
    narrow: tuple[Records[Any], ...] = ()
    frames = _frames(disk, path)
    while (read := await off_loop(next, frames, None)) is not None:
        frame, size_bytes = read
        done += size_bytes
        progress(done, total)
        if isinstance(frame, Head):
            if frame.snapshot.format > FORMAT:
                raise NewerFormat(
                    f"{path} has store format {frame.snapshot.format}; this release knows up to "
                    f"{FORMAT}. Restore it with the Perdure that made it, or a newer one."
                )
            narrow = check_layouts(frame.layouts, str(path), layouts).indexes
            for name, _, _ in frame.layouts:
                if name not in declared:
                    raise Invalid(f"{path} holds {name}, which this release does not know.")
            for layout in layouts:
                await add_layout(session, as_stored(layout, frame.layouts))
        elif isinstance(frame, Piece):
            await session.copy_records_to_table(
                frame.table, records=map(tuple, frame.rows), columns=list(frame.columns)
            )
    for records in narrow:
        await widen(session, records)
    await session.execute(SQL["pass_stream_ids"], STREAM_IDS)


def _framed(frame: Frame) -> bytes:
    body = _encoder.encode(frame)
    return len(body).to_bytes(4) + xxhash.xxh3_64_digest(body) + body


def _frames(disk: Disk, path: Path) -> Iterator[tuple[Frame, int]]:
    """The frames of a file and their sizes. Raises `Damaged` where it is not whole."""
    rest = b""
    rows = offset = 0
    for chunk in disk.read_chunks(path, 0, _CHUNK_BYTES):
        rest += chunk
        while len(rest) >= _HEAD_BYTES:
            end = _HEAD_BYTES + int.from_bytes(rest[:4])
            if len(rest) < end:
                break
            frame = _checked(path, offset, rest[4:_HEAD_BYTES], rest[_HEAD_BYTES:end])
            if isinstance(frame, Head) != (offset == 0):
                raise Damaged(f"{path} at byte {offset}", "it does not begin as a copy does")
            rest, offset = rest[end:], offset + end
            if isinstance(frame, End):
                if rest or frame.rows != rows:
                    raise Damaged(str(path), f"it has {rows} rows and says {frame.rows}")
                yield frame, end
                return
            rows += len(frame.rows) if isinstance(frame, Piece) else 0
            yield frame, end
    raise Damaged(str(path), f"it ends at byte {offset + len(rest)} without its last frame")


def _checked(path: Path, offset: int, checksum: bytes, body: bytes) -> Frame:
    if xxhash.xxh3_64_digest(body) != checksum:
        raise Damaged(f"{path} at byte {offset}", "it does not match its checksum")
    try:
        return _decoder.decode(body)
    except msgspec.MsgspecError as error:
        raise Damaged(f"{path} at byte {offset}", f"it cannot be read ({error})") from None


def _read_through(disk: Disk, path: Path) -> None:
    for _ in _frames(disk, path):
        pass
