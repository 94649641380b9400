"""A program that commits known steps, and prints what was acknowledged.

`python -m perdure.proving.writer [--fork] URL WRITERS [STEPS]`: first `ready`, then a line for
every acknowledgement, the writer and its step, written out before the next step begins. It goes on
until it is killed; with STEPS each writer ends after so many, and the store is closed, its log
having started over early. An engine that refuses by name ends it with `refused` and the code.
With --fork it leaves a child, which does nothing as long as their standard input is open.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence

from perdure.core.clock import SystemClock
from perdure.core.engine import Engine
from perdure.core.errors import PerdureError
from perdure.engines import open_engine
from perdure.proving.file_stories import small_journals
from perdure.proving.steps import EVENTS, LAYOUTS, TENANT, step
from perdure.proving.watched import small_checkpoints


async def _write(url: str, writers: int, steps: int | None, *, fork: bool) -> None:
    engine = await open_engine(url, LAYOUTS, clock=SystemClock())
    if fork:
        _fork()
    os.write(1, b"ready\n")
    found = await asyncio.gather(
        *(_work(engine, writer, steps) for writer in range(writers)), return_exceptions=True
    )
    await engine.close()
    for error in found:
        if error is not None:
            raise error


def _fork() -> None:
    """Leave a child, and go on once it runs."""
    told, tell = os.pipe()
    if os.fork() == 0:
        os.write(tell, b".")
        os.close(1)  # whoever reads there is to see its end when the writer dies
        os.read(0, 1)
        os._exit(0)
    os.read(told, 1)


async def _work(engine: Engine, writer: int, steps: int | None) -> None:
    number = (await engine.tip(EVENTS, (TENANT, f"w{writer}"))).last
    while number != steps:
        number += 1
        await engine.commit(step(writer, number))
        os.write(1, f"{writer} {number}\n".encode())


def main(arguments: Sequence[str]) -> None:
    """See the head of this file."""
    fork = arguments[0] == "--fork"
    url, writers, *steps = arguments[fork:]
    try:
        if steps:
            with small_checkpoints(), small_journals(wait_s=0.0):
                asyncio.run(_write(url, int(writers), int(steps[0]), fork=fork))
        else:
            asyncio.run(_write(url, int(writers), None, fork=fork))
    except PerdureError as error:
        os.write(1, f"refused {error.code}\n".encode())


if __name__ == "__main__":
    main(sys.argv[1:])
