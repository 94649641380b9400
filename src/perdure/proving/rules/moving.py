"""Rules of rows: a store that another takes over row by row is the same store."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec

from perdure.core.batch import append, check, delete, drop, join, put, trim
from perdure.core.engine import Engine
from perdure.core.errors import Closed, Conflict, CursorRefused, Invalid, Trimmed, Unavailable
from perdure.core.limits import PAGE_MAX, ROWS_BYTES_MAX
from perdure.core.rows import FloorRow, OperationRow, RecordRow, Row, Rows, StreamRow, each
from perdure.core.values import Tip
from perdure.engines.checked import Checked
from perdure.proving.rules import Chapter
from perdure.proving.subject import (
    EVENTS,
    FACTS,
    MOVES,
    NOTES,
    PLIES,
    Note,
    Store,
    all_refused,
    holds,
    refused,
    same,
    stored,
)

moving = Chapter()

A = ("t", "a")
B = ("t", "b")
TWINS = ("g", "g2", "g ", "f")
"""Names of partitions, each of which begins as another does."""


@moving.rule("C17", "C5", "C6", copying=True)
async def a_store_that_was_taken_over_goes_on_as_it_would_have(store: Store) -> None:
    engine = await store.open()
    await _fill(engine)
    first = await engine.scan(FACTS, ("t",), limit=1)
    async with _another(store, copy_of=engine.store_id) as other:
        await _take_over(engine, other)
        same(await stored(other), await stored(engine))
        second = await other.scan(FACTS, ("t",), limit=1, cursor=first.cursor)
        same([record.key for record in second.items], [("t", "once")], "a cursor from before")
        same(await _all(other), await _all(engine))
        for one in (engine, other):
            written = await one.commit(
                put(FACTS, A, Note(), expect=2)
                + put(FACTS, B, Note(), expect=0)
                + append(EVENTS, A, [Note()], after=4)
                + append(EVENTS, B, [Note()], after=0)
            )
            same(written.numbers, (3, 3, 5, 1), "versions and numbers after the move")
            again = put(FACTS, ("t", "once"), Note(), attachment=b"").named("an operation")
            same((await one.commit(again)).numbers, (1,), "an operation id after the move")
            other_content = put(FACTS, ("t", "once"), Note(rank=9)).named("an operation")
            await refused(Invalid, one.commit(other_content))
            same((await one.tip(EVENTS, B)).incarnation, 2)
            await refused(CursorRefused, one.read(EVENTS, B, incarnation=1, limit=1))
            await refused(Trimmed, one.read(EVENTS, A, limit=1))
            same((await one.read(EVENTS, ("t", "emptied"), after=2, limit=1)), [])
        same(await _all(other), await _all(engine))


@moving.rule("C17", durable=True, copying=True)
async def a_copy_is_opened_by_nobody_before_it_is_complete(store: Store) -> None:
    engine = await store.open()
    await _fill(engine)
    beside = store.beside("other")
    try:
        other = await beside.open_copy(engine.store_id)
        first = await engine.rows()
        await other.load(first.items[:9])
        await other.close()
        await refused(Unavailable, beside.open())
        await refused(Invalid, beside.open_copy("store_another"))
        other = await beside.open_copy(engine.store_id)
        await _take_over(engine, other)
        await other.close()
        await refused(Unavailable, beside.open())
        other = await beside.open_copy(engine.store_id)
        await other.load((), complete=True)
        await other.close()
        await refused(Invalid, beside.open_copy(engine.store_id))
        other = await beside.open()
        same(await _all(other), await _all(engine))
        same(other.store_id, engine.store_id)
    finally:
        await beside.close()


@moving.rule("C17", "C18")
async def rows_come_in_pages_that_are_bounded(store: Store) -> None:
    engine = await store.open()
    same(await engine.rows(), Rows((), None), "the rows of an empty store")
    large = Note(body="x" * (ROWS_BYTES_MAX // 2))
    for name in ("1", "2", "3"):
        await engine.commit(put(FACTS, ("t", name), large) + append(EVENTS, A, [large]))
    await engine.commit(append(EVENTS, B, [Note()] * (2 * PAGE_MAX)))
    few = [put(NOTES, ("t", "box", f"{at}"), Note()) for at in range(PAGE_MAX + 1)]
    await engine.commit(join(few))
    async with _another(store) as other:
        after, pages = None, 0
        while True:
            page = await engine.rows(after=after)
            size_bytes = sum(row.size_bytes for row in page.items)
            holds(size_bytes <= ROWS_BYTES_MAX or len(page.items) == 1, f"{size_bytes} in a page")
            await other.load(page.items)
            same([found async for found in other.verify()], [], "half of a store")
            pages += 1
            if (after := page.after) is None:
                break
        same(await _all(other), await _all(engine))
    holds(pages >= 8, f"all of it came in {pages} pages")


@moving.rule("C17", "C22")
async def loading_again_changes_nothing_and_loading_another_thing_is_refused(store: Store) -> None:
    engine = await store.open()
    await _fill(engine)
    async with _another(store) as other:
        rows = await _all(engine)
        await _take_over(engine, other)
        await _take_over(engine, other)
        await other.load(())
        for row in rows:
            for changed in _changed(row):
                await refused(Conflict, other.load([changed]))
                new = RecordRow(FACTS.name, "t\x1fnew", 7, b"{}")
                await refused(Conflict, other.load([new, changed]))
        facts = [row for row in rows if isinstance(row, RecordRow)]
        await refused(Invalid, other.load([facts[0], facts[0]]))
        await refused(Invalid, other.load([RecordRow("unknown", "t\x1fnew", 1, b"{}")]))
        same(await _all(other), rows, "after what was refused")
        begins_late = StreamRow(EVENTS.name, "t\x1fnew", 1, 1, 5, (b"{}",))
        await refused(Conflict, other.load([begins_late]))
        await other.load([FloorRow(EVENTS.name, 1)])
        await other.load([FloorRow(EVENTS.name, 7), FloorRow(PLIES.name, 3)])
        await other.load([FloorRow(EVENTS.name, 5)])
        same((await other.tip(EVENTS, ("t", "absent"))).incarnation, 7)
        await other.commit(append(EVENTS, ("t", "absent"), [Note()]))
        same((await other.tip(EVENTS, ("t", "absent"))).incarnation, 7)


@moving.rule("C17", "C23")
async def one_partition_moves_without_the_others(store: Store) -> None:
    engine = await store.open()
    await _fill(engine)
    async with _another(store) as other:
        for partition in TWINS:
            before = await _all(other)
            await _take_over(engine, other, partition)
            mine = await _all(other, partition)
            same(mine, await _all(engine, partition))
            same(await _all(other), sorted([*before, *mine], key=lambda row: row.at))
            for tenant in ("s", "t"):
                moved = await other.scan(MOVES, (tenant, partition), limit=9)
                same([record.key[2] for record in moved.items], ["1", "3"])
                same((await other.tip(PLIES, (tenant, partition))).last, 3)
            again = put(MOVES, ("t", partition, "4"), Note()).named("an operation")
            same((await other.commit(again)).numbers, (3,), "an operation id of the partition")
            again = put(MOVES, ("t", partition, "2"), Note(), expect=0)
            same((await other.commit(again)).numbers, (3,), "a tombstone of the partition")
            await engine.commit(again)
        same(await _all(other, "absent"), [])
        same(await other.get(FACTS, A), None)


@moving.rule("C17", "C23")
async def what_was_unloaded_leaves_no_trace_and_can_come_back(store: Store) -> None:
    engine = await store.open()
    if not await _may_be_a_shard(engine):
        return
    await _fill(engine)
    long = append(PLIES, ("u", "g"), [Note(rank=rank) for rank in range(2 * PAGE_MAX + 7)])
    await engine.commit(long)
    before = await _each(engine)
    async with _another(store) as other:
        for partition in TWINS:
            await _take_over(engine, other, partition)
            mine = await _each(engine, partition)
            left = [row for row in await _each(engine) if row not in mine]
            after = None
            while True:
                page = await other.rows(after=after, partition=partition)
                for _ in range(2):
                    await engine.unload(page.items)
                    same([found async for found in engine.verify()], [], "while it is unloaded")
                if (after := page.after) is None:
                    break
            same(await _each(engine, partition), [])
            same(await _each(engine), left)
            for tenant in ("s", "t", "u"):
                same(await engine.tip(PLIES, (tenant, partition)), Tip())
                same((await engine.scan(MOVES, (tenant, partition), limit=9)).items, [])
        rows = await _each(other)
        for row in rows:
            for changed in _changed(row):
                if isinstance(changed, RecordRow | OperationRow):
                    await refused(Conflict, other.unload([changed]))
        same(await _each(other), rows, "after what was refused")
        for partition in TWINS:
            await _take_over(other, engine, partition)
        same(await _each(engine), before)


@moving.rule("C17", "C5")
async def rows_are_moved_under_checks_or_not_at_all(store: Store) -> None:
    engine = await store.open()
    await engine.commit(put(FACTS, A, Note(rank=1)))
    row = RecordRow(FACTS.name, "t\x1fnew", 7, b"{}")
    for wrong in (0, 2):
        await refused(Conflict, engine.load([row], under=check(FACTS, A, wrong)))
    same(len(await _all(engine)), 1)
    await engine.load([row], under=check(FACTS, A, 1) + check(FACTS, B, 0))
    same(len(await _all(engine)), 2)
    if not await _may_be_a_shard(engine):
        return
    for wrong in (0, 2):
        await refused(Conflict, engine.unload([row], under=check(FACTS, A, wrong)))
    await refused(Invalid, engine.unload([row], under=put(FACTS, A, Note())))
    await engine.unload([row], under=check(FACTS, A, 1))
    same(len(await _all(engine)), 1)


@moving.rule("C9")
async def a_closed_engine_gives_and_takes_no_rows(store: Store) -> None:
    engine = await store.open()
    await engine.close()
    floor = [FloorRow(EVENTS.name, 2)]
    await all_refused(Closed, engine.rows(), engine.load(floor), engine.unload(floor))


async def _may_be_a_shard(engine: Engine) -> bool:
    """Whether the engine can let go of rows; one that cannot says so."""
    try:
        await engine.unload(())
    except Invalid:
        return False
    return True


async def _fill(engine: Engine) -> None:
    """Some of everything that a store can hold."""
    await engine.commit(put(FACTS, A, Note(rank=1)) + put(FACTS, B, Note()))
    await engine.commit(put(FACTS, A, Note(body={"n": [1.50, None]}), attachment=b"\0\xff"))
    await engine.commit(delete(FACTS, B))
    await engine.commit(put(FACTS, ("t", "once"), Note(), attachment=b"").named("an operation"))
    await engine.commit(put(NOTES, ("t", "box", "1"), Note("open", 1, due_s=5)))
    await engine.commit(append(EVENTS, A, [Note(rank=rank) for rank in range(4)]))
    await engine.commit(trim(EVENTS, A, 3) + append(EVENTS, B, [Note()]))
    await engine.commit(drop(EVENTS, B))
    for name in ("emptied", "remade"):
        await engine.commit(append(EVENTS, ("t", name), [Note(), Note()]))
    await engine.commit(trim(EVENTS, ("t", "emptied"), 3) + drop(EVENTS, ("t", "remade")))
    await engine.commit(append(EVENTS, ("t", "remade"), [Note()]))
    for tenant in ("s", "t"):
        for game in TWINS:
            key = (tenant, game)
            for id in ("1", "2", "3"):
                await engine.commit(put(MOVES, (*key, id), Note()) + append(PLIES, key, [Note()]))
            await engine.commit(delete(MOVES, (*key, "2")) + trim(PLIES, key, 2))
    for game in TWINS:
        last = ("t", game, "4")
        await engine.commit(put(MOVES, last, Note()))
        await engine.commit(delete(MOVES, last))
        await engine.commit(put(MOVES, last, Note()).named("an operation"))
        await engine.commit(delete(MOVES, last))


def _changed(row: Row) -> list[Row]:
    """Rows of the same place that say something else."""
    change = msgspec.structs.replace
    match row:
        case RecordRow(value=None):
            return [change(row, version=row.version + 1), change(row, value=b"{}")]
        case RecordRow():
            return [
                change(row, version=row.version + 1),
                change(row, value=b"{}"),
                change(row, attachment=b"other"),
                change(row, value=None, attachment=None),
            ]
        case StreamRow(values=()):
            return [
                change(row, incarnation=row.incarnation + 1),
                change(row, first=row.first + 1, after=row.after + 1),
            ]
        case StreamRow():
            return [
                change(row, incarnation=row.incarnation + 1),
                change(row, first=row.first + 1, after=row.after + 1),
                change(row, values=(*row.values[:-1], b"{}")),
                change(row, after=row.after + len(row.values) + 1),
            ]
        case OperationRow():
            return [change(row, digest=row.digest + 1), change(row, numbers=(*row.numbers, 9))]
        case _:
            return []


@asynccontextmanager
async def _another(store: Store, copy_of: str | None = None) -> AsyncIterator[Checked]:
    beside = store.beside("other")
    try:
        yield await (beside.open_copy(copy_of) if copy_of else beside.open())
    finally:
        await beside.close()


async def _take_over(source: Engine, target: Engine, partition: str | None = None) -> None:
    after = None
    while True:
        page = await source.rows(after=after, partition=partition)
        await target.load(page.items)
        if (after := page.after) is None:
            return


async def _all(engine: Engine, partition: str | None = None) -> list[Row]:
    rows: list[Row] = []
    after = None
    while True:
        page = await engine.rows(after=after, partition=partition)
        rows += page.items
        if (after := page.after) is None:
            return rows


async def _each(engine: Engine, partition: str | None = None) -> list[Row]:
    return list(each(await _all(engine, partition)))
