"""Rules of logs: numbers without holes, trims, drops and incarnations, waiting, listing."""

from __future__ import annotations

import asyncio

from perdure.core.batch import append, drop, put, trim
from perdure.core.errors import (
    Closed,
    Conflict,
    CursorRefused,
    Invalid,
    LimitExceeded,
    Trimmed,
)
from perdure.core.limits import PAGE_MAX
from perdure.core.values import Entry, Tip
from perdure.proving import hostile
from perdure.proving.rules import Chapter
from perdure.proving.subject import (
    EVENTS,
    FACTS,
    PLIES,
    Note,
    Store,
    all_refused,
    holds,
    refused,
    same,
)

logs = Chapter()

A = ("t", "a")
B = ("t", "b")
SOON_S = 5.0
"""Far longer than anything here takes; who waits this long has slept through a commit."""


def _ranks(entries: list[Entry[Note]]) -> list[int]:
    return [entry.value.rank for entry in entries]


def _notes(*ranks: int) -> list[Note]:
    return [Note(rank=rank) for rank in ranks]


@logs.rule("C6")
async def numbers_run_from_one_without_holes(store: Store) -> None:
    engine = await store.open()
    same(await engine.tip(EVENTS, A), Tip())
    for size in (1, 3, 2):
        await engine.commit(append(EVENTS, A, [Note()] * size))
    same(await engine.tip(EVENTS, A), Tip(1, 1, 6))
    entries = await engine.read(EVENTS, A, limit=100)
    same([entry.seq for entry in entries], [1, 2, 3, 4, 5, 6])


@logs.rule("C6")
async def numbers_stay_dense_with_many_writers(store: Store) -> None:
    engine = await store.open()

    async def write(writer: int) -> list[int]:
        lasts = []
        for turn in range(10):
            committed = await engine.commit(
                append(EVENTS, A, _notes(1000 * writer + 2 * turn, 1000 * writer + 2 * turn + 1))
            )
            lasts.append(committed.numbers[0])
        return lasts

    answered = await asyncio.gather(*(write(writer) for writer in range(10)))
    same(sorted(last for lasts in answered for last in lasts), list(range(2, 201, 2)))
    entries = await engine.read(EVENTS, A, limit=PAGE_MAX)
    same([entry.seq for entry in entries], list(range(1, 201)))
    for writer, lasts in enumerate(answered):
        same(lasts, sorted(lasts))
        for turn, last in enumerate(lasts):
            pair = _ranks(entries[last - 2 : last])
            same(pair, [1000 * writer + 2 * turn, 1000 * writer + 2 * turn + 1])


@logs.rule("C6")
async def a_tailing_reader_misses_nothing(store: Store) -> None:
    engine = await store.open()
    writers, turns = 6, 10

    async def write(writer: int) -> None:
        for turn in range(turns):
            await engine.commit(append(EVENTS, A, [Note(rank=writer, due_s=turn)]))

    async def tail() -> list[int]:
        seen: list[int] = []
        while len(seen) < writers * turns:
            await engine.wait(EVENTS, A, len(seen), timeout_s=SOON_S)
            page = await engine.read(EVENTS, A, after=len(seen), limit=7)
            holds(bool(page), "a waiter was woken, or waited in vain, with nothing to read")
            seen += [entry.seq for entry in page]
        return seen

    tails = [asyncio.create_task(tail()) for _ in range(3)]
    await asyncio.gather(*(write(writer) for writer in range(writers)))
    for seen in await asyncio.gather(*tails):
        same(seen, list(range(1, writers * turns + 1)))


@logs.rule("C5", "C6")
async def an_append_can_say_after_which_number(store: Store) -> None:
    engine = await store.open()
    await engine.commit(append(EVENTS, A, _notes(1, 2), after=0))
    for after in (0, 1, 3):
        conflict = await refused(Conflict, engine.commit(append(EVENTS, A, [Note()], after=after)))
        same((conflict.expected, conflict.actual), (after, 2))
    await engine.commit(append(EVENTS, A, _notes(3), after=2))
    racing = (engine.commit(append(EVENTS, A, [Note()], after=3)) for _ in range(10))
    results = await asyncio.gather(*racing, return_exceptions=True)
    same(sum(isinstance(result, Conflict) for result in results), 9)
    same((await engine.tip(EVENTS, A)).last, 4)


@logs.rule("C6")
async def one_batch_may_append_to_a_stream_more_than_once(store: Store) -> None:
    engine = await store.open()
    committed = await engine.commit(
        append(EVENTS, A, _notes(1)) + append(EVENTS, B, _notes(9)) + append(EVENTS, A, _notes(2))
    )
    same(committed.numbers, (1, 1, 2))
    same(_ranks(await engine.read(EVENTS, A, limit=9)), [1, 2])


@logs.rule("C6")
async def streams_of_one_name_in_two_logs_are_two_streams(store: Store) -> None:
    engine = await store.open()
    await engine.commit(append(EVENTS, A, _notes(1, 2)))
    await engine.commit(append(PLIES, A, _notes(3)))
    await engine.commit(append(EVENTS, ("t2", "a"), _notes(4)))
    same(_ranks(await engine.read(EVENTS, A, limit=9)), [1, 2])
    same(_ranks(await engine.read(PLIES, A, limit=9)), [3])
    same(_ranks(await engine.read(EVENTS, ("t2", "a"), limit=9)), [4])


@logs.rule("C18")
async def reading_is_bounded_and_past_the_end_is_empty(store: Store) -> None:
    engine = await store.open()
    await engine.commit(append(EVENTS, A, _notes(*range(1, 8))))
    same(_ranks(await engine.read(EVENTS, A, after=2, limit=3)), [3, 4, 5])
    same(await engine.read(EVENTS, A, limit=0), [])
    for after in (7, 8, 10**12, 2**63 - 1, 2**63, 10**30):
        same(await engine.read(EVENTS, A, after=after, limit=PAGE_MAX), [], f"after {after}")
    same(await engine.read(EVENTS, ("t", "never"), limit=PAGE_MAX), [])
    for limit in (-1, PAGE_MAX + 1):
        error = await refused(LimitExceeded, engine.read(EVENTS, A, limit=limit))
        same(error.limit, PAGE_MAX)
    await refused(Invalid, engine.read(EVENTS, A, after=-1, limit=1))


@logs.rule("C6")
async def a_trimmed_prefix_names_the_first_kept(store: Store) -> None:
    engine = await store.open()
    await engine.commit(append(EVENTS, A, _notes(1, 2, 3, 4, 5)))
    same((await engine.commit(trim(EVENTS, A, 4))).numbers, (4,))
    same(await engine.tip(EVENTS, A), Tip(1, 4, 5))
    for after in (0, 2):
        trimmed = await refused(Trimmed, engine.read(EVENTS, A, after=after, limit=9))
        same(trimmed.first_kept, 4)
    same(_ranks(await engine.read(EVENTS, A, after=3, limit=9)), [4, 5])
    same((await engine.commit(trim(EVENTS, A, 2))).numbers, (4,), "a trim never gives back")


@logs.rule("C6")
async def numbers_go_on_after_everything_was_trimmed(store: Store) -> None:
    engine = await store.open()
    await engine.commit(append(EVENTS, A, _notes(1, 2)))
    same((await engine.commit(trim(EVENTS, A, 100))).numbers, (3,))
    same(await engine.tip(EVENTS, A), Tip(1, 3, 2))
    same(await engine.read(EVENTS, A, after=2, limit=9), [])
    await refused(Trimmed, engine.read(EVENTS, A, limit=9))
    same((await engine.commit(append(EVENTS, A, _notes(3), after=2))).numbers, (3,))
    same(_ranks(await engine.read(EVENTS, A, after=2, limit=9)), [3])


@logs.rule("C6", "C23")
async def a_drop_starts_a_new_incarnation(store: Store) -> None:
    engine = await store.open()
    await engine.commit(append(EVENTS, A, _notes(1, 2)))
    same(_ranks(await engine.read(EVENTS, A, incarnation=1, limit=9)), [1, 2])
    same((await engine.commit(drop(EVENTS, A))).numbers, (2,))
    same(await engine.tip(EVENTS, A), Tip(2, 1, 0))
    await refused(CursorRefused, engine.read(EVENTS, A, incarnation=1, limit=9))
    await engine.commit(append(EVENTS, A, _notes(7), after=0))
    same(_ranks(await engine.read(EVENTS, A, limit=9)), [7])
    await refused(CursorRefused, engine.read(EVENTS, A, after=1, incarnation=1, limit=9))
    same(_ranks(await engine.read(EVENTS, A, incarnation=2, limit=9)), [7])
    await refused(CursorRefused, engine.read(EVENTS, A, incarnation=3, limit=9))


@logs.rule("C6")
async def dropping_or_trimming_what_was_never_written_changes_nothing(store: Store) -> None:
    engine = await store.open()
    same((await engine.commit(drop(EVENTS, A) + trim(EVENTS, B, 9))).numbers, (1, 1))
    same(await engine.tip(EVENTS, A), Tip())
    await engine.commit(append(EVENTS, A, _notes(1)))
    await engine.commit(drop(EVENTS, A))
    same((await engine.commit(drop(EVENTS, A))).numbers, (2,))
    same(await engine.tip(EVENTS, A), Tip(2, 1, 0))


@logs.rule("C6")
async def a_trimmed_stream_can_be_dropped(store: Store) -> None:
    engine = await store.open()
    await engine.commit(append(EVENTS, A, _notes(1, 2)) + trim(EVENTS, A, 3))
    same((await engine.commit(drop(EVENTS, A) + append(EVENTS, A, _notes(5)))).numbers, (2, 1))
    same(await engine.tip(EVENTS, A), Tip(2, 1, 1))


@logs.rule("C6", "C19", "C23", durable=True)
async def numbers_and_incarnations_survive_reopening(store: Store) -> None:
    engine = await store.open()
    await engine.commit(append(EVENTS, A, _notes(1, 2, 3)) + trim(EVENTS, A, 3))
    await engine.commit(append(EVENTS, B, _notes(1)) + drop(EVENTS, B))
    await engine.commit(append(EVENTS, ("t", "c"), _notes(1)) + trim(EVENTS, ("t", "c"), 9))
    engine = await store.reopen(engine)
    same(await engine.tip(EVENTS, A), Tip(1, 3, 3))
    await refused(Trimmed, engine.read(EVENTS, A, after=1, limit=9))
    same(await engine.tip(EVENTS, B), Tip(2, 1, 0))
    await refused(CursorRefused, engine.read(EVENTS, B, incarnation=1, limit=9))
    same((await engine.commit(append(EVENTS, ("t", "c"), _notes(2)))).numbers, (2,))


@logs.rule("C6")
async def a_wait_ends_at_once_when_there_is_something_to_read(store: Store) -> None:
    engine = await store.open()
    await engine.commit(append(EVENTS, A, _notes(1, 2)))
    async with asyncio.timeout(SOON_S / 2):
        same(await engine.wait(EVENTS, A, 0, timeout_s=SOON_S), Tip(1, 1, 2))
        same(await engine.wait(EVENTS, A, 1, timeout_s=SOON_S), Tip(1, 1, 2))


@logs.rule("C6")
async def a_wait_in_vain_ends_with_the_tip(store: Store) -> None:
    engine = await store.open()
    await engine.commit(append(EVENTS, A, _notes(1)))
    async with asyncio.timeout(SOON_S):
        for timeout_s in (0.0, 0.01, -1.0):
            same(await engine.wait(EVENTS, A, 1, timeout_s=timeout_s), Tip(1, 1, 1))
        same(await engine.wait(EVENTS, B, 0, timeout_s=0.01), Tip())


@logs.rule("C6")
async def no_commit_is_slept_through(store: Store) -> None:
    """The commit lands before, while and after the waiter looks; other streams are no answer."""
    engine = await store.open()
    for last in range(60):
        async with asyncio.timeout(SOON_S):
            waiting = [
                asyncio.create_task(engine.wait(EVENTS, A, last, timeout_s=2 * SOON_S))
                for _ in range(3)
            ]
            for _ in range(last % 6):
                await asyncio.sleep(0)
            await engine.commit(append(EVENTS, B, [Note()]) + put(FACTS, A, Note()))
            await engine.commit(append(EVENTS, A, [Note()]))
            for tip in await asyncio.gather(*waiting):
                same(tip.last, last + 1)


@logs.rule("C6")
async def whoever_waits_while_the_engine_closes_is_told(store: Store) -> None:
    engine = await store.open()
    waiting = asyncio.create_task(engine.wait(EVENTS, A, 0, timeout_s=SOON_S))
    await asyncio.sleep(0)
    await engine.close()
    async with asyncio.timeout(SOON_S / 2):
        await refused(Closed, waiting)


@logs.rule("C18", "C19")
async def streams_are_listed_by_key_in_pages(store: Store) -> None:
    engine = await store.open()
    names = ["a", "ab", "b", "c", "d"]
    for name in reversed(names):
        await engine.commit(append(EVENTS, ("t", name), [Note()]))
    await engine.commit(append(EVENTS, ("t2", "a"), [Note()]))
    for limit in (1, 2, 5, 100):
        found, cursor = [], None
        while True:
            page = await engine.streams(EVENTS, ("t",), limit=limit, cursor=cursor)
            found += page.items
            if (cursor := page.cursor) is None:
                break
        same(found, [("t", name) for name in names])
    same((await engine.streams(EVENTS, ("t",), limit=0)).items, [])
    same((await engine.streams(EVENTS, ("nobody",), limit=9)).items, [])
    same(len((await engine.streams(EVENTS, (), limit=9)).items), 6)
    await refused(LimitExceeded, engine.streams(EVENTS, ("t",), limit=PAGE_MAX + 1))
    cursor = (await engine.streams(EVENTS, ("t",), limit=1)).cursor
    for log, prefix in ((EVENTS, ("t2",)), (EVENTS, ()), (PLIES, ("t",))):
        await refused(CursorRefused, engine.streams(log, prefix, limit=1, cursor=cursor))


@logs.rule("C6")
async def only_streams_with_entries_are_listed(store: Store) -> None:
    engine = await store.open()
    for name in ("dropped", "kept", "trimmed"):
        await engine.commit(append(EVENTS, ("t", name), _notes(1, 2)))
    await engine.commit(drop(EVENTS, ("t", "dropped")) + trim(EVENTS, ("t", "trimmed"), 9))
    await engine.commit(trim(EVENTS, ("t", "kept"), 2))
    same((await engine.streams(EVENTS, ("t",), limit=9)).items, [("t", "kept")])
    await engine.commit(append(EVENTS, ("t", "trimmed"), _notes(3)))
    same((await engine.streams(EVENTS, ("t",), limit=9)).items, [("t", "kept"), ("t", "trimmed")])


@logs.rule("C20")
async def streams_with_hostile_names_stay_distinct(store: Store) -> None:
    engine = await store.open()
    names = list(hostile.LEGAL_NAMES.values())
    for rank, name in enumerate(names):
        await engine.commit(append(EVENTS, ("t", name), [Note(rank=rank)]))
    for rank, name in enumerate(names):
        same(_ranks(await engine.read(EVENTS, ("t", name), limit=9)), [rank], name)
    listed = (await engine.streams(EVENTS, ("t",), limit=PAGE_MAX)).items
    same(listed, sorted(("t", name) for name in names))
    for name in hostile.REFUSED_NAMES.values():
        await all_refused(
            Invalid,
            engine.read(EVENTS, ("t", name), limit=1),
            engine.tip(EVENTS, ("t", name)),
            engine.wait(EVENTS, ("t", name), 0, timeout_s=0),
            exactly=False,
        )
