"""SQLite with nothing around it, through the standard library: WAL, synchronous=FULL.

`put` with one writer is an INSERT and a commit each. With more, a thread takes what has gathered
and commits it as one group: the least that group commit can cost in Python.
"""

from __future__ import annotations

import asyncio
import json
import queue
import sqlite3
import threading
from pathlib import Path

from bench.load import DOCUMENT, GET_ROWS, closed_loop, key_of, main, plain_loop

TEXT = json.dumps(DOCUMENT)
INSERT = "INSERT INTO records (key, version, value) VALUES (?, 1, ?)"


def connect(directory: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(
        directory / "raw.db", isolation_level=None, check_same_thread=False
    )
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute(
        "CREATE TABLE records (id INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE,"
        " version INTEGER NOT NULL, value TEXT NOT NULL)"
    )
    return connection


class Grouped:
    """One thread that commits whatever waits."""

    def __init__(self, connection: sqlite3.Connection, loop: asyncio.AbstractEventLoop) -> None:
        self._connection = connection
        self._loop = loop
        self._waiting: queue.SimpleQueue[tuple[str, asyncio.Future[None]] | None]
        self._waiting = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    async def put(self, key: str) -> None:
        done = self._loop.create_future()
        self._waiting.put((key, done))
        await done

    def close(self) -> None:
        self._waiting.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (first := self._waiting.get()) is not None:
            group = [first]
            while not self._waiting.empty():
                following = self._waiting.get()
                if following is None:
                    self._waiting.put(None)
                    break
                group.append(following)
            self._connection.execute("BEGIN IMMEDIATE")
            self._connection.executemany(INSERT, [(key, TEXT) for key, _ in group])
            self._connection.execute("COMMIT")
            self._loop.call_soon_threadsafe(self._settle, group)

    def _settle(self, group: list[tuple[str, asyncio.Future[None]]]) -> None:
        for _, done in group:
            done.set_result(None)


def put(directory: Path, writers: int, duration_s: float) -> dict[str, float]:
    connection = connect(directory)
    if writers == 1:
        return plain_loop(
            lambda n: connection.execute(INSERT, (key_of(0, n), TEXT)), duration_s
        )  # in autocommit mode: committed and synced when it returns

    async def grouped() -> dict[str, float]:
        committer = Grouped(connection, asyncio.get_running_loop())
        try:
            return await closed_loop(
                lambda writer, n: committer.put(key_of(writer, n)), writers, duration_s
            )
        finally:
            committer.close()

    return asyncio.run(grouped())


def get(directory: Path, writers: int, duration_s: float) -> dict[str, float]:
    connection = connect(directory)
    connection.execute("BEGIN")
    connection.executemany(INSERT, [(key_of(0, n), TEXT) for n in range(GET_ROWS)])
    connection.execute("COMMIT")

    def one(n: int) -> str:
        query = "SELECT version, value FROM records WHERE key = ?"
        row = connection.execute(query, (key_of(0, n * 7919 % GET_ROWS),)).fetchone()
        assert row is not None
        return row[1]

    return plain_loop(one, duration_s)


if __name__ == "__main__":
    main({"put": put, "get": get})
