"""Clocks that jump and stand still: under the engine, under blobs, and under a whole server."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator
from pathlib import Path

from perdure.core.batch import delete, put
from perdure.core.errors import PerdureError
from perdure.core.limits import CLOCK_OFF_S
from perdure.engines.blobs_local import LocalBlobs
from perdure.proving.campaign import Campaign, Life, Stage
from perdure.proving.drills.drill import Subject, Trial
from perdure.proving.drills.opening import open_in
from perdure.proving.faults import CLOCK_JUMP
from perdure.proving.file_stories import small_journals
from perdure.proving.jumping import DAY_S, HOUR_S, JumpingClock, Jumps
from perdure.proving.steps import NOTES, TENANT, Note, step, troubles
from perdure.proving.watched import HastyDisk

_STEPS = 6
_JUMPS_S = (-HOUR_S, -DAY_S, DAY_S, 0.0)
"""Back an hour, on and back a day; 0: from then on the clock stands still."""


class JumpedEngine:
    """See `says`."""

    fault = CLOCK_JUMP
    says = (
        "the clock goes back an hour, back and on a day, or stands still, before each commit and "
        "before a reopening, twice in a history: operation ids still answer repeats, a deleted "
        "record goes on with its versions, and every step is there in its order"
    )

    def __init__(self, subject: Subject = "engine") -> None:
        self.subject = subject

    def lacks(self) -> str | None:
        return None

    async def run(self, trial: Trial) -> None:
        places = [
            (jump_s, at, again_s)
            for at in range(1, _STEPS + 1)
            for jump_s, again_s in itertools.product(_JUMPS_S, _JUMPS_S)
            if abs(jump_s + again_s) <= CLOCK_OFF_S
        ]
        trial.planned = len(places)
        for case, (jump_s, at, again_s) in enumerate(places, 1):
            if trial.over:
                return
            if trial.wants(case):
                with trial.place(case) as place, small_journals(wait_s=0.0):
                    wrong = await self._history(place, jump_s, at, again_s)
                    told = f"{jump_s:+g} s before step {at}, then {again_s:+g} s"
                    trial.judged(case, (f"{told}: {it}" for it in wrong), place)

    async def _history(self, place: Path, jump_s: float, at: int, again_s: float) -> list[str]:
        clock = JumpingClock(Jumps(still=jump_s == 0.0))
        engine = await open_in(place, self.subject, clock)
        wrong: list[str] = []
        mortal = (TENANT, "mortal")
        await engine.commit(put(NOTES, mortal, Note("born")))
        await engine.commit(delete(NOTES, mortal))
        first = await engine.commit(step(0, 1).named("step 1"))
        await engine.commit(step(1, 1))
        clock.jump(HOUR_S)  # an hour passes
        for number in range(2, _STEPS + 2):
            if number == at + 1:
                clock.jump(jump_s)
            await engine.commit(step(0, number).named(f"step {number}"))
            await engine.commit(step(1, number) + delete(NOTES, (TENANT, f"w1-{number - 1}x")))
        clock.jump(again_s)
        try:
            await engine.commit(put(NOTES, (TENANT, "passing"), Note("by")))
            await engine.commit(delete(NOTES, (TENANT, "passing")).named("sweep"))
            again = await engine.commit(step(0, 1).named("step 1"))
            if again != first:
                wrong.append(f"a repeat of step 1 got {again}, not {first}")
            born_again = await engine.commit(put(NOTES, mortal, Note("again"), expect=0))
            if born_again.numbers != (3,):
                wrong.append(
                    f"a record deleted at version 2 was made again as {born_again.numbers}"
                )
        except PerdureError as error:
            wrong.append(f"after the jumps: {error!r}")
        await engine.close()
        clock.jump(-again_s)
        engine = await open_in(place, self.subject, clock)
        if not engine.recovered.clean or engine.recovered.duration_s < 0:
            wrong.append(f"opened again it says {engine.recovered}")
        done = dict.fromkeys((0, 1), _STEPS + 1)
        wrong += await troubles(engine, done, done)
        await engine.close()
        return wrong


class JumpedBlobs:
    """See `says`."""

    fault = CLOCK_JUMP
    subject: Subject = "blobs"
    says = (
        "blobs are put, dropped and read while the clock goes back, on, or stands still between "
        "any two of these: what was put is there, also for who opens the directory later"
    )

    def lacks(self) -> str | None:
        return None

    async def run(self, trial: Trial) -> None:
        places = list(itertools.product(_JUMPS_S, repeat=3))
        trial.planned = len(places)
        for case, jumps_s in enumerate(places, 1):
            if trial.over:
                return
            if trial.wants(case):
                with trial.place(case) as place:
                    trial.judged(case, await _blobs(place / "blobs", jumps_s), place)


async def _blobs(root: Path, jumps_s: tuple[float, ...]) -> list[str]:
    clock = JumpingClock(Jumps(still=0.0 in jumps_s))
    blobs = await LocalBlobs.open(root, disk=HastyDisk(), clock=clock)
    kept: set[str] = set()
    for number, by_s in enumerate(jumps_s):
        kept.add((await blobs.put(_said(f"kept {number}"), size_bytes_max=100)).digest)
        gone = await blobs.put(_said(f"dropped {number}"), size_bytes_max=100)
        clock.jump(by_s)
        await blobs.drop(gone.digest)
    await blobs.close()
    blobs = await LocalBlobs.open(root, disk=HastyDisk(), clock=clock)
    listed = {blob.digest async for blob in blobs.list()}
    wrong = [] if listed == kept else [f"{kept} were put and kept, and {listed} are there"]
    wrong += [f"verify: {found.where}: {found.why}" async for found in blobs.verify()]
    await blobs.close()
    return wrong


async def _said(text: str) -> AsyncIterator[bytes]:
    yield text.encode()


class JumpedServer:
    """See `says`."""

    fault = CLOCK_JUMP
    subject: Subject = "server"
    says = (
        "servers live by clocks that stand still or are an hour or a day ahead, and are started "
        "again by a right one: every surface is judged by what was acknowledged, and repeated "
        "requests have one effect"
    )

    def __init__(self, *clocks: Jumps, plant: str | None = None) -> None:
        self._clocks = clocks or (Jumps(off_s=DAY_S), Jumps(off_s=HOUR_S), Jumps(still=True))
        self._plant = plant

    def lacks(self) -> str | None:
        return None

    async def run(self, trial: Trial) -> None:
        async with Stage(trial.home) as stage:
            for case, jumps in enumerate(itertools.cycle(self._clocks), 1):
                if trial.over or (trial.case is not None and case > trial.case):
                    break
                if trial.wants(case):
                    with trial.place(case) as place:
                        seed = f"{trial.seed}/{case}"
                        with Campaign(stage, place, seed=seed, plant=self._plant) as campaign:
                            await campaign.live(Life(clock=jumps))
                        trial.judged(case, map(str, campaign.verdict.violations), campaign.data)
                        trial.count("judgements", sum(campaign.verdict.judged.values()))
