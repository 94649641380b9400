"""Idempotency of requests: what was answered to a key, so that a repeat gets the same answer.

A record is written in the same batch as the effect it stands for. That is the whole mechanism:
either both are there after a crash, or neither. Two requests with one key race for the record
with `expect=0`; the loser reads it and joins the winner.
"""

from __future__ import annotations

import msgspec

from perdure.core.batch import Batch, delete, put
from perdure.core.engine import Engine, Survives
from perdure.core.keys import Key
from perdure.core.layouts import Index, Records
from perdure.core.promises import Durability, Promise
from perdure.core.values import Record


class Remembered(msgspec.Struct, frozen=True):
    """What a request led to.

    `digest` identifies the request's content. A response is named by `response_id` and read from
    its own surface; any other answer is kept whole as the record's attachment. `transient` marks
    an effect that lived in the memory of boot `boot_id` only (`store: false`). `joined` says that
    another process waits for the response on behalf of a later sending.
    """

    digest: str
    accepted_at_s: int
    boot_id: str
    response_id: str | None = None
    status: int = 200
    transient: bool = False
    joined: bool = False


IDEMPOTENCY = Records(
    "idempotency",
    Remembered,
    key=("tenant", "key"),
    indexes=(Index("by_age", ("accepted_at_s",), every_tenant=True),),
)

KEPT_S = 24 * 3600
"""How long a key is remembered."""


class Idempotency:
    """Reads of remembered requests, and the batches that write them."""

    promise = Promise(
        surface="idempotency",
        durability=Durability.SHARED,
        acknowledgement="durable in the same commit as the effect it stands for",
        survives=Survives(process_crash=True, power_cut=True, failed_sync=True, damage=True),
        owner="whoever commits first under a key",
        recovery="none needed: the record and its effect are one commit",
        retention="24 hours",
        layouts=(IDEMPOTENCY,),
        statements=("C22",),
    )

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def find(self, tenant: str, key: str) -> Record[Remembered] | None:
        """What a key stands for, if it was seen."""
        return await self._engine.get(IDEMPOTENCY, (tenant, key))

    async def older_than(self, accepted_before_s: int, *, limit: int) -> list[Key]:
        """Keys accepted before a time, the oldest first."""
        page = await self._engine.scan(IDEMPOTENCY, (), index="by_age", limit=limit)
        return [item.key for item in page.items if item.value.accepted_at_s < accepted_before_s]

    def remember(
        self,
        tenant: str,
        key: str,
        remembered: Remembered,
        *,
        answer: bytes | None = None,
        expect: int | None = 0,
    ) -> Batch:
        """Remember a request under `key`; `expect=None` takes over an earlier use of the key."""
        return put(IDEMPOTENCY, (tenant, key), remembered, attachment=answer, expect=expect)

    def forget(self, key: Key, *, expect: int | None = None) -> Batch:
        """Forget what is too old to be asked for, or led to nothing."""
        return delete(IDEMPOTENCY, key, expect=expect)
