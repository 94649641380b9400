"""Seals: a compaction that was handed out is accepted by every later life, and no other is."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import msgspec

from perdure.proving.client import Answer, Client
from perdure.proving.oracle import Check, History, Op, Verdict
from perdure.proving.snapshot import Snapshot
from perdure.proving.workload import Scene
from perdure.surfaces.seals import SEALS

SURFACE = "seals"


class Sealed(msgspec.Struct):
    """A summary that was asked for, and the item that came back."""

    op: Op
    item: dict[str, Any] | None = None


class SealsActor:
    """See `proving.workload.Actor`."""

    surface = SURFACE

    def __init__(self) -> None:
        self._sealed: dict[int, list[Sealed]] = defaultdict(list)

    async def act(self, client: Client) -> None:
        op = client.history.intend(SURFACE, "create")
        sealed = Sealed(op)
        self._sealed[client.worker].append(sealed)
        body = {"model": f"echo-{op.mark}", "input": f"what {op.mark} said"}
        answer = await client.do(op, "POST", "/v1/responses/compact", body)
        if answer.status == 200:
            [sealed.item] = answer.json()["output"]

    async def judge(self, scene: Scene) -> None:
        things = [(sealed.op, sealed) for own in self._sealed.values() for sealed in own]
        for sealed in scene.chosen(things):
            if sealed.item is None:
                continue
            answer = await _say(scene.client, sealed.item)
            scene.verdict.holds(
                Check.KEPT,
                SURFACE,
                answer.status == 200,
                f"the summary of {sealed.op} was answered {answer.status} {answer.body!r}",
            )
            content = sealed.item["encrypted_content"]
            at = scene.rng.randrange(len(content))
            other = content[:at] + ("A" if content[at] != "A" else "B") + content[at + 1 :]
            answer = await _say(scene.client, sealed.item | {"encrypted_content": other})
            scene.verdict.holds(
                Check.INTENDED,
                SURFACE,
                answer.code == "invalid_encrypted_content",
                f"the summary of {sealed.op}, changed at {at}, was answered {answer.status}",
            )

    def audit(self, store: Snapshot, history: History, verdict: Verdict, *, settled: bool) -> None:
        handed_out = [one for own in self._sealed.values() for one in own if one.item is not None]
        kept = store.records[SEALS.name]
        verdict.holds(
            Check.KEPT,
            SURFACE,
            len(kept) == 1 if handed_out else len(kept) <= 1,
            f"{len(handed_out)} summaries were handed out under {len(kept)} secrets",
        )


async def _say(client: Client, item: dict[str, Any]) -> Answer:
    """Continue from a summary, in a response that is not stored."""
    said = [item, {"role": "user", "content": "echo on we go"}]
    body = {"model": "scripted", "input": said, "store": False}
    return await client.send("POST", "/v1/responses", body)
