"""Responses: chains, streams and deletions, and what of them must be there after a death."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

import msgspec

from perdure.core.keys import Key
from perdure.proving.client import Client, ends, head
from perdure.proving.oracle import Check, History, Op, Verdict
from perdure.proving.scripts import script_of
from perdure.proving.snapshot import Kept, Snapshot
from perdure.proving.workload import Scene
from perdure.surfaces.items import ITEMS
from perdure.surfaces.responses import EVENTS, RESPONSES, Status

SURFACE = "responses"


class Asked(msgspec.Struct):
    """One request for a response. `body` is what GET must answer, once that is known; `seen` are
    the events that reached the client; `sure` says that the client may rely on its existence."""

    op: Op
    prompt: str
    previous: Asked | None
    id: str | None = None
    body: bytes | None = None
    seen: list[bytes] = []
    continued: bool = False
    deletion: Op | None = None

    @property
    def sure(self) -> bool:
        return self.op.outcome == "acknowledged" or bool(self.seen)


class ResponsesActor:
    """See `proving.workload.Actor`."""

    surface = SURFACE

    def __init__(self) -> None:
        self._asked: dict[int, list[Asked]] = defaultdict(list)

    async def act(self, client: Client) -> None:
        own = self._asked[client.worker]
        ended = [asked for asked in own if asked.body and asked.id and not asked.deletion]
        roll = client.rng.random()
        if ended and roll < 0.1:
            await self._delete(client, client.rng.choice(ended))
        elif ended and roll < 0.2:
            await self._read(client, client.rng.choice(ended))
        else:
            previous = client.rng.choice(ended) if ended and roll < 0.6 else None
            await self._ask(client, previous, stream=client.rng.random() < 0.5)

    async def _ask(self, client: Client, previous: Asked | None, *, stream: bool) -> None:
        op = client.history.intend(SURFACE, "stream" if stream else "create", creates="response")
        prompt = a_prompt(op, client)
        body: dict[str, Any] = {"model": "scripted", "input": prompt}
        if previous is not None:
            previous.continued = True
            body["previous_response_id"] = previous.id
        asked = Asked(op, prompt, previous)
        self._asked[client.worker].append(asked)
        if not stream:
            answer = await client.do(op, "POST", "/v1/responses", body)
            if answer.status == 200:
                asked.id, asked.body = answer.json()["id"], answer.body
            return
        try:
            await client.post_stream(op, "/v1/responses", body | {"stream": True}, asked.seen)
        finally:
            if asked.seen:
                asked.id = id_of(asked.seen[0])
                if ends(asked.seen[-1]):
                    asked.body = bytes(head(asked.seen[-1]).response)

    async def _read(self, client: Client, asked: Asked) -> None:
        answer = await client.get(f"/v1/responses/{asked.id}")
        if answer.body != asked.body:
            client.history.complaints.append(f"{asked.id} is not what it was a moment ago")

    async def _delete(self, client: Client, asked: Asked) -> None:
        if asked.continued:
            return
        asked.deletion = op = client.history.intend(SURFACE, "delete", id=asked.id)
        await client.do(op, "DELETE", f"/v1/responses/{asked.id}")

    async def judge(self, scene: Scene) -> None:
        found = by_operation(scene.before, scene.history)
        things = [
            (max((asked.op, asked.deletion or asked.op), key=lambda op: op.cycle), asked)
            for own in self._asked.values()
            for asked in own
        ]
        for asked in scene.chosen(things):
            if asked.id is None and (key := found.get(asked.op.number)) is not None:
                asked.id = key[-1]
            if asked.id is not None:
                await self._judge_one(scene, asked, asked.id)

    async def _judge_one(self, scene: Scene, asked: Asked, id: str) -> None:
        holds = scene.verdict.holds
        answer = await scene.client.get(f"/v1/responses/{id}")
        if answer.status == 404:
            gone = asked.deletion is not None and asked.deletion.outcome != "refused"
            holds(Check.KEPT, SURFACE, gone or not asked.sure, f"{id} was acknowledged and is gone")
            log = await scene.client.log(f"/v1/responses/{id}?stream=true")
            holds(Check.WHOLE, SURFACE, not log, f"{id} is gone and still has events")
            return
        deleted = asked.deletion is not None and asked.deletion.outcome == "acknowledged"
        holds(Check.KEPT, SURFACE, not deleted, f"{id} was deleted and is back")
        if not holds(Check.KEPT, SURFACE, answer.status == 200, f"{id}: {answer.status}"):
            return
        if asked.body is not None:
            holds(Check.KEPT, SURFACE, answer.body == asked.body, f"{id} is not what was answered")
        asked.body = answer.body
        ended = Status(answer.json()["status"]).terminal
        if not holds(Check.CLEAN, SURFACE, ended, f"{id} is unfinished, and nobody generates it"):
            return
        log = await scene.client.log(f"/v1/responses/{id}?stream=true")
        _judge_log(scene, asked, id, log)
        _judge_body(scene.verdict, asked, id, answer.json(), log)
        await judge_resuming(scene, id, log)

    def audit(self, store: Snapshot, history: History, verdict: Verdict, *, settled: bool) -> None:
        counts = Counter(_operations(store, history).values())
        for number, count in counts.items():
            op = history.ops[number - 1]
            asked_for = op.detail.get("creates") == "response" and op.outcome != "refused"
            verdict.holds(
                Check.INTENDED, SURFACE, asked_for and count == 1, f"{count} responses to {op}"
            )
        kept = store.records[RESPONSES.name]
        for key, record in kept.items():
            _audit_one(store, key, record, verdict, settled=settled)
        for key in store.streams[EVENTS.name]:
            verdict.holds(Check.ATOMIC, SURFACE, key in kept, f"events without {key[-1]}")
        marked = set(_operations(store, history))
        for key in kept.keys() - marked:
            verdict.holds(Check.INTENDED, SURFACE, False, f"{key[-1]} was never asked for")


def a_prompt(op: Op, client: Client) -> str:
    """Something to ask, with the operation's mark in it, whose answer is known beforehand."""
    length = client.rng.randint(1, 12)
    match client.rng.randrange(5):
        case 0:
            return f"pace 0.005 {op.mark} " + "one by one " * length
        case 1:
            return f"reasoning {op.mark} " + "hm " * length
        case _:
            return f"echo {op.mark} " + "words " * length


def said_in(body: dict[str, Any]) -> str:
    """The text of a response's messages."""
    return "".join(
        part.get("text", "")
        for item in body["output"]
        if item["type"] == "message"
        for part in item["content"]
    )


def _judge_log(scene: Scene, asked: Asked, id: str, log: list[bytes]) -> None:
    holds = scene.verdict.holds
    numbers = [head(event).sequence_number for event in log]
    holds(
        Check.DENSE,
        SURFACE,
        numbers == list(range(len(log))),
        f"the events of {id} are numbered {numbers}",
    )
    holds(
        Check.DENSE,
        SURFACE,
        log[: len(asked.seen)] == asked.seen,
        f"{id}: a client saw {len(asked.seen)} events that are not the first of those stored",
    )
    holds(Check.CLEAN, SURFACE, bool(log) and ends(log[-1]), f"the stream of {id} has no end")


def _judge_body(
    verdict: Verdict, asked: Asked, id: str, body: dict[str, Any], log: list[bytes]
) -> None:
    last = msgspec.json.decode(log[-1]) if log else {}
    verdict.holds(
        Check.ATOMIC,
        SURFACE,
        last.get("response") == body,
        f"{id} and its last event say different things",
    )
    expected, said = script_of(asked.prompt).text, said_in(body)
    completed = body["status"] == "completed"
    verdict.holds(
        Check.KEPT if asked.op.outcome == "acknowledged" else Check.WHOLE,
        SURFACE,
        said == expected if completed else expected.startswith(said),
        f"{id} ({body['status']}) says {said!r}, not {expected!r}",
    )
    reason = (body.get("perdure") or {}).get("reason")
    verdict.holds(
        Check.REPORTED,
        SURFACE,
        completed or reason in ("process_restart", "server_stopped"),
        f"{id} is {body['status']} because of {reason}",
    )


async def judge_resuming(scene: Scene, id: str, log: list[bytes]) -> None:
    """A stream read from any of its events on is the rest of it."""
    if not log:
        return
    after = scene.rng.randrange(len(log))
    path = f"/v1/responses/{id}?stream=true&starting_after="
    rest = await scene.client.log(f"{path}{after}")
    scene.verdict.holds(
        Check.RESUMES,
        SURFACE,
        rest == log[after + 1 :],
        f"{id} after {after} is {len(rest)} events, not the {len(log) - after - 1} that follow",
    )


def _audit_one(store: Snapshot, key: Key, record: Kept, verdict: Verdict, *, settled: bool) -> None:
    id, terminal = key[-1], record.value.status.terminal
    waited_for = record.value.job_id is None
    stream = store.events(EVENTS, key)
    numbers = [head(event).sequence_number for event in stream.entries]
    whole = len(numbers) >= 2 and numbers == list(range(len(numbers))) and stream.tip.first == 1
    verdict.holds(Check.DENSE, SURFACE, whole, f"{id} has events {numbers}, tip {stream.tip}")
    ended = bool(numbers) and ends(stream.entries[-1])
    verdict.holds(
        Check.ATOMIC,
        SURFACE,
        terminal == ended and (record.value.runner is None) == (terminal or not waited_for),
        f"{id} is {record.value.status.value}, its last event is "
        f"{'' if ended else 'not '}an end, its runner is {record.value.runner}",
    )
    inputs = store.under(ITEMS, *key, "input")
    outputs = [
        msgspec.json.decode(item.attachment or b"null")
        for _, item in sorted(store.under(ITEMS, *key, "output").items())
    ]
    body = msgspec.json.decode(record.attachment or b"{}")
    verdict.holds(Check.ATOMIC, SURFACE, bool(inputs), f"{id} has no input items")
    verdict.holds(
        Check.ATOMIC,
        SURFACE,
        outputs == body.get("output"),
        f"{id} has {len(outputs)} output items, its body {len(body.get('output', []))}",
    )
    if settled:
        status: Status = record.value.status
        verdict.holds(Check.CLEAN, SURFACE, terminal, f"{id} is {status.value} after recovery")


def _operations(store: Snapshot, history: History) -> dict[Key, int]:
    """The operations that asked for the responses in a store, told by their marks in the first
    input items."""
    found: dict[Key, int] = {}
    for key, item in store.records[ITEMS.name].items():
        owner, part, position = key[:2], key[2], key[3]
        if part == "input" and int(position) == 0 and owner in store.records[RESPONSES.name]:
            for op in history.named_in((item.attachment or b"").decode())[:1]:
                found[owner] = op.number
    return found


def by_operation(store: Snapshot, history: History) -> dict[int, Key]:
    """Responses in a store by the operation that asked for them."""
    return {number: key for key, number in _operations(store, history).items()}


def id_of(created: bytes) -> str:
    """The id of the response that an event tells of."""
    return str(msgspec.json.decode(head(created).response)["id"])
