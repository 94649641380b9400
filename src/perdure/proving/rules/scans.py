"""Rules of reading many records: order, indexes, pages, cursors, counts."""

from __future__ import annotations

from collections.abc import Sequence

from perdure.core import cursors
from perdure.core.batch import Batch, append, delete, put
from perdure.core.engine import Engine
from perdure.core.errors import CursorRefused, Invalid, LimitExceeded
from perdure.core.keys import Key
from perdure.core.layouts import Column
from perdure.core.limits import PAGE_MAX
from perdure.proving import hostile
from perdure.proving.rules import Chapter
from perdure.proving.subject import (
    EVENTS,
    FACTS,
    MOVES,
    NOTES,
    Note,
    Store,
    all_refused,
    refused,
    same,
    there,
)

scans = Chapter()

BOX = ("t", "box")


async def _fill(engine: Engine, notes: dict[str, Note], box: Key = BOX) -> None:
    batch = Batch()
    for name, note in notes.items():
        batch += put(NOTES, (*box, name), note)
    await engine.commit(batch)


async def _walk(
    engine: Engine,
    prefix: Key,
    *,
    limit: int,
    index: str | None = None,
    where: Sequence[Column] = (),
    descending: bool = False,
) -> list[str]:
    """Last segments of the keys that pages of `limit` give, from the first page to the end."""
    found: list[str] = []
    cursor: str | None = None
    while True:
        page = await engine.scan(
            NOTES,
            prefix,
            index=index,
            where=where,
            limit=limit,
            cursor=cursor,
            descending=descending,
        )
        found += [record.key[-1] for record in page.items]
        if (cursor := page.cursor) is None:
            return found


RANKED = {
    "a": Note("open", 2),
    "b": Note("open", 1),
    "c": Note("done", 1),
    "d": Note(None, 3),
    "e": Note("open", 1, due_s=7),
    "f": Note("open", -5, due_s=3),
    "g": Note("", 0),
}
BY_STATUS = ["g", "c", "f", "b", "e", "a"]
OPEN = ["f", "b", "e", "a"]
BY_RANK = ["f", "g", "b", "c", "e", "a", "d"]
"""Rank 1: `b` and `c` have no due time and come before `e`, which has one."""


@scans.rule("C18")
async def a_scan_goes_by_key_under_its_prefix(store: Store) -> None:
    engine = await store.open()
    await _fill(engine, dict.fromkeys("cab", Note()))
    await _fill(engine, {"x": Note()}, ("t", "box2"))
    await _fill(engine, {"y": Note()}, ("t", "bo"))
    await _fill(engine, {"z": Note()}, ("t2", "box"))
    same(await _walk(engine, BOX, limit=9), ["a", "b", "c"])
    same(await _walk(engine, BOX, limit=9, descending=True), ["c", "b", "a"])
    same(await _walk(engine, ("t",), limit=9), ["y", "a", "b", "c", "x"])
    same(await _walk(engine, (), limit=9), ["y", "a", "b", "c", "x", "z"])
    same(await _walk(engine, ("t", "box", "a"), limit=9), [], "a prefix is shorter than its keys")
    same(await _walk(engine, ("nobody",), limit=9), [])


@scans.rule("C18")
async def pages_of_any_size_give_the_whole_once_and_in_order(store: Store) -> None:
    engine = await store.open()
    await _fill(engine, RANKED)
    for limit in (1, 2, 3, 7, PAGE_MAX):
        for down in (False, True):
            turned = slice(None, None, -1 if down else 1)
            same(await _walk(engine, BOX, limit=limit, descending=down), list("abcdefg")[turned])
            for index, where, expected in (
                ("by_status", (), BY_STATUS),
                ("by_status", ("open",), OPEN),
                ("by_status", ("open", 1), ["b", "e"]),
                ("by_rank", (), BY_RANK),
                ("by_rank", (1,), ["b", "c", "e"]),
            ):
                walked = await _walk(
                    engine, ("t",), limit=limit, index=index, where=where, descending=down
                )
                same(walked, expected[turned], f"{index} {where} by {limit}")


@scans.rule("C18")
async def a_page_that_reaches_the_end_has_no_cursor(store: Store) -> None:
    engine = await store.open()
    await _fill(engine, RANKED)
    for name in RANKED:
        await engine.commit(append(EVENTS, ("t", name), [Note()]))
    for limit, more in ((6, True), (7, False), (8, False)):
        for down in (False, True):
            page = await engine.scan(NOTES, BOX, limit=limit, descending=down)
            same(page.cursor is not None, more)
            ranked = await engine.scan(NOTES, ("t",), index="by_rank", limit=limit, descending=down)
            same(ranked.cursor is not None, more)
        same((await engine.streams(EVENTS, ("t",), limit=limit)).cursor is not None, more)


@scans.rule("C18")
async def an_index_leaves_out_records_whose_first_field_is_none(store: Store) -> None:
    engine = await store.open()
    await _fill(engine, RANKED)
    same(await _walk(engine, (), index="due", limit=9), ["f", "e"])
    same(await _walk(engine, ("t",), index="by_status", limit=9), BY_STATUS, "`d` has no status")


@scans.rule("C18")
async def an_index_follows_its_records(store: Store) -> None:
    engine = await store.open()
    await _fill(engine, RANKED)
    await _fill(engine, {"a": Note("done", 9), "b": Note(None, 1), "d": Note("open", 0, due_s=1)})
    await engine.commit(delete(NOTES, (*BOX, "e")))
    same(await _walk(engine, ("t",), index="by_status", where=("open",), limit=9), ["f", "d"])
    same(await _walk(engine, ("t",), index="by_status", where=("done",), limit=9), ["c", "a"])
    same(await _walk(engine, (), index="due", limit=9), ["d", "f"])


@scans.rule("C23")
async def an_index_belongs_to_its_tenant_unless_it_says_otherwise(store: Store) -> None:
    engine = await store.open()
    await _fill(engine, {"mine": Note("open", 1, due_s=2)})
    await _fill(engine, {"other": Note("open", 1, due_s=1)}, ("t2", "box"))
    await _fill(engine, {"near": Note("open", 1, due_s=3)}, ("t ", "box"))
    same(await _walk(engine, ("t",), index="by_status", limit=9), ["mine"])
    same(await _walk(engine, ("t",), limit=9), ["mine"])
    same(await _walk(engine, (), index="due", limit=1), ["other", "mine", "near"])


@scans.rule("C20")
async def text_in_an_index_is_not_taken_for_a_number_or_another_text(store: Store) -> None:
    engine = await store.open()
    texts = ["", "1", "01", "1.0", "1e1", "NULL", "a", "A", "caf\u00e9", "cafe\u0301", "%", "_"]
    texts += [" ", "a ", "'", "\U0001f600", "\uffff", "null", "true", "-1", "9" * 30]
    await _fill(engine, {f"{at}": Note(text) for at, text in enumerate(texts)})
    for at, text in enumerate(texts):
        found = await _walk(engine, ("t",), index="by_status", where=(text,), limit=9)
        same(found, [f"{at}"], repr(text))
    walked = await _walk(engine, ("t",), index="by_status", limit=5)
    same([texts[int(name)] for name in walked], sorted(texts), "text goes by code points")


@scans.rule("C20")
async def whole_numbers_in_an_index_keep_all_64_bits(store: Store) -> None:
    engine = await store.open()
    ranks = [2**63 - 1, -(2**63), 2**53, 2**53 + 1, 0, -1, 1]
    await _fill(engine, {f"{at}": Note("x", rank) for at, rank in enumerate(ranks)})
    walked = await _walk(engine, ("t",), index="by_rank", limit=2)
    same([ranks[int(name)] for name in walked], sorted(ranks))
    for at, rank in enumerate(ranks):
        same(await _walk(engine, ("t",), index="by_rank", where=(rank,), limit=9), [f"{at}"])


@scans.rule("C20")
async def keys_with_hostile_names_stay_distinct_and_ordered(store: Store) -> None:
    engine = await store.open()
    names = list(hostile.LEGAL_NAMES.values())
    await _fill(engine, {name: Note("x", at) for at, name in enumerate(names)})
    for at, name in enumerate(names):
        same(there(await engine.get(NOTES, (*BOX, name))).value.rank, at, name)
        await _fill(engine, {"inside": Note("y", at)}, ("t", name))
        same(await _walk(engine, ("t", name), limit=9), ["inside"], name)
    same(await _walk(engine, BOX, limit=7), sorted(names))
    same(await _walk(engine, BOX, limit=7, descending=True), sorted(names, reverse=True))
    for name in hostile.REFUSED_NAMES.values():
        await refused(Invalid, engine.get(NOTES, (*BOX, name)), exactly=False)
        await refused(Invalid, engine.get_many(NOTES, [(*BOX, name)]), exactly=False)
        await refused(Invalid, engine.scan(NOTES, ("t", name), limit=1), exactly=False)
        await refused(Invalid, engine.count(NOTES, ("t", name)), exactly=False)


@scans.rule("C18")
async def scans_are_bounded_and_limit_zero_is_empty(store: Store) -> None:
    engine = await store.open()
    await _fill(engine, RANKED)
    for index, prefix in ((None, BOX), ("by_status", ("t",)), ("due", ())):
        for limit in (-1, PAGE_MAX + 1):
            error = await refused(
                LimitExceeded, engine.scan(NOTES, prefix, index=index, limit=limit)
            )
            same(error.limit, PAGE_MAX)
        page = await engine.scan(NOTES, prefix, index=index, limit=0)
        same((page.items, page.cursor), ([], None))


@scans.rule("C19")
async def a_cursor_is_stable_under_concurrent_writes(store: Store) -> None:
    """Between two pages records come and go on both sides, the last one seen among them."""
    engine = await store.open()
    for index, prefix, down in (
        (None, BOX, False),
        (None, BOX, True),
        ("by_rank", ("t",), False),
        ("by_rank", ("t",), True),
    ):
        await _fill(engine, {f"{at}": Note("x", at) for at in range(1, 10)})
        first = await engine.scan(NOTES, prefix, index=index, limit=4, descending=down)
        seen = [record.key[-1] for record in first.items]
        await engine.commit(delete(NOTES, (*BOX, seen[-1])) + delete(NOTES, (*BOX, seen[0])))
        added = {"00": Note("x", 0), "45": Note("x", 4), "55": Note("x", 5), "95": Note("x", 9)}
        await _fill(engine, added)
        rest = await engine.scan(
            NOTES, prefix, index=index, limit=99, cursor=first.cursor, descending=down
        )
        found = [record.key[-1] for record in rest.items]
        untouched = [name for name in map(str, range(1, 10)) if name not in seen]
        same(sorted(set(found) - set(added)), untouched)
        same(len(found), len(set(found)))
        for name in ("00", "95"):
            behind = (name == "00") != down
            same(name in found, not behind, f"{name} is {'behind' if behind else 'ahead'}")
        await engine.commit(delete(NOTES, (*BOX, "45")) + delete(NOTES, (*BOX, "55")))
        await engine.commit(delete(NOTES, (*BOX, "00")) + delete(NOTES, (*BOX, "95")))


@scans.rule("C19")
async def a_cursor_past_the_end_is_empty(store: Store) -> None:
    engine = await store.open()
    await _fill(engine, RANKED)
    page = await engine.scan(NOTES, BOX, limit=3)
    for name in "defg":
        await engine.commit(delete(NOTES, (*BOX, name)))
    rest = await engine.scan(NOTES, BOX, limit=3, cursor=page.cursor)
    same((rest.items, rest.cursor), ([], None))


@scans.rule("C19", "C23")
async def a_cursor_of_another_question_is_refused(store: Store) -> None:
    engine = await store.open()
    await _fill(engine, RANKED)
    by_key = (await engine.scan(NOTES, BOX, limit=1)).cursor
    by_index = (
        await engine.scan(NOTES, ("t",), index="by_status", where=("open",), limit=1)
    ).cursor
    await all_refused(
        CursorRefused,
        engine.scan(NOTES, ("t",), limit=1, cursor=by_key),
        engine.scan(NOTES, ("t2", "box"), limit=1, cursor=by_key),
        engine.scan(NOTES, BOX, limit=1, cursor=by_key, descending=True),
        engine.scan(MOVES, BOX, limit=1, cursor=by_key),
        engine.streams(EVENTS, BOX, limit=1, cursor=by_key),
        engine.scan(NOTES, BOX, limit=1, cursor=by_index),
        engine.scan(NOTES, ("t",), index="by_status", limit=1, cursor=by_index),
        engine.scan(NOTES, ("t",), index="by_status", where=("done",), limit=1, cursor=by_index),
        engine.scan(NOTES, ("t",), index="by_rank", limit=1, cursor=by_index),
        engine.scan(NOTES, ("t2",), index="by_status", where=("open",), limit=1, cursor=by_index),
        engine.scan(NOTES, BOX, limit=1, cursor="not a cursor"),
        engine.scan(NOTES, BOX, limit=1, cursor=""),
    )


@scans.rule("C19", "C23")
async def a_cursor_of_another_store_is_refused(store: Store) -> None:
    engine = await store.open()
    await _fill(engine, RANKED)
    other = await Store(store.subject, store.directory / "other").open()
    await _fill(other, RANKED)
    cursor = (await other.scan(NOTES, BOX, limit=1)).cursor
    await other.close()
    await refused(CursorRefused, engine.scan(NOTES, BOX, limit=1, cursor=cursor))


@scans.rule("C19", durable=True)
async def a_cursor_survives_reopening(store: Store) -> None:
    engine = await store.open()
    await _fill(engine, RANKED)
    by_key = (await engine.scan(NOTES, BOX, limit=3)).cursor
    by_rank = (await engine.scan(NOTES, ("t",), index="by_rank", limit=3)).cursor
    engine = await store.reopen(engine)
    rest = await engine.scan(NOTES, BOX, limit=9, cursor=by_key)
    same([record.key[-1] for record in rest.items], list("defg"))
    rest = await engine.scan(NOTES, ("t",), index="by_rank", limit=9, cursor=by_rank)
    same([record.key[-1] for record in rest.items], BY_RANK[3:])


@scans.rule("C19")
async def a_scan_can_go_on_after_any_record(store: Store) -> None:
    engine = await store.open()
    await _fill(engine, RANKED)
    for at, name in enumerate(BY_RANK):
        record = there(await engine.get(NOTES, (*BOX, name)))
        cursor = cursors.at_record(engine.store_id, NOTES, ("t",), record, index="by_rank")
        page = await engine.scan(NOTES, ("t",), index="by_rank", limit=99, cursor=cursor)
        same([found.key[-1] for found in page.items], BY_RANK[at + 1 :])


@scans.rule("C20")
async def a_question_that_does_not_fit_its_index_is_refused(store: Store) -> None:
    engine = await store.open()
    await _fill(engine, RANKED)
    wide: list[tuple[str | None, Key, tuple[Column, ...]]] = [
        ("by_status", (), ()),
        ("by_status", BOX, ()),
        ("due", ("t",), ()),
        ("absent", ("t",), ()),
        (None, BOX, ("open",)),
        ("by_status", ("t",), ("open", 1, 1)),
        ("by_rank", ("t",), (2**63,)),
        ("by_status", ("t",), ("a\0b",)),
        ("by_status", ("t",), ("\ud800",)),
    ]
    for index, prefix, where in wide:
        await refused(Invalid, engine.scan(NOTES, prefix, index=index, where=where, limit=1))
    for index, prefix, group in (
        ("by_status", ("t",), 3),
        ("by_status", ("t",), -1),
        (None, ("t",), 1),
        ("by_status", (), 0),
        ("absent", ("t",), 0),
    ):
        await refused(Invalid, engine.count(NOTES, prefix, index=index, group=group))


@scans.rule("C18")
async def counting_agrees_with_scanning(store: Store) -> None:
    engine = await store.open()
    same(await engine.count(NOTES, ()), {})
    await _fill(engine, RANKED)
    await _fill(engine, {"x": Note("open", 1, due_s=1)}, ("t2", "box"))
    await engine.commit(delete(NOTES, (*BOX, "a")))
    same(await engine.count(NOTES, ()), {(): 7})
    same(await engine.count(NOTES, ("t",)), {(): 6})
    same(await engine.count(NOTES, BOX), {(): 6})
    same(await engine.count(NOTES, ("nobody",)), {})
    by_status = await engine.count(NOTES, ("t",), index="by_status", group=1)
    same(by_status, {("open",): 3, ("done",): 1, ("",): 1})
    by_rank = await engine.count(NOTES, ("t",), index="by_rank", group=2)
    expected = {(1, None): 2, (1, 7): 1, (-5, 3): 1, (3, None): 1, (0, None): 1}
    same(by_rank, expected)
    same(await engine.count(NOTES, ("t",), index="by_status"), {(): 5})
    same(await engine.count(NOTES, (), index="due", group=1), {(7,): 1, (3,): 1, (1,): 1})


@scans.rule("C18")
async def many_keys_are_answered_in_their_order(store: Store) -> None:
    engine = await store.open()
    await _fill(engine, RANKED)
    asked = [(*BOX, name) for name in ("c", "never", "a", "c")]
    found = await engine.get_many(NOTES, asked)
    same(
        [record and record.value for record in found], [RANKED["c"], None, RANKED["a"], RANKED["c"]]
    )
    same(await engine.get_many(NOTES, []), [])
    many = [(*BOX, "a")] * PAGE_MAX
    same(len(await engine.get_many(NOTES, many)), PAGE_MAX)
    await refused(LimitExceeded, engine.get_many(NOTES, [*many, (*BOX, "a")]))


@scans.rule("C23")
async def collections_do_not_see_each_other(store: Store) -> None:
    engine = await store.open()
    await engine.commit(put(FACTS, ("t", "x"), Note(rank=1)))
    await engine.commit(put(MOVES, ("t", "g", "x"), Note(rank=2)))
    same(await engine.get(NOTES, ("t", "g", "x")), None)
    same(there(await engine.get(MOVES, ("t", "g", "x"))).value.rank, 2)
    same([r.value.rank for r in (await engine.scan(FACTS, ("t",), limit=9)).items], [1])
