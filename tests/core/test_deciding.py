"""The pure function that decides a batch."""

from typing import Any

import pytest

from perdure.core.batch import Batch, append, check, delete, drop, put, trim
from perdure.core.deciding import Facts, LogWrite, RecordWrite, decide, places
from perdure.core.errors import Conflict
from perdure.core.layouts import Log, Records
from perdure.core.values import Tip

NOTES: Records[Any] = Records("notes", Any, key=("tenant", "id"))  # type: ignore[arg-type]
EVENTS: Log[Any] = Log("events", Any, key=("tenant", "id"))  # type: ignore[arg-type]
A = ("t", "a")
B = ("t", "b")


def run(facts: Facts, *batches: Batch) -> list[tuple[int, ...]]:
    return [decide(batch, facts).numbers for batch in batches]


# proves C5
def test_versions_rise_by_one_through_deletions() -> None:
    facts = Facts()
    numbers = run(facts, put(NOTES, A, 1), put(NOTES, A, 2), delete(NOTES, A), put(NOTES, A, 3))
    assert numbers == [(1,), (2,), (3,), (4,)]


# proves C23
def test_a_deleted_record_matches_only_zero() -> None:
    facts = Facts()
    run(facts, put(NOTES, A, 1), delete(NOTES, A, expect=1))
    for stale in (check(NOTES, A, 1), check(NOTES, A, 2), put(NOTES, A, 9, expect=2)):
        with pytest.raises(Conflict) as conflict:
            decide(stale, facts)
        assert conflict.value.actual == 0
    assert run(facts, check(NOTES, A, 0), put(NOTES, A, 2, expect=0)) == [(0,), (3,)]


def test_deleting_what_is_absent_changes_nothing() -> None:
    facts = Facts()
    assert decide(delete(NOTES, A), facts).writes == []
    run(facts, put(NOTES, A, 1), delete(NOTES, A))
    decision = decide(delete(NOTES, A, expect=0), facts)
    assert (decision.writes, decision.numbers) == ([], (2,))


def test_a_tombstone_has_no_value_and_blank_columns() -> None:
    facts = Facts()
    run(facts, put(NOTES, A, 1, attachment=b"x"))
    (write,) = decide(delete(NOTES, A), facts).writes
    assert isinstance(write, RecordWrite)
    assert (write.value, write.attachment, write.version) == (None, None, 2)


# proves C4
# proves C5
def test_a_conflict_says_what_was_expected_and_changes_no_fact() -> None:
    facts = Facts()
    run(facts, put(NOTES, A, 1), append(EVENTS, A, [1]))
    before = (dict(facts.versions), dict(facts.tips))
    losing = put(NOTES, B, 1) + append(EVENTS, A, [2]) + put(NOTES, A, 2, expect=7)
    with pytest.raises(Conflict, match=r"put notes t/a: expected 7, found 1") as conflict:
        decide(losing, facts)
    assert (conflict.value.expected, conflict.value.actual) == (7, 1)
    assert (facts.versions, facts.tips) == before


def test_preconditions_on_records_see_the_state_before_the_batch() -> None:
    facts = Facts()
    assert run(facts, put(NOTES, A, 1) + check(NOTES, A, 0)) == [(1, 0)]


def test_operations_on_one_stream_take_effect_in_their_order() -> None:
    facts = Facts()
    steps = (
        append(EVENTS, A, [1, 2], after=0)
        + append(EVENTS, A, [3], after=2)
        + trim(EVENTS, A, 3)
        + drop(EVENTS, A)
        + append(EVENTS, A, [4], after=0)
    )
    decision = decide(steps, facts)
    assert decision.numbers == (2, 3, 3, 2, 1)
    assert facts.tips[("events", "t\x1fa")] == Tip(incarnation=2, first=1, last=1)
    trimmed = decision.writes[2]
    assert isinstance(trimmed, LogWrite)
    assert trimmed.forget == (1, 2)


@pytest.mark.parametrize(("before", "first"), [(0, 1), (1, 1), (2, 2), (4, 4), (5, 4), (10**9, 4)])
def test_a_trim_stops_past_the_end(before: int, first: int) -> None:
    facts = Facts()
    run(facts, append(EVENTS, A, [1, 2, 3]))
    assert run(facts, trim(EVENTS, A, before)) == [(first,)]
    assert facts.tips[("events", "t\x1fa")].last == 3


def test_numbers_go_on_after_everything_was_trimmed() -> None:
    facts = Facts()
    assert run(facts, append(EVENTS, A, [1, 2]), trim(EVENTS, A, 9), append(EVENTS, A, [3])) == [
        (2,),
        (3,),
        (3,),
    ]


def test_dropping_what_was_never_written_changes_nothing() -> None:
    facts = Facts()
    decision = decide(drop(EVENTS, A) + trim(EVENTS, A, 5), facts)
    assert (decision.writes, decision.numbers) == ([], (1, 1))


def test_the_places_of_a_batch_are_all_it_touches() -> None:
    batch = put(NOTES, A, 1) + check(NOTES, B, 0) + trim(EVENTS, A, 1)
    assert places(batch) == ({("notes", "t\x1fa"), ("notes", "t\x1fb")}, {("events", "t\x1fa")})
