"""The runner catches planted bugs: each is red within a few lives, for the right reason, and the
same lives are green without it."""

from __future__ import annotations

from pathlib import Path

import pytest

from perdure.proving.campaign import Stage
from perdure.proving.planted import PLANTS
from perdure.proving.planted_lives import CASES, ELSEWHERE, shown_in_lives

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.mark.parametrize("plant", CASES)
async def test_a_planted_bug_is_caught(stage: Stage, tmp_path: Path, plant: str) -> None:
    found = await shown_in_lives(stage, tmp_path, plant)
    told = [str(violation) for violation in found]
    assert {one.check for one in found} & CASES[plant].checks, f"{PLANTS[plant].says}: {told}"


async def test_every_plant_has_a_case() -> None:
    assert set(CASES) | ELSEWHERE == set(PLANTS)
