"""Seals: the secret by which a tenant's things that live with its clients are known again.

What is sealed is not stored: the client keeps it and brings it back, perhaps after years, perhaps
to another process. The secret is in the store because everything that serves the store must know
it, and a backup must carry it. It is made once, when it is first needed.
"""

from __future__ import annotations

import msgspec

from perdure.core.batch import Batch, put
from perdure.core.engine import Engine, Survives
from perdure.core.layouts import Records
from perdure.core.promises import Durability, Promise
from perdure.core.values import Record


class Seal(msgspec.Struct, frozen=True):
    """A secret, as random text, and when it was made."""

    secret: str
    created_at_s: int


SEALS = Records("seals", Seal, key=("tenant", "purpose"))


class Seals:
    """Reads of secrets, and the batch that makes one."""

    promise = Promise(
        surface="seals",
        durability=Durability.SHARED,
        acknowledgement="durable before anything that it seals is handed out",
        survives=Survives(process_crash=True, power_cut=True, failed_sync=True, damage=True),
        owner="whoever commits first; it never changes",
        recovery="none needed: one record, written once",
        retention="for ever: without it nothing that was sealed is accepted again",
        layouts=(SEALS,),
        statements=("R1",),
    )

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def find(self, tenant: str, purpose: str) -> Record[Seal] | None:
        """The secret, once there is one."""
        return await self._engine.get(SEALS, (tenant, purpose))

    def make(self, tenant: str, purpose: str, seal: Seal) -> Batch:
        """The first secret; there is no second, so the loser of a race meets `Conflict`."""
        return put(SEALS, (tenant, purpose), seal, expect=0)
