"""Clients of an engine that is wrong, as a program: `python wrong_contender.py HOW URL SEED`."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import msgspec

from perdure.core.batch import Batch, Put
from perdure.core.engine import Engine
from perdure.core.keys import Key
from perdure.core.layouts import Records
from perdure.core.values import Committed, Record
from perdure.engines.wrapping import Wrapping
from perdure.proving.contender import contend


class LosesUpdates(Wrapping):
    """Writes over whatever is there."""

    async def commit(self, batch: Batch) -> Committed:
        ops = tuple(
            msgspec.structs.replace(op, expect=None) if isinstance(op, Put) else op
            for op in batch.ops
        )
        return await super().commit(Batch(ops, batch.operation_id))


class ReadsLate(Wrapping):
    """Answers from what it read before, the first time after a write."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self.kept: dict[Key, Any] = {}

    async def get(self, records: Records[Any], key: Key) -> Record[Any] | None:
        record = await super().get(records, key)
        before = self.kept.get(key, record)
        self.kept[key] = record
        return before


HOW = {"loses-updates": LosesUpdates, "reads-late": ReadsLate}

if __name__ == "__main__":
    how, url, seed = sys.argv[1:]
    asyncio.run(contend(url, seed, HOW[how]))
