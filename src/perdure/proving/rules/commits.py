"""Rules of the one write door: versions, preconditions, atomicity, partitions, operation ids."""

from __future__ import annotations

import asyncio

from perdure.core.batch import Batch, append, check, delete, drop, put, trim
from perdure.core.errors import (
    CommitUnknown,
    Conflict,
    Invalid,
    LimitExceeded,
    PerdureError,
    SpansPartitions,
)
from perdure.core.limits import BATCH_OPS_MAX, OPERATION_KEPT_S, TOMBSTONE_KEPT_S
from perdure.core.values import Committed, Entry
from perdure.engines.failing import Failing, unknown_committed, unknown_lost
from perdure.proving import hostile
from perdure.proving.rules import Chapter
from perdure.proving.subject import (
    EVENTS,
    FACTS,
    MOVES,
    NOTES,
    PLIES,
    Note,
    Store,
    holds,
    refused,
    same,
    stored,
    there,
)

commits = Chapter()

A = ("t", "a")
B = ("t", "b")


def _numbers(committed: Committed) -> tuple[int, ...]:
    return committed.numbers


@commits.rule("C5")
async def versions_rise_by_one_with_each_write(store: Store) -> None:
    engine = await store.open()
    for version in range(1, 5):
        same(_numbers(await engine.commit(put(FACTS, A, Note(rank=version)))), (version,))
        record = there(await engine.get(FACTS, A))
        same((record.version, record.value.rank), (version, version))


@commits.rule("C5", "C23")
async def a_deletion_leaves_a_tombstone_that_keeps_the_version(store: Store) -> None:
    engine = await store.open()
    await engine.commit(put(FACTS, A, Note(rank=1)))
    same(_numbers(await engine.commit(delete(FACTS, A, expect=1))), (2,))
    same(await engine.get(FACTS, A), None)
    same((await engine.scan(FACTS, ("t",), limit=10)).items, [])
    same(_numbers(await engine.commit(put(FACTS, A, Note(rank=2), expect=0))), (3,))


@commits.rule("C5")
async def expecting_zero_means_absent(store: Store) -> None:
    engine = await store.open()
    same(_numbers(await engine.commit(check(FACTS, A, 0) + delete(FACTS, B, expect=0))), (0, 0))
    await engine.commit(put(FACTS, A, Note(), expect=0))
    conflict = await refused(Conflict, engine.commit(put(FACTS, A, Note(), expect=0)))
    same((conflict.expected, conflict.actual), (0, 1))
    await engine.commit(delete(FACTS, A))
    same(_numbers(await engine.commit(check(FACTS, A, 0))), (0,))


@commits.rule("C5")
async def deleting_what_is_absent_changes_nothing(store: Store) -> None:
    engine = await store.open()
    await engine.commit(delete(FACTS, A) + put(FACTS, B, Note()))
    same(_numbers(await engine.commit(put(FACTS, A, Note(), expect=0))), (1,))
    await engine.commit(delete(FACTS, A))
    same(_numbers(await engine.commit(delete(FACTS, A))), (2,))
    same(_numbers(await engine.commit(put(FACTS, A, Note()))), (3,))


@commits.rule("C5")
async def a_conflict_names_expected_and_actual_and_nothing_is_applied(store: Store) -> None:
    engine = await store.open()
    await engine.commit(put(FACTS, A, Note(rank=1)) + append(EVENTS, A, [Note(rank=1)]))
    before = await stored(engine)
    whole = put(FACTS, B, Note()) + append(EVENTS, A, [Note()]) + append(EVENTS, B, [Note()])
    for condition, expected, actual in (
        (put(FACTS, A, Note(), expect=7), 7, 1),
        (delete(FACTS, A, expect=2), 2, 1),
        (check(FACTS, A, 0), 0, 1),
        (check(FACTS, ("t", "never"), 3), 3, 0),
        (append(EVENTS, A, [Note()], after=0), 0, 2),
    ):
        conflict = await refused(Conflict, engine.commit(whole + condition))
        same((conflict.expected, conflict.actual), (expected, actual), conflict.where)
        same(await stored(engine), before)


@commits.rule("C5")
async def of_writers_racing_with_one_version_exactly_one_wins(store: Store) -> None:
    engine = await store.open()
    await engine.commit(put(FACTS, A, Note()))
    for version in range(1, 6):
        results = await asyncio.gather(
            *(engine.commit(put(FACTS, A, Note(rank=i), expect=version)) for i in range(20)),
            return_exceptions=True,
        )
        winners = [i for i, result in enumerate(results) if isinstance(result, Committed)]
        losers = [result for result in results if isinstance(result, Conflict)]
        same((len(winners), len(losers)), (1, 19))
        same({(lost.expected, lost.actual) for lost in losers}, {(version, version + 1)})
        same(there(await engine.get(FACTS, A)).value.rank, winners[0], "the value is a loser's")


@commits.rule("C5")
async def of_racing_creators_exactly_one_wins(store: Store) -> None:
    engine = await store.open()
    racing = (engine.commit(put(FACTS, A, Note(rank=i), expect=0)) for i in range(20))
    results = await asyncio.gather(*racing, return_exceptions=True)
    same(sum(isinstance(result, Committed) for result in results), 1)
    same(sum(isinstance(result, Conflict) for result in results), 19)


@commits.rule("C5")
async def counting_by_compare_and_set_loses_no_step(store: Store) -> None:
    engine = await store.open()
    await engine.commit(put(FACTS, A, Note(rank=0)))

    async def step() -> None:
        while True:
            record = there(await engine.get(FACTS, A))
            raised = Note(rank=record.value.rank + 1)
            try:
                await engine.commit(put(FACTS, A, raised, expect=record.version))
                return
            except Conflict:
                continue

    await asyncio.gather(*(step() for _ in range(30)))
    same(there(await engine.get(FACTS, A)).value.rank, 30, "steps were lost or counted twice")


@commits.rule("C4")
async def a_batch_applies_all_its_operations_at_once(store: Store) -> None:
    engine = await store.open()
    await engine.commit(
        put(FACTS, A, Note(rank=1)) + put(FACTS, B, Note()) + append(EVENTS, A, [Note(), Note()])
    )
    committed = await engine.commit(
        put(FACTS, A, Note(rank=2), expect=1, attachment=b"\0\xff")
        + delete(FACTS, B)
        + check(FACTS, ("t", "c"), 0)
        + append(EVENTS, A, [Note(rank=3)], after=2)
        + trim(EVENTS, A, 3)
        + append(EVENTS, B, [Note(rank=4)])
        + drop(EVENTS, B)
        + append(EVENTS, B, [Note(rank=5)], after=0)
    )
    same(_numbers(committed), (2, 2, 0, 3, 3, 1, 2, 1))
    same(await engine.get(FACTS, B), None)
    same(await engine.read(EVENTS, A, after=2, limit=9), [Entry(3, Note(rank=3))])
    same(await engine.read(EVENTS, B, limit=9), [Entry(1, Note(rank=5))])


@commits.rule("C4")
async def an_empty_batch_commits_nothing(store: Store) -> None:
    engine = await store.open()
    same(_numbers(await engine.commit(Batch())), ())
    same(_numbers(await engine.commit(Batch().named("op"))), ())
    same(_numbers(await engine.commit(put(FACTS, A, Note()).named("op"))), (1,))


@commits.rule("C4")
async def a_batch_that_writes_a_record_twice_is_refused(store: Store) -> None:
    engine = await store.open()
    await refused(Invalid, engine.commit(put(FACTS, A, Note()) + delete(FACTS, A)))
    same(await stored(engine), [])


@commits.rule("C18")
async def a_batch_over_the_limit_is_refused(store: Store) -> None:
    engine = await store.open()
    many = Batch(append(EVENTS, A, [Note()]).ops * (BATCH_OPS_MAX + 1))
    await refused(LimitExceeded, engine.commit(many))
    same(await stored(engine), [])


@commits.rule("C23")
async def a_batch_that_spans_two_partitions_is_refused(store: Store) -> None:
    engine = await store.open()
    one = put(MOVES, ("t", "g1", "1"), Note()) + append(PLIES, ("t", "g1"), [Note()])
    for other in (
        put(MOVES, ("t", "g2", "1"), Note()),
        check(MOVES, ("t", "g2", "1"), 0),
        append(PLIES, ("t", "g2"), [Note()]),
        put(FACTS, A, Note()),
    ):
        await refused(SpansPartitions, engine.commit(one + other))
    same(await stored(engine), [])
    same(_numbers(await engine.commit(one)), (1, 1))


@commits.rule("C22")
async def a_repeated_operation_id_has_one_effect_and_the_first_answer(store: Store) -> None:
    engine = await store.open()
    batch = (put(FACTS, A, Note(), expect=0) + append(EVENTS, A, [Note()])).named("op")
    first = await engine.commit(batch)
    await engine.commit(put(FACTS, A, Note(rank=9)) + append(EVENTS, A, [Note(rank=9)]))
    before = await stored(engine)
    same(await engine.commit(batch), first, "preconditions are not looked at again")
    same(await stored(engine), before)


@commits.rule("C22")
async def other_content_under_a_used_operation_id_is_refused(store: Store) -> None:
    engine = await store.open()
    await engine.commit(put(FACTS, A, Note(rank=1)).named("op"))
    before = await stored(engine)
    for other in (
        put(FACTS, A, Note(rank=2)),
        put(FACTS, B, Note(rank=1)),
        put(FACTS, A, Note(rank=1), expect=1),
        delete(FACTS, A),
    ):
        await refused(Invalid, engine.commit(other.named("op")))
    same(await stored(engine), before)


@commits.rule("C22")
async def operation_ids_belong_to_a_partition(store: Store) -> None:
    engine = await store.open()
    for batch in (
        put(FACTS, A, Note()),
        put(MOVES, ("t", "g1", "1"), Note()),
        put(MOVES, ("t", "g2", "1"), Note()),
    ):
        same(_numbers(await engine.commit(batch.named("op"))), (1,))


@commits.rule("C22")
async def a_refused_batch_does_not_use_up_its_operation_id(store: Store) -> None:
    engine = await store.open()
    await refused(Conflict, engine.commit(put(FACTS, A, Note(), expect=1).named("op")))
    same(_numbers(await engine.commit(put(FACTS, A, Note(), expect=0).named("op"))), (1,))


@commits.rule("C22")
async def repeats_that_race_have_one_effect(store: Store) -> None:
    engine = await store.open()
    batch = append(EVENTS, A, [Note()]).named("op")
    answers = await asyncio.gather(*(engine.commit(batch) for _ in range(20)))
    same({answer.numbers for answer in answers}, {(1,)})
    same((await engine.tip(EVENTS, A)).last, 1)


@commits.rule("C22", durable=True)
async def operation_ids_are_known_after_reopening(store: Store) -> None:
    engine = await store.open()
    batch = append(EVENTS, A, [Note(), Note()]).named("op")
    first = await engine.commit(batch)
    engine = await store.reopen(engine)
    same(await engine.commit(batch), first)
    await refused(Invalid, engine.commit(append(EVENTS, A, [Note()]).named("op")))
    same((await engine.tip(EVENTS, A)).last, 2)


@commits.rule("C22")
async def an_operation_id_is_known_for_a_day(store: Store) -> None:
    engine = await store.open()
    batch = append(EVENTS, A, [Note()]).named("op")
    first = await engine.commit(batch)
    store.clock.late_s = OPERATION_KEPT_S - 60
    for number in range(20):
        await engine.commit(append(EVENTS, B, [Note()]).named(f"later {number}"))
    same(await engine.commit(batch), first)
    same((await engine.tip(EVENTS, A)).last, 1)


@commits.rule("C23")
async def a_tombstone_outlives_operation_ids_and_leases(store: Store) -> None:
    engine = await store.open()
    await engine.commit(put(FACTS, A, Note()))
    await engine.commit(delete(FACTS, A))
    store.clock.late_s = TOMBSTONE_KEPT_S - 60
    for number in range(20):
        await engine.commit(put(FACTS, ("t", f"{number}"), Note()) + delete(FACTS, B))
        await engine.commit(delete(FACTS, ("t", f"{number}")))
    same(_numbers(await engine.commit(put(FACTS, A, Note(), expect=0))), (3,))


@commits.rule("C22", "C4")
async def an_unknown_outcome_is_resolved_by_operation_id(store: Store) -> None:
    engine = await store.open(
        around=lambda below: Failing(below, [unknown_committed(at=1), unknown_lost(at=3)])
    )
    for stream in (A, B):
        batch = (put(FACTS, stream, Note(), expect=0) + append(EVENTS, stream, [Note()])).named(
            f"op {stream}"
        )
        await refused(CommitUnknown, engine.commit(batch))
        present = await engine.get(FACTS, stream) is not None
        same(present, stream == A)
        same((await engine.tip(EVENTS, stream)).last, int(present), "half a batch is there")
        same(_numbers(await engine.commit(batch)), (1, 1))
        same((await engine.tip(EVENTS, stream)).last, 1)


@commits.rule("C22", "C4")
async def cancelling_the_caller_leaves_all_or_nothing_and_a_repeat_completes_it(
    store: Store,
) -> None:
    engine = await store.open()
    for number in range(20):
        key = ("t", f"{number}")
        batch = (put(FACTS, key, Note(), expect=0) + append(EVENTS, key, [Note()])).named(
            f"op {number}"
        )
        caller = asyncio.create_task(engine.commit(batch))
        for _ in range(number % 5):
            await asyncio.sleep(0)
        caller.cancel()
        await asyncio.gather(caller, return_exceptions=True)
        same(_numbers(await engine.commit(batch)), (1, 1))
        same((await engine.tip(EVENTS, key)).last, 1)
        same(_numbers(await engine.commit(check(FACTS, key, 1))), (1,))


@commits.rule("C23")
async def the_owner_of_a_deleted_record_cannot_write_to_its_successor(store: Store) -> None:
    engine = await store.open()
    for recreated in range(3):
        await engine.commit(put(FACTS, A, Note(status="mine"), expect=0))
        record = there(await engine.get(FACTS, A))
        same(record.version, 2 * recreated + 1)
        await engine.commit(delete(FACTS, A))
        for stale in (
            put(FACTS, A, Note(), expect=record.version),
            check(FACTS, A, record.version),
            delete(FACTS, A, expect=record.version + 1),
        ):
            await refused(Conflict, engine.commit(stale))


@commits.rule("C20")
async def hostile_but_legal_values_come_back_unchanged(store: Store) -> None:
    engine = await store.open()
    values = {**hostile.LEGAL_VALUES, "long": "x" * 1_000_000}
    for name, value in values.items():
        await engine.commit(
            put(NOTES, ("t", "values", name), Note(body=value))
            + append(EVENTS, ("t", name), [Note(body=value)])
        )
    for name, value in values.items():
        record = there(await engine.get(NOTES, ("t", "values", name)))
        same(repr(record.value.body), repr(value), name)
        (entry,) = await engine.read(EVENTS, ("t", name), limit=1)
        same(repr(entry.value.body), repr(value), name)


@commits.rule("C4")
async def an_attachment_belongs_to_its_version(store: Store) -> None:
    engine = await store.open()
    for attachment in (None, b"", b"\0", bytes(range(256)) * 300, b"x", None):
        await engine.commit(put(FACTS, A, Note(), attachment=attachment))
        record = there(await engine.get(FACTS, A))
        same(record.attachment, attachment)
        (scanned,) = (await engine.scan(FACTS, ("t",), limit=1)).items
        same(scanned.attachment, attachment)


@commits.rule("C3", "C5")
async def concurrent_writers_and_readers_agree_in_the_end(store: Store) -> None:
    """Writers of shared and of own keys, readers in between; what was acknowledged is there."""
    engine = await store.open()
    acknowledged: dict[str, int] = {}

    async def write(writer: int) -> None:
        for turn in range(8):
            own = ("t", f"own {writer}")
            committed = await engine.commit(
                put(FACTS, own, Note(rank=turn), expect=turn)
                + put(FACTS, A, Note(rank=writer))
                + append(EVENTS, B, [Note(rank=writer, due_s=turn)])
            )
            acknowledged[own[1]] = committed.numbers[0]

    async def read() -> None:
        for _ in range(8):
            known = dict(acknowledged)
            page = await engine.scan(FACTS, ("t",), limit=100)
            seen = {record.key[1]: record.version for record in page.items}
            for own, version in known.items():
                holds(seen.get(own, 0) >= version, f"{own} was acknowledged and is not seen")
            await engine.read(EVENTS, B, limit=100)

    await asyncio.gather(*(write(i) for i in range(8)), *(read() for _ in range(4)))
    record = there(await engine.get(FACTS, A))
    same(record.version, 64)
    entries = await engine.read(EVENTS, B, limit=100)
    for writer in range(8):
        own_turns = [e.value.due_s for e in entries if e.value.rank == writer]
        same(own_turns, list(range(8)), "one writer's entries are out of its order")


@commits.rule("C20")
async def an_operation_id_is_text_like_any_other(store: Store) -> None:
    engine = await store.open()
    for number, name in enumerate(hostile.LEGAL_NAMES.values(), 1):
        same(_numbers(await engine.commit(append(EVENTS, A, [Note()]).named(name))), (number,))
    for name in hostile.REFUSED_NAMES.values():
        try:
            Batch().named(name)
        except PerdureError as error:
            holds(isinstance(error, Invalid), f"{name!r} is refused as {type(error).__name__}")
        else:
            holds(False, f"{name!r} became an operation id")
