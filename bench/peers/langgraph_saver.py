"""LangGraph's SQLite checkpointers: `AsyncSqliteSaver.aput` and `SqliteSaver.get_tuple`."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from langgraph.checkpoint.base import empty_checkpoint
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver

from bench.load import DOCUMENT, GET_ROWS, closed_loop, key_of, main, plain_loop

METADATA: Any = {"source": "loop", "step": 1}


def checkpoint_of(id: str) -> Any:
    return empty_checkpoint() | {"id": id, "channel_values": {"document": DOCUMENT}}


def config_of(thread: str) -> Any:
    return {"configurable": {"thread_id": thread, "checkpoint_ns": ""}}


def put(directory: Path, writers: int, duration_s: float) -> dict[str, float]:
    async def within() -> dict[str, float]:
        async with AsyncSqliteSaver.from_conn_string(str(directory / "saver.db")) as saver:
            await saver.setup()
            template = checkpoint_of("")
            configs = [config_of(f"thread-{writer}") for writer in range(writers)]

            async def one(writer: int, n: int) -> None:
                checkpoint = template | {"id": key_of(writer, n)}
                await saver.aput(configs[writer], checkpoint, METADATA, {})

            return await closed_loop(one, writers, duration_s)

    return asyncio.run(within())


def get(directory: Path, writers: int, duration_s: float) -> dict[str, float]:
    with SqliteSaver.from_conn_string(str(directory / "saver.db")) as saver:
        saver.setup()
        saver.conn.execute("PRAGMA synchronous=OFF")  # only while it is filled
        for n in range(GET_ROWS):
            saver.put(config_of(f"thread-{n}"), checkpoint_of(key_of(0, n)), METADATA, {})
        saver.conn.execute("PRAGMA synchronous=FULL")
        configs = [config_of(f"thread-{n * 7919 % GET_ROWS}") for n in range(GET_ROWS)]
        return plain_loop(lambda n: saver.get_tuple(configs[n % GET_ROWS]), duration_s)


if __name__ == "__main__":
    main({"put": put, "get": get})
