"""Every promise to survive is put to the test: lives at random, killed, with their power cut or
with a disk that fails, and each surface that claims to survive it is judged by an actor of its
own."""

from __future__ import annotations

import random
from typing import NamedTuple

import msgspec
import pytest
import pytest_asyncio

from perdure.core.promises import Promise
from perdure.proving.actors import actors
from perdure.proving.campaign import Campaign, Life, Stage
from perdure.proving.crash import OFFICIAL, life_of, official
from perdure.proving.drills.failing_server import failed_syncs
from perdure.proving.workload import Uncovered, cover
from perdure.surfaces.state import PROMISES
from tests.crash.conftest import violations

pytestmark = pytest.mark.asyncio(loop_scope="module")

SEED = "ci"
CYCLES = {"process_crash": 10, "power_cut": 8, "failed_sync": 5}
LEAST = 10
"""So often at least every surface is judged."""

SURELY_MADE = {"sqlite.sync": 30, "sqlite.write": 40}
"""Every life makes so many calls of a kind, and four of every other."""

CLAIMS = [
    (fault, promise) for fault in CYCLES for promise in PROMISES if getattr(promise.survives, fault)
]


def a_life(rng: random.Random, fault: str) -> Life:
    """A life at random that ends in this fault."""
    if fault == "failed_sync":
        met = [one for one in failed_syncs() if one.n <= SURELY_MADE.get(one.calls[0], 4)]
        return Life(trouble=rng.choice(met))
    return life_of(rng, power=fault == "power_cut")


class Ran(NamedTuple):
    """A campaign of one fault, and how many of its lives met what was planned for them."""

    campaign: Campaign
    reached: int


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def ran(stage: Stage, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ran]:
    """One campaign a fault, run to its end or to the first violation."""
    ran: dict[str, Ran] = {}
    for fault, cycles in CYCLES.items():
        home, reached = tmp_path_factory.mktemp(fault), 0
        with Campaign(stage, home, seed=SEED, more=official()) as campaign:
            for cycle in range(cycles):
                rng = random.Random(f"{SEED}/{fault}/{cycle}")
                sound = await campaign.live(a_life(rng, fault))
                reached += campaign.reached
                if not sound:
                    break
        ran[fault] = Ran(campaign, reached)
    return ran


# proves C3, C4, C9, C13, C15, C22, R2, R4, R5, R7
@pytest.mark.parametrize(
    ("fault", "promise"), CLAIMS, ids=[f"{promise.surface}-{fault}" for fault, promise in CLAIMS]
)
async def test_a_surface_survives_what_it_promises(
    ran: dict[str, Ran], fault: str, promise: Promise
) -> None:
    campaign = ran[fault].campaign
    own = [str(it) for it in campaign.verdict.violations if it.surface == promise.surface]
    assert own == []
    assert campaign.verdict.of(promise.surface) >= LEAST


# proves C13
async def test_no_life_ends_in_any_violation(ran: dict[str, Ran]) -> None:
    for fault, (campaign, _) in ran.items():
        assert violations(campaign) == []
        assert campaign.history.cycle == CYCLES[fault]
    deaths = ran["power_cut"].campaign.deaths
    assert sum(count for kind, count in deaths.items() if kind.startswith("power cut")) >= 6
    assert ran["failed_sync"].reached >= 4


async def test_the_official_client_took_part(ran: dict[str, Ran]) -> None:
    assert ran["process_crash"].campaign.verdict.of(OFFICIAL) > 5


async def test_a_promise_without_an_actor_fails_by_name() -> None:
    stranger = msgspec.structs.replace(PROMISES[0], surface="strangers")
    with pytest.raises(Uncovered, match="strangers"):
        cover([*PROMISES, stranger], actors())
