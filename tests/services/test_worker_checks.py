"""What is held against each other of workers: each way in which it may disagree is found and named,
and nothing else is, also while it is written."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import msgspec
import pytest

import perdure
from perdure.core.batch import Batch, append, delete, drop, put, trim
from perdure.core.clock import SystemClock
from perdure.core.engine import Engine
from perdure.core.keys import Key
from perdure.core.layouts import Records
from perdure.engines import open_engine
from perdure.library import Embedded
from perdure.services.worker_checks import check_workers
from perdure.surfaces.retentions import ARCHIVES, RETENTIONS, ArchivePart, Retention
from perdure.surfaces.state import LAYOUTS
from perdure.surfaces.workers import (
    INPUTS,
    OVERVIEWS,
    RUNTIMES,
    STATES,
    SUBMISSIONS,
    TRANSCRIPTS,
    USAGES,
    WORKER_EVENTS,
    WORKERS,
    Queued,
    Said,
    Status,
    WorkerEvent,
)

KEY = ("default", "lab", "scout")
AT = ("lab", "scout")
OPERATION = ("default", "lab", "op1")


async def lived(state: Embedded) -> None:
    """A worker that has done something, and one that was archived."""
    workers = state.workers
    await workers.create_runtime({"id": "lab"})
    for worker_id in ("scout", "old"):
        await workers.create("lab", {"id": worker_id})
        for number in range(3):
            sent = {"content": {"n": 1.5, "of": number}, "submission_id": f"s{number}"}
            await workers.input("lab", worker_id, sent)
    run = (await workers.start(*AT)).generation
    said = [{"role": "assistant", "content": "done"}]
    for name in ("a", "b"):
        step = {"generation": run, "taken": 1, "transcript": said, "name": name, "usage": {"t": 3}}
        await workers.progress(*AT, step)
        await workers.overview(*AT)
        await workers.usage(*AT)
    await workers.stop(*AT)
    await workers.cancel("lab", "old")
    await workers.retain("lab", "old", {"operation_id": "op1", "mode": "archive"})


Harm = Callable[[Engine], Any]


def changed(records: Records[Any], key: Key, **fields: Any) -> Harm:
    async def harm(engine: Engine) -> Batch:
        found = await engine.get(records, key)
        assert found is not None
        value = msgspec.structs.replace(found.value, **fields)
        return put(records, key, value, attachment=found.attachment)

    return harm


def done(batch: Batch) -> Harm:
    async def harm(engine: Engine) -> Batch:
        return batch

    return harm


def event(type: str, generation: int) -> WorkerEvent:
    return WorkerEvent(type, "evt_x", 1, generation)  # type: ignore[arg-type]


NULL = msgspec.Raw(b"null")
HARMS: dict[str, tuple[Harm, str]] = {
    "an event more than is counted": (
        done(append(WORKER_EVENTS, KEY, [event("accepted", 2)])),
        "its state counts 8 of worker_events, and 1 to 9 are there",
    ),
    "an entry that is counted and gone": (
        done(drop(TRANSCRIPTS, KEY)),
        "its state counts 5 of worker_transcripts, and 1 to 0 are there",
    ),
    "events that were trimmed": (done(trim(WORKER_EVENTS, KEY, 3)), "and 3 to 8 are there"),
    "an input that nobody took and somebody counts": (
        changed(STATES, KEY, taken=4),
        "its state has taken 4 of 3 inputs",
    ),
    "a taken input that no event tells": (changed(STATES, KEY, taken=3), "amount to another"),
    "a state that is gone": (done(delete(STATES, KEY)), "it has no state"),
    "another status": (changed(WORKERS, KEY, status=Status.READY), "amount to another status"),
    "another generation": (changed(WORKERS, KEY, generation=7), "amount to another status"),
    "another end": (changed(WORKERS, KEY, ended_by="evt_other"), "amount to another status"),
    "an event that does not follow": (
        done(
            drop(WORKER_EVENTS, KEY)
            + append(WORKER_EVENTS, KEY, [event("created", 0), event("released", 0)])
            + append(WORKER_EVENTS, KEY, [event("created", 0)] * 6)
        ),
        "event 2, released, does not follow on ready",
    ),
    "an overview of other events": (
        changed(OVERVIEWS, KEY, runs=2),
        "its overview is not what its first 7 events amount to",
    ),
    "a usage of other events": (
        changed(USAGES, KEY, counted={"t": 7}),
        "its usage is not what its first 7 events amount to",
    ),
    "a usage ahead of its log": (changed(USAGES, KEY, events=9), "a projection is of 9 events"),
    "an acknowledgement that is gone": (
        done(delete(SUBMISSIONS, (*KEY, "s1"))),
        "2 submissions are kept of 3 inputs",
    ),
    "an acknowledgement of something else": (
        changed(SUBMISSIONS, (*KEY, "s1"), digest="0"),
        "input 2 is not what was acknowledged of s1",
    ),
    "an acknowledgement that names another event": (
        changed(SUBMISSIONS, (*KEY, "s1"), event=1),
        "input 2 is not what was acknowledged of s1",
    ),
    "an acknowledgement that names no event": (
        changed(SUBMISSIONS, (*KEY, "s1"), event=99),
        "input 2 leads to no event",
    ),
    "an input that was never said": (
        done(drop(INPUTS, KEY) + append(INPUTS, KEY, [Queued(f"s{n}", n + 7) for n in range(3)])),
        "input 1 leads to no event",
    ),
    "other words": (
        done(drop(TRANSCRIPTS, KEY) + append(TRANSCRIPTS, KEY, [Said("user", 1, NULL)] * 5)),
        "input 1 is not what was acknowledged of s0",
    ),
    "a worker that is gone": (done(delete(WORKERS, KEY)), "there is none of workers"),
    "a runtime that is gone": (done(delete(RUNTIMES, KEY[:2])), "there is none of runtimes"),
    "a part of an archive that was changed": (
        done(put(ARCHIVES, (*OPERATION, "00000000"), ArchivePart(1), attachment=b"x")),
        "its archive is not what it was",
    ),
    "a part of an archive that is gone": (
        done(delete(ARCHIVES, (*OPERATION, "00000000"))),
        "its archive is not what it was",
    ),
    "an archive that nobody made": (done(delete(RETENTIONS, OPERATION)), "none of worker_reten"),
    "an operation that nothing completes": (
        done(put(RETENTIONS, (*OPERATION[:2], "op2"), Retention("scout", "purge", 1))),
        "it is not done, and no worker waits for it",
    ),
}


# proves W4, W9
@pytest.mark.parametrize("harm", HARMS)
async def test_what_disagrees_is_found_and_named(harm: str) -> None:
    engine = await open_engine("memory://", LAYOUTS)
    state = Embedded(engine, SystemClock())
    await lived(state)
    assert [one async for one in check_workers(engine)] == []
    make, told = HARMS[harm]
    await engine.commit(await make(engine))
    found = [one.why async for one in check_workers(engine)]
    assert any(told in why for why in found), found
    within = [one.why async for one in check_workers(engine, KEY[:2])]
    assert sorted(within) == sorted(found)
    await state.workers.create_runtime({"id": "other"})
    assert [one async for one in check_workers(engine, ("default", "other"))] == []
    await engine.close()


# proves W4
async def test_nothing_is_found_while_workers_are_written_and_removed(tmp_path: Path) -> None:
    async with perdure.open(f"sqlite:///{tmp_path / 'state.db'}") as state:
        workers, busy = state.workers, True
        await workers.create_runtime({"id": "lab"})

        async def write(worker_id: str) -> None:
            for round in range(6):
                await workers.create("lab", {"id": worker_id})
                for number in range(4):
                    await workers.input("lab", worker_id, {"content": number})
                    await workers.overview("lab", worker_id)
                await workers.stop("lab", worker_id)
                asked = {"operation_id": f"{worker_id}{round}", "mode": "archive"}
                await workers.retain("lab", worker_id, asked)

        async def look() -> int:
            walks = 0
            while busy:
                async with aclosing(check_workers(state.engine)) as found:
                    assert [one async for one in found] == []
                walks += 1
            return walks

        looking = asyncio.create_task(look())
        await asyncio.gather(*map(write, "abc"))
        busy = False
        assert await looking > 0
