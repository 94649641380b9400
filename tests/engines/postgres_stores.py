"""Stores of the postgres engine for tests: opened by a URL, and looked into past the engine."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import asyncpg

from perdure.core.clock import Clock, SystemClock
from perdure.core.disk import Disk
from perdure.engines.postgres import PostgresEngine
from perdure.engines.postgres_driver import parse
from perdure.proving.subject import LAYOUTS


def at(dsn: str, schema: str) -> str:
    """The URL of a store."""
    return f"{dsn}{'&' if '?' in dsn else '?'}schema={schema}"


async def opened(url: str, *, clock: Clock | None = None, **options: Any) -> PostgresEngine:
    layouts = options.pop("layouts", LAYOUTS)
    return await PostgresEngine.open(
        url, layouts, clock=clock or SystemClock(), disk=Disk(), **options
    )


@asynccontextmanager
async def beside(url: str) -> AsyncIterator[asyncpg.Connection[asyncpg.Record]]:
    """A session of somebody else in the store's schema."""
    address = parse(url)
    session = await asyncpg.connect(
        address.dsn, server_settings={"search_path": address.schema or "public"}
    )
    try:
        yield session
    finally:
        with suppress(ConnectionError):  # the server may be gone: some tests are about that
            await session.close()
