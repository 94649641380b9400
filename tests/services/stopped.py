"""A process that stops itself inside the transaction of a commit, when it has its locks: before it
says COMMIT, or in the middle of a statement, which the database has prepared and is to execute. It
tells which boot it is."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from typing import Any

from perdure.core.batch import put
from perdure.core.clock import SystemClock
from perdure.engines import open_engine
from perdure.engines.postgres_commit import Committer
from perdure.surfaces.conversations import CONVERSATIONS
from perdure.surfaces.state import LAYOUTS, State


async def main(where: str, url: str, *key: str) -> None:
    engine = await open_engine(url, LAYOUTS)
    state = State(engine)
    boot_id = SystemClock().new_id("boot")
    await state.commit(state.boots.take_lease(boot_id))
    held = await engine.get(CONVERSATIONS, key)
    assert held is not None
    sys.stdout.write(f"{boot_id}\n")
    sys.stdout.flush()

    async def stop(committer: Committer, session: Any) -> None:
        if where == "statement":
            await session.prepare("SELECT $1::text")
        os.kill(os.getpid(), signal.SIGSTOP)

    Committer._seal = stop  # type: ignore[assignment]
    await state.commit(put(CONVERSATIONS, key, held.value) + state.boots.alive(boot_id))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
