"""Two servers on one database, under the same clients. One of them is cut off from it, and the
other takes over what it ran; and a fleet that does not is caught."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from perdure.proving.oracle import Check
from perdure.proving.pair import STRIKES, Pair, PairLife, PairStage
from perdure.proving.planted import PLANTS
from perdure.proving.planted_lives import PAIRS
from tests.crash.conftest import violations

LOADED_S = 30.0
"""For a takeover, on a machine that does much else at the same time."""

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def two(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[PairStage]:
    async with PairStage(tmp_path_factory.mktemp("two")) as stage:
        yield stage


# proves C3, C4, C13, C15, C22, R2, R3, R4, R5, R7
async def test_who_is_cut_off_is_replaced_in_time_and_ends_itself(
    two: PairStage, tmp_path: Path
) -> None:
    with Pair(two, tmp_path, seed="ci", patience_s=LOADED_S) as pair:
        sound = await pair.live(PairLife(strike="partition", after_s=0.5))
        assert sound, violations(pair)
        assert len(pair.taken_s) == 1
        for surface in pair.surfaces:
            assert pair.verdict.of(surface) > 0


async def test_a_fleet_that_leaves_the_dead_their_leases_is_caught(
    two: PairStage, tmp_path: Path
) -> None:
    assert PAIRS.keys() <= PLANTS.keys()
    assert set(PAIRS.values()) <= set(STRIKES)
    life = PairLife(strike="kill", workers=1, steps=1, surfaces=("boots",))
    with Pair(two, tmp_path, seed="ci", plant="leaves-the-dead") as pair:
        assert not await pair.live(life)
        assert {violation.check for violation in pair.verdict.violations} == {Check.CLEAN}
