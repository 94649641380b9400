"""Idempotency: a request sent again, also after a death, has one effect and the first answer."""

from __future__ import annotations

import hashlib
import time
from collections import defaultdict
from typing import Any

import msgspec

from perdure.proving.actors.responses import a_prompt
from perdure.proving.client import Answer, Client
from perdure.proving.oracle import Check, History, Op, Verdict
from perdure.proving.snapshot import Snapshot
from perdure.proving.workload import Scene
from perdure.surfaces.idempotency import IDEMPOTENCY
from perdure.surfaces.responses import RESPONSES

SURFACE = "idempotency"


_RETRIED_WITHIN_S = 45.0
"""Well within the time for which a request without a key is known again."""


class Named(msgspec.Struct):
    """A request that will be sent again: under a key of its own, or without one and counting, as
    the official SDKs do. `answer` is the first one that arrived whole; of one that was not to be
    stored, only the process that gave it can give it again, which answered at `url`."""

    op: Op
    key: str | None
    path: str
    body: dict[str, Any]
    sent_s: float
    url: str
    answer: bytes | None = None

    @property
    def stored(self) -> bool:
        return bool(self.body.get("store", True))

    def headers(self, count: int = 1) -> dict[str, str]:
        if self.key is None:
            return {"x-stainless-retry-count": str(count)}
        return {"idempotency-key": self.key}

    def may_be_sent_again(self, history: History) -> bool:
        """A key is known for a day, a retry for a minute and to the life it was sent in."""
        return self.key is not None or (
            self.op.cycle == history.cycle and time.monotonic() - self.sent_s < _RETRIED_WITHIN_S
        )

    async def send(self, client: Client, body: dict[str, Any] | None = None) -> Answer:
        """Send it again, or another body under its key."""
        return await client.send("POST", self.path, body or self.body, self.headers())


class IdempotencyActor:
    """See `proving.workload.Actor`."""

    surface = SURFACE

    def __init__(self) -> None:
        self._named: dict[int, list[Named]] = defaultdict(list)

    async def act(self, client: Client) -> None:
        own = [named for named in self._named[client.worker] if named.answer is not None]
        if own and client.rng.random() < 0.3:
            await self._repeat(client, client.rng.choice(own[-4:]))
            return
        op = client.history.intend(SURFACE, "create")
        key = f"key {op.mark}" if client.rng.random() < 0.7 else None
        named = Named(op, key, "/v1/responses", {}, time.monotonic(), client.url)
        kind = client.rng.randrange(3)
        if kind == 0:
            named.path, named.body = "/v1/conversations", {"metadata": {"mark": op.mark}}
            op.detail["creates"] = "conversation"
        else:
            named.body = {"model": "scripted", "input": a_prompt(op, client)}
            if kind == 1 and key is not None:
                named.body["store"] = False
            else:
                op.detail["creates"] = "response"
        self._named[client.worker].append(named)
        answer = await client.do(op, "POST", named.path, named.body, named.headers(0))
        if answer.status == 200:
            named.answer = answer.body

    async def _repeat(self, client: Client, named: Named) -> None:
        if not named.may_be_sent_again(client.history):
            return
        answer = await named.send(client)
        sent = (named.op.cycle, named.url)
        alive = named.stored or sent == (client.history.cycle, client.url)
        if alive and answer.body != named.answer:
            client.history.complaints.append(f"{named.op}: a repeat got another answer")
        if named.key is None:
            return
        refused = await named.send(client, named.body | {"metadata": {"other": "body"}})
        if alive and refused.code != "idempotency_key_reused":
            client.history.complaints.append(f"{named.key} was taken for another body")

    async def judge(self, scene: Scene) -> None:
        things = [(named.op, named) for own in self._named.values() for named in own]
        for named in scene.chosen(things):
            if not named.may_be_sent_again(scene.history):
                continue
            answer = await named.send(scene.client)
            if not named.stored:
                _judge_lost(scene.verdict, named, answer)
                continue
            sure = named.answer is not None
            scene.verdict.holds(
                Check.KEPT if sure else Check.GOES_ON,
                SURFACE,
                answer.status == 200 and (not sure or answer.body == named.answer),
                f"{named.op} was answered {answer.status} {answer.body!r}, "
                f"at first {named.answer!r}",
            )
            if answer.status == 200:
                named.answer = answer.body
                scene.history.settle(named.op, "acknowledged", 200)
            again = await named.send(scene.client)
            scene.verdict.holds(
                Check.GOES_ON,
                SURFACE,
                again.body == answer.body,
                f"{named.op}: two answers to one request",
            )

    def audit(self, store: Snapshot, history: History, verdict: Verdict, *, settled: bool) -> None:
        keys = {
            f"k-{hashlib.sha256((named.key or '').encode()).hexdigest()}": named
            for own in self._named.values()
            for named in own
        }
        for named in keys.values():
            if not named.stored and named.op.cycle == history.cycle:
                where = store.names_on_disk(named.body["input"])
                verdict.holds(
                    Check.INTENDED, SURFACE, not where, f"{named.op}, not stored, is in {where}"
                )
        deleted = {op.detail["id"] for op in history.ops if op.verb == "delete"}
        for key, kept in store.records[IDEMPOTENCY.name].items():
            remembered = kept.value
            intended = key[-1] in keys or key[-1].startswith("d-")
            verdict.holds(Check.INTENDED, SURFACE, intended, f"{key[-1]} was never sent")
            if remembered.response_id is not None and not remembered.transient:
                there = (key[0], remembered.response_id) in store.records[RESPONSES.name]
                verdict.holds(
                    Check.ATOMIC,
                    SURFACE,
                    there or remembered.response_id in deleted,
                    f"{key[-1]} stands for {remembered.response_id}, which is not there",
                )


def _judge_lost(verdict: Verdict, named: Named, answer: Answer) -> None:
    """What was not to be stored is not done a second time in silence."""
    lost = answer.status == 409 and answer.code == "idempotent_result_lost"
    never_done = named.answer is None and answer.status == 200
    verdict.holds(
        Check.GOES_ON,
        SURFACE,
        lost or never_done,
        f"{named.op}, not stored, was answered {answer.status} {answer.body!r}",
    )
    if never_done:
        named.answer = answer.body
