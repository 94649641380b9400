"""A program that accepts inputs over a state that is wrong: `python wrong_accepting.py HOW`."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable

from perdure.core.batch import Batch
from perdure.core.values import Committed
from perdure.proving import accepting
from perdure.surfaces.state import State

COMMIT = State.commit
UNDER_WAY: set[asyncio.Future[Committed]] = set()

Commit = Callable[[State, Batch], Awaitable[Committed]]


async def in_two(state: State, batch: Batch) -> Committed:
    """The state and its event first, then what was said."""
    await COMMIT(state, Batch(batch.ops[:3]))
    return await COMMIT(state, Batch(batch.ops[3:]))


async def hasty(state: State, batch: Batch) -> Committed:
    """Acknowledges what it has only handed over."""
    commit = asyncio.ensure_future(COMMIT(state, batch))
    UNDER_WAY.add(commit)
    commit.add_done_callback(UNDER_WAY.discard)
    await asyncio.sleep(0)
    return Committed(())


HOW: dict[str, Commit] = {"in two": in_two, "hasty": hasty}


if __name__ == "__main__":
    State.commit = HOW[sys.argv[1]]  # type: ignore[method-assign,assignment]
    accepting.main()
