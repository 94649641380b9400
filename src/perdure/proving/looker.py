"""A program that looks at a store of known steps which it cannot write to, and prints what it saw.

`python -m perdure.proving.looker URL WRITERS`: what opening it to write was told, then the last
step of every writer, each checked to its first, then what `verify` finds.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence

from perdure.core.clock import SystemClock
from perdure.core.errors import PerdureError
from perdure.engines import open_engine
from perdure.proving.steps import LAYOUTS, Unsound, last_step


async def _look(url: str, writers: int) -> None:
    try:
        engine = await open_engine(url, LAYOUTS, clock=SystemClock())
        await engine.close()
        print("opened")
    except PerdureError as error:
        print(f"refused {error.code}: {error}")
    try:
        engine = await open_engine(url, LAYOUTS, clock=SystemClock(), read_only=True)
        for writer in range(writers):
            print(writer, await last_step(engine, writer))
        async for found in engine.verify():
            print(f"verify: {found.where}: {found.why}")
        await engine.close()
    except (PerdureError, Unsound) as error:
        print(f"not readable: {error}")


def main(arguments: Sequence[str]) -> None:
    """See the head of this file."""
    url, writers = arguments
    asyncio.run(_look(url, int(writers)))


if __name__ == "__main__":
    main(sys.argv[1:])
