"""Perdure's SQLite engine, used as a library: a typed record of 1 KiB, one put a commit.

`traced` writes the key of each acknowledged put to the null device, so that a trace of system
calls shows it between the writes and syncs of the store.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec

from bench.load import DOCUMENT, GET_ROWS, closed_loop, key_of, main
from perdure.core.batch import join, put
from perdure.core.engine import Engine
from perdure.core.layouts import Records
from perdure.engines import open_engine


class Document(msgspec.Struct, frozen=True):
    """The payload, typed as a surface would type it."""

    id: str
    type: str
    role: str
    status: str
    created_at: int
    position: int
    tags: list[str]
    text: str


DOCUMENTS = Records("documents", Document, key=("tenant", "document_id"))
VALUE = msgspec.convert(DOCUMENT, Document)


def run(directory: Path, measure: Callable[[Engine], Awaitable[dict[str, float]]]) -> dict:
    async def within() -> dict[str, float]:
        engine = await open_engine(f"sqlite:///{directory / 'perdure.db'}", (DOCUMENTS,))
        try:
            return await measure(engine)
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


def traced(directory: Path, writers: int, duration_s: float) -> dict[str, float]:
    void = os.open(os.devnull, os.O_WRONLY)

    async def measure(engine: Engine) -> dict[str, float]:
        async def one(writer: int, n: int) -> None:
            key = key_of(writer, n)
            await engine.commit(put(DOCUMENTS, ("default", key), VALUE))
            os.write(void, f"acknowledged {key}".encode())

        return await closed_loop(one, writers, duration_s)

    return run(directory, measure)


def get(directory: Path, writers: int, duration_s: float) -> dict[str, float]:
    async def measure(engine: Engine) -> dict[str, float]:
        await engine.commit(
            join(put(DOCUMENTS, ("default", key_of(0, n)), VALUE) for n in range(GET_ROWS))
        )

        async def one(_writer: int, n: int) -> None:
            record = await engine.get(DOCUMENTS, ("default", key_of(0, n * 7919 % GET_ROWS)))
            assert record is not None

        return await closed_loop(one, 1, duration_s)

    return run(directory, measure)


def wal(directory: Path, writers: int, duration_s: float) -> dict[str, float]:
    """Puts, watching how large the log gets."""
    path = directory / "perdure.db-wal"

    async def measure(engine: Engine) -> dict[str, float]:
        largest = 0

        async def one(writer: int, n: int) -> None:
            nonlocal largest
            await engine.commit(put(DOCUMENTS, ("default", key_of(writer, n)), VALUE))
            if n % 64 == writer:
                largest = max(largest, path.stat().st_size)

        sample = await closed_loop(one, writers, duration_s)
        return sample | {"wal_bytes": largest}

    return run(directory, measure)


if __name__ == "__main__":
    main({"put": puts, "get": get, "traced": traced, "wal": wal})
