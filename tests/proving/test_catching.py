"""The bugs that the evidence page lists: enough of them, each told apart, and what a proof that
catches none would look like."""

from __future__ import annotations

from pathlib import Path

import pytest

from perdure.proving.campaign import Stage
from perdure.proving.catching import BUGS, Bug, replaced
from perdure.proving.planted import PLANTS

QUICK = [bug for bug in BUGS if bug.part != "server"]
"""Those of the server are caught one by one in tests/crash/test_planted.py."""


# proves C3, C8, C9
@pytest.mark.parametrize("bug", QUICK, ids=lambda bug: bug.says.replace(" ", "_"))
async def test_every_bug_is_caught_by_what_it_does(bug: Bug, tmp_path: Path) -> None:
    if (lacks := bug.lacks()) is not None:
        pytest.skip(lacks)
    shown = await bug.catch(Stage(tmp_path / "unused"), tmp_path)
    assert shown is not None
    assert "TypeError" not in shown, "the plant itself is broken"


def test_every_bug_is_listed_once() -> None:
    assert len({(bug.part, bug.says) for bug in BUGS}) == len(BUGS) > 40
    assert {plant.says for plant in PLANTS.values()} <= {bug.says for bug in BUGS}


def test_what_was_replaced_comes_back() -> None:
    with replaced(Bug, "__doc__", "another"):
        assert Bug.__doc__ == "another"
    assert Bug.__doc__ != "another"
