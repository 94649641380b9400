"""Items: what responses were given, listed the same before and after a death."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import msgspec

from perdure.proving.client import Client
from perdure.proving.oracle import Check, History, Op, Verdict
from perdure.proving.snapshot import Snapshot
from perdure.proving.workload import Scene
from perdure.surfaces.conversations import CONVERSATIONS
from perdure.surfaces.items import ITEMS
from perdure.surfaces.responses import RESPONSES

SURFACE = "items"


class Given(msgspec.Struct):
    """A response made of several items; `listed` is how the server lists them."""

    op: Op
    texts: list[str]
    id: str | None = None
    listed: list[bytes] = []


class ItemsActor:
    """See `proving.workload.Actor`."""

    surface = SURFACE

    def __init__(self) -> None:
        self._given: dict[int, list[Given]] = defaultdict(list)

    async def act(self, client: Client) -> None:
        op = client.history.intend(SURFACE, "create", creates="response")
        texts = [f"{op.mark} item {at}" for at in range(client.rng.randint(1, 3))]
        sent: list[dict[str, Any]] = [{"role": "user", "content": text} for text in texts]
        own = self._given[client.worker]
        known = [given for given in own if given.listed]
        if known and client.rng.random() < 0.5:
            other = client.rng.choice(known)
            at = client.rng.randrange(len(other.texts))
            sent.append({"type": "item_reference", "id": _id_of(other.listed[at])})
            texts.append(other.texts[at])
        given = Given(op, texts)
        own.append(given)
        body = {"model": "scripted", "input": sent}
        answer = await client.do(op, "POST", "/v1/responses", body)
        if answer.status == 200:
            given.id = answer.json()["id"]
            given.listed = await _listed(client, given.id, "asc")

    async def judge(self, scene: Scene) -> None:
        things = [(given.op, given) for own in self._given.values() for given in own]
        for given in scene.chosen(things):
            if given.id is not None:
                await _judge_one(scene, given, given.id)

    def audit(self, store: Snapshot, history: History, verdict: Verdict, *, settled: bool) -> None:
        owners = {
            *store.records[RESPONSES.name],
            *store.records[CONVERSATIONS.name],
            *(("default", op.detail["id"]) for op in history.ops if op.verb == "delete"),
        }
        for key, item in store.records[ITEMS.name].items():
            where = "/".join(key[1:])
            body = msgspec.json.decode(item.attachment or b"{}")
            same = (body.get("id"), body.get("type")) == (item.value.id, item.value.type)
            verdict.holds(Check.ATOMIC, SURFACE, same, f"{where} and its JSON name two items")
            verdict.holds(Check.ATOMIC, SURFACE, key[:2] in owners, f"{where} has no owner")


async def _judge_one(scene: Scene, given: Given, id: str) -> None:
    holds = scene.verdict.holds
    listed = await _listed(scene.client, id, "asc")
    backwards = await _listed(scene.client, id, "desc")
    holds(Check.RESUMES, SURFACE, backwards == listed[::-1], f"{id} pages differently both ways")
    said = [_said(body) for body in listed]
    holds(Check.KEPT, SURFACE, said == given.texts, f"{id} was given {given.texts}, has {said}")
    if given.listed:
        holds(Check.KEPT, SURFACE, listed == given.listed, f"{id}: its items changed")
    given.listed = listed


async def _listed(client: Client, id: str, order: str) -> list[bytes]:
    found: list[bytes] = []
    after = ""
    while True:
        path = f"/v1/responses/{id}/input_items?limit=2&order={order}{after}"
        answer = await client.get(path)
        page = msgspec.json.decode(answer.body, type=_List)
        found += [bytes(raw) for raw in page.data]
        if not page.has_more:
            return found
        after = f"&after={page.last_id}"


class _List(msgspec.Struct):
    data: list[msgspec.Raw] = []
    has_more: bool = False
    last_id: str | None = None


def _id_of(body: bytes) -> str:
    return str(msgspec.json.decode(body)["id"])


def _said(body: bytes) -> str:
    content = msgspec.json.decode(body)["content"]
    return "".join(part.get("text", "") for part in content)
