"""Every counted edge of one scenario: the server is killed before commit 1, then before commit 2,
and so on until the scenario ends alive. Then its power is cut after each commit, and it is killed
behind each part of a stream. The scenario uses every surface; all lives of a test share one data
directory."""

from __future__ import annotations

from pathlib import Path

import pytest

from perdure.proving.campaign import Campaign, Life, Stage
from perdure.proving.launcher import At, Death
from tests.crash.conftest import violations

pytestmark = pytest.mark.asyncio(loop_scope="module")

STEPS = 7
CHOICES = "two"
"""A stream, a conversation, items, a named request, a deletion, a turn in the conversation."""

FEWEST = {"before": 20, "after": 20, "sent": 3}
"""The scenario commits and sends at least this often; else it has shrunk unnoticed."""


# proves C3, C4, C13, C22, R2, R3, R4, R5, R7
@pytest.mark.parametrize("at", FEWEST)
async def test_every_edge_of_a_scenario(stage: Stage, tmp_path: Path, at: At) -> None:
    with Campaign(stage, tmp_path) as campaign:
        n = 0
        while True:
            n += 1
            life = Life(
                workers=1, steps=STEPS, choices=CHOICES, death=Death(at, n), power=at == "after"
            )
            assert await campaign.live(life), (str(life), violations(campaign))
            if not campaign.reached:
                break
        assert n > FEWEST[at]
        verbs = {(op.surface, op.verb) for op in campaign.history.ops if op.cycle == n}
    assert {
        ("responses", "stream"),
        ("responses", "delete"),
        ("conversations", "create"),
        ("conversations", "say"),
        ("items", "create"),
        ("idempotency", "create"),
    } <= verbs
    died = {"before": "killed at a commit", "after": "power cut at a commit"}
    assert campaign.deaths[died.get(at, "killed at a stream part")] == n - 1
