"""Perdure over PostgreSQL databases of its own: the same partitioned records on one and on four."""

from __future__ import annotations

import asyncio
import time
from functools import partial
from pathlib import Path

from bench.load import closed_loop, key_of, main
from bench.peers.perdure_engine import VALUE, Document
from perdure.core.batch import put
from perdure.core.layouts import Records
from perdure.engines import open_engine
from perdure.proving.subjects import postgres_url

SESSIONS = Records("sessions", Document, key=("tenant", "session", "id"), partition="session")


def puts(shards: int, directory: Path, writers: int, duration_s: float) -> dict[str, float]:
    """Each writer has a session, so writers are spread over the shards. `cpu_us` is what a put
    costs this process."""
    urls = [postgres_url(directory / str(shard)) for shard in range(shards)]

    async def within() -> dict[str, float]:
        engine = await open_engine("shards:" + ",".join(urls), (SESSIONS,))
        done = 0

        async def one(writer: int, n: int) -> None:
            nonlocal done
            key = ("default", f"session-{writer}", key_of(writer, n))
            await engine.commit(put(SESSIONS, key, VALUE))
            done += 1

        try:
            before_s = time.process_time()
            found = await closed_loop(one, writers, duration_s)
            spent_s = time.process_time() - before_s
            return found | {"cpu_us": spent_s / done * 1e6}
        finally:
            await engine.close()

    return asyncio.run(within())


if __name__ == "__main__":
    main({f"shards-{shards}": partial(puts, shards) for shards in (1, 4)})
