"""asyncpg with nothing above it: a row a statement over as many connections as there are writers,
64 rows a statement over one (`unnest`), and gets by key. Texts, not decoded."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import asyncpg

from bench.load import DOCUMENT, GET_ROWS, closed_loop, key_of, main

TEXT = json.dumps(DOCUMENT)
ROWS = 64
PUT = (
    "INSERT INTO documents (key, value) VALUES ($1, $2) "
    "ON CONFLICT (key) DO UPDATE SET value = excluded.value"
)
PUT_MANY = (
    "INSERT INTO documents (key, value) SELECT * FROM unnest($1::text[], $2::text[]) "
    "ON CONFLICT (key) DO UPDATE SET value = excluded.value"
)


def run(connections: int, measure: Callable[[asyncpg.Pool], Awaitable[dict[str, float]]]) -> dict:
    async def within() -> dict[str, float]:
        dsn = os.environ["PERDURE_POSTGRES"]
        async with asyncpg.create_pool(dsn, min_size=connections, max_size=connections) as pool:
            await pool.execute("DROP TABLE IF EXISTS documents")
            await pool.execute("CREATE TABLE documents (key text PRIMARY KEY, value text NOT NULL)")
            return await measure(pool)

    return asyncio.run(within())


def puts(directory: Path, writers: int, duration_s: float) -> dict[str, float]:
    async def measure(pool: asyncpg.Pool) -> dict[str, float]:
        held = [await pool.acquire() for _ in range(writers)]

        async def one(writer: int, n: int) -> None:
            await held[writer].execute(PUT, key_of(writer, n), TEXT)

        found = await closed_loop(one, writers, duration_s)
        for session in held:
            await pool.release(session)
        return found

    return run(writers, measure)


def puts_together(directory: Path, writers: int, duration_s: float) -> dict[str, float]:
    """One connection, `ROWS` rows a statement; `rate` is of rows."""

    async def measure(pool: asyncpg.Pool) -> dict[str, float]:
        async with pool.acquire() as session:

            async def many(writer: int, n: int) -> None:
                keys = [key_of(row, n) for row in range(ROWS)]
                await session.execute(PUT_MANY, keys, [TEXT] * ROWS)

            found = await closed_loop(many, 1, duration_s)
        return found | {"rate": found["rate"] * ROWS}

    return run(1, measure)


def gets(directory: Path, readers: int, duration_s: float) -> dict[str, float]:
    async def measure(pool: asyncpg.Pool) -> dict[str, float]:
        keys = [key_of(0, n) for n in range(GET_ROWS)]
        await pool.execute(PUT_MANY, keys, [TEXT] * GET_ROWS)
        held = [await pool.acquire() for _ in range(readers)]
        question = "SELECT value FROM documents WHERE key = $1"

        async def one(reader: int, n: int) -> None:
            await held[reader].fetchval(question, keys[(reader + n * 7919) % GET_ROWS])

        found = await closed_loop(one, readers, duration_s)
        for session in held:
            await pool.release(session)
        return found

    return run(readers, measure)


if __name__ == "__main__":
    main({"put": puts, "together": puts_together, "get": gets})
