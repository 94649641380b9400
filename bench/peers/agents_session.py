"""The OpenAI Agents SDK's `SQLiteSession`: `add_items`, one item a call, a session a writer; and
`get_items` of the newest 20, or of the newest 100 of a long one, which is all it can be asked."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from agents import SQLiteSession

from bench.load import (
    DOCUMENT,
    LONG_ENTRIES,
    LONG_READ,
    SESSION_ITEMS,
    SESSION_LAST,
    closed_loop,
    main,
)

ITEM: Any = DOCUMENT
_TOGETHER = 5_000


def run(
    directory: Path,
    sessions: int,
    measure: Callable[[list[SQLiteSession]], Awaitable[dict[str, float]]],
) -> dict[str, float]:
    async def within() -> dict[str, float]:
        path = directory / "session.db"
        opened = [SQLiteSession(f"session-{n}", path) for n in range(sessions)]
        try:
            return await measure(opened)
        finally:
            for session in opened:
                session.close()

    return asyncio.run(within())


def put(directory: Path, writers: int, duration_s: float) -> dict[str, float]:
    async def measure(sessions: list[SQLiteSession]) -> dict[str, float]:
        return await closed_loop(
            lambda writer, n: sessions[writer].add_items([ITEM]), writers, duration_s
        )

    return run(directory, writers, measure)


def read(directory: Path, writers: int, duration_s: float) -> dict[str, float]:
    async def measure(sessions: list[SQLiteSession]) -> dict[str, float]:
        await sessions[0].add_items([ITEM] * SESSION_ITEMS)

        async def one(_writer: int, _n: int) -> None:
            assert len(await sessions[0].get_items(limit=SESSION_LAST)) == SESSION_LAST

        return await closed_loop(one, writers, duration_s)

    return run(directory, 1, measure)


def long(directory: Path, writers: int, duration_s: float) -> dict[str, float]:
    async def measure(sessions: list[SQLiteSession]) -> dict[str, float]:
        began_s = time.perf_counter()
        for _ in range(0, LONG_ENTRIES, _TOGETHER):
            await sessions[0].add_items([ITEM] * _TOGETHER)
        built_s = time.perf_counter() - began_s

        async def one(_writer: int, _n: int) -> None:
            assert len(await sessions[0].get_items(limit=LONG_READ)) == LONG_READ

        found = await closed_loop(one, 1, duration_s)
        return {"end_ms": found["p50_ms"], "end_p99_ms": found["p99_ms"], "built_s": built_s}

    return run(directory, 1, measure)


if __name__ == "__main__":
    main({"put": put, "append": put, "read": read, "long": long})
