"""A program that commits known steps until it is killed, and prints what was acknowledged.

`python -m perdure.proving.writer URL WRITERS`: first `ready`, then a line for every
acknowledgement, the writer and its step, written out before the next step begins.
"""

from __future__ import annotations

import asyncio
import os
import sys

from perdure.core.clock import SystemClock
from perdure.engines import open_engine
from perdure.proving.steps import EVENTS, LAYOUTS, TENANT, step


async def _write(url: str, writers: int) -> None:
    engine = await open_engine(url, LAYOUTS, clock=SystemClock())
    os.write(1, b"ready\n")

    async def write(writer: int) -> None:
        number = (await engine.tip(EVENTS, (TENANT, f"w{writer}"))).last
        while True:
            number += 1
            await engine.commit(step(writer, number))
            os.write(1, f"{writer} {number}\n".encode())

    await asyncio.gather(*(write(writer) for writer in range(writers)))


if __name__ == "__main__":
    asyncio.run(_write(sys.argv[1], int(sys.argv[2])))
