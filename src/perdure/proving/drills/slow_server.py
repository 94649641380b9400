"""A server on a slow disk: killed while syncs hang, and asked to read meanwhile."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import httpx
import msgspec

from perdure.proving.campaign import Campaign, Life, Stage
from perdure.proving.drills.drill import Subject, Trial
from perdure.proving.faults import SLOW_DISK
from perdure.proving.launcher import Plan
from perdure.proving.refusing import Call, Trouble
from perdure.proving.snapshot import Snapshot
from perdure.proving.victim import Victim
from perdure.proving.waiting import wait_until

_HANGS_S = 8.0
_READING_S = 2.0
"""So long it is read while they hang: until all that write have come to their sync."""

_READS_S = 4.0
"""How long a read may take while syncs hang: less than they do, and much more than it needs."""

_LOOKS_S = 0.2
"""How long a look takes at most whether a start is through: a hang that begins meanwhile is judged
while it lasts."""

_STARTED = 40
"""A start makes fewer syncs of each kind."""

_STARTING = 16
"""It makes about so many in directories and files of its own."""

_STARTS = 4
"""How many of them hang in one case, each in a start of its own."""

_AT_ONCE = 12
_DELAYS_S = (0.02, 0.1, 0.3)
_SYNCS: tuple[Call, ...] = ("sqlite.sync", "disk.sync", "disk.names")

_numbers = itertools.count(1)

Write = Callable[[httpx.AsyncClient], Coroutine[None, None, str]]
"""Writes something, and says where that can be read once it is acknowledged."""


class SlowServer:
    """See `says`."""

    fault = SLOW_DISK
    subject: Subject = "server"
    says = (
        "a sync of its start hangs for seconds, and then every sync while many clients write: it "
        "lives and reads meanwhile, "
        "and after a kill in the middle of it everything acknowledged is there; and lives of all "
        "surfaces over a disk whose every sync is slow: all is done late and nothing refused"
    )

    def __init__(self, plant: str | None = None) -> None:
        self._plant = plant

    def lacks(self) -> str | None:
        return None

    async def run(self, trial: Trial) -> None:
        async with Stage(trial.home) as stage:
            await trial.each(partial(self._judge, trial, stage))

    async def _judge(self, trial: Trial, stage: Stage, case: int, place: Path) -> list[str]:
        kind = self._kinds[case % len(self._kinds)]
        return await kind(self, trial, case, stage, place)

    async def _commits(self, trial: Trial, case: int, stage: Stage, place: Path) -> list[str]:
        n = _STARTED + trial.rng(case).randrange(20)
        return await self._hang(stage, place, Trouble(calls=("sqlite.sync",), n=n), _conversation)

    async def _uploads(self, trial: Trial, case: int, stage: Stage, place: Path) -> list[str]:
        n = 5 + trial.rng(case).randrange(10)
        return await self._hang(stage, place, Trouble(calls=("disk.sync",), n=n), _file)

    async def _hang(self, stage: Stage, place: Path, trouble: Trouble, write: Write) -> list[str]:
        """Write until the first sync hangs, then with many at once; read; kill."""
        told = place / "hangs"
        plan = Plan(data=str(place / "data"), port=stage.port, upstream=stage.upstream.url)
        trouble = msgspec.structs.replace(trouble, times=None, delay_s=_HANGS_S, told=str(told))
        slow = msgspec.structs.replace(plan, trouble=trouble, plant=self._plant)
        kept: list[str] = []
        async with _served(stage, slow) as (_, asked):
            kept += [await _file(asked), await _conversation(asked)]
            while not _hangs(told):
                writing = asyncio.create_task(write(asked))
                await _either(writing, told)
                if not writing.done():
                    break
                kept.append(writing.result())
            began_s = time.monotonic()
            many = [writing, *(asyncio.create_task(write(asked)) for _ in range(_AT_ONCE))]
            wrong: list[str] = []
            while not wrong and time.monotonic() - began_s < _READING_S:
                wrong = [
                    f"syncs hang, and GET {path} {found}"
                    for path in ("/livez", "/v1/conversations", "/v1/files", *kept[:2])
                    if (found := await _read(asked, path)) is not None
                ]
            early = [one.result() for one in many[1:] if one.done()]
            if early and time.monotonic() - began_s < _HANGS_S:
                wrong.append(f"{early} were acknowledged before a sync could end")
            kept += early
        await asyncio.gather(*many, return_exceptions=True)
        async with _served(stage, plan) as (_, asked):
            for path in kept:
                if (found := await _read(asked, path)) is not None:
                    wrong.append(f"{path} was acknowledged, and after a kill it {found}")
        return wrong + (await Snapshot.of(place / "data", place / "copy", verify=True)).findings

    async def _starts(self, trial: Trial, case: int, stage: Stage, place: Path) -> list[str]:
        first = case // len(self._kinds) * _STARTS % _STARTING
        wrong: list[str] = []
        for n in range(first + 1, first + _STARTS + 1):
            wrong += await self._start(stage, place, n)
        return wrong

    async def _start(self, stage: Stage, place: Path, n: int) -> list[str]:
        """While the `n`-th sync of a start hangs, it says that it is alive and how far it is."""
        told = place / f"hangs-{n}"
        hangs = Trouble(calls=("disk.sync", "disk.names"), n=n, delay_s=_HANGS_S, told=str(told))
        plan = Plan(data=str(place / f"data-{n}"), port=stage.port, upstream=stage.upstream.url)
        slow = msgspec.structs.replace(plan, trouble=hangs, plant=self._plant)
        victim = await stage.nursery.start(slow)
        try:
            async with httpx.AsyncClient(
                base_url=victim.url, trust_env=False, verify=False
            ) as asked:

                async def come() -> bool:
                    return _hangs(told) or await _read(asked, "/readyz", _LOOKS_S) is None

                await wait_until(come, _HANGS_S, "a sync that hangs, or the end of the start,")
                return [
                    f"{hangs}: a sync of the start hangs, and GET {path} {found}"
                    for path in ("/livez", "/v1/startup")
                    if (found := await _read(asked, path)) is not None
                ]
        finally:
            victim.signal()
            await victim.death()

    async def _lives(self, trial: Trial, case: int, stage: Stage, place: Path) -> list[str]:
        """A life of the crash campaign in which all work is done late."""
        delay_s = trial.rng(case).choice(_DELAYS_S)
        slow = Trouble(calls=_SYNCS, times=None, delay_s=delay_s)
        with Campaign(stage, place, seed=f"{trial.seed}/{case}", plant=self._plant) as campaign:
            await campaign.live(Life(trouble=slow, steps=3))
        trial.count("judgements", sum(campaign.verdict.judged.values()))
        return [str(violation) for violation in campaign.verdict.violations]

    _kinds = (_lives, _starts, _commits, _uploads)


async def _conversation(asked: httpx.AsyncClient) -> str:
    answer = await asked.post("/v1/conversations", json={})
    return f"/v1/conversations/{answer.raise_for_status().json()['id']}"


async def _file(asked: httpx.AsyncClient) -> str:
    data = f"file {next(_numbers)}".encode()  # one digest is put by one at a time
    answer = await asked.post(
        "/v1/files", files={"file": ("a.txt", data)}, data={"purpose": "user_data"}
    )
    return f"/v1/files/{answer.raise_for_status().json()['id']}/content"


async def _read(asked: httpx.AsyncClient, path: str, within_s: float = _READS_S) -> str | None:
    """What is wrong with reading it; None where that works, in time."""
    try:
        status = (await asked.get(path, timeout=within_s)).status_code
    except httpx.TransportError as error:
        return f"is not answered within {within_s:g} s: {type(error).__name__}"
    return None if status == 200 else f"is answered {status}"


async def _either(writing: asyncio.Task[str], told: Path) -> None:
    """Until it was written, or its sync hangs."""

    async def come() -> bool:
        return writing.done() or _hangs(told)

    await wait_until(come, _HANGS_S, "a write, or a sync that hangs,")


def _hangs(told: Path) -> bool:
    return told.exists()


@asynccontextmanager
async def _served(stage: Stage, plan: Plan) -> AsyncIterator[tuple[Victim, httpx.AsyncClient]]:
    """A server that is ready, killed where the context ends, and a client of it."""
    victim = await stage.nursery.start(plan)
    async with httpx.AsyncClient(
        base_url=victim.url, timeout=2 * _HANGS_S, trust_env=False, verify=False
    ) as client:
        try:
            await victim.ready()
            yield victim, client
        finally:
            victim.signal()
            await victim.death()
