"""The strict reader and the canonical writer of JSON."""

import json
import math
from typing import Any

import msgspec
import pytest

from perdure.core import codec
from perdure.core.errors import Invalid, LimitExceeded
from perdure.core.limits import JSON_DEPTH_MAX
from perdure.proving import hostile


# proves C20
@pytest.mark.parametrize("name", hostile.REFUSED_JSON)
def test_hostile_text_is_refused(name: str) -> None:
    with pytest.raises(Invalid):
        codec.parse(hostile.REFUSED_JSON[name])


# proves C20
@pytest.mark.parametrize("name", hostile.REFUSED_VALUES)
def test_hostile_values_are_refused_wherever_they_hide(name: str) -> None:
    value = hostile.REFUSED_VALUES[name]
    with pytest.raises(Invalid):
        codec.check(codec.plain(value))


# proves C20
@pytest.mark.parametrize("name", hostile.LEGAL_VALUES)
def test_legal_values_come_back_unchanged(name: str) -> None:
    value = hostile.LEGAL_VALUES[name]
    codec.check(value)
    back = codec.parse(codec.encode(value))
    assert json.dumps(back) == json.dumps(value)


def test_text_given_as_str_may_not_hold_a_lone_surrogate() -> None:
    with pytest.raises(Invalid, match="lone surrogate"):
        codec.parse('"\ud800"')


def test_depth_counts_containers_and_the_deepest_may_be_full() -> None:
    def nested(levels: int, inside: str) -> str:
        return "[" * levels + inside + "]" * levels

    for inside in ("", "1", '"x"'):
        codec.parse(nested(JSON_DEPTH_MAX, inside))
        with pytest.raises(LimitExceeded) as refused:
            codec.parse(nested(JSON_DEPTH_MAX + 1, inside))
        assert (refused.value.actual, refused.value.limit) == (JSON_DEPTH_MAX + 1, JSON_DEPTH_MAX)


def test_brackets_inside_text_are_not_depth() -> None:
    assert codec.parse(b'"' + b"[" * 500 + b'"') == "[" * 500


def test_a_paired_surrogate_escape_is_a_character() -> None:
    assert codec.parse(b'"\\ud83d\\ude00"') == "\U0001f600"


def test_a_negative_zero_stays_negative() -> None:
    assert math.copysign(1, codec.parse(codec.encode(-0.0))) == -1


class Reading(msgspec.Struct):
    celsius: float
    raw: msgspec.Raw = msgspec.Raw(b"{}")


@pytest.mark.parametrize(
    "hidden", [Reading(math.nan), [Reading(math.nan)], {"a": (Reading(1e999),)}]
)
def test_a_number_inside_nested_structs_is_seen(hidden: Any) -> None:
    with pytest.raises(Invalid, match="not finite"):
        codec.check(codec.plain(hidden))


def test_raw_text_beside_numbers_is_taken_on_trust() -> None:
    codec.check(codec.plain([Reading(1.5, msgspec.Raw(b'{"any":1}'))]))
