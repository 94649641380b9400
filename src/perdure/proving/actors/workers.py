"""Workers: inputs accepted once, steps that are whole, ends that last, and runs that are over once
their server is."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import msgspec

from perdure.core.keys import Key
from perdure.proving.client import Answer, Client
from perdure.proving.oracle import Check, History, Op, Verdict
from perdure.proving.snapshot import Kept, Snapshot
from perdure.proving.workload import Scene
from perdure.surfaces.workers import (
    INPUTS,
    STATES,
    SUBMISSIONS,
    TRANSCRIPTS,
    WORKER_EVENTS,
    WORKERS,
    Status,
)

SURFACE = "workers"


class Sent(msgspec.Struct):
    """An input, and how it was acknowledged."""

    op: Op
    answer: bytes | None = None

    @property
    def body(self) -> dict[str, Any]:
        return {"content": f"do {self.op.mark}", "submission_id": f"sub_{self.op.mark}"}


class Agent(msgspec.Struct):
    """A worker, and what is known of it. `generation` is the newest that was told, `run` the one
    that was given and not taken back; `end` the answer to what ended it."""

    op: Op
    path: str
    inputs: list[Sent] = []
    steps: list[Op] = []
    generation: int = 0
    run: int | None = None
    end: bytes | None = None
    ending: Op | None = None

    @property
    def latest(self) -> Op:
        ops = [self.op, *(sent.op for sent in self.inputs), *self.steps, self.ending or self.op]
        return max(ops, key=lambda op: op.number)

    def learn(self, answer: Answer) -> None:
        """Note the generation of an answer that holds one."""
        if answer.status == 200:
            self.generation = max(self.generation, answer.json()["generation"])


class WorkersActor:
    """See `proving.workload.Actor`."""

    surface = SURFACE

    def __init__(self) -> None:
        self._agents: dict[int, list[Agent]] = defaultdict(list)

    async def act(self, client: Client) -> None:
        agents = [one for one in self._agents[client.worker] if one.ending is None]
        roll = client.rng.random()
        if not agents or roll < 0.1:
            await self._create(client)
            return
        agent = client.rng.choice(agents[-3:])
        if roll < 0.45:
            await _add(client, agent)
        elif roll < 0.95:
            await _work(client, agent)
        else:
            verb = client.rng.choice(["stop", "cancel"])
            agent.ending = op = client.history.intend(SURFACE, verb)
            answer = await client.do(op, "POST", f"{agent.path}/{verb}")
            if answer.status == 200:
                agent.end = answer.body

    async def _create(self, client: Client) -> None:
        home = f"runtime_{client.worker}"
        op = client.history.intend(SURFACE, "establish")
        await client.do(op, "POST", "/v1/runtimes", {"id": home, "config": {"w": client.worker}})
        op = client.history.intend(SURFACE, "create")
        agent = Agent(op, f"/v1/runtimes/{home}/workers/worker_{op.mark}")
        self._agents[client.worker].append(agent)
        body = {"id": f"worker_{op.mark}", "config": {"mark": op.mark}}
        await client.do(op, "POST", f"/v1/runtimes/{home}/workers", body)

    async def judge(self, scene: Scene) -> None:
        things = [(agent.latest, agent) for own in self._agents.values() for agent in own]
        for agent in scene.chosen(things):
            await _judge_one(scene, agent)

    def audit(self, store: Snapshot, history: History, verdict: Verdict, *, settled: bool) -> None:
        states = store.records[STATES.name]
        workers = store.records[WORKERS.name]
        verdict.holds(
            Check.ATOMIC, SURFACE, states.keys() == workers.keys(), "workers and states differ"
        )
        for key, worker in workers.items():
            if key in states:
                _audit_one(store, key, worker, states[key], verdict, settled=settled)


async def _add(client: Client, agent: Agent) -> None:
    sent = Sent(client.history.intend(SURFACE, "input"))
    agent.inputs.append(sent)
    answer = await client.do(sent.op, "POST", f"{agent.path}/input", sent.body)
    if answer.status == 200:
        sent.answer = answer.body


async def _work(client: Client, agent: Agent) -> None:
    """A run, in steps: it begins, takes what waits, and lets go."""
    op = client.history.intend(SURFACE, "start" if agent.run is None else "progress")
    if agent.run is None:
        answer = await client.do(op, "POST", f"{agent.path}/start")
        agent.learn(answer)
        agent.run = answer.json()["generation"] if answer.status == 200 else None
        return
    run = {"generation": agent.run}
    waiting = await client.get(f"{agent.path}/inputs")
    if waiting.status == 200 and (given := waiting.json()["data"]):
        said = [
            {"role": "assistant", "content": f"{op.mark} did {one['content']}"} for one in given
        ]
        step = run | {"taken": len(given), "transcript": said, "state": {"last": op.mark}}
        step["data"] = client.rng.choice([None, op.mark, {"by": op.mark}])
        answer = await client.do(op, "POST", f"{agent.path}/progress", step)
        agent.steps.append(op)
    else:
        answer = await client.do(op, "POST", f"{agent.path}/release", run)
        agent.learn(answer)
        agent.run = None
    if answer.status == 409:
        agent.run = None


async def _judge_one(scene: Scene, agent: Agent) -> None:
    holds, client = scene.verdict.holds, scene.client
    answer = await client.get(agent.path)
    if answer.status == 404:
        sure = agent.op.outcome == "acknowledged"
        holds(Check.KEPT, SURFACE, not sure, f"{agent.path} was acknowledged and is gone")
        return
    if not holds(Check.KEPT, SURFACE, answer.status == 200, f"{agent.path}: {answer.status}"):
        return
    found = answer.json()
    rose = found["generation"] >= agent.generation
    holds(Check.VERSIONS, SURFACE, rose, f"{agent.path} fell behind {agent.generation}: {found}")
    if agent.end is not None:
        holds(Check.KEPT, SURFACE, answer.body == agent.end, f"{agent.path} did not stay ended")
        again = await client.send("POST", f"{agent.path}/cancel")
        holds(Check.GOES_ON, SURFACE, again.body == agent.end, f"{agent.path} ended twice")
    elif agent.run is not None:
        stale = {"generation": agent.run}
        late = await client.send("POST", f"{agent.path}/progress", stale)
        holds(
            Check.CLEAN,
            SURFACE,
            found["status"] != "running" and late.code == "stale_generation",
            f"{agent.path} is {found['status']}; a run of a dead server was answered {late}",
        )
        agent.run = None
    agent.generation = found["generation"]
    await _judge_inputs(scene, agent, ended=Status(found["status"]).ended)


async def _judge_inputs(scene: Scene, agent: Agent, *, ended: bool) -> None:
    """Every acknowledged input stands where it was said to, and once however often it is sent."""
    holds, client = scene.verdict.holds, scene.client
    said = await _transcript(client, agent)
    for sent in agent.inputs:
        at = [number for number, text in enumerate(said, 1) if text == sent.body["content"]]
        if sent.answer is not None:
            told = msgspec.json.decode(sent.answer)
            holds(Check.KEPT, SURFACE, at == [told["transcript"]], f"{sent.op} is at {at}: {told}")
        else:
            gone = sent.op.outcome == "refused"
            whole = len(at) <= (0 if gone else 1)
            holds(Check.WHOLE, SURFACE, whole, f"{sent.op} is at {at} of {agent.path}")
    if agent.inputs:
        sent = agent.inputs[-1]
        again = await client.send("POST", f"{agent.path}/input", sent.body)
        fitting = again.body == sent.answer if sent.answer else again.status == 200 or ended
        holds(Check.GOES_ON, SURFACE, fitting, f"{sent.op} again was answered {again}")
        if again.status == 200:
            sent.answer = again.body
            scene.history.settle(sent.op, "acknowledged", 200)


async def _transcript(client: Client, agent: Agent) -> list[str]:
    said: list[str] = []
    after = ""
    while True:
        page = (await client.get(f"{agent.path}/transcript?limit=50{after}")).json()
        said += [one["content"] for one in page["data"]]
        if not page["has_more"]:
            return said
        after = f"&after={page['cursor']}"


def _audit_one(
    store: Snapshot, key: Key, worker: Kept, state: Kept, verdict: Verdict, *, settled: bool
) -> None:
    """State, logs, queue and submissions tell of the same commits."""
    counts = state.value
    events = [WORKER_EVENTS.decode(key, it) for it in store.events(WORKER_EVENTS, key).entries]
    said = store.events(TRANSCRIPTS, key).entries
    queued = [INPUTS.decode(key, it) for it in store.events(INPUTS, key).entries]
    accepted = [event.submission_id for event in events if event.type == "accepted"]
    kept = {it[3] for it in store.under(SUBMISSIONS, *key)}
    verdict.holds(
        Check.ATOMIC,
        SURFACE,
        (counts.events, counts.transcript) == (len(events), len(said))
        and counts.transcript == sum(event.added for event in events)
        and counts.taken == sum(event.taken for event in events)
        and counts.inputs == len(accepted)
        and accepted == [one.submission_id for one in queued]
        and (kept == set(accepted) or worker.value.status is Status.RETIRED),
        f"{key[-1]} counts {counts}; there are {len(events)} events, {len(said)} said, "
        f"{len(queued)} queued, {len(kept)} submissions",
    )
    generations = [event.generation for event in events]
    verdict.holds(
        Check.DENSE,
        SURFACE,
        generations == sorted(generations) and worker.value.generation == generations[-1],
        f"{key[-1]} is {worker.value}, its events are of {generations}",
    )
    if settled:
        running = worker.value.status is Status.RUNNING
        verdict.holds(Check.CLEAN, SURFACE, not running, f"{key[-1]} runs after recovery")
