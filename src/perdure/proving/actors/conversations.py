"""Conversations: items added, removed and answered to, in turns that never tear or interleave."""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from itertools import groupby
from typing import Any

import msgspec

from perdure.core.keys import Key
from perdure.proving.actors.responses import a_prompt
from perdure.proving.client import Client, Gone
from perdure.proving.oracle import Check, History, Op, Verdict
from perdure.proving.scripts import script_of
from perdure.proving.snapshot import Kept, Snapshot
from perdure.proving.workload import Scene
from perdure.surfaces.conversations import CONVERSATIONS
from perdure.surfaces.items import ITEMS
from perdure.surfaces.responses import RESPONSES

SURFACE = "conversations"


class Group(msgspec.Struct):
    """What one operation adds: `texts` in order. Groups of one `wave` were sent at once, so they
    may stand in either order. `bodies` are the items as they were answered."""

    op: Op
    wave: int
    texts: list[str]
    bodies: list[bytes] = []
    removals: dict[str, Op] = {}

    def left(self, outcome: str) -> set[str]:
        """Texts whose removal came out so."""
        return {text for text, op in self.removals.items() if op.outcome == outcome}


class Talk(msgspec.Struct):
    """One conversation and all that was done to it."""

    op: Op
    id: str | None = None
    groups: list[Group] = []
    metadata: list[tuple[Op, dict[str, str]]] = []
    deletion: Op | None = None
    waves: int = 0


class ConversationsActor:
    """See `proving.workload.Actor`."""

    surface = SURFACE

    def __init__(self) -> None:
        self._talks: dict[int, list[Talk]] = defaultdict(list)

    async def act(self, client: Client) -> None:
        talks = [talk for talk in self._talks[client.worker] if talk.id and not talk.deletion]
        roll = client.rng.random()
        if not talks or roll < 0.15:
            await self._create(client)
            return
        talk = client.rng.choice(talks[-3:])
        if roll < 0.4:
            await _add(client, talk, client.rng.randint(1, 3))
        elif roll < 0.5:
            await _add_at_once(client, talk)
        elif roll < 0.8:
            await _say(client, talk)
        elif roll < 0.88:
            await _describe(client, talk)
        elif roll < 0.97:
            await _remove(client, talk)
        else:
            talk.deletion = op = client.history.intend(SURFACE, "delete", id=talk.id)
            await client.do(op, "DELETE", f"/v1/conversations/{talk.id}")

    async def _create(self, client: Client) -> None:
        op = client.history.intend(SURFACE, "create", creates="conversation")
        talk = Talk(op, metadata=[(op, {"mark": op.mark})])
        self._talks[client.worker].append(talk)
        body: dict[str, Any] = {"metadata": {"mark": op.mark}}
        if client.rng.random() < 0.6:
            group = Group(op, 0, [f"{op.mark} begins"])
            talk.groups.append(group)
            body["items"] = _messages(group.texts)
        answer = await client.do(op, "POST", "/v1/conversations", body)
        if answer.status == 200:
            talk.id = answer.json()["id"]

    async def judge(self, scene: Scene) -> None:
        found = {
            op.number: key[-1]
            for key, kept in scene.before.records[CONVERSATIONS.name].items()
            for op in scene.history.named_in(kept.value.metadata.get("mark", ""))
        }
        things = [
            (max(_operations(talk), key=lambda op: op.cycle), talk)
            for talks in self._talks.values()
            for talk in talks
        ]
        for talk in scene.chosen(things):
            talk.id = talk.id or found.get(talk.op.number)
            if talk.id is not None:
                await _judge_one(scene, talk, talk.id)

    def audit(self, store: Snapshot, history: History, verdict: Verdict, *, settled: bool) -> None:
        kept = store.records[CONVERSATIONS.name]
        named = [
            (key, op)
            for key, conversation in kept.items()
            for op in history.named_in(conversation.value.metadata.get("mark", ""))
        ]
        counts = Counter(op.number for _, op in named)
        for key, op in named:
            asked_for = op.detail.get("creates") == "conversation" and op.outcome != "refused"
            verdict.holds(
                Check.INTENDED,
                SURFACE,
                asked_for and counts[op.number] == 1,
                f"{key[-1]} is one of {counts[op.number]} conversations of {op}",
            )
        for key in kept.keys() - {key for key, _ in named}:
            verdict.holds(Check.INTENDED, SURFACE, False, f"{key[-1]} was never asked for")
        removals = Counter(op.detail["id"] for op in history.ops if op.verb == "remove")
        for key, conversation in kept.items():
            _audit_one(store, key, conversation, removals[key[-1]], verdict, settled=settled)


async def _add(client: Client, talk: Talk, count: int, wave: int | None = None) -> None:
    op = client.history.intend(SURFACE, "add", id=talk.id)
    if wave is None:
        talk.waves += 1
    group = Group(op, wave or talk.waves, [f"{op.mark} part {at}" for at in range(count)])
    talk.groups.append(group)
    answer = await client.do(
        op, "POST", f"/v1/conversations/{talk.id}/items", {"items": _messages(group.texts)}
    )
    if answer.status == 200:
        group.bodies = [bytes(raw) for raw in _list_of(answer.body)]


async def _add_at_once(client: Client, talk: Talk) -> None:
    """Several writers race for one conversation: each turn stays whole."""
    talk.waves += 1
    racing = [_add(client, talk, 2, talk.waves) for _ in range(3)]
    outcomes = await asyncio.gather(*racing, return_exceptions=True)
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome


async def _say(client: Client, talk: Talk) -> None:
    """A response in the conversation: the turn joins it when the response has completed."""
    op = client.history.intend(SURFACE, "say", id=talk.id, creates="response")
    prompt = a_prompt(op, client)
    talk.waves += 1
    script = script_of(prompt)
    answered = ["".join(script.thoughts), script.text] if script.thoughts else [script.text]
    group = Group(op, talk.waves, [prompt, *answered])
    talk.groups.append(group)
    body = {"model": "scripted", "input": prompt, "conversation": talk.id}
    if client.rng.random() < 0.5:
        answer = await client.do(op, "POST", "/v1/responses", body)
        if answer.status == 200 and answer.json()["status"] != "completed":
            client.history.settle(op, "unknown")
    else:
        await client.post_stream(op, "/v1/responses", body | {"stream": True}, [])


async def _describe(client: Client, talk: Talk) -> None:
    op = client.history.intend(SURFACE, "describe", id=talk.id)
    metadata = {"mark": talk.op.mark, "by": op.mark}
    talk.metadata.append((op, metadata))
    await client.do(op, "POST", f"/v1/conversations/{talk.id}", {"metadata": metadata})


async def _remove(client: Client, talk: Talk) -> None:
    listed = [
        (group, body)
        for group in talk.groups
        for body in group.bodies
        if _said(body) not in group.removals
    ]
    if not listed:
        return
    group, body = client.rng.choice(listed)
    op = client.history.intend(SURFACE, "remove", id=talk.id)
    group.removals[_said(body)] = op
    item_id = msgspec.json.decode(body)["id"]
    await client.do(op, "DELETE", f"/v1/conversations/{talk.id}/items/{item_id}")


async def _judge_one(scene: Scene, talk: Talk, id: str) -> None:
    holds = scene.verdict.holds
    answer = await scene.client.get(f"/v1/conversations/{id}")
    if answer.status == 404:
        gone = talk.deletion is not None and talk.deletion.outcome != "refused"
        sure = talk.op.outcome == "acknowledged"
        holds(Check.KEPT, SURFACE, gone or not sure, f"{id} was acknowledged and is gone")
        return
    deleted = talk.deletion is not None and talk.deletion.outcome == "acknowledged"
    holds(Check.KEPT, SURFACE, not deleted, f"{id} was deleted and is back")
    if not holds(Check.KEPT, SURFACE, answer.status == 200, f"{id}: {answer.status}"):
        return
    allowed = _latest(talk)
    found = answer.json()["metadata"]
    holds(Check.KEPT, SURFACE, found in allowed, f"{id} is described as {found}, not {allowed}")
    bodies = await _all_items(scene.client, id)
    _judge_order(scene.verdict, talk, id, [_said(body) for body in bodies])
    items = set(bodies)
    for group in talk.groups:
        if group.bodies and not group.removals:
            holds(
                Check.KEPT,
                SURFACE,
                items.issuperset(group.bodies),
                f"{id}: items of {group.op} are not what was answered",
            )
    try:
        await _add(scene.client, talk, 1)
    except Gone:
        holds(Check.LIVE, SURFACE, False, f"the server left while {id} was added to")
        return
    op = talk.groups[-1].op
    holds(Check.CLEAN, SURFACE, op.status != 400, f"{id} is still held by a dead response")
    holds(Check.GOES_ON, SURFACE, op.outcome == "acknowledged", f"{id} took no item: {op}")


def _judge_order(verdict: Verdict, talk: Talk, id: str, said: list[str]) -> None:
    """Every turn is whole or absent, in one piece, and in the order it was sent."""
    owners = {text: group for group in talk.groups for text in group.texts}
    strange = [text for text in said if text not in owners]
    verdict.holds(Check.INTENDED, SURFACE, not strange, f"{id} holds {strange}, never sent")
    runs = [
        (group, list(texts))
        for number, texts in groupby(
            [text for text in said if text in owners], key=lambda text: owners[text].op.number
        )
        for group in talk.groups
        if group.op.number == number
    ]
    seen = Counter(group.op.number for group, _ in runs)
    waves = [group.wave for group, _ in runs]
    whole = max(seen.values(), default=1) == 1 and waves == sorted(waves)
    verdict.holds(Check.ATOMIC, SURFACE, whole, f"{id}: turns interleave or moved: {said}")
    present = {group.op.number: texts for group, texts in runs}
    for group in talk.groups:
        there = present.get(group.op.number, [])
        gone, perhaps = group.left("acknowledged"), group.left("unknown")
        expected = [text for text in group.texts if text not in gone]
        certain = [text for text in expected if text not in perhaps]
        complete = [text for text in there if text not in perhaps] == certain and all(
            text in expected for text in there
        )
        if group.op.outcome == "acknowledged":
            verdict.holds(
                Check.KEPT, SURFACE, complete, f"{id}: of {expected} there is {there} ({group.op})"
            )
        else:
            refused = group.op.outcome == "refused"
            verdict.holds(
                Check.WHOLE,
                SURFACE,
                not there or (complete and not refused),
                f"{id}: of {expected}, not acknowledged, there is {there} ({group.op})",
            )


def _audit_one(
    store: Snapshot, key: Key, kept: Kept, removals: int, verdict: Verdict, *, settled: bool
) -> None:
    id, held_by = key[-1], kept.value.held_by
    positions = [int(item[3]) for item in sorted(store.under(ITEMS, *key, "items"))]
    end = kept.value.next_position
    verdict.holds(
        Check.DENSE,
        SURFACE,
        all(position < end for position in positions) and end - len(positions) <= removals,
        f"{id} has items at {positions} of {end}, and at most {removals} were removed",
    )
    if settled:
        verdict.holds(Check.CLEAN, SURFACE, held_by is None, f"{id} is held by {held_by}")
    elif held_by is not None:
        holder = store.records[RESPONSES.name].get((key[0], held_by))
        running = holder is not None and not holder.value.status.terminal
        verdict.holds(Check.ATOMIC, SURFACE, running, f"{id} is held by {held_by}, not running")


def _latest(talk: Talk) -> list[dict[str, str]]:
    """The descriptions that may stand now: the last acknowledged one, or one sent after it."""
    allowed: list[dict[str, str]] = []
    for op, metadata in talk.metadata:
        if op.outcome == "acknowledged":
            allowed = []
        if op.outcome != "refused":
            allowed.append(metadata)
    return allowed


async def _all_items(client: Client, id: str) -> list[bytes]:
    """Every item's bytes, the oldest first, in small pages."""
    found: list[bytes] = []
    after = ""
    while True:
        answer = await client.get(f"/v1/conversations/{id}/items?order=asc&limit=7{after}")
        found += [bytes(raw) for raw in _list_of(answer.body)]
        if not answer.json()["has_more"]:
            return found
        after = f"&after={answer.json()['last_id']}"


class _List(msgspec.Struct):
    data: list[msgspec.Raw]


def _list_of(body: bytes) -> list[msgspec.Raw]:
    return msgspec.json.decode(body, type=_List).data


def _said(body: bytes) -> str:
    content = msgspec.json.decode(body)["content"]
    return "".join(part.get("text", "") for part in content)


def _messages(texts: list[str]) -> list[dict[str, str]]:
    return [{"role": "user", "content": text} for text in texts]


def _operations(talk: Talk) -> list[Op]:
    return [talk.op, *(group.op for group in talk.groups), *filter(None, [talk.deletion])]
