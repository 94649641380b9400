"""Retentions: a worker that is archived or purged is there as a whole or gone as a whole, what was
archived is what it had said, and an operation that a death interrupts comes to its end."""

from __future__ import annotations

import hashlib
from collections import defaultdict

import msgspec

from perdure.proving.client import Client
from perdure.proving.oracle import Check, History, Op, Verdict
from perdure.proving.snapshot import Snapshot
from perdure.proving.workload import Scene
from perdure.surfaces.retentions import ARCHIVES, RETENTIONS
from perdure.surfaces.workers import WORKERS

SURFACE = "worker_retentions"


class Retired(msgspec.Struct):
    """A worker that is to be retired, and what was told of that. `removal` is of its archive."""

    op: Op
    home: str
    mode: str
    answer: bytes | None = None
    removal: Op | None = None

    @property
    def worker_id(self) -> str:
        return f"retired_{self.op.mark}"

    @property
    def path(self) -> str:
        return f"{self.home}/retentions/op_{self.op.mark}"

    @property
    def body(self) -> dict[str, str]:
        return {"operation_id": f"op_{self.op.mark}", "mode": self.mode}

    @property
    def said(self) -> str:
        return f"keep {self.op.mark}"


class RetentionsActor:
    """See `proving.workload.Actor`."""

    surface = SURFACE

    def __init__(self) -> None:
        self._retired: dict[int, list[Retired]] = defaultdict(list)

    async def act(self, client: Client) -> None:
        own = self._retired[client.worker]
        kept = [one for one in own if one.answer and one.mode == "archive" and not one.removal]
        if kept and client.rng.random() < 0.3:
            one = client.rng.choice(kept)
            one.removal = client.history.intend(SURFACE, "discard")
            await client.do(one.removal, "DELETE", f"{one.path}/content")
            return
        home = f"/v1/runtimes/retiring_{client.worker}"
        mode = client.rng.choice(["archive", "purge"])
        await client.send("POST", "/v1/runtimes", {"id": home.rpartition("/")[2]})
        one = Retired(client.history.intend(SURFACE, "retain"), home, mode)
        await client.send("POST", f"{home}/workers", {"id": one.worker_id})
        at = f"{home}/workers/{one.worker_id}"
        await client.send("POST", f"{at}/input", {"content": one.said, "submission_id": "s"})
        await client.send("POST", f"{at}/stop")
        own.append(one)
        answer = await client.do(one.op, "POST", f"{at}/retain", one.body)
        if answer.status == 200:
            one.answer = answer.body

    async def judge(self, scene: Scene) -> None:
        things = [(one.removal or one.op, one) for own in self._retired.values() for one in own]
        for one in scene.chosen(things):
            await _judge_one(scene, one)

    def audit(self, store: Snapshot, history: History, verdict: Verdict, *, settled: bool) -> None:
        operations = store.records[RETENTIONS.name]
        strays = {key[:-1] for key in store.records[ARCHIVES.name]} - operations.keys()
        verdict.holds(Check.ATOMIC, SURFACE, not strays, f"no operation archived {strays}")
        for key, held in operations.items():
            retention = held.value
            there = (*key[:2], retention.worker_id) in store.records[WORKERS.name]
            parts = len(store.under(ARCHIVES, *key))
            whole = parts == retention.parts or retention.removed_at_s is not None
            verdict.holds(
                Check.ATOMIC,
                SURFACE,
                there != retention.done and (whole or not retention.done),
                f"{key[-1]} is {retention}; worker there: {there}, parts: {parts}",
            )


async def _judge_one(scene: Scene, one: Retired) -> None:
    """Sent again the operation comes to its end, and is what it was."""
    holds, client = scene.verdict.holds, scene.client
    if one.answer is None:
        again = await client.send("POST", f"{one.home}/workers/{one.worker_id}/retain", one.body)
        ended = again.status == 200 and again.json()["done"]
        never = again.status in (404, 409)  # the worker was not made, or not stopped, in time
        holds(Check.GOES_ON, SURFACE, ended or never, f"{one.op} again was answered {again}")
        if not ended:
            return
        one.answer = again.body
        scene.history.settle(one.op, "acknowledged", 200)
    told, found = msgspec.json.decode(one.answer), await client.get(one.path)
    if one.removal is not None:
        await client.send("DELETE", f"{one.path}/content")
        found = await client.get(one.path)
        gone = found.status == 200 and found.json()["removed_at"] is not None
        holds(Check.KEPT, SURFACE, gone, f"the archive of {one.op} was removed: {found}")
    else:
        holds(Check.KEPT, SURFACE, found.body == one.answer, f"{one.op} is told as {found}")
    worker = await client.get(f"{one.home}/workers/{one.worker_id}")
    holds(Check.WHOLE, SURFACE, worker.status == 404, f"{one.op} is done; its worker: {worker}")
    content = await client.get(f"{one.path}/content")
    if one.mode == "archive" and one.removal is None:
        sound = hashlib.sha256(content.body).hexdigest() == told["digest"]
        right = sound and one.said.encode() in content.body
        holds(Check.KEPT, SURFACE, right, f"{one.op} archived {content.status} {content.body!r}")
    else:
        holds(Check.CLEAN, SURFACE, content.status == 404, f"{one.op} archives {content.status}")
