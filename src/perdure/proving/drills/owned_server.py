"""Two servers on one data directory, which may have lost its lock files."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import msgspec

from perdure.proving.campaign import Stage
from perdure.proving.client import head
from perdure.proving.drills.drill import Subject, Trial
from perdure.proving.faults import TWO_OWNERS
from perdure.proving.launcher import Plan
from perdure.proving.ports import kept_port
from perdure.proving.snapshot import Snapshot
from perdure.proving.victim import Nursery, Victim
from perdure.proving.waiting import wait_until

_UNAVAILABLE = 5
"""How a server ends that may not have its store."""

_LOCK_FILES = ("perdure.db.lock", "blobs/lock")
_WORDS = 30
_PROMPT = f"slow 0.03 {_WORDS}"
"""The model counts for a second: long enough for another server to come meanwhile."""

_ENDS_S = 20.0
_DEADLINE_S = 10.0


class OwnedServer:
    """See `says`."""

    fault = TWO_OWNERS
    subject: Subject = "server"
    says = (
        "a second server is started on the data of one that works, or is paused, and makes a "
        "response in the background: it ends by naming the first, which goes on. Where all lock "
        "files were removed it may take over: then the first is not ready, reads, and refuses to "
        "write; the response is made once, and what either acknowledged is there"
    )

    def __init__(self, plant: str | None = None) -> None:
        self._plant = plant

    def lacks(self) -> str | None:
        return None

    async def run(self, trial: Trial) -> None:
        meetings = list(itertools.product((False, True), repeat=2))
        trial.rng("order").shuffle(meetings)
        trial.planned = len(meetings)
        async with Stage(trial.home) as stage, Nursery(trial.home / "second.log") as nursery:
            for case, (removed, paused) in enumerate(meetings, 1):
                if trial.over:
                    return
                if trial.wants(case):
                    with trial.place(case) as place:
                        meeting = _Meeting(trial, place, stage, nursery, self._plant)
                        wrong = await meeting.judge(removed=removed, paused=paused)
                        how = f"the first is {'paused' if paused else 'at work'}"
                        locks = f"its lock files are {'removed' if removed else 'kept'}"
                        trial.judged(case, (f"{how}, {locks}: {it}" for it in wrong), place)


class _Meeting:
    """One server, a second one, and what either acknowledged."""

    def __init__(
        self, trial: Trial, place: Path, stage: Stage, nursery: Nursery, plant: str | None
    ) -> None:
        self._trial = trial
        self._place = place
        self._stage = stage
        self._nursery = nursery
        self._plan = Plan(
            data=str(place / "data"), port=stage.port, upstream=stage.upstream.url, plant=plant
        )
        self._kept: list[str] = []
        self._wrong: list[str] = []

    async def judge(self, *, removed: bool, paused: bool) -> list[str]:
        """Let them meet; what did not hold."""
        async with _served(self._stage.nursery, self._plan) as first, _asking(first) as asked:
            for _ in range(3):
                await self._write(asked)
            body = {"model": "scripted", "input": _PROMPT, "background": True}
            made = (await asked.post("/v1/responses", json=body)).json()["id"]
            for name in _LOCK_FILES * removed:
                self._trial.disk.remove(Path(self._plan.data) / name)
            if paused:
                os.kill(first.pid, signal.SIGSTOP)
            with kept_port() as port:
                plan = msgspec.structs.replace(self._plan, port=port, plant=None)
                async with _served(self._nursery, plan) as second, _asking(second) as other:
                    if paused:
                        os.kill(first.pid, signal.SIGCONT)
                    if second.dead:
                        await self._refused(first, asked, await second.death(), removed=removed)
                    else:
                        await self._replaced(asked, other, removed=removed)
                    if not self._wrong:
                        await self._end(asked if second.dead else other, made)
        if not self._wrong:
            await self._afterwards(made)
        return self._wrong

    async def _refused(
        self, first: Victim, asked: httpx.AsyncClient, code: int, *, removed: bool
    ) -> None:
        """The second is gone: it says who has the store, and that one goes on."""
        if code != _UNAVAILABLE:
            self._wrong.append(f"the second ended with {code}")
        said = (self._trial.home / "second.log").read_text()
        if not removed and f"in use by process {first.pid}." not in said:
            self._wrong.append("the second did not name the first")
        refused = await self._write(asked)
        if refused and not (removed and refused == "latched"):
            self._wrong.append(f"the first was left alone, and a write got {refused}")

    async def _replaced(
        self, asked: httpx.AsyncClient, other: httpx.AsyncClient, *, removed: bool
    ) -> None:
        """The second has taken over: the first only reads, and says so."""
        self._trial.count("taken over")
        if not removed:
            self._wrong.append("a second server serves beside the first")
        if refused := await self._write(other):
            self._wrong.append(f"the second has the store, and a write got {refused}")
        if (refused := await self._write(asked)) != "latched":
            self._wrong.append(f"the first was replaced, and a write got {refused or 'done'}")
        for path, status in (
            ("/livez", 200),
            ("/readyz", 503),
            (f"/v1/conversations/{self._kept[0]}", 200),
        ):
            found = (await asked.get(path)).status_code
            if found != status:
                self._wrong.append(f"the first was replaced, and {path} says {found}")

    async def _end(self, asked: httpx.AsyncClient, made: str) -> None:
        """The response comes to its end."""

        async def ended() -> bool:
            answer = await asked.get(f"/v1/responses/{made}")
            return bool(answer.json()["status"] == "completed")

        await wait_until(ended, _ENDS_S, "the end of a response, after two servers met,")

    async def _afterwards(self, made: str) -> None:
        """Both are dead: the next server finds what either acknowledged, and the store is sound."""
        plan = msgspec.structs.replace(self._plan, plant=None)
        async with _served(self._stage.nursery, plan) as third, _asking(third) as asked:
            for one in self._kept:
                found = (await asked.get(f"/v1/conversations/{one}")).status_code
                self._wrong += [f"{one} was acknowledged, and now it is {found}"] * (found != 200)
            said = (await asked.get(f"/v1/responses/{made}")).json()["output"][-1]["content"][0]
            if said["text"] != " ".join(str(number) for number in range(1, _WORDS + 1)):
                self._wrong.append(f"the response says {said['text']!r}")
            stream = (await asked.get(f"/v1/responses/{made}?stream=true")).content.split(b"\n")
            events = [head(line[6:]) for line in stream if line.startswith(b"data: {")]
            numbers = [event.sequence_number for event in events]
            if numbers != list(range(len(numbers))):
                self._wrong.append(f"the events of the response are numbered {numbers}")
        store = await Snapshot.of(Path(plan.data), self._place / "copy", verify=True)
        self._wrong += store.findings

    async def _write(self, asked: httpx.AsyncClient) -> str | None:
        """Make a conversation; the code with which that is refused, None where it is done."""
        answer = await asked.post("/v1/conversations", json={})
        if answer.status_code == 200:
            self._kept.append(answer.json()["id"])
            return None
        return str(answer.json()["error"]["code"])


@asynccontextmanager
async def _served(nursery: Nursery, plan: Plan) -> AsyncIterator[Victim]:
    """A server that is ready or has ended by itself, and is dead after the context."""
    victim = await nursery.start(plan)
    try:
        await victim.ready()
        yield victim
    finally:
        victim.signal()
        await victim.death()


@asynccontextmanager
async def _asking(victim: Victim) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(
        base_url=victim.url, timeout=_DEADLINE_S, trust_env=False, verify=False
    ) as client:
        yield client
