"""The checker of histories knows one that nothing explains, and the drill brings some about."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from perdure.proving.drills.drill import Trial
from perdure.proving.drills.histories import ContendingClients
from perdure.proving.linear import OPERATIONS_MAX, Operation, Register, linearizable


def wrote(
    value: str, version: int, called: int, returned: int, expect: int | None = None
) -> Operation:
    return Operation(
        told="written",
        value=value,
        version=version,
        expect=expect,
        called=called,
        returned=returned,
    )


def read(version: int, value: str | None, called: int, returned: int) -> Operation:
    found = Register(version, value)
    return Operation(told="found", found=found, called=called, returned=returned)


def refused(expect: int, actual: int, called: int, returned: int) -> Operation:
    return Operation(
        told="refused", expect=expect, version=actual, called=called, returned=returned
    )


def unknown(value: str, called: int, expect: int | None = None) -> Operation:
    return Operation(told="unknown", value=value, expect=expect, called=called)


EXPLAINED = {
    "nothing": [],
    "one after another": [wrote("a", 1, 1, 2, 0), read(1, "a", 3, 4), refused(0, 1, 5, 6)],
    "a read of a write that is under way": [wrote("a", 1, 1, 4), read(1, "a", 2, 3)],
    "two at once, the second called first": [wrote("a", 2, 1, 4, 1), wrote("b", 1, 2, 3, 0)],
    "an unknown write that is there": [unknown("a", 1, 0), read(1, "a", 5, 6)],
    "an unknown write that is not": [unknown("a", 1, 0), read(0, None, 5, 6)],
    "an unknown write that comes late": [
        unknown("a", 1),
        read(0, None, 2, 3),
        read(1, "a", 4, 5),
    ],
}
UNEXPLAINED = {
    "a lost update": [wrote("a", 1, 1, 2, 0), wrote("b", 1, 3, 4, 0)],
    "two winners of one version": [wrote("a", 1, 1, 4, 0), wrote("b", 2, 2, 3, 0)],
    "a stale read": [wrote("a", 1, 1, 2), wrote("b", 2, 3, 4), read(1, "a", 5, 6)],
    "a read of the future": [read(1, "a", 1, 2), wrote("a", 1, 3, 4)],
    "an acknowledged write that is gone": [wrote("a", 1, 1, 2), read(0, None, 3, 4)],
    "reads that go back": [wrote("a", 1, 1, 9), read(1, "a", 2, 3), read(0, None, 4, 5)],
    "a refusal without a reason": [wrote("a", 1, 1, 2), refused(1, 1, 3, 4)],
    "an unknown write that comes and goes": [
        unknown("a", 1, 0),
        read(1, "a", 2, 3),
        read(0, None, 4, 5),
    ],
    "an unknown write done twice": [unknown("a", 1), read(2, "a", 2, 3)],
    "a value nobody wrote": [wrote("a", 1, 1, 2), read(1, "b", 3, 4)],
}


@pytest.mark.parametrize("history", EXPLAINED.values(), ids=EXPLAINED)
def test_a_history_with_an_order_is_explained(history: list[Operation]) -> None:
    assert linearizable(history, Register())


@pytest.mark.parametrize("history", UNEXPLAINED.values(), ids=UNEXPLAINED)
def test_a_history_without_an_order_is_not(history: list[Operation]) -> None:
    assert not linearizable(history, Register())


def test_the_longest_history_is_searched_and_a_longer_one_refused() -> None:
    """Eight at once, all the time, and one wrong answer at the very end."""
    history = [wrote(f"{n}", n, n, n + 8) for n in range(1, OPERATIONS_MAX)]
    last = OPERATIONS_MAX - 1
    assert linearizable([*history, read(last, f"{last}", 900, 901)], Register())
    assert not linearizable([*history, read(last, "1", 900, 901)], Register())
    with pytest.raises(ValueError, match="more than"):
        linearizable([*history, *history], Register())


@pytest.mark.parametrize("how", ["loses-updates", "reads-late"])
async def test_an_engine_that_is_wrong_is_caught(how: str, tmp_path: Path) -> None:
    program = (sys.executable, str(Path(__file__).with_name("wrong_contender.py")), how)
    trial = Trial(tmp_path, "1", seconds=20)
    await ContendingClients(program).run(trial)
    assert any("no order" in one.what for one in trial.violations), trial.violations
