"""Jobs: responses asked for in the background, which must come to their end whoever dies over them,
and cancellations, which must hold."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import msgspec

from perdure.core.keys import Key
from perdure.proving.actors.responses import a_prompt, by_operation, id_of, judge_resuming, said_in
from perdure.proving.client import Client, ends, head
from perdure.proving.oracle import Check, History, Op, Verdict
from perdure.proving.scripts import script_of
from perdure.proving.snapshot import Kept, Snapshot
from perdure.proving.waiting import TooLate, wait_until
from perdure.proving.workload import Scene
from perdure.surfaces.jobs import JOB_EVENTS, JOB_INPUTS, JOBS, Job
from perdure.surfaces.responses import EVENTS, RESPONSES, Status

SURFACE = "jobs"

_DONE = b'{"type":"response.output_item.done"'

TAKEN_OVER_S = 10.0
"""From a ready server to the end of what the dead one left, which is short."""


class Work(msgspec.Struct):
    """One response asked for in the background. `body` is what it ended with, once that was seen;
    `seen` are the events that reached a client."""

    op: Op
    prompt: str
    id: str | None = None
    body: bytes | None = None
    seen: list[bytes] = []
    cancelled: Op | None = None
    deleted: Op | None = None

    @property
    def sure(self) -> bool:
        return self.op.outcome == "acknowledged" or bool(self.seen)

    @property
    def latest(self) -> Op:
        ops = [self.op, self.cancelled or self.op, self.deleted or self.op]
        return max(ops, key=lambda op: op.cycle)


class JobsActor:
    """See `proving.workload.Actor`."""

    surface = SURFACE

    def __init__(self) -> None:
        self._works: dict[int, list[Work]] = defaultdict(list)

    async def act(self, client: Client) -> None:
        known = [work for work in self._works[client.worker] if work.id and not work.deleted]
        roll = client.rng.random()
        if known and roll < 0.2:
            await self._cancel(client, client.rng.choice(known[-3:]))
        elif known and roll < 0.3:
            await self._delete(client, client.rng.choice(known[-3:]))
        elif known and roll < 0.45:
            await self._follow(client, client.rng.choice(known[-3:]))
        else:
            await self._start(client, stream=client.rng.random() < 0.3)

    async def _start(self, client: Client, *, stream: bool) -> None:
        op = client.history.intend(SURFACE, "stream" if stream else "create", creates="response")
        work = Work(op, _prompt(op, client))
        self._works[client.worker].append(work)
        body = {"model": "scripted", "input": work.prompt, "background": True}
        if stream:
            try:
                await client.post_stream(op, "/v1/responses", body | {"stream": True}, work.seen)
            finally:
                if work.seen:
                    work.id = id_of(work.seen[0])
            return
        answer = await client.do(op, "POST", "/v1/responses", body)
        if answer.status == 200:
            work.id = answer.json()["id"]
            status = answer.json()["status"]
            if status not in ("queued", "in_progress", "completed"):
                client.history.complaints.append(f"{work.id} was answered as {status}")

    async def _cancel(self, client: Client, work: Work) -> None:
        op = client.history.intend(SURFACE, "cancel", id=work.id)
        work.cancelled = op
        answer = await client.do(op, "POST", f"/v1/responses/{work.id}/cancel")
        if answer.status == 200:
            if not Status(answer.json()["status"]).terminal:
                client.history.complaints.append(f"{work.id} was cancelled and goes on")
            if work.body is not None and answer.body != work.body:
                client.history.complaints.append(f"{work.id} ended twice")
            work.body = answer.body

    async def _delete(self, client: Client, work: Work) -> None:
        work.deleted = op = client.history.intend(SURFACE, "delete", id=work.id)
        await client.do(op, "DELETE", f"/v1/responses/{work.id}")

    async def _follow(self, client: Client, work: Work) -> None:
        """Read on behind what was seen, to the end: a reader that lost its connection."""
        path = f"/v1/responses/{work.id}?stream=true&starting_after={len(work.seen) - 1}"
        work.seen += await client.log(path)

    async def judge(self, scene: Scene) -> None:
        jobs = scene.before.records[JOBS.name]
        for job in jobs.values():
            if job.value.owed is not None:
                await _judge_takeover(scene, job.value)
        found = by_operation(scene.before, scene.history)
        things = [(work.latest, work) for own in self._works.values() for work in own]
        for work in scene.chosen(things):
            if work.id is None and (key := found.get(work.op.number)) is not None:
                work.id = key[-1]
            if work.id is not None:
                await _judge_one(scene, work, work.id)

    def audit(self, store: Snapshot, history: History, verdict: Verdict, *, settled: bool) -> None:
        jobs = store.records[JOBS.name]
        for key, job in jobs.items():
            _audit_one(store, key, job, verdict, settled=settled)
        for key, response in store.records[RESPONSES.name].items():
            job_id = response.value.job_id
            there = job_id is None or (key[0], job_id) in jobs
            verdict.holds(Check.ATOMIC, SURFACE, there, f"{key[-1]} has no job {job_id}")
        for key in store.records[JOB_INPUTS.name]:
            held = key in jobs and jobs[key].value.owed is not None
            verdict.holds(Check.CLEAN, SURFACE, held, f"{key[-1]} needs its input no more")
        for key in store.streams[JOB_EVENTS.name]:
            verdict.holds(Check.ATOMIC, SURFACE, key in jobs, f"events without job {key[-1]}")


def _prompt(op: Op, client: Client) -> str:
    """Something to ask; often it takes as long as a server lives."""
    if client.rng.random() < 0.6:
        return f"pace 0.02 {op.mark} " + "one by one " * client.rng.randint(1, 10)
    return a_prompt(op, client)


async def _judge_takeover(scene: Scene, job: Job) -> None:
    path = f"/v1/responses/{job.subject}"

    async def ended() -> bool:
        answer = await scene.client.get(path)
        return answer.status == 200 and Status(answer.json()["status"]).terminal

    try:
        await wait_until(ended, TAKEN_OVER_S, f"the end of {job.subject}")
    except TooLate as late:
        scene.verdict.holds(Check.CLEAN, SURFACE, False, f"{late}: it was left {job}")
        return
    answer = (await scene.client.get(path)).json()
    holds = job.owed != "cancel" or answer["status"] == "cancelled"
    scene.verdict.holds(Check.KEPT, SURFACE, holds, f"{job.subject} was to be cancelled: {answer}")


async def _judge_one(scene: Scene, work: Work, id: str) -> None:
    holds = scene.verdict.holds
    answer = await scene.client.get(f"/v1/responses/{id}")
    if answer.status == 404:
        gone = work.deleted is not None and work.deleted.outcome != "refused"
        holds(Check.KEPT, SURFACE, gone or not work.sure, f"{id} was acknowledged and is gone")
        return
    gone = work.deleted is not None and work.deleted.outcome == "acknowledged"
    holds(Check.KEPT, SURFACE, not gone, f"{id} was deleted and is back")
    if not holds(Check.KEPT, SURFACE, answer.status == 200, f"{id}: {answer.status}"):
        return
    body = answer.json()
    if work.body is not None:
        holds(Check.KEPT, SURFACE, answer.body == work.body, f"{id} is not what it ended as")
    if not holds(Check.CLEAN, SURFACE, Status(body["status"]).terminal, f"{id} has no end"):
        return
    work.body = answer.body
    log = await scene.client.log(f"/v1/responses/{id}?stream=true")
    seen = work.seen
    holds(Check.DENSE, SURFACE, log[: len(seen)] == seen, f"{id}: what a client saw is not stored")
    numbers = [head(event).sequence_number for event in log]
    holds(Check.DENSE, SURFACE, numbers == list(range(len(log))), f"{id} has events {numbers}")
    _judge_end(scene.verdict, work, id, body)
    _judge_grammar(scene.verdict, work, id, body, [msgspec.json.decode(event) for event in log])
    await judge_resuming(scene, id, log)


def _judge_end(verdict: Verdict, work: Work, id: str, body: dict[str, Any]) -> None:
    """It says all that it was asked to; or it was cancelled, or its deletion cancelled it."""
    expected, said = script_of(work.prompt).text, said_in(body)
    may_be_cancelled = work.cancelled is not None or work.deleted is not None
    whole = body["status"] == "completed" and said == expected
    cut = body["status"] == "cancelled" and may_be_cancelled and expected.startswith(said)
    verdict.holds(
        Check.KEPT,
        SURFACE,
        whole or cut,
        f"{id} ({body['status']}) says {said!r}, not {expected!r}",
    )


def _judge_grammar(
    verdict: Verdict, work: Work, id: str, body: dict[str, Any], log: list[dict[str, Any]]
) -> None:
    """Items open and close in order, one place an item, and one is open when an attempt begins that
    goes on with it, none when any other does; what was said before the last of those is told as
    abandoned, and each item by itself says what was asked for, from its beginning."""
    holds = verdict.holds
    types = [event["type"] for event in log]
    opens, closes = (
        [event["output_index"] for event in log if event["type"] == f"response.output_item.{how}"]
        for how in ("added", "done")
    )
    holds(
        Check.WHOLE,
        SURFACE,
        types[:2] == ["response.created", "response.queued"]
        and opens == list(range(len(opens)))
        and sorted(closes) == opens,
        f"{id} opens items {opens} and closes {closes}",
    )
    begins = [at for at, type in enumerate(types) if type == "response.in_progress"]
    open_then = [
        types[:at].count("response.output_item.added")
        - types[:at].count("response.output_item.done")
        for at in begins
    ]
    perdure = body.get("perdure") or {}
    told = perdure.get("attempts") or [{}]
    goes_on = [int(attempt.get("continued", False)) for attempt in told]
    holds(
        Check.WHOLE,
        SURFACE,
        open_then == goes_on[: len(begins)],
        f"{id} had items open: {open_then}, its attempts are {told}",
    )
    holds(Check.ATOMIC, SURFACE, log[-1]["response"] == body, f"{id} and its last event differ")
    attempts, began = len(told), len(begins)
    holds(
        Check.REPORTED,
        SURFACE,
        began == attempts or (body["status"] == "cancelled" and began == 0),
        f"{id} tells of {attempts} attempts, its events of {began}",
    )
    items = perdure.get("abandoned", []) + body["output"]
    done = [event["item"] for event in log if event["type"] == "response.output_item.done"]
    holds(
        Check.KEPT, SURFACE, items == done, f"{id}: {len(items)} items are told, {len(done)} done"
    )
    expected = script_of(work.prompt).text
    for item in items:
        said = said_in({"output": [item]})
        holds(Check.WHOLE, SURFACE, expected.startswith(said), f"{id} says {said!r} in one item")


def _audit_one(store: Snapshot, key: Key, kept: Kept, verdict: Verdict, *, settled: bool) -> None:
    job: Job = kept.value
    response = store.records[RESPONSES.name].get((key[0], job.subject))
    ended = response is not None and response.value.status.terminal
    verdict.holds(
        Check.ATOMIC,
        SURFACE,
        response is not None
        and response.value.job_id == key[-1]
        and ended == (job.owed is None)
        and (job.owed is not None or job.runner is None),
        f"{key[-1]} is {job}, its response {response and response.value}",
    )
    events = [JOB_EVENTS.decode(key, text) for text in store.events(JOB_EVENTS, key).entries]
    began = [event.attempt for event in events if event.type == "began"]
    over = [event.attempt for event in events if event.type == "ended"]
    running = job.runner is not None
    verdict.holds(
        Check.DENSE,
        SURFACE,
        began == list(range(1, job.attempt + 1)) and over == began[: len(began) - running],
        f"{key[-1]} is {job}, began {began}, ended {over}",
    )
    said = store.events(EVENTS, (key[0], job.subject)).entries
    done = [msgspec.json.decode(text)["item"] for text in said if text.startswith(_DONE)]
    finished = [item["id"] for item in done if item.get("status", "completed") == "completed"]
    steps = [event.subject for event in events if event.type == "step"]
    verdict.holds(
        Check.ATOMIC, SURFACE, steps == finished, f"{key[-1]}: {steps} are steps, not {finished}"
    )
    if settled:
        verdict.holds(Check.CLEAN, SURFACE, job.owed is None, f"{key[-1]} is {job} after recovery")
        verdict.holds(Check.CLEAN, SURFACE, any(map(ends, said[-1:])), f"{job.subject} has no end")
