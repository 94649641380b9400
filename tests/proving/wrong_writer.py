"""A writer over an engine that is wrong, as a program: `python wrong_writer.py HOW URL ...`."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress

from perdure.core.batch import Batch
from perdure.core.errors import PerdureError
from perdure.core.values import Committed
from perdure.engines import sqlite_driver
from perdure.engines.sqlite import SqliteEngine
from perdure.proving import writer

COMMIT = SqliteEngine.commit
FORCE = sqlite_driver._force
UNDER_WAY: set[asyncio.Future[Committed]] = set()

Commit = Callable[[SqliteEngine, Batch], Awaitable[Committed]]


async def deaf(engine: SqliteEngine, batch: Batch) -> Committed:
    """Acknowledges what was refused."""
    with suppress(PerdureError):
        return await COMMIT(engine, batch)
    return Committed(())


async def hasty(engine: SqliteEngine, batch: Batch) -> Committed:
    """Acknowledges what it has only handed over."""
    commit = asyncio.ensure_future(COMMIT(engine, batch))
    UNDER_WAY.add(commit)
    commit.add_done_callback(UNDER_WAY.discard)
    return Committed(())


async def untyped(engine: SqliteEngine, batch: Batch) -> Committed:
    """Lets through whatever a refusal came from."""
    try:
        return await COMMIT(engine, batch)
    except PerdureError as error:
        raise error.__cause__ or error from None


def synced_less(connection: object, pragma: str, value: str | int) -> None:
    """SQLite as most programs run it: commits are synced with the next checkpoint."""
    FORCE(connection, pragma, 1 if pragma == "synchronous" else value)  # type: ignore[arg-type]


HOW: dict[str, Commit] = {"deaf": deaf, "hasty": hasty, "untyped": untyped, "synced-less": COMMIT}


if __name__ == "__main__":
    how, *arguments = sys.argv[1:]
    SqliteEngine.commit = HOW[how]  # type: ignore[method-assign,assignment]
    if how == "synced-less":
        sqlite_driver._force = synced_less  # type: ignore[assignment]
    writer.main(arguments)
