"""The requests of `starlette_server`, durable in PostgreSQL: what a team would write itself, by
asyncpg alone (a row and a commit a request) or by LangGraph's checkpointer (a checkpoint each)."""

from __future__ import annotations

import secrets
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Protocol

import asyncpg
import msgspec
import uvicorn
from langgraph.checkpoint.base import empty_checkpoint
from langgraph.checkpoint.postgres.aio import AsyncPostgresSaver
from psycopg.rows import dict_row
from psycopg_pool import AsyncConnectionPool
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from bench.peers.starlette_server import (
    Conversation,
    ItemList,
    answer,
    encode,
    new_conversation,
    new_items,
    ready,
)

SESSIONS = 16
TABLES = """
DROP TABLE IF EXISTS peer_items, peer_bodies;
CREATE TABLE peer_bodies (id text PRIMARY KEY, body text NOT NULL);
CREATE TABLE peer_items (
    id text PRIMARY KEY, body text NOT NULL,
    conversation text NOT NULL REFERENCES peer_bodies (id)
);
"""


class Store(Protocol):
    """Bodies by id, and items added to one of them."""

    async def put(self, id: str, body: str) -> None: ...
    async def get(self, id: str) -> str | None: ...
    async def add(self, id: str, items: list[tuple[str, str]]) -> None: ...


class Rows:
    """By asyncpg."""

    def __init__(self, pool: asyncpg.Pool[asyncpg.Record]) -> None:
        self.pool = pool

    async def put(self, id: str, body: str) -> None:
        await self.pool.execute("INSERT INTO peer_bodies VALUES ($1, $2)", id, body)

    async def get(self, id: str) -> str | None:
        found: str | None = await self.pool.fetchval(
            "SELECT body FROM peer_bodies WHERE id = $1", id
        )
        return found

    async def add(self, id: str, items: list[tuple[str, str]]) -> None:
        try:
            await self.pool.execute(
                "INSERT INTO peer_items SELECT *, $1 FROM unnest($2::text[], $3::text[])",
                id,
                *map(list, zip(*items, strict=True)),
            )
        except asyncpg.ForeignKeyViolationError:
            raise HTTPException(404) from None


class Checkpoints:
    """By LangGraph: an id is a thread."""

    def __init__(self, saver: AsyncPostgresSaver) -> None:
        self.saver = saver

    async def put(self, id: str, body: str) -> None:
        config: Any = {"configurable": {"thread_id": id, "checkpoint_ns": ""}}
        checkpoint: Any = empty_checkpoint() | {
            "id": f"{time.time_ns():020}",
            "channel_values": {"body": body},
            "channel_versions": {"body": 1},
        }
        await self.saver.aput(config, checkpoint, {"source": "loop", "step": 1}, {"body": 1})

    async def get(self, id: str) -> str | None:
        found = await self.saver.aget_tuple({"configurable": {"thread_id": id}})
        return None if found is None else str(found.checkpoint["channel_values"]["body"])

    async def add(self, id: str, items: list[tuple[str, str]]) -> None:
        for item, body in items:
            await self.put(f"{id}/{item}", body)


@asynccontextmanager
async def open_store(kind: str, dsn: str) -> AsyncIterator[Store]:
    if kind == "asyncpg":
        async with asyncpg.create_pool(dsn, min_size=SESSIONS, max_size=SESSIONS) as pool:
            await pool.execute(TABLES)
            yield Rows(pool)
        return
    options = {"autocommit": True, "prepare_threshold": 0, "row_factory": dict_row}
    async with AsyncConnectionPool(
        dsn, min_size=SESSIONS, max_size=SESSIONS, kwargs=options
    ) as sessions:
        saver = AsyncPostgresSaver(sessions)
        await saver.setup()
        yield Checkpoints(saver)


def told(body: str | None) -> Response:
    if body is None:
        raise HTTPException(404)
    return Response(body, media_type="application/json")


async def create(request: Request) -> Response:
    sent = new_conversation(await request.body())
    made = Conversation(f"conv_{secrets.token_hex(24)}", int(time.time()), sent.metadata)
    await request.state.store.put(made.id, encode(made).decode())
    return answer(made)


async def retrieve(request: Request) -> Response:
    return told(await request.state.store.get(request.path_params["id"]))


async def add(request: Request) -> Response:
    sent = new_items(await request.body())
    for item in sent.items:
        item.id = f"msg_{secrets.token_hex(24)}"
    items = [(item.id, encode(item).decode()) for item in sent.items]
    await request.state.store.add(request.path_params["id"], items)
    return answer(ItemList(sent.items, sent.items[0].id, sent.items[-1].id))


async def keep(request: Request) -> Response:
    msgspec.json.decode(body := await request.body())
    await request.state.store.put(request.path_params["id"], body.decode())
    return answer(None)


@asynccontextmanager
async def lifespan(_app: Starlette) -> AsyncIterator[dict[str, Store]]:
    async with open_store(*sys.argv[2:4]) as store:
        yield {"store": store}


app = Starlette(
    lifespan=lifespan,
    routes=[
        Route("/readyz", ready),
        Route("/v1/conversations", create, methods=["POST"]),
        Route("/v1/conversations/{id}", retrieve),
        Route("/v1/conversations/{id}/items", add, methods=["POST"]),
        Route("/v1/responses/{id}", keep, methods=["PUT"]),
        Route("/v1/responses/{id}", retrieve),
    ],
)

if __name__ == "__main__":
    uvicorn.run(app, port=int(sys.argv[1]), log_level="warning", access_log=False)
