"""Boots: every start is on record, says how the one before ended, and what it recovered."""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise
from typing import Any

from perdure.proving.client import Client
from perdure.proving.oracle import Check, History, Verdict
from perdure.proving.snapshot import Snapshot
from perdure.proving.workload import Scene
from perdure.surfaces.boots import BOOTS, INSTANCES
from perdure.surfaces.responses import RESPONSES

SURFACE = "boots"


class BootsActor:
    """See `proving.workload.Actor`. `told` are the boots that servers said they were, by instance
    and number."""

    surface = SURFACE

    def __init__(self) -> None:
        self.told: dict[tuple[str, int], str] = {}

    async def act(self, client: Client) -> None:
        answer = await client.get("/v1/startup")
        if answer.status == 200:
            self._note(answer.json())

    def _note(self, startup: dict[str, Any]) -> None:
        self.told[startup["instance_id"], startup["number"]] = startup["boot_id"]

    async def judge(self, scene: Scene) -> None:
        startup = (await scene.client.get("/v1/startup")).json()
        instances = (await scene.client.get("/v1/instances")).json()["data"]
        boots = (await scene.client.get("/v1/boots?limit=100")).json()["data"]
        self._note(startup)
        _judge_start(scene, startup)
        _judge_alive(scene, startup, instances)
        self._judge_history(scene, startup, [listed["boot"] for listed in boots])

    def _judge_history(
        self, scene: Scene, startup: dict[str, Any], boots: list[dict[str, Any]]
    ) -> None:
        holds = scene.verdict.holds
        numbers = [boot["number"] for boot in boots]
        newest = startup["number"]
        expected = list(range(newest, max(newest - 100, 0), -1))
        holds(Check.DENSE, SURFACE, numbers == expected, f"boots are numbered {numbers}")
        for boot in boots:
            told = self.told.get((startup["instance_id"], boot["number"]), boot["boot_id"])
            holds(Check.KEPT, SURFACE, boot["boot_id"] == told, f"boot {boot['number']} changed")
        for later, earlier in pairwise(boots):
            linked = (later["previous_boot_id"], later["previous_ended_clean"]) == (
                earlier["boot_id"],
                earlier["ended_clean"],
            )
            holds(Check.REPORTED, SURFACE, linked, f"boot {later['number']} has another past")

    def audit(self, store: Snapshot, history: History, verdict: Verdict, *, settled: bool) -> None:
        kept = store.records[BOOTS.name]
        newest: dict[str, str] = {}
        numbers: dict[str, list[int]] = defaultdict(list)
        for key, boot in sorted(kept.items()):
            newest[key[1]] = boot.value.boot_id
            numbers[key[1]].append(int(key[-1]))
        dense = all(own == list(range(1, len(own) + 1)) for own in numbers.values())
        verdict.holds(Check.DENSE, SURFACE, dense, f"boots are numbered {dict(numbers)}")
        lost = set(self.told.values()) - {boot.value.boot_id for boot in kept.values()}
        verdict.holds(Check.KEPT, SURFACE, not lost, f"boots {lost} answered and are gone")
        for instance in store.records[INSTANCES.name].values():
            verdict.holds(
                Check.REPORTED,
                SURFACE,
                instance.value.boot_id == newest.get(instance.value.instance_id),
                f"the last sign of life is of {instance.value.boot_id}, not the newest boot",
            )


def _judge_start(scene: Scene, startup: dict[str, Any]) -> None:
    """The report of the start, against what the runner did and what lay in the dead store."""
    holds, start = scene.verdict.holds, scene.start
    before = [
        boot.value
        for key, boot in sorted(scene.before.records[BOOTS.name].items())
        if key[1] == startup["instance_id"]
    ]
    last = before[-1] if before else None
    holds(
        Check.REPORTED,
        SURFACE,
        startup["previous_boot_id"] == (last.boot_id if last else None),
        f"boot {startup['number']} follows {startup['previous_boot_id']}, in the store is {last}",
    )
    if last is not None and last.pid not in start.given_up:
        clean = last.pid in start.stopped
        holds(
            Check.REPORTED,
            SURFACE,
            startup["previous_ended_clean"] is clean,
            f"the last server {'stopped' if clean else 'was killed'}, and the boot says "
            f"previous_ended_clean: {startup['previous_ended_clean']}",
        )
    if not start.beside:
        _judge_recovered(scene, startup)
    holds(
        Check.SOUND,
        SURFACE,
        not any(found["damaged"] for found in startup["recovery"]),
        f"recovery reports damage: {startup['recovery']}",
    )


def _judge_recovered(scene: Scene, startup: dict[str, Any]) -> None:
    unfinished = [
        response.value
        for response in scene.before.records[RESPONSES.name].values()
        if not response.value.status.terminal
    ]
    waiting = sum(response.job_id is not None for response in unfinished)
    told = {found["surface"]: found for found in startup["recovery"]}
    counts = told["responses"]["interrupted"], told["jobs"]["requeued"]
    scene.verdict.holds(
        Check.REPORTED,
        SURFACE,
        counts == (len(unfinished) - waiting, waiting),
        f"{len(unfinished)} responses were unfinished, {waiting} of them jobs; reported are "
        f"{counts[0]} interrupted and {counts[1]} requeued",
    )


def _judge_alive(scene: Scene, startup: dict[str, Any], instances: list[dict[str, Any]]) -> None:
    """The process that answers is said to be ready, those beside it, and nobody else."""
    start = scene.start
    ready = {one["pid"]: one["boot_id"] for one in instances if one["ready"]}
    scene.verdict.holds(
        Check.REPORTED,
        SURFACE,
        ready.keys() == {start.pid, *start.beside}
        and (ready[start.pid], startup["pid"]) == (startup["boot_id"], start.pid),
        f"process {start.pid} answers, beside {set(start.beside)}; ready are {ready}",
    )
