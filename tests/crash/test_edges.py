"""Every counted edge of one scenario: the server is killed before commit 1, then before commit 2,
and so on until the scenario ends alive. Then its power is cut after each commit, and it is killed
behind each part of a stream. The scenarios together use every surface; all lives of a test share
one data directory."""

from __future__ import annotations

import itertools
from pathlib import Path

import msgspec
import pytest

from perdure.proving.campaign import Campaign, Life, Stage
from perdure.proving.launcher import At, Death
from tests.crash.conftest import violations

pytestmark = pytest.mark.asyncio(loop_scope="module")


class Scenario(msgspec.Struct, frozen=True):
    """What one worker does, the same in every life, and how often at least that commits."""

    surfaces: tuple[str, ...]
    choices: str
    steps: int
    verbs: set[tuple[str, str]]
    commits: int


SCENARIOS = {
    "waited for": Scenario(
        ("responses", "conversations", "items", "idempotency", "boots"),
        "two",
        7,
        {
            ("responses", "stream"),
            ("responses", "delete"),
            ("conversations", "create"),
            ("conversations", "say"),
            ("items", "create"),
            ("idempotency", "create"),
        },
        20,
    ),
    "in the background": Scenario(
        ("jobs",),
        "s",
        3,
        {("jobs", "create"), ("jobs", "cancel"), ("jobs", "delete")},
        5,
    ),
}

MISSED = 3
"""So many lives in a row that do not come to their edge end it: there is no edge after a commit
that is refused, as those of a fenced owner are."""

PARTS = 3
"""The first scenario sends at least so many parts of a stream."""


# proves C3, C4, C13, C22, R2, R3, R4, R5, R7
@pytest.mark.parametrize(
    ("at", "named"),
    [*itertools.product(("before", "after"), SCENARIOS), ("sent", "waited for")],
)
async def test_every_edge_of_a_scenario(stage: Stage, tmp_path: Path, at: At, named: str) -> None:
    scenario = SCENARIOS[named]
    with Campaign(stage, tmp_path) as campaign:
        n = missed = edges = 0
        while missed < MISSED:
            n += 1
            life = Life(
                workers=1,
                steps=scenario.steps,
                surfaces=scenario.surfaces,
                choices=scenario.choices,
                death=Death(at, n),
                power=at == "after",
            )
            assert await campaign.live(life), (str(life), violations(campaign))
            edges += campaign.reached
            missed = 0 if campaign.reached else missed + 1
        assert edges >= (PARTS if at == "sent" else scenario.commits)
        verbs = {(op.surface, op.verb) for op in campaign.history.ops if op.cycle == n}
    assert scenario.verbs <= verbs
    died = {"before": "killed at a commit", "after": "power cut at a commit"}
    assert campaign.deaths[died.get(at, "killed at a stream part")] == edges
