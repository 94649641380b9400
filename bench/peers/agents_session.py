"""The OpenAI Agents SDK's `SQLiteSession.add_items`, one item a call, a session a writer."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from agents import SQLiteSession

from bench.load import DOCUMENT, closed_loop, main

ITEM: Any = DOCUMENT


def put(directory: Path, writers: int, duration_s: float) -> dict[str, float]:
    async def within() -> dict[str, float]:
        path = directory / "session.db"
        sessions = [SQLiteSession(f"session-{writer}", path) for writer in range(writers)]
        try:
            return await closed_loop(
                lambda writer, n: sessions[writer].add_items([ITEM]), writers, duration_s
            )
        finally:
            for session in sessions:
                session.close()

    return asyncio.run(within())


if __name__ == "__main__":
    main({"put": put})
