"""A node's start and stop: what it checks, what it says of itself, what it refuses."""

from __future__ import annotations

import asyncio
import errno
from pathlib import Path
from typing import get_args

import pytest

from perdure.core.batch import Batch
from perdure.core.blobs import Blobs
from perdure.core.clock import SystemClock
from perdure.core.disk import Disk
from perdure.core.engine import Engine
from perdure.core.errors import (
    Invalid,
    Latched,
    PerdureError,
    PromiseBroken,
    StorageFull,
    StoreLocked,
)
from perdure.core.values import Committed
from perdure.engines import open_blobs, open_engine
from perdure.engines.wrapping import Wrapping
from perdure.proving.refusing import Call, Refusing, Trouble
from perdure.proving.waiting import wait_until
from perdure.services import lifecycle
from perdure.services.config import Config, load
from perdure.services.lifecycle import Node
from perdure.services.reports import instance_state
from perdure.services.sweeper import Sweeper
from perdure.surfaces.state import LAYOUTS


def config(tmp_path: Path, **flags: object) -> Config:
    return load(environment={}, flags={"data": str(tmp_path)} | flags)


# proves C2
async def test_a_promise_the_engine_cannot_hold_is_refused_when_shared(tmp_path: Path) -> None:
    node = Node(config(tmp_path, engine="memory://", profile="shared"), environment={})
    with pytest.raises(PromiseBroken, match=r"responses \(shared_durable_workflow_state\)"):
        await node.open()


# proves C2
async def test_locally_it_is_a_warning_that_readiness_repeats(tmp_path: Path) -> None:
    node = Node(config(tmp_path, engine="memory://"), environment={})
    await node.open()
    (warning,) = node.readiness().warnings
    await node.close()
    assert "survives process crash" in warning
    assert "sqlite:///PATH" in warning


# proves C2
@pytest.mark.parametrize("url", ["sqlit:///x.db", "sqlite://", "postgresql:/x", "x"])
async def test_a_mistyped_engine_is_refused_never_replaced(tmp_path: Path, url: str) -> None:
    with pytest.raises(Invalid, match="no engine opens"):
        await Node(config(tmp_path, engine=url), environment={}).open()


# proves C11
async def test_a_second_node_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    first = Node(config(tmp_path), environment={})
    await first.open()
    with pytest.raises(StoreLocked):
        await Node(config(tmp_path), environment={}).open()
    assert first.readiness().ready
    await first.close()
    again = Node(config(tmp_path), environment={})
    await again.open()
    assert again.boot.previous_ended_clean
    await again.close()


class Waits(SystemClock):
    """Says when somebody first waits."""

    def __init__(self) -> None:
        super().__init__()
        self.waited = asyncio.Event()

    async def sleep(self, duration_s: float) -> None:
        self.waited.set()
        await super().sleep(duration_s)


# proves C11
@pytest.mark.parametrize("part", ["engine", "blobs"])
async def test_a_start_waits_for_who_only_looks_at_the_store(tmp_path: Path, part: str) -> None:
    first = Node(config(tmp_path), environment={})
    await first.open()
    await first.close()
    settings, clock = config(tmp_path), Waits()
    if part == "engine":
        looker: Engine | Blobs = await open_engine(settings.engine_url, LAYOUTS, read_only=True)
    else:
        looker = await open_blobs(settings.blobs_url, read_only=True)
    node = Node(settings, environment={}, clock=clock)
    opening = asyncio.create_task(node.open())
    await asyncio.wait_for(clock.waited.wait(), 30)
    assert not opening.done()
    await looker.close()
    await opening
    assert node.readiness().ready
    await node.close()


class Full(Wrapping):
    """An engine whose disk can fill up."""

    full = False

    async def commit(self, batch: Batch) -> Committed:
        if self.full:
            raise StorageFull("no space left")
        return await super().commit(batch)


# proves O1
async def test_a_full_store_is_unready_and_ready_again_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lifecycle, "HEARTBEAT_S", 0.01)
    node = Node(config(tmp_path), environment={}, wrap=Full)
    await node.open()
    engine = node.state.engine
    assert isinstance(engine, Full)

    async def ready() -> bool:
        return node.readiness().ready

    async def unready() -> bool:
        return not node.readiness().ready

    engine.full = True
    await wait_until(unready, 10, "unreadiness")
    (check,) = [check for check in node.readiness().checks if not check.ok]
    assert (check.name, check.reason) == ("engine", "no space left")
    engine.full = False
    await wait_until(ready, 10, "readiness")
    await node.close()


class Unmarked(Disk):
    """A disk that can fail a write the engine makes behind every sync."""

    failing = False

    def overwrite(self, fd: int, data: bytes, offset: int) -> None:
        if self.failing:
            raise OSError(errno.EIO, "as planned")
        super().overwrite(fd, data, offset)


# proves C9, O1
async def test_a_latched_engine_is_unready_at_once_and_still_read(tmp_path: Path) -> None:
    disk = Unmarked()
    node = Node(config(tmp_path), environment={}, disk=disk)
    await node.open()
    disk.failing = True
    await node.state.commit(node.state.boots.heartbeat(node._alive(True)))
    (check,) = [check for check in node.readiness().checks if not check.ok]
    assert check.name == "engine"
    assert "mark" in check.reason
    with pytest.raises(Latched):
        await node.state.commit(node.state.boots.heartbeat(node._alive(True)))
    newest, unread = await node.state.boots.newest(node.boot.instance_id)
    assert newest is not None
    assert not unread
    await node.close()


class Late(SystemClock):
    late_s = 0.0

    def now_s(self) -> float:
        return super().now_s() + self.late_s


# proves C15
async def test_a_sign_of_life_is_the_boots_own_and_not_believed_for_long(tmp_path: Path) -> None:
    clock = Late()
    node = Node(config(tmp_path), environment={}, clock=clock)
    await node.open()
    (sign,) = (await node.state.boots.instances(limit=10)).items
    assert (sign.value.boot_id, sign.value.ready) == (node.boot_id, True)
    assert instance_state(sign.value, node.state, clock, node.boot_id).ready
    assert not instance_state(sign.value, node.state, clock, "another boot").ready
    clock.late_s = 30.0
    late = instance_state(sign.value, node.state, clock, node.boot_id)
    assert (late.ready, late.heartbeat_age_s >= 30) == (False, True)
    await node.close()


# proves O1
async def test_a_node_that_drains_is_unready(tmp_path: Path) -> None:
    node = Node(config(tmp_path), environment={})
    await node.open()
    assert node.readiness().ready
    await node.drain(0)
    (check,) = [check for check in node.readiness().checks if not check.ok]
    assert (check.name, check.reason) == ("accepting", "draining")
    await node.close()


# proves O1
async def test_a_node_that_has_not_opened_says_what_it_waits_for(tmp_path: Path) -> None:
    node = Node(config(tmp_path), environment={})
    readiness = node.readiness()
    assert not readiness.ready
    assert readiness.checks[0].reason == "starting: starting"
    await node.open()
    names = [phase.name for phase in node.startup.phases]
    assert names == [
        "open engine",
        "open blobs",
        "check promises",
        "record boot",
        "recover",
        "connect upstream",
    ]
    assert all(phase.duration_s is not None for phase in node.startup.phases)
    await node.close()


async def test_only_as_many_boots_are_kept_as_retention_says(tmp_path: Path) -> None:
    for _ in range(4):
        node = Node(config(tmp_path, **{"retention.boots_kept": 2}), environment={})
        await node.open()
        await Sweeper(node.state, node.clock, node.boot, 2).sweep()
        history = await node.state.boots.history(node.boot.instance_id, limit=10)
        await node.close()
    assert [item.value.number for item in history.items] == [4, 3]


# proves C9, C10
@pytest.mark.parametrize("call", [call for call in get_args(Call) if call.startswith("disk.")])
async def test_a_start_on_a_failing_disk_ends_in_our_words(tmp_path: Path, call: Call) -> None:
    """The system's own error, as it wrote down which instance this is, came out as it was."""
    for n in range(1, 50):
        trouble = Trouble(calls=(call,), n=n, times=None, errno=errno.EROFS)
        refusing = Refusing(trouble)
        node = Node(config(tmp_path / str(n)), environment={}, disk=refusing.disk)
        try:
            await node.open()
        except PerdureError:
            assert refusing.reached
            assert not node.opened
            continue
        refusing.over()
        await node.close()
        if not refusing.reached:
            break
    assert not refusing.reached
