"""Fuzzing: every target stands some of it, and one that breaks is shown by its case."""

from __future__ import annotations

import pytest

from perdure.core.errors import Invalid
from perdure.proving import fuzz
from perdure.services.relay import ResponsesReader

CASES = 500


# proves C2, R12
@pytest.mark.parametrize("target", fuzz.TARGETS)
def test_no_target_breaks(target: str) -> None:
    assert [wrong for case in range(CASES) if (wrong := fuzz.fuzz(target, "ci", case))] == []


def test_a_target_that_breaks_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(reader: ResponsesReader, chunk: dict[str, object]) -> list[object]:
        raise KeyError("item")

    monkeypatch.setattr(ResponsesReader, "read", breaks)
    found = [wrong for case in range(CASES) if (wrong := fuzz.fuzz("answers", "ci", case))]
    assert found
    assert found[0].endswith("of seed ci: KeyError: 'item'")


def test_what_is_refused_in_our_words_is_no_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(rng: object) -> None:
        raise Invalid("no.")

    monkeypatch.setitem(fuzz.TARGETS, "request", refuses)
    assert fuzz.fuzz("request", "ci", 1) is None
