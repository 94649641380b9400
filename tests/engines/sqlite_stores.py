"""What the tests of the sqlite engine keep in their stores, and how they open them.

Run as a program it is a writer: it commits until it is killed and prints what was acknowledged.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

from perdure.core.clock import Clock, SystemClock
from perdure.core.disk import Disk
from perdure.engines.sqlite import SqliteEngine
from perdure.proving.steps import EVENTS, LAYOUTS, step

WRITERS = 8


async def opened(
    path: Path,
    *,
    vfs: str | None = None,
    read_only: bool = False,
    clock: Clock | None = None,
    disk: Disk | None = None,
) -> SqliteEngine:
    return await SqliteEngine.open(
        str(path),
        LAYOUTS,
        clock=clock or SystemClock(),
        disk=disk or Disk(),
        read_only=read_only,
        vfs=vfs,
    )


async def damage(engine: SqliteEngine) -> list[str]:
    return [f"{found.where}: {found.why}" async for found in engine.verify()]


async def _write(path: Path) -> None:
    engine = await opened(path)
    os.write(1, b"ready\n")

    async def write(writer: int) -> None:
        number = (await engine.tip(EVENTS, ("t", f"w{writer}"))).last
        while True:
            number += 1
            await engine.commit(step(writer, number))
            os.write(1, f"{writer} {number}\n".encode())

    await asyncio.gather(*(write(writer) for writer in range(WRITERS)))


if __name__ == "__main__":
    asyncio.run(_write(Path(sys.argv[1])))
