"""Layouts: what a collection encodes, indexes and refuses."""

import enum
import math
from typing import Any, Literal

import msgspec
import pytest

from perdure.core.errors import Damaged, Invalid, LimitExceeded
from perdure.core.layouts import Index, Log, Records
from perdure.core.limits import COLUMN_BYTES_MAX, VALUE_BYTES_MAX
from perdure.proving import hostile


class Job(msgspec.Struct):
    status: str | None = None
    tries: int = 0
    share: float = 0.0
    raw: msgspec.Raw = msgspec.Raw(b"null")


class Counter(msgspec.Struct):
    name: str
    count: int = 0


JOBS = Records(
    "jobs",
    Job,
    key=("tenant", "id"),
    indexes=(Index("by_status", ("status", "tries")), Index("by_tries", ("tries",))),
)
COUNTERS = Records("counters", Counter, key=("tenant", "name"))
ANYTHING = Records("anything", dict[str, Any], key=("tenant", "id"))


def test_each_indexed_field_is_a_column_once() -> None:
    assert JOBS.fields == ("status", "tries")
    assert JOBS.columns(Job("done", 3)) == ("done", 3)
    assert JOBS.column_of(JOBS.index("by_tries"), ("done", 3)) == (3,)


def test_an_undeclared_index_is_refused() -> None:
    with pytest.raises(Invalid, match="no index 'by_share'"):
        JOBS.index("by_share")


# proves C20
@pytest.mark.parametrize(
    "job",
    [Job(tries=2**63), Job(tries=-(2**63) - 1), Job(tries=True), Job("a\0b"), Job("\ud800")],
)
def test_a_column_no_engine_could_index_is_refused(job: Job) -> None:
    with pytest.raises(Invalid):
        JOBS.columns(job)


@pytest.mark.parametrize("tries", [2**63 - 1, -(2**63), 0])
def test_every_64_bit_integer_is_a_column(tries: int) -> None:
    assert JOBS.columns(Job(tries=tries)) == (None, tries)


# proves C20
@pytest.mark.parametrize("name", hostile.REFUSED_VALUES)
def test_hostile_values_are_refused_before_anything_is_written(name: str) -> None:
    with pytest.raises(Invalid):
        ANYTHING.encode({"value": hostile.REFUSED_VALUES[name]})


@pytest.mark.parametrize("share", [math.nan, math.inf])
def test_a_struct_with_a_number_json_lacks_is_refused(share: float) -> None:
    with pytest.raises(Invalid, match="not finite"):
        JOBS.encode(Job(share=share))


def test_plain_structs_are_encoded_without_a_walk_and_surrogates_still_refused() -> None:
    assert COUNTERS.encode(Counter("a", 1)) == b'{"name":"a","count":1}'
    with pytest.raises(Invalid):
        COUNTERS.encode(Counter("\ud800"))


def test_raw_parts_are_kept_verbatim() -> None:
    text = b'{"a" : 1.50}'
    stored = JOBS.encode(Job(raw=msgspec.Raw(text)))
    assert text in stored
    assert bytes(JOBS.decode(("t", "j"), stored).raw) == text


def test_a_value_over_the_limit_is_refused() -> None:
    with pytest.raises(LimitExceeded):
        COUNTERS.encode(Counter("x" * VALUE_BYTES_MAX))


@pytest.mark.parametrize(
    "text", [b"", b"{", b'{"count":1}', b'{"name":1}', b"[" * 100_000 + b"]" * 100_000]
)
def test_stored_text_that_does_not_fit_is_damage_and_names_the_record(text: bytes) -> None:
    with pytest.raises(Damaged, match="counters c") as damaged:
        COUNTERS.decode(("default", "c"), text)
    assert damaged.value.where == "counters c"


def test_an_indexed_text_over_the_limit_is_refused() -> None:
    assert JOBS.columns(Job(status="x" * COLUMN_BYTES_MAX))
    with pytest.raises(LimitExceeded, match="status"):
        JOBS.columns(Job(status="\u00e9" * COLUMN_BYTES_MAX))


def test_a_partition_is_a_segment_of_the_key() -> None:
    turns = Log("turns", Counter, key=("tenant", "session"), partition="session")
    assert turns.partition_of(("t", "s")) == "s"
    assert COUNTERS.partition_of(("t", "s")) is None


# proves C7
def test_bytes_that_are_no_text_any_more_are_damage() -> None:
    with pytest.raises(Damaged):
        COUNTERS.decode(("t", "a"), b'{"name":"\xf8"}')


def test_a_column_has_the_kind_that_its_field_declares() -> None:
    class Kinds(enum.StrEnum):
        ONE = "one"

    class Mixed(msgspec.Struct):
        text: str | None
        number: int
        word: Literal["a", "b"] | None
        kind: Kinds
        either: str | int

        @property
        def made(self) -> str | None:
            return self.text

    def kinds(*fields: str) -> tuple[type[str] | type[int], ...]:
        return Records("mixed", Mixed, key=("id",), indexes=(Index("by", fields),)).kinds()

    assert kinds("text", "number", "word", "kind", "made") == (str, int, str, str, str)
    assert kinds() == ()
    for field in ("either", "absent"):
        with pytest.raises(Invalid, match=f"{field} is indexed, so declare it"):
            kinds("text", field)
