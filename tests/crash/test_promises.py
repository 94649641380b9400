"""Every promise to survive is put to the test: lives at random, killed or with their power cut,
and each surface that claims to survive it is judged by an actor of its own."""

from __future__ import annotations

import random

import msgspec
import pytest
import pytest_asyncio

from perdure.core.promises import Promise
from perdure.proving.actors import actors
from perdure.proving.campaign import Campaign, Stage
from perdure.proving.crash import OFFICIAL, life_of, official
from perdure.proving.workload import Uncovered, cover
from perdure.surfaces.state import PROMISES
from tests.crash.conftest import violations

pytestmark = pytest.mark.asyncio(loop_scope="module")

SEED = "ci"
CYCLES = {"process_crash": 15, "power_cut": 10}
LEAST = 20
"""So often at least every surface is judged."""

CLAIMS = [
    (fault, promise) for fault in CYCLES for promise in PROMISES if getattr(promise.survives, fault)
]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def campaigns(stage: Stage, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Campaign]:
    """One campaign a fault, run to its end or to the first violation."""
    ran: dict[str, Campaign] = {}
    for fault, cycles in CYCLES.items():
        home = tmp_path_factory.mktemp(fault)
        with Campaign(stage, home, seed=SEED, more=official()) as campaign:
            for cycle in range(cycles):
                rng = random.Random(f"{SEED}/{fault}/{cycle}")
                if not await campaign.live(life_of(rng, power=fault == "power_cut")):
                    break
        ran[fault] = campaign
    return ran


# proves C3, C4, C9, C13, C15, C22, R2, R4, R5, R7
@pytest.mark.parametrize(
    ("fault", "promise"), CLAIMS, ids=[f"{promise.surface}-{fault}" for fault, promise in CLAIMS]
)
async def test_a_surface_survives_what_it_promises(
    campaigns: dict[str, Campaign], fault: str, promise: Promise
) -> None:
    campaign = campaigns[fault]
    own = [str(it) for it in campaign.verdict.violations if it.surface == promise.surface]
    assert own == []
    assert campaign.verdict.of(promise.surface) >= LEAST


# proves C13
async def test_no_life_ends_in_any_violation(campaigns: dict[str, Campaign]) -> None:
    for fault, campaign in campaigns.items():
        assert violations(campaign) == []
        assert campaign.history.cycle == CYCLES[fault]
    deaths = campaigns["power_cut"].deaths
    assert sum(count for kind, count in deaths.items() if kind.startswith("power cut")) >= 6


async def test_the_official_client_took_part(campaigns: dict[str, Campaign]) -> None:
    assert campaigns["process_crash"].verdict.of(OFFICIAL) > 5


async def test_a_promise_without_an_actor_fails_by_name() -> None:
    stranger = msgspec.structs.replace(PROMISES[0], surface="strangers")
    with pytest.raises(Uncovered, match="strangers"):
        cover([*PROMISES, stranger], actors())
