"""Batches: what is refused while one is built, how they join, what their digest stands for."""

from typing import Any

import pytest

from perdure.core import batch as batches
from perdure.core.batch import (
    Batch,
    append,
    check,
    delete,
    digest,
    drop,
    partition_of,
    put,
    size_bytes,
    trim,
)
from perdure.core.errors import Invalid, LimitExceeded, SpansPartitions
from perdure.core.keys import Key
from perdure.core.layouts import Log, Records

NOTES = Records("notes", Any, key=("tenant", "id"))  # type: ignore[arg-type]
TURNS = Records("turns", Any, key=("tenant", "session", "id"), partition="session")  # type: ignore[arg-type]
EVENTS: Log[Any] = Log("events", Any, key=("tenant", "id"))  # type: ignore[arg-type]

A: Key = ("t", "a")
B: Key = ("t", "b")


def test_batches_add_and_only_the_empty_one_is_falsy() -> None:
    both = put(NOTES, A, 1) + append(EVENTS, A, [1, 2])
    assert [type(op).__name__ for op in both.ops] == ["Put", "Append"]
    assert both
    assert not Batch()
    assert Batch() + both == both == both + Batch()


def test_a_sum_keeps_the_one_operation_id() -> None:
    named = put(NOTES, A, 1).named("op")
    assert (named + put(NOTES, B, 1)).operation_id == "op"
    assert (put(NOTES, B, 1) + named).operation_id == "op"
    assert (named + put(NOTES, B, 1).named("op")).operation_id == "op"
    with pytest.raises(Invalid, match="two different operation ids"):
        named + put(NOTES, B, 1).named("other")


@pytest.mark.parametrize("name", ["", "a\0", "\ud800", "x" * 256, "\u00e9" * 128])
def test_hostile_operation_ids_are_refused(name: str) -> None:
    with pytest.raises(Invalid):
        put(NOTES, A, 1).named(name)


@pytest.mark.parametrize("key", [("t",), ("t", "a", "b"), ()])
def test_a_key_has_the_segments_its_layout_names(key: Key) -> None:
    for make in (
        lambda: put(NOTES, key, 1),
        lambda: delete(NOTES, key),
        lambda: check(NOTES, key, 0),
        lambda: append(EVENTS, key, [1]),
        lambda: trim(EVENTS, key, 1),
        lambda: drop(EVENTS, key),
    ):
        with pytest.raises(Invalid, match="2 segments"):
            make()


@pytest.mark.parametrize("number", [-1, 2**63, 1.0, True, "1"])
def test_expected_numbers_are_whole_and_not_negative(number: Any) -> None:
    for make in (
        lambda: put(NOTES, A, 1, expect=number),
        lambda: delete(NOTES, A, expect=number),
        lambda: check(NOTES, A, number),
        lambda: append(EVENTS, A, [1], after=number),
        lambda: trim(EVENTS, A, number),
    ):
        with pytest.raises(Invalid, match="whole number"):
            make()


def test_an_append_without_entries_is_refused() -> None:
    with pytest.raises(Invalid, match="at least one"):
        append(EVENTS, A, [])


def test_a_record_is_written_once_but_may_also_be_checked() -> None:
    assert partition_of(put(NOTES, A, 1) + check(NOTES, A, 0) + put(NOTES, B, 1)) is None
    for twice in (put(NOTES, A, 1) + put(NOTES, A, 2), put(NOTES, A, 1) + delete(NOTES, A)):
        with pytest.raises(Invalid, match="twice"):
            partition_of(twice)


# proves C23
def test_a_batch_lies_in_one_partition() -> None:
    one = put(TURNS, ("t", "s1", "1"), 1)
    assert partition_of(one) == "s1"
    assert partition_of(one + delete(TURNS, ("t", "s1", "2"))) == "s1"
    for other in (
        put(TURNS, ("t", "s2", "1"), 1),
        put(NOTES, A, 1),
        check(TURNS, ("t", "s3", "1"), 0),
    ):
        with pytest.raises(SpansPartitions):
            partition_of(one + other)


def test_operations_and_entries_are_counted_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "BATCH_OPS_MAX", 3)
    partition_of(put(NOTES, A, 1) + append(EVENTS, A, [1, 2]))
    with pytest.raises(LimitExceeded):
        partition_of(put(NOTES, A, 1) + append(EVENTS, A, [1, 2, 3]))
    with pytest.raises(LimitExceeded):
        partition_of(append(EVENTS, A, [1, 2, 3, 4]))


def test_bytes_are_limited_for_a_single_append_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "BATCH_BYTES_MAX", 100)
    partition_of(append(EVENTS, A, ["x" * 98]))
    for large in (append(EVENTS, A, ["x" * 50] * 2), put(NOTES, A, "x" * 98) + put(NOTES, B, 1)):
        assert size_bytes(large) > 100
        with pytest.raises(LimitExceeded):
            partition_of(large)


def test_an_attachment_over_the_limit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "ATTACHMENT_BYTES_MAX", 10)
    whole = put(NOTES, A, 1, attachment=bytes(10))
    assert size_bytes(whole) == 11
    with pytest.raises(LimitExceeded):
        put(NOTES, A, 1, attachment=bytes(11))


def test_a_check_expects_something() -> None:
    with pytest.raises(Invalid, match="version it expects"):
        check(NOTES, A, None)  # type: ignore[arg-type]


# proves C22
def test_a_digest_tells_every_difference() -> None:
    different = [
        put(NOTES, A, 1),
        put(NOTES, A, 2),
        put(NOTES, B, 1),
        put(NOTES, A, 1, expect=0),
        put(NOTES, A, 1, attachment=b""),
        put(NOTES, A, 1, attachment=b"1"),
        put(TURNS, ("t", "a", "b"), 1),
        delete(NOTES, A),
        delete(NOTES, A, expect=1),
        check(NOTES, A, 1),
        append(EVENTS, A, [1]),
        append(EVENTS, A, [1], after=0),
        append(EVENTS, A, [1, 2]),
        append(EVENTS, A, [12]),
        trim(EVENTS, A, 1),
        drop(EVENTS, A),
        put(NOTES, A, 1) + put(NOTES, B, 1),
        put(NOTES, B, 1) + put(NOTES, A, 1),
        Batch(),
    ]
    assert len({digest(batch) for batch in different}) == len(different)
    assert all(-(2**63) <= digest(batch) < 2**63 for batch in different)
    assert digest(put(NOTES, A, 1).named("x")) == digest(put(NOTES, A, 1).named("y"))


def test_an_attachment_cannot_pass_for_an_operation() -> None:
    """The attachment of one spells the delete of the other, and its length ends in the value."""
    short: Records[Any] = Records("n", Any, key=("tenant", "id"))  # type: ignore[arg-type]
    spelled = b"Delete\x1en\x1et\x1fk\x1eNone"
    assert len(spelled) == 17
    honest = put(short, A, 7, attachment=b"7") + delete(short, ("t", "k"))
    forged = put(short, A, 7, attachment=spelled)
    assert digest(honest) != digest(forged)
