"""The lives that bring each planted bug of the server to light: short, and with their deaths where
the bug shows.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from perdure.proving.campaign import Campaign, Life, Stage
from perdure.proving.launcher import Death
from perdure.proving.oracle import Check, Violation
from perdure.proving.pair import Strike


class Case(msgspec.Struct, frozen=True):
    """Lives that bring a planted bug to light, and the checks that may see it."""

    checks: set[Check]
    surface: str
    deaths: tuple[Death, ...]
    steps: int = 4
    choices: str = "planted"
    power: bool = False
    continues: bool = False


def edges(first: int, last: int) -> tuple[Death, ...]:
    return tuple(Death("before", n) for n in range(first, last + 1))


CASES: dict[str, Case] = {
    "acknowledges-early": Case({Check.KEPT}, "conversations", edges(3, 6)),
    "syncs-less": Case(
        {Check.OPENS, Check.KEPT}, "conversations", (Death("after", 7),) * 2, power=True
    ),
    "splits-batches": Case({Check.ATOMIC, Check.DENSE}, "responses", edges(4, 6)),
    "remembers-later": Case({Check.INTENDED}, "idempotency", edges(4, 9)),
    "shows-early": Case({Check.DENSE}, "responses", edges(4, 12)),
    "ignores-preconditions": Case(
        {Check.KEPT, Check.ATOMIC, Check.WHOLE},
        "conversations",
        (Death("before", 99),) * 4,
        steps=6,
        choices="d",
    ),
    "recovers-twice": Case({Check.DENSE}, "responses", edges(4, 8)),
    "keeps-locks": Case({Check.CLEAN}, "conversations", edges(5, 12), 8),
    "keeps-jobs": Case({Check.CLEAN}, "jobs", edges(7, 16)),
    "accepts-jobs-later": Case({Check.ATOMIC}, "jobs", edges(4, 6)),
    "notes-steps-later": Case({Check.ATOMIC}, "jobs", edges(8, 30), choices="e"),
    "says-inputs-later": Case({Check.ATOMIC}, "workers", edges(5, 12), 8),
    "keeps-runs": Case({Check.CLEAN}, "workers", edges(7, 14), 10),
    "leaves-open": Case({Check.WHOLE}, "jobs", edges(9, 14), choices="f"),
    "takes-it-for-more": Case(
        {Check.WHOLE, Check.KEPT}, "jobs", edges(9, 14), choices="f", continues=True
    ),
    "always-clean": Case({Check.REPORTED}, "boots", edges(3, 3)),
    "refers-later": Case({Check.ATOMIC}, "blobs", edges(4, 9)),
    "names-before-bytes": Case(
        {Check.WHOLE, Check.KEPT}, "files", (Death("after", 9),) * 3, steps=8, power=True
    ),
    "keeps-no-claim": Case(
        {Check.CLEAN}, "files", tuple(Death("after", n) for n in range(7, 20)), steps=10
    ),
    "ready-too-soon": Case({Check.OPENS}, "boots", edges(3, 5)),
}
PAIRS: dict[str, Strike] = {"writes-on": "pause", "keeps-epoch": "kill", "leaves-the-dead": "kill"}
"""Plants that show where two servers use one database, and the strike that shows each."""

ELSEWHERE = {
    *("trusts-rows", "hides-damage", "hides-failures", "stops-reading", "trusts-clock"),
    *("writes-beside", "keeps-lock", "writes-over", "reads-behind", "starts-in-line"),
    *PAIRS,
}
"""Plants that need a damaged store, a failing or slow disk, a clock that jumps, a second owner or
clients that contend, and so other cases than lives."""


_ROUNDS = 3
"""Deaths are counted in edges, and how many edges work comes to is up to how commits meet in a
group: on a machine with much else to do, every death of a case may miss the place it is for."""


async def shown_in_lives(stage: Stage, home: Path, plant: str) -> list[Violation]:
    """What the lives of the plant's case bring to light, up to the first that shows something of
    what may see it."""
    case = CASES[plant]
    for number in range(_ROUNDS):
        with Campaign(stage, home / f"round-{number}", plant=plant) as campaign:
            for death in case.deaths:
                if not await campaign.live(_life(case, death)):
                    break
            violations = campaign.verdict.violations
        if any(one.check in case.checks for one in violations):
            break
    return violations


def _life(case: Case, death: Death) -> Life:
    return Life(
        workers=1,
        steps=case.steps,
        surfaces=(case.surface,),
        choices=case.choices,
        death=death,
        power=case.power,
        continues=case.continues,
    )
