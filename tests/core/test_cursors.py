"""Cursors continue exactly the question they were made for."""

import base64
import itertools

import msgspec
import pytest

from perdure.core import cursors
from perdure.core.cursors import Position, Question
from perdure.core.errors import CursorRefused, Invalid, LimitExceeded, Trimmed
from perdure.core.layouts import Column, Index, Log, Records
from perdure.core.limits import PAGE_MAX
from perdure.core.values import Record, Tip


class Note(msgspec.Struct):
    status: str | None = None
    rank: int = 0


NOTES = Records(
    "notes",
    Note,
    key=("tenant", "id"),
    indexes=(
        Index("by_status", ("status", "rank")),
        Index("work", ("status",), every_tenant=True),
    ),
)
EVENTS = Log("events", Note, key=("tenant", "id"))

ASKED = Question("store", "notes", ("t",), "by_status", ("done",))
PLACE = Position((7,), "t\x1fa")


def test_a_cursor_gives_back_its_position() -> None:
    assert cursors.unpack(ASKED, cursors.pack(ASKED, PLACE)) == PLACE


# proves C19
# proves C23
@pytest.mark.parametrize(
    "other",
    [
        Question("another store", "notes", ("t",), "by_status", ("done",)),
        Question("store", "others", ("t",), "by_status", ("done",)),
        Question("store", "notes", ("another tenant",), "by_status", ("done",)),
        Question("store", "notes", ("t",), None, ("done",)),
        Question("store", "notes", ("t",), "by_status", ("open",)),
        Question("store", "notes", ("t",), "by_status", ()),
        Question("store", "notes", ("t",), "by_status", ("done",), descending=True),
    ],
)
def test_a_cursor_of_another_question_is_refused(other: Question) -> None:
    with pytest.raises(CursorRefused):
        cursors.unpack(other, cursors.pack(ASKED, PLACE))


# proves C19
@pytest.mark.parametrize(
    "forged", ["", "x", "====", "\u00e9", "\ud800", "AAAA" * 100, "a b", "\0", "-_" * 9]
)
def test_what_is_not_a_cursor_is_refused(forged: str) -> None:
    with pytest.raises(CursorRefused):
        cursors.unpack(ASKED, forged)


# proves C19
def test_a_cursor_with_any_bit_flipped_is_refused() -> None:
    good = cursors.pack(ASKED, PLACE)
    data = base64.urlsafe_b64decode(good + "=" * (-len(good) % 4))
    for at, bit in itertools.product(range(len(data)), range(8)):
        flipped = bytearray(data)
        flipped[at] ^= 1 << bit
        with pytest.raises(CursorRefused):
            cursors.unpack(ASKED, base64.urlsafe_b64encode(bytes(flipped)).decode().rstrip("="))


def test_at_record_continues_after_a_record_no_scan_returned() -> None:
    record = Record(("t", "a"), 1, Note("done", 7))
    made = cursors.at_record("store", NOTES, ("t",), record, index="by_status", where=("done",))
    assert cursors.unpack(ASKED, made) == PLACE


# proves C18
@pytest.mark.parametrize("limit", [-1, PAGE_MAX + 1])
def test_a_limit_out_of_bounds_is_an_error_naming_the_limit(limit: int) -> None:
    with pytest.raises(LimitExceeded, match=str(PAGE_MAX)):
        cursors.check_limit(limit)


@pytest.mark.parametrize(
    ("prefix", "index", "where"),
    [
        ((), "by_status", ()),
        (("t", "a"), "by_status", ()),
        (("t",), "work", ()),
        (("t",), "by_status", ("done", 1, 2)),
        (("t",), None, ("done",)),
        (("t",), "absent", ()),
        (("t\0",), None, ()),
        (("t",), "by_status", (2**63,)),
        (("t",), "by_status", ("\ud800",)),
        (("t",), "by_status", ("a\0b",)),
        (("t",), "by_status", (None,)),
        (("t",), "by_status", (True,)),
        (("t",), "by_status", (1.5,)),
    ],
)
def test_a_question_the_index_cannot_answer_is_refused(
    prefix: tuple[str, ...], index: str | None, where: tuple[Column, ...]
) -> None:
    with pytest.raises(Invalid):
        cursors.check_question(NOTES, Question("store", "notes", prefix, index, where))


def test_counting_by_more_fields_than_there_are_is_refused() -> None:
    by_status = NOTES.index("by_status")
    cursors.check_group(NOTES, by_status, 2)
    for index, group in ((by_status, 3), (by_status, -1), (None, 1)):
        with pytest.raises(Invalid):
            cursors.check_group(NOTES, index, group)


def test_a_trimmed_place_names_the_first_kept() -> None:
    tip = Tip(incarnation=2, first=5, last=9)
    cursors.check_position(EVENTS, ("t", "a"), tip, 4, 2)
    with pytest.raises(Trimmed) as trimmed:
        cursors.check_position(EVENTS, ("t", "a"), tip, 3, None)
    assert trimmed.value.first_kept == 5
    with pytest.raises(CursorRefused):
        cursors.check_position(EVENTS, ("t", "a"), tip, 4, 1)
    with pytest.raises(Invalid):
        cursors.check_position(EVENTS, ("t", "a"), Tip(), -1, None)
