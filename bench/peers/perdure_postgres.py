"""Perdure's PostgreSQL engine, used as a library: a typed record of 1 KiB, one put a commit."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

from bench.load import GET_ROWS, closed_loop, key_of, main
from bench.peers.perdure_engine import DOCUMENTS, VALUE
from perdure.core.batch import join, put
from perdure.core.engine import Engine
from perdure.engines import open_engine
from perdure.proving.subjects import postgres_url


def run(directory: Path, measure: Callable[[Engine], Awaitable[dict[str, float]]]) -> dict:
    async def within() -> dict[str, float]:
        engine = await open_engine(postgres_url(directory), (DOCUMENTS,))
        try:
            found = await measure(engine)
            return found | {"group": engine.stats.commits / engine.stats.groups}
        finally:
            await engine.close()

    return asyncio.run(within())


def puts(directory: Path, writers: int, duration_s: float) -> dict[str, float]:
    async def measure(engine: Engine) -> dict[str, float]:
        return await closed_loop(
            lambda writer, n: engine.commit(put(DOCUMENTS, ("default", key_of(writer, n)), VALUE)),
            writers,
            duration_s,
        )

    return run(directory, measure)


def gets(directory: Path, readers: int, duration_s: float) -> dict[str, float]:
    async def measure(engine: Engine) -> dict[str, float]:
        keys = [("default", key_of(0, n)) for n in range(GET_ROWS)]
        for start in range(0, GET_ROWS, 1_000):
            await engine.commit(join(put(DOCUMENTS, key, VALUE) for key in keys[start:][:1_000]))
        return await closed_loop(
            lambda reader, n: engine.get(DOCUMENTS, keys[(reader + n * 7919) % GET_ROWS]),
            readers,
            duration_s,
        )

    return run(directory, measure)


if __name__ == "__main__":
    main({"put": puts, "get": gets})
