"""Keys join injectively, in order, and refuse what has no place in them."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perdure.core import keys
from perdure.core.errors import Invalid, LimitExceeded
from perdure.core.limits import KEY_SEGMENTS_MAX
from perdure.proving import hostile

LEGAL = list(hostile.LEGAL_NAMES.values())

segments = st.one_of(
    st.sampled_from(LEGAL),
    st.text(
        st.characters(codec="utf-8", min_codepoint=0x20, exclude_characters="\x7f"),
        min_size=1,
        max_size=8,
    ),
)
some_keys = st.lists(segments, min_size=1, max_size=4).map(tuple)


# proves C20
@pytest.mark.parametrize("name", hostile.REFUSED_NAMES)
@pytest.mark.parametrize("beside", [(), ("tenant",)])
def test_hostile_names_are_refused(name: str, beside: keys.Key) -> None:
    with pytest.raises(Invalid):
        keys.join((*beside, hostile.REFUSED_NAMES[name]))


# proves C20
def test_legal_names_stay_distinct() -> None:
    joined = {keys.join((a, b)) for a, b in itertools.product(LEGAL, LEGAL)}
    assert len(joined) == len(LEGAL) ** 2


@given(some_keys)
def test_split_undoes_join(key: keys.Key) -> None:
    assert keys.split(keys.join(key)) == key


@given(some_keys, some_keys)
def test_joined_keys_keep_the_order_of_tuples(one: keys.Key, other: keys.Key) -> None:
    assert (keys.join(one) < keys.join(other)) == (one < other)
    assert (keys.join(one).encode() < keys.join(other).encode()) == (one < other)


@given(some_keys, some_keys)
def test_a_span_holds_exactly_the_longer_keys(prefix: keys.Key, key: keys.Key) -> None:
    low, high = keys.span(prefix)
    inside = low < keys.join(key) < high
    assert inside == (len(key) > len(prefix) and key[: len(prefix)] == prefix)


def test_the_empty_prefix_spans_every_key() -> None:
    low, high = keys.span(())
    assert all(low < keys.join((segment,)) < high for segment in LEGAL)


@pytest.mark.parametrize("key", [(), ("a",) * (KEY_SEGMENTS_MAX + 1)])
def test_the_number_of_segments_is_limited(key: keys.Key) -> None:
    with pytest.raises(Invalid):
        keys.join(key)


def test_a_segment_over_the_limit_names_the_limit() -> None:
    with pytest.raises(LimitExceeded, match="limit of 255"):
        keys.join(("x" * 256,))


@pytest.mark.parametrize("letter", ["x", "\u00e9"])
def test_a_key_over_the_limit_names_the_limit(letter: str) -> None:
    segment = letter * (250 // len(letter.encode()))
    assert keys.join((segment,) * 4)
    with pytest.raises(LimitExceeded, match="limit of 1024"):
        keys.join((segment,) * 5)


@pytest.mark.parametrize("key", [None, (1,), ("a", None), ("a", b"b")])
def test_what_is_not_text_is_refused(key: object) -> None:
    with pytest.raises(Invalid, match="tuple of strings"):
        keys.join(key)  # type: ignore[arg-type]


def test_the_default_tenant_is_elided_for_people() -> None:
    assert keys.show(("default", "a", "b")) == "a/b"
    assert keys.show(("other", "a")) == "other/a"
    assert keys.show(("default",)) == "default"
