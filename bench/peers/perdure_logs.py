"""Perdure as a library: a log with a stream a writer, one entry of 1 KiB a commit; and the worker
runtime, one step of a run a commit, which adds to the worker's transcript and events and writes its
state. Each on the engine that its case is named by.

Reads come from a store that was closed and opened again, so that nothing of it is still in memory
that a program would not have after a start.
"""

from __future__ import annotations

import array
import asyncio
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import msgspec

import perdure.library
from bench.load import (
    DOCUMENT,
    LONG_ENTRIES,
    LONG_READ,
    SESSION_ITEMS,
    SESSION_LAST,
    Measure,
    closed_loop,
    main,
    percentile,
    read_places,
)
from bench.peers.perdure_engine import VALUE, Document
from perdure.core.batch import append
from perdure.core.engine import Engine
from perdure.core.layouts import Log
from perdure.engines import open_engine
from perdure.engines.files import FilesEngine
from perdure.library import Embedded

SESSIONS = Log("sessions", Document, key=("tenant", "session_id"))
_TOGETHER = 5_000
_ITEM = {"role": "user", "content": DOCUMENT}
_RUNTIME = "bench"


def url_of(engine: str, directory: Path) -> str:
    where = {"files": f"file:///{directory / 'store'}", "sqlite": f"sqlite:///{directory}/store.db"}
    return where.get(engine, "memory://")


def session(writer: int) -> tuple[str, str]:
    return "default", f"session-{writer}"


@asynccontextmanager
async def opened(engine: str, directory: Path) -> AsyncIterator[Engine]:
    found = await open_engine(url_of(engine, directory), (SESSIONS,))
    try:
        yield found
    finally:
        await found.close()


async def filled(engine: str, directory: Path, entries: int) -> None:
    """One stream with so many entries."""
    async with opened(engine, directory) as store:
        for start in range(0, entries, _TOGETHER):
            values = [VALUE] * min(_TOGETHER, entries - start)
            await store.commit(append(SESSIONS, session(0), values))


async def appends(
    engine: str, directory: Path, writers: int, duration_s: float
) -> dict[str, float]:
    async with opened(engine, directory) as store:
        return await closed_loop(
            lambda writer, _n: store.commit(append(SESSIONS, session(writer), [VALUE])),
            writers,
            duration_s,
        )


async def read(engine: str, directory: Path, writers: int, duration_s: float) -> dict[str, float]:
    await filled(engine, directory, SESSION_ITEMS)
    async with opened(engine, directory) as store:

        async def one(_writer: int, _n: int) -> None:
            last = (await store.tip(SESSIONS, session(0))).last
            found = await store.read(
                SESSIONS, session(0), after=last - SESSION_LAST, limit=SESSION_LAST
            )
            assert len(found) == SESSION_LAST

        return await closed_loop(one, writers, duration_s)


async def long(engine: str, directory: Path, writers: int, duration_s: float) -> dict[str, float]:
    began_s = time.perf_counter()
    await filled(engine, directory, LONG_ENTRIES)
    built_s = time.perf_counter() - began_s
    async with opened(engine, directory) as store:

        async def one(after: int) -> int:
            return len(await store.read(SESSIONS, session(0), after=after, limit=LONG_READ))

        return await read_places(one) | {"built_s": built_s}


@asynccontextmanager
async def working(
    engine: str, directory: Path, workers: int
) -> AsyncIterator[tuple[Embedded, list[int]]]:
    """Running workers, with their generations."""
    async with perdure.library.open(url_of(engine, directory)) as state:
        await state.workers.create_runtime({"id": _RUNTIME})
        generations = []
        for worker in range(workers):
            await state.workers.create(_RUNTIME, {"id": f"worker-{worker}"})
            run = await state.workers.start(_RUNTIME, f"worker-{worker}")
            generations.append(run.generation)
        yield state, generations


async def step(state: Embedded, worker: int, generation: int) -> None:
    """One step of a run, with one item for the transcript."""
    step = {"generation": generation, "transcript": [_ITEM]}
    await state.workers.progress(_RUNTIME, f"worker-{worker}", step)


async def steps(engine: str, directory: Path, writers: int, duration_s: float) -> dict[str, float]:
    async with working(engine, directory, writers) as (state, generations):
        return await closed_loop(
            lambda writer, _n: step(state, writer, generations[writer]), writers, duration_s
        )


async def transcript(
    engine: str, directory: Path, writers: int, duration_s: float
) -> dict[str, float]:
    """The newest items of a transcript, behind the cursor that a reader of those before them
    has."""
    async with working(engine, directory, 1) as (state, (generation,)):
        for _ in range(SESSION_ITEMS):
            await step(state, 0, generation)
        before = SESSION_ITEMS - SESSION_LAST
        cursor: str | None = None
        while before:
            page = await state.workers.transcript(
                _RUNTIME, "worker-0", after=cursor, limit=min(100, before)
            )
            cursor, before = page.cursor, before - len(page.data)
    async with perdure.library.open(url_of(engine, directory)) as state:

        async def one(_writer: int, _n: int) -> None:
            page = await state.workers.transcript(
                _RUNTIME, "worker-0", after=cursor, limit=SESSION_LAST
            )
            assert len(page.data) == SESSION_LAST

        return await closed_loop(one, writers, duration_s)


class Grown(msgspec.Struct):
    """What a store and its process take at one moment."""

    rate: float
    overlay_mib: float
    journal_mib: float
    resident_mib: float


async def sustained(
    engine: str, directory: Path, writers: int, duration_s: float
) -> dict[str, object]:
    """Appends for long, watched once a second. Latencies are those of one writer, in an array: what
    this process takes is to be the store's."""
    async with opened(engine, directory) as store:
        assert isinstance(store, FilesEngine)
        began_s, done, seen = time.perf_counter(), 0, []
        latencies_s = array.array("f")

        async def write(writer: int) -> None:
            nonlocal done
            while (started_s := time.perf_counter()) < began_s + duration_s:
                await store.commit(append(SESSIONS, session(writer), [VALUE]))
                done += 1
                if writer == 0:
                    latencies_s.append(time.perf_counter() - started_s)

        async def watch() -> None:
            before, at_s = 0, began_s
            while at_s < began_s + duration_s - 1:
                await asyncio.sleep(1)
                now_s = time.perf_counter()
                rate, before, at_s = (done - before) / (now_s - at_s), done, now_s
                seen.append(_grown(store, rate))

        await asyncio.gather(watch(), *(write(writer) for writer in range(writers)))
        elapsed_s = time.perf_counter() - began_s
        ending_s = time.perf_counter()
    ordered = sorted(latencies_s)
    third = len(seen) // 3
    return {
        "rate": done / elapsed_s,
        "p50_ms": percentile(ordered, 0.5) * 1e3,
        "p99_ms": percentile(ordered, 0.99) * 1e3,
        "stored_mib": done * len(msgspec.json.encode(VALUE)) / 2**20,
        "close_s": time.perf_counter() - ending_s,
        "first": _most(seen[:third]),
        "last": _most(seen[-third:]),
    }


def _grown(store: FilesEngine, rate: float) -> Grown:
    with open("/proc/self/statm") as file:
        resident_bytes = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return Grown(
        rate,
        store._state.waiting_bytes / 2**20,
        store.stats.log_size_bytes / 2**20,
        resident_bytes / 2**20,
    )


def _most(seen: list[Grown]) -> dict[str, float]:
    """The mean rate of some moments, and the most of everything else."""
    return {
        "rate": sum(one.rate for one in seen) / len(seen),
        "overlay_mib": max(one.overlay_mib for one in seen),
        "journal_mib": max(one.journal_mib for one in seen),
        "resident_mib": max(one.resident_mib for one in seen),
    }


CASES = {
    "append": appends,
    "read": read,
    "long": long,
    "step": steps,
    "transcript": transcript,
    "sustained": sustained,
}


def _run(name: str, engine: str, directory: Path, writers: int, duration_s: float) -> object:
    return asyncio.run(CASES[name](engine, directory, writers, duration_s))


if __name__ == "__main__":
    cases: dict[str, Measure] = {
        f"{engine}-{name}": partial(_run, name, engine)
        for engine in ("files", "sqlite", "memory")
        for name in CASES
    }
    main(cases)
