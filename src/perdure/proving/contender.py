"""A program whose clients contend for a few records, until it is killed or done, and tells what
each asked and was told, as it happens.

`python -m perdure.proving.contender URL SEED`: a line of JSON (`Told`) before each call and after
each answer. Some commits lose their answer, done or not.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
from collections.abc import Callable

import msgspec
from msgspec.structs import replace

from perdure.core.batch import put
from perdure.core.clock import SystemClock
from perdure.core.engine import Engine
from perdure.core.errors import CommitUnknown, Conflict
from perdure.engines import open_engine
from perdure.engines.failing import Failing, unknown_committed, unknown_lost
from perdure.proving.linear import Operation, Register
from perdure.proving.steps import LAYOUTS, NOTES, TENANT, Note

KEYS = ("one", "other")
CLIENTS = 4
TURNS = 20
"""Of each client, a read or a write: what the search is spared in one life."""

_UNKNOWN = 8


class Told(msgspec.Struct, frozen=True):
    """A client's call, then its answer. A write that is called for has no answer yet: its outcome
    is unknown; a read that is called for is nothing at all."""

    client: int
    key: str
    what: Operation | None


def _tell(client: int, key: str, what: Operation | None) -> None:
    os.write(1, msgspec.json.encode(Told(client, key, what)) + b"\n")


async def read(engine: Engine, key: str) -> Register:
    """What a record is now."""
    record = await engine.get(NOTES, (TENANT, key))
    return Register() if record is None else Register(record.version, record.value.text)


async def _contend(engine: Engine, client: int, seed: str) -> None:
    rng = random.Random(f"{seed}/{client}")
    versions = dict.fromkeys(KEYS, 0)
    for turn in range(TURNS):
        key = rng.choice(KEYS)
        if rng.random() < 0.4:
            _tell(client, key, None)
            found = await read(engine, key)
            versions[key] = found.version
            _tell(client, key, Operation(told="found", found=found))
            continue
        expect = None if rng.random() < 0.1 else versions[key]
        write = Operation(told="unknown", value=f"{seed}-{client}-{turn}", expect=expect)
        _tell(client, key, write)
        answer = await _answered(engine, key, write)
        if answer.told != "unknown":
            versions[key] = answer.version
        _tell(client, key, answer)


async def _answered(engine: Engine, key: str, write: Operation) -> Operation:
    batch = put(NOTES, (TENANT, key), Note(write.value or ""), expect=write.expect)
    try:
        (version,) = (await engine.commit(batch)).numbers
    except Conflict as conflict:
        return replace(write, told="refused", version=conflict.actual)
    except CommitUnknown:
        return write
    return replace(write, told="written", version=version)


async def contend(
    url: str, seed: str, around: Callable[[Engine], Engine] = lambda engine: engine
) -> None:
    """See the head of this file; `around` puts a wrapper about the engine."""
    rng = random.Random(seed)
    engine = await open_engine(url, LAYOUTS, clock=SystemClock())
    lost = [
        rng.choice((unknown_committed, unknown_lost))(rng.randrange(1, CLIENTS * TURNS))
        for _ in range(_UNKNOWN)
    ]
    failing = Failing(around(engine), lost)
    await asyncio.gather(*(_contend(failing, client, seed) for client in range(CLIENTS)))
    await engine.close()


if __name__ == "__main__":
    asyncio.run(contend(sys.argv[1], sys.argv[2]))
