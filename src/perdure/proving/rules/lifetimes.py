"""Rules of a store's life: reopening, closing, damage, and what it was not opened for."""

from __future__ import annotations

import asyncio

from perdure.core.batch import append, check, delete, drop, put, trim
from perdure.core.disk import Disk
from perdure.core.engine import Engine
from perdure.core.errors import Closed, Conflict, Damaged, Invalid
from perdure.core.layouts import Log, Records
from perdure.core.limits import PAGE_MAX
from perdure.core.values import Committed, Finding
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
    there,
)

lifetimes = Chapter()

A = ("t", "a")
B = ("t", "b")
UNKNOWN_RECORDS = Records("unknown_records", Note, key=("tenant", "id"))
UNKNOWN_LOG = Log("unknown_log", Note, key=("tenant", "id"))


@lifetimes.rule("C3", "C5", durable=True)
async def everything_is_there_after_reopening(store: Store) -> None:
    engine = await store.open()
    store_id = engine.store_id
    await engine.commit(
        put(NOTES, ("t", "box", "1"), Note("open", 1, due_s=5, body={"a": [1.5, None]}))
        + put(FACTS, A, Note(), attachment=b"\0\xff")
        + append(EVENTS, A, [Note(rank=1), Note(rank=2)])
    )
    await engine.commit(put(FACTS, A, Note(rank=2), attachment=b"") + put(FACTS, B, Note()))
    await engine.commit(delete(FACTS, B) + trim(EVENTS, A, 2))
    await engine.commit(put(MOVES, ("t", "g", "1"), Note()) + append(PLIES, ("t", "g"), [Note()]))
    before = await stored(engine)
    for _ in range(2):
        engine = await store.reopen(engine)
        same(await stored(engine), before)
        same(engine.store_id, store_id)
        holds(engine.recovered.clean, "a store that was closed opens as if it had crashed")
        same((engine.recovered.cut, engine.recovered.findings), ((), ()))
    same((await engine.commit(put(FACTS, B, Note(), expect=0))).numbers, (3,), "the tombstone")


@lifetimes.rule("C3", durable=True)
async def commits_under_way_when_the_engine_closes_end_whole(store: Store) -> None:
    engine = await store.open()
    await engine.commit(put(FACTS, ("t", "first"), Note()))
    keys = [("t", f"{number}") for number in range(24)]
    large = bytes(1024 * 1024)  # so that they do not fit into one group
    tasks = [
        asyncio.create_task(
            engine.commit(put(FACTS, key, Note(), attachment=large) + append(EVENTS, key, [Note()]))
        )
        for key in keys
    ]
    await asyncio.sleep(0)
    await engine.close()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    engine = await store.open()
    for key, result in zip(keys, results, strict=True):
        acknowledged = isinstance(result, Committed)
        holds(acknowledged or isinstance(result, Closed), f"a commit ended as {result!r}")
        same(await engine.get(FACTS, key) is not None, acknowledged)
        same((await engine.tip(EVENTS, key)).last, int(acknowledged))


@lifetimes.rule("C9")
async def a_closed_engine_says_so_to_everything(store: Store) -> None:
    engine = await store.open()
    await engine.commit(put(FACTS, A, Note()) + append(EVENTS, A, [Note()]))
    await engine.close()
    await all_refused(
        Closed,
        engine.commit(put(FACTS, A, Note())),
        engine.get(FACTS, A),
        engine.get_many(FACTS, [A]),
        engine.get_many(FACTS, []),
        engine.scan(FACTS, ("t",), limit=1),
        engine.count(FACTS, ("t",)),
        engine.read(EVENTS, A, limit=1),
        engine.tip(EVENTS, A),
        engine.wait(EVENTS, A, 0, timeout_s=1),
        engine.streams(EVENTS, ("t",), limit=1),
        _first(engine),
    )
    await engine.close()


@lifetimes.rule("C4")
async def a_collection_the_store_was_not_opened_with_is_refused(store: Store) -> None:
    engine = await store.open()
    known = put(FACTS, A, Note()) + append(EVENTS, A, [Note()])
    for unknown in (
        put(UNKNOWN_RECORDS, A, Note()),
        delete(UNKNOWN_RECORDS, A),
        check(UNKNOWN_RECORDS, A, 0),
        append(UNKNOWN_LOG, A, [Note()]),
        drop(UNKNOWN_LOG, A),
    ):
        await refused(Invalid, engine.commit(known + unknown))
    await all_refused(
        Invalid,
        engine.get(UNKNOWN_RECORDS, A),
        engine.get_many(UNKNOWN_RECORDS, [A]),
        engine.scan(UNKNOWN_RECORDS, ("t",), limit=1),
        engine.count(UNKNOWN_RECORDS, ("t",)),
        engine.read(UNKNOWN_LOG, A, limit=1),
        engine.tip(UNKNOWN_LOG, A),
        engine.wait(UNKNOWN_LOG, A, 0, timeout_s=0),
        engine.streams(UNKNOWN_LOG, ("t",), limit=1),
    )
    same(await stored(engine), [])


@lifetimes.rule("C7")
async def verify_finds_nothing_in_a_sound_store(store: Store) -> None:
    engine = await store.open()
    same([finding async for finding in engine.verify()], [])
    await engine.commit(put(FACTS, A, Note(), attachment=b"x") + append(EVENTS, A, [Note()] * 5))
    await engine.commit(delete(FACTS, A) + trim(EVENTS, A, 3) + append(EVENTS, B, [Note()]))
    await engine.commit(drop(EVENTS, B) + put(NOTES, ("t", "b", "1"), Note("x", 1, due_s=1)))
    same([finding async for finding in engine.verify()], [])


@lifetimes.rule("C17", durable=True)
async def a_backup_holds_all_that_was_acknowledged_and_nothing_by_half(store: Store) -> None:
    engine = await store.open()
    await engine.commit(put(NOTES, ("t", "box", "1"), Note("open", 1, due_s=5), attachment=b"\0"))
    await engine.commit(put(FACTS, A, Note()) + append(EVENTS, A, [Note()] * 5))
    await engine.commit(delete(FACTS, A) + trim(EVENTS, A, 3))
    before = await stored(engine)
    into = store.directory / "copy"
    Disk().make_directory(into)
    told: list[tuple[int, int]] = []
    backing_up = asyncio.create_task(engine.backup(into, lambda *far: told.append(far)))
    written = 0
    while not backing_up.done():
        key = ("t", "later", f"{written}")
        await engine.commit(put(NOTES, key, Note()) + append(EVENTS, B, [Note(rank=written)]))
        written += 1
    snapshot = await backing_up
    same(snapshot.store_id, engine.store_id)
    holds(bool(told) and all(0 <= done <= total for done, total in told), f"progress was {told}")
    restored = await store.restored(into)
    try:
        copy = await restored.open()
        holds(copy.store_id != engine.store_id, "a restored store has the id of another")
        same([finding async for finding in copy.verify()], [])
        for found in before:
            holds(found in await stored(copy), f"the backup lacks {found}")
        last = (await copy.tip(EVENTS, B)).last
        later = await copy.scan(NOTES, ("t", "later"), limit=PAGE_MAX)
        same(len(later.items), last, "commits that are in the backup by half")
        holds(last <= written, "the backup has what was never written")
        await copy.commit(put(FACTS, A, Note(), expect=0))
    finally:
        await restored.close()
    same((await engine.tip(EVENTS, B)).last, written, "the store itself was changed")


@lifetimes.rule("R13")
async def what_a_store_takes_is_told_by_collection(store: Store) -> None:
    engine = await store.open()
    for number in range(40):
        big = put(FACTS, ("t", f"{number}"), Note(body="x" * 10_000), attachment=b"x" * 10_000)
        await engine.commit(big + append(EVENTS, A, [Note(body="x" * 5_000)]))
    await engine.commit(put(NOTES, ("t", "box", "1"), Note("open", 1, due_s=1)))
    usage = await engine.usage()
    facts, events = usage.collections["facts"], usage.collections["events"]
    holds(800_000 <= facts < 1_200_000, f"800,000 bytes of records are said to take {facts}")
    holds(200_000 <= events < 400_000, f"200,000 bytes of entries are said to take {events}")
    parts = sum(usage.collections.values()) + usage.other_bytes + usage.free_bytes
    holds(parts <= usage.total_bytes <= parts + 65_536, f"the parts of {usage} are not the whole")
    await engine.close()
    await refused(Closed, engine.usage())


@lifetimes.rule("C17")
async def what_does_not_outlive_the_process_is_not_backed_up(store: Store) -> None:
    engine = await store.open()
    if not engine.survives.process_crash:
        into = store.directory / "copy"
        Disk().make_directory(into)
        await refused(Invalid, engine.backup(into, lambda done, total: None))
    await engine.close()
    await refused(Closed, engine.backup(store.directory, lambda done, total: None))


@lifetimes.rule("C9")
async def a_sound_engine_accepts_writes_and_counts_them(store: Store) -> None:
    engine = await store.open()
    same(engine.latched, None)
    before, conflicts = engine.stats.commits, engine.stats.conflicts
    for _ in range(3):
        await engine.commit(put(FACTS, A, Note()))
    await refused(Conflict, engine.commit(put(FACTS, A, Note(), expect=0)))
    same((engine.stats.commits - before, engine.stats.conflicts - conflicts), (3, 1))
    holds(1 <= engine.stats.groups <= engine.stats.commits, "groups are counted otherwise")


@lifetimes.rule("C7", "C8", durable=True, damaging=True)
async def a_damaged_record_is_named_and_the_rest_goes_on(store: Store) -> None:
    engine = await store.open()
    names = ("1", "2", "3")
    for name in names:
        await engine.commit(put(NOTES, ("t", "box", name), Note("open", 1, due_s=1, body="sound")))
    await engine.close()
    hurt = ("t", "box", "2")
    store.damage(hurt)
    found = await store.open_unchecked()
    try:
        damaged = await refused(Damaged, found.get(NOTES, hurt), exactly=False)
        holds("box/2" in damaged.where, f"the damage is said to be in {damaged.where}")
        await refused(Damaged, found.get_many(NOTES, [hurt]), exactly=False)
        before = await found.scan(NOTES, ("t", "box"), limit=9)
        same([record.key[-1] for record in before.items], ["1"])
        stopped = found.scan(NOTES, ("t", "box"), limit=9, cursor=before.cursor)
        resume = (await refused(Damaged, stopped, exactly=False)).resume
        behind = await found.scan(NOTES, ("t", "box"), limit=9, cursor=resume)
        same([record.key[-1] for record in behind.items], ["3"])
        for name in ("1", "3"):
            same(there(await found.get(NOTES, ("t", "box", name))).value.body, "sound")
        first = await found.scan(NOTES, ("t", "box"), limit=1)
        same([record.key[-1] for record in first.items], ["1"])
        listed = [finding.where async for finding in found.verify()]
        holds(any("box/2" in where for where in listed), f"verify lists only {listed}")
        await found.commit(put(FACTS, A, Note()))
    finally:
        await found.close()


@lifetimes.rule("C18")
async def a_long_log_is_read_from_its_end_as_quickly_as_a_short_one(store: Store) -> None:
    """Reading costs what is read: 200 pages near the end of a log of 20,000 entries."""
    engine = await store.open()
    for _ in range(20):
        await engine.commit(append(EVENTS, A, [Note(body="x" * 50)] * PAGE_MAX))
    async with asyncio.timeout(20):
        for _ in range(200):
            same(len(await engine.read(EVENTS, A, after=19_990, limit=10)), 10)


async def _first(engine: Engine) -> Finding:
    return await anext(engine.verify())
