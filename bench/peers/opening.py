"""Opening a store that was killed, in a fresh process: by Perdure, or by SQLite alone (`raw`),
which recovers the same log and reads one row. Prints the seconds; leaves without closing, so that
nothing is written on the way out."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import sys
import time

from perdure.engines import open_engine
from perdure.surfaces.state import LAYOUTS


def raw(path: str) -> None:
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("SELECT key, value FROM records_responses LIMIT 1").fetchone()


def checkpointed(path: str) -> None:
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("SELECT key, value FROM records_responses LIMIT 1").fetchone()
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()


def perdure(path: str) -> None:
    asyncio.get_event_loop_policy().new_event_loop().run_until_complete(
        open_engine(f"sqlite:///{path}", LAYOUTS)
    )


if __name__ == "__main__":
    opened = {"raw": raw, "checkpointed": checkpointed, "perdure": perdure}[sys.argv[1]]
    started_s = time.perf_counter()
    opened(sys.argv[2])
    print(time.perf_counter() - started_s, flush=True)
    os._exit(0)
