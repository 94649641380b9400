"""The runner catches planted bugs: each is red within a few lives, for the right reason, and the
same lives are green without it."""

from __future__ import annotations

from pathlib import Path

import pytest

from perdure.proving.campaign import Campaign, Stage
from perdure.proving.planted import PLANTS
from perdure.proving.planted_lives import CASES, ELSEWHERE, live
from tests.crash.conftest import violations

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.mark.parametrize("plant", CASES)
async def test_a_planted_bug_is_caught(stage: Stage, tmp_path: Path, plant: str) -> None:
    case = CASES[plant]
    with Campaign(stage, tmp_path, plant=plant) as campaign:
        await live(campaign, case)
    found = {violation.check for violation in campaign.verdict.violations}
    assert found & case.checks, f"{PLANTS[plant].says}: {violations(campaign)}"


async def test_every_plant_has_a_case() -> None:
    assert set(CASES) | ELSEWHERE == set(PLANTS)
