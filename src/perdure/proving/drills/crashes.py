"""Processes killed: a writer over an engine, and the server with all its surfaces."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

from perdure.core.clock import SystemClock
from perdure.core.errors import PerdureError, StoreLocked
from perdure.engines import open_engine
from perdure.proving.campaign import Campaign, Stage
from perdure.proving.crash import life_of
from perdure.proving.drills.drill import Subject, Trial, url_in
from perdure.proving.faults import PROCESS_CRASH
from perdure.proving.steps import LAYOUTS, last_step, troubles

_WRITERS = 4
_LIVES = 6
"""Lives of one store: each judges all steps of all lives before it."""

_ACKNOWLEDGED_MAX = 200


class KilledWriter:
    """See `says`."""

    fault = PROCESS_CRASH
    says = (
        "a writer of several streams is killed at random; while it is paused nobody else may open "
        "the store; then every acknowledged step is there, whole, and work goes on"
    )

    def __init__(self, subject: Subject = "engine") -> None:
        self.subject = subject

    def lacks(self) -> str | None:
        return None

    async def run(self, trial: Trial) -> None:
        case = 0
        while not trial.over and case != trial.case:
            with trial.place(case + 1) as place:
                acknowledged = dict.fromkeys(range(_WRITERS), 0)
                for _ in range(_LIVES):
                    case += 1
                    wrong = await self._live(trial, case, place, acknowledged)
                    trial.judged(case, wrong, place)
                    if wrong or trial.over or case == trial.case:
                        break

    async def _live(
        self, trial: Trial, case: int, place: Path, acknowledged: dict[int, int]
    ) -> list[str]:
        """One life of the writer, killed somewhere; what does not hold after it."""
        url = url_in(place, self.subject)
        rng = trial.rng("killed writer", case)
        writer = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "perdure.proving.writer", url, str(_WRITERS)),
            stdout=asyncio.subprocess.PIPE,
        )
        told = writer.stdout
        assert told is not None
        if await told.readline() != b"ready\n":
            await writer.wait()
            return [f"a writer could not open the store, and ended with {writer.returncode}"]
        wrong: list[str] = []
        for _ in range(rng.randrange(1, _ACKNOWLEDGED_MAX)):
            _note(acknowledged, await told.readline())
        if rng.random() < 0.3:
            os.kill(writer.pid, signal.SIGSTOP)
            wrong += await _refused(url, writer.pid)
        writer.kill()
        while line := await told.readline():
            _note(acknowledged, line)
        await writer.wait()
        try:
            engine = await open_engine(url, LAYOUTS, clock=SystemClock())
        except PerdureError as error:
            return [*wrong, f"the store does not open: {error}"]
        begun = {who: number + 1 for who, number in acknowledged.items()}
        wrong += await troubles(engine, acknowledged, begun)
        if engine.recovered.clean:
            wrong.append("a store whose owner was killed says that it was closed")
        for who in acknowledged:
            acknowledged[who] = await last_step(engine, who)
        trial.count("acknowledged steps", sum(acknowledged.values()))
        await engine.close()
        return wrong


class KilledServer:
    """See `says`."""

    fault = PROCESS_CRASH
    subject: Subject = "server"
    says = (
        "the server is killed while clients use every surface: at counted commits, between the "
        "parts of a stream, at random moments, and again while it recovers; each surface is "
        "judged from outside by what was acknowledged"
    )
    power = False

    def lacks(self) -> str | None:
        return None

    async def run(self, trial: Trial) -> None:
        async with Stage(trial.home) as stage:
            with Campaign(stage, trial.home, seed=trial.seed) as campaign:
                cycle = 0
                while not trial.over and cycle != trial.case:
                    cycle += 1
                    rng = trial.rng(cycle)
                    await campaign.live(life_of(rng, power=self.power))
                    trial.judged(cycle, map(str, campaign.verdict.violations), campaign.data)
                    campaign.verdict.violations.clear()
                trial.count("judgements", sum(campaign.verdict.judged.values()))
                for kind, count in campaign.deaths.items():
                    trial.count(kind, count)


def _note(acknowledged: dict[int, int], line: bytes) -> None:
    """Take down an acknowledgement; a line that was cut off says nothing."""
    if line.endswith(b"\n"):
        who, number = map(int, line.split())
        acknowledged[who] = number


async def _refused(url: str, holder: int) -> list[str]:
    """A second owner is refused by the name of the first, even while that one is paused."""
    try:
        engine = await open_engine(url, LAYOUTS, clock=SystemClock())
    except StoreLocked as locked:
        return [] if locked.holder == holder else [f"the holder is {holder}, told was {locked}"]
    await engine.close()
    return ["a second process opened the store beside its owner"]
