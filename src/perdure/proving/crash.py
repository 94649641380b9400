"""The crash campaign as a command: `python -m perdure.proving.crash --cycles 200 --seed 1`; with
`--servers 2`, of two servers on one PostgreSQL (see `pair`).

Every choice comes from the seed: what the workers do, where and how the server dies, what survives
a power cut. It prints what was judged, and ends with 1 and the command that repeats it if anything
did not hold. Times are the machine's, so a death at a moment may fall elsewhere in a repetition;
one at a counted edge does not.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import importlib.util
import math
import random
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path

import msgspec

from perdure.core.disk import Disk
from perdure.proving.campaign import Campaign, Life, Stage
from perdure.proving.ending import told_as_interrupted
from perdure.proving.launcher import Death
from perdure.proving.oracle import Check
from perdure.proving.pair import TAKEN_OVER_S, Pair, PairStage
from perdure.proving.pair import life_of as pair_life_of
from perdure.proving.planted import PLANTS
from perdure.proving.workload import Actor

OFFICIAL = "official client"

_COMMITS = 60
_PARTS = 40
_RECOVERY_COMMITS = 4
_WORK_S = 0.4
_POWER = 0.3
"""How many of the lives end, if they die as planned, in a power cut."""


def life_of(rng: random.Random, *, power: bool) -> Life:
    """A life at random, deaths at counted edges more often than others; with `power` every death
    is a power cut."""
    death: Death | None = None
    kill_after_s: float | None = None
    roll = rng.random()
    if roll < 0.45:
        death = Death(rng.choice(("before", "after")), rng.randint(1, _COMMITS))
    elif roll < 0.6:
        death = Death(rng.choice(("sending", "sent")), rng.randint(1, _PARTS))
    elif roll < 0.7 or power:
        death = Death("moment", rng.randint(30, int(_WORK_S * 2000)))
    elif roll < 0.95:
        kill_after_s = rng.uniform(0, _WORK_S)
    else:
        return Life(stop=True, kill_after_s=rng.uniform(0, _WORK_S))
    rebirths = [
        Death(rng.choice(("before", "after")), rng.randint(1, _RECOVERY_COMMITS))
        if rng.random() < 0.7
        else Death("moment", rng.randint(0, 150))
        for _ in range(rng.choice((0, 0, 0, 1, 2)))
    ]
    return Life(
        death=death,
        power=power,
        kill_after_s=kill_after_s,
        rebirths=tuple(rebirths),
        again=rng.random() < 0.25,
        continues=rng.random() < 0.5,
    )


def official() -> list[Actor]:
    """The actor that uses the official client, where that is installed."""
    if importlib.util.find_spec("openai") is None:
        return []
    return [importlib.import_module("perdure.proving.actors.official").OfficialActor()]


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What a campaign came to."""

    seed: str
    cycles: int
    ok: bool
    judged: dict[str, int]
    surfaces: dict[str, int]
    deaths: dict[str, int]
    operations: dict[str, int]
    ready_p50_s: float
    ready_max_s: float
    taken_over_p50_s: float = 0.0
    taken_over_max_s: float = 0.0
    taken_over: int = 0
    violations: list[str]
    evidence: str
    again: str


def report(campaign: Campaign | Pair, cycles: int, again: str) -> Report:
    """The numbers of a campaign so far."""
    verdict, ready_s = campaign.verdict, sorted(campaign.ready_s) or [0.0]
    taken_s = sorted(campaign.taken_s if isinstance(campaign, Pair) else ()) or [0.0]
    checks: Counter[str] = Counter()
    surfaces: Counter[str] = Counter()
    for (check, surface), count in verdict.judged.items():
        checks[check.value] += count
        surfaces[surface] += count
    return Report(
        seed=campaign.seed,
        cycles=cycles,
        ok=not verdict.violations,
        judged={check.value: checks[check.value] for check in Check},
        surfaces=dict(surfaces),
        deaths=dict(sorted(campaign.deaths.items())),
        operations=dict(Counter(op.outcome for op in campaign.history.ops)),
        ready_p50_s=round(ready_s[len(ready_s) // 2], 3),
        ready_max_s=round(ready_s[-1], 3),
        taken_over_p50_s=round(taken_s[len(taken_s) // 2], 3),
        taken_over_max_s=round(taken_s[-1], 3),
        taken_over=len(campaign.moved) if isinstance(campaign, Pair) else 0,
        violations=list(dict.fromkeys(map(str, verdict.violations))),
        evidence=str(campaign.home),
        again=again,
    )


async def run(
    home: Path,
    cycles: int,
    seed: str,
    plant: str | None,
    *,
    quiet: bool,
    seconds: float = math.inf,
) -> Report:
    """Live until a violation, or as often as asked, or until `seconds` are over."""
    Disk().make_directory(home)
    ends_s = time.monotonic() + seconds
    async with Stage(home) as stage:
        with Campaign(stage, home, seed=seed, plant=plant, more=official()) as campaign:
            for cycle in range(1, cycles + 1):
                rng = random.Random(f"{seed}/{cycle}")
                life = life_of(rng, power=rng.random() < _POWER)
                sound = await campaign.live(life)
                if not quiet:
                    print(f"{cycle:4}/{cycles} {life}: {_told(campaign)}", flush=True)
                if not sound or time.monotonic() > ends_s:
                    break
    planted = f" --plant {plant}" if plant else ""
    again = f"python -m perdure.proving.crash --cycles {cycle} --seed {seed}{planted}"
    return report(campaign, cycle, again)


async def run_pair(
    home: Path,
    cycles: int,
    seed: str,
    plant: str | None,
    *,
    quiet: bool,
    seconds: float = math.inf,
    patience_s: float = TAKEN_OVER_S,
) -> Report:
    """The same of two servers on one database."""
    Disk().make_directory(home)
    ends_s = time.monotonic() + seconds
    async with PairStage(home) as stage:
        pair = Pair(*(stage, home), seed=seed, plant=plant, more=official(), patience_s=patience_s)
        with pair:
            for cycle in range(1, cycles + 1):
                life = pair_life_of(random.Random(f"{seed}/{cycle}"), cycle)
                sound = await pair.live(life)
                if not quiet:
                    print(f"{cycle:4}/{cycles} {life}: {_told(pair)}", flush=True)
                if not sound or time.monotonic() > ends_s:
                    break
    planted = f" --plant {plant}" if plant else ""
    again = f"python -m perdure.proving.crash --servers 2 --cycles {cycle} --seed {seed}{planted}"
    return report(pair, cycle, again)


def _told(campaign: Campaign | Pair) -> str:
    verdict = campaign.verdict
    ready = f"ready in {campaign.ready_s[-1]:.2f} s" if campaign.ready_s else "not ready"
    return f"{ready}, {sum(verdict.judged.values())} judged, {len(verdict.violations)} violations"


def show(told: Report) -> str:
    """The verdict for people."""
    lines = [f"{count:9}  {check}" for check, count in told.judged.items()]
    lines += ["", "judged for " + _listed(told.surfaces)]
    if OFFICIAL not in told.surfaces:
        lines.append("the package openai is not installed, so its client took no part")
    lines += ["operations " + _listed(told.operations), "deaths     " + _listed(told.deaths)]
    lines.append(f"ready      in {told.ready_p50_s} s (median), {told.ready_max_s} s at most")
    if told.taken_over_max_s:
        median_s, max_s = told.taken_over_p50_s, told.taken_over_max_s
        work = f"{told.taken_over} responses and jobs that a dead server had begun"
        lines.append(f"taken over in {median_s} s (median), {max_s} s at most: {work}")
    if told.ok:
        lines.append(f"{told.cycles} cycles, seed {told.seed}: no violation")
    else:
        lines += ["", *(f"VIOLATION  {violation}" for violation in told.violations)]
        lines += [f"evidence   {told.evidence}", f"again      {told.again}"]
    return "\n".join(lines)


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())


def main() -> None:
    """See the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cycles", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=math.inf, help="end after these")
    parser.add_argument("--seed", default="1")
    parser.add_argument("--engine", choices=("sqlite", "postgres"), help="[default: by servers]")
    parser.add_argument("--servers", type=int, choices=(1, 2), default=1)
    parser.add_argument(
        "--patience", type=float, default=TAKEN_OVER_S, help="seconds for a takeover, of two"
    )
    parser.add_argument("--plant", choices=sorted(PLANTS), help="a bug that should be caught")
    parser.add_argument("--home", type=Path, help="where data and evidence go [default: temporary]")
    parser.add_argument("--json", action="store_true", help="print the report as JSON only")
    options = parser.parse_args()
    if options.engine not in (None, "sqlite" if options.servers == 1 else "postgres"):
        parser.error("one server is killed on sqlite, two are on postgres")
    home = options.home or Path(tempfile.mkdtemp(prefix="perdure-crash-"))
    running = run
    if options.servers == 2:
        running = partial(run_pair, patience_s=options.patience)
    told = asyncio.run(
        running(
            home,
            options.cycles,
            options.seed,
            options.plant,
            quiet=options.json,
            seconds=options.seconds,
        )
    )
    if options.json:
        print(msgspec.json.format(msgspec.json.encode(told), indent=2).decode())
    else:
        print(show(told))
    sys.exit(not told.ok)


if __name__ == "__main__":
    with told_as_interrupted():
        main()
