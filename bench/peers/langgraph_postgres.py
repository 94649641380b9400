"""LangGraph's PostgreSQL checkpointer: `AsyncPostgresSaver.aput`, with a connection a writer."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

from langgraph.checkpoint.base import empty_checkpoint
from langgraph.checkpoint.postgres.aio import AsyncPostgresSaver
from psycopg.rows import dict_row
from psycopg_pool import AsyncConnectionPool

from bench.load import DOCUMENT, closed_loop, key_of, main

METADATA: Any = {"source": "loop", "step": 1}


def put(directory: Path, writers: int, duration_s: float) -> dict[str, float]:
    async def within() -> dict[str, float]:
        options = {"autocommit": True, "prepare_threshold": 0, "row_factory": dict_row}
        pool = AsyncConnectionPool(
            os.environ["PERDURE_POSTGRES"],
            min_size=writers,
            max_size=writers,
            kwargs=options,
            open=False,
        )
        await pool.open(wait=True)
        saver = AsyncPostgresSaver(pool)
        await saver.setup()
        values = {"channel_values": {"document": DOCUMENT}, "channel_versions": {"document": 1}}
        template: Any = empty_checkpoint() | values

        async def one(writer: int, n: int) -> None:
            config: Any = {"configurable": {"thread_id": f"thread-{writer}", "checkpoint_ns": ""}}
            checkpoint = template | {"id": key_of(writer, n)}
            await saver.aput(config, checkpoint, METADATA, {"document": n})

        found = await closed_loop(one, writers, duration_s)
        await pool.close()
        return found

    return asyncio.run(within())


if __name__ == "__main__":
    main({"put": put})
