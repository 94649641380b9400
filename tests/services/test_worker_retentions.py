"""Archiving, purging and removing archives, interrupted at every step: whoever comes next completes
it, and nothing is lost or left over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import perdure
from perdure.core.batch import delete
from perdure.core.clock import SystemClock
from perdure.core.engine import Engine
from perdure.core.errors import Invalid, Missing, Unavailable
from perdure.engines import open_engine
from perdure.engines.failing import Edge, Failing, Fault
from perdure.library import Embedded
from perdure.proving.waiting import wait_until
from perdure.services import retiring
from perdure.services.config import load
from perdure.services.lifecycle import Node
from perdure.services.retiring import Retiring
from perdure.services.worker_checks import check_workers
from perdure.surfaces.retentions import ARCHIVES, RETENTIONS, Retention
from perdure.surfaces.state import LAYOUTS
from perdure.surfaces.workers import WORKERS
from perdure.wire.lists import ListQuery
from perdure.wire.workers import NotPossible

KEY = ("default", "lab", "scout")
AT = ("lab", "scout")
OPERATION = ("default", "lab", "op1")
LINES = 2 + 7 + 4
ARCHIVE = {"operation_id": "op1", "mode": "archive"}


async def ended(state: Embedded) -> None:
    """A worker that has ended, of whom there is something in every place."""
    await state.workers.create_runtime({"id": "lab"})
    await state.workers.create("lab", {"id": "scout"})
    for number in range(4):
        await state.workers.input(*AT, {"content": f"{number}" * 90, "submission_id": f"s{number}"})
    await state.workers.overview(*AT)
    await state.workers.stop(*AT)


async def archived(state: Embedded) -> bytes:
    return b"".join([part async for part in state.workers.archive("lab", "op1")])


async def wrong(engine: Engine) -> list[str]:
    return [f"{one.where}: {one.why}" async for one in check_workers(engine)]


async def begun(state: Embedded, asked: dict[str, str]) -> None:
    """What a process leaves behind that dies as soon as the operation has begun."""
    dies = Failing(state.engine)

    async def die() -> None:
        raise Unavailable("dead")

    dies.faults = [Fault(Edge.AFTER, die, at=1)]
    with pytest.raises(Unavailable):
        await Embedded(dies, SystemClock()).workers.retain(*AT, asked)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retiring, "PART_BYTES", 500)
    monkeypatch.setattr(retiring, "_REMOVED", 3)


# proves W1, C4
@pytest.mark.parametrize("edge", Edge)
@pytest.mark.parametrize("mode", ["archive", "purge"])
async def test_an_operation_that_dies_at_any_commit_is_completed(mode: str, edge: Edge) -> None:
    """Also the removal of the archive, which is the second half of the commits."""
    asked, at, over = {"operation_id": "op1", "mode": mode}, 0, False
    whole: bytes | None = None

    async def die() -> None:
        raise Unavailable("dead")

    async def live(state: Embedded) -> None:
        await state.workers.retain(*AT, asked)
        if mode == "archive":
            await state.workers.remove_archive("lab", "op1")

    while not over:
        at += 1
        engine = await open_engine("memory://", LAYOUTS)
        state = Embedded(engine, SystemClock())
        await ended(state)
        dies = Failing(engine, [Fault(edge, die, at=at)])
        try:
            await live(Embedded(dies, SystemClock()))
            over = True
        except Unavailable:
            assert await wrong(engine) == []
        before = await engine.get(RETENTIONS, OPERATION)
        await Retiring(state, SystemClock()).sweep()
        assert await wrong(engine) == []
        found = await engine.get(RETENTIONS, OPERATION)
        parts = (await engine.count(ARCHIVES, OPERATION)).get((), 0)
        if before is None:
            assert (found, at, edge) == (None, 1, Edge.BEFORE)
            assert (await state.workers.get(*AT)).status == "stopped"
            continue
        assert found is not None
        assert found.value.done
        assert await engine.get(WORKERS, KEY) is None
        assert (await engine.scan(RETENTIONS, (), index="waiting", limit=9)).items == []
        if before.value.removed_at_s is not None or mode == "purge":
            assert parts == 0
        else:
            data = await archived(state)
            assert parts == found.value.parts > 3
            assert data.count(b"\n") == found.value.lines == LINES
            whole = data
        if edge is Edge.AFTER or at > 1:
            assert (await state.workers.retain(*AT, asked)).done
    assert at > (4 if mode == "purge" else 12)
    assert (whole is not None) == (mode == "archive")


# proves W1
@pytest.mark.parametrize("scheme", ["sqlite:///{}/state.db", "file:///{}/state"])
async def test_who_opens_the_store_next_completes_what_was_begun(
    scheme: str, tmp_path: Path
) -> None:
    url = scheme.format(tmp_path)
    async with perdure.open(url) as state:
        await ended(state)
        await begun(state, ARCHIVE)
        assert not (await state.workers.retention("lab", "op1")).done
        assert (await state.workers.get(*AT)).status == "retired"
    async with perdure.open(url, read_only=True) as state:
        assert not (await state.workers.retention("lab", "op1")).done
    async with perdure.open(url) as state:
        assert (await state.workers.retention("lab", "op1")).done
        assert (await archived(state)).count(b"\n") == LINES
        with pytest.raises(Missing):
            await state.workers.get(*AT)
        assert await wrong(state.engine) == []


# proves W1
async def test_a_server_completes_what_the_one_before_it_began(tmp_path: Path) -> None:
    settings = load(environment={}, flags={"data": str(tmp_path)})
    async with perdure.open(settings.engine_url) as state:
        await ended(state)
        await begun(state, ARCHIVE)
    node = Node(settings, environment={})
    await node.open()

    async def completed() -> bool:
        return (await node.workers_of("default").retention("lab", "op1")).done

    await wait_until(completed, 60, "the archive")
    assert await wrong(node.state.engine) == []
    await node.close()


# proves W1
async def test_an_archive_is_removed_when_somebody_says_so(tmp_path: Path) -> None:
    root = tmp_path / "state"
    async with perdure.open(f"file:///{root}") as state:
        await ended(state)
        with pytest.raises(Missing):
            await state.workers.remove_archive("lab", "op1")
        waiting = Retention("scout", "archive", 1)
        await state.commit(state.retentions.keep(OPERATION, waiting, expect=0))
        with pytest.raises(NotPossible):
            await state.workers.remove_archive("lab", "op1")
        await state.commit(delete(RETENTIONS, OPERATION))
        done = await state.workers.retain(*AT, ARCHIVE)
        removed = await state.workers.remove_archive("lab", "op1")
        assert removed.removed_at is not None
        assert (removed.digest, removed.size_bytes) == (done.digest, done.size_bytes)
        assert await state.workers.remove_archive("lab", "op1") == removed
        assert await state.workers.retain(*AT, ARCHIVE) == removed
        with pytest.raises(Missing):
            await archived(state)
        await state.workers.create("lab", {"id": "scout"})
        await state.workers.cancel(*AT)
        await state.workers.retain(*AT, {"operation_id": "op2", "mode": "purge"})
        with pytest.raises((Missing, Invalid)):
            await state.workers.remove_archive("lab", "op2")
    left = sorted(str(path.relative_to(root)) for path in root.rglob("*.*") if path.is_file())
    retentions = [f"runtimes/lab/retentions/op{n}/retention.json" for n in (1, 2)]
    assert left == [*retentions, "runtimes/lab/runtime.json"]
    assert sorted(path.name for path in (root / "runtimes/lab").iterdir()) == [
        "retentions",
        "runtime.json",
    ]


async def test_what_cannot_be_completed_is_told_once_and_keeps_no_other_waiting() -> None:
    engine = await open_engine("memory://", LAYOUTS)
    state: Any = Embedded(engine, SystemClock())
    await ended(state)
    await begun(state, ARCHIVE)
    lost = (*OPERATION[:2], "op0")
    await state.commit(state.retentions.keep(lost, Retention("nobody", "purge", 1), expect=0))
    for _ in range(2):
        await Retiring(state, SystemClock()).sweep()
        (told,) = (await state.workers.diagnostics("lab", ListQuery())).items
        assert (told.where, told.worker_id) == ("operation lab/op0", "nobody")
        assert (await state.workers.retention("lab", "op1")).done
    await engine.close()
