"""Several nodes over one store: work goes where somebody lives, and the dead write nothing more.

Once over a real PostgreSQL, where each has connections of its own, and once over one engine in
memory, whose answers take no time.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from perdure.core.batch import Batch, layout_of, put
from perdure.core.clock import SystemClock
from perdure.core.engine import Engine, Survives
from perdure.core.errors import Conflict, PromiseBroken, Unavailable
from perdure.core.keys import SYSTEM_TENANT
from perdure.engines import blobs_local, open_engine
from perdure.engines.wrapping import Wrapping
from perdure.proving.subjects import postgres_url
from perdure.proving.upstream import ScriptedUpstream
from perdure.proving.waiting import wait_until
from perdure.services import fleet, lifecycle
from perdure.services.config import load
from perdure.services.fleet import Fleet
from perdure.services.gateway import Started
from perdure.services.lifecycle import Node
from perdure.services.recovery import Recovery
from perdure.services.stored import Stored
from perdure.surfaces.boots import INSTANCES, Instance
from perdure.surfaces.conversations import CONVERSATIONS
from perdure.surfaces.responses import RESPONSES
from perdure.surfaces.state import LAYOUTS, State
from perdure.wire.errors import ConversationLocked
from tests.services.conftest import Driver, someone
from tests.services.test_background import body, heard, job_of
from tests.services.test_blobs import chunks
from tests.services.test_recovery import said

WITHIN_S = 10.0

Join = Callable[..., Awaitable[Driver]]


class Shared(Wrapping):
    """One node's view of an engine that others use too. While it is not `awake` the node's process
    stands still, as far as the store can see. `lent` is not its own to close."""

    def __init__(self, engine: Engine, *, lent: bool) -> None:
        super().__init__(engine)
        self.shared = True
        self.survives = Survives(True, True, True, True, True)
        self._lent = lent
        self.awake = asyncio.Event()
        self.awake.set()
        self.creating = 0
        """Responses that are to be made once it is awake."""

    async def commit(self, batch: Any) -> Any:
        self.creating += any(layout_of(op) is RESPONSES for op in batch.ops)
        await self.awake.wait()
        return await super().commit(batch)

    async def close(self) -> None:
        if not self._lent:
            await super().close()


@pytest.fixture(params=["memory", "postgres"])
async def join(
    request: pytest.FixtureRequest,
    upstream: ScriptedUpstream,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> AsyncIterator[Join]:
    monkeypatch.setattr(fleet, "LEASE_S", 0.5)
    monkeypatch.setattr(lifecycle, "FLEET_HEARTBEAT_S", 0.05)
    monkeypatch.setattr(lifecycle, "WATCH_S", 0.05)
    url = "memory://" if request.param == "memory" else postgres_url(tmp_path)
    common = await open_engine(url, LAYOUTS, clock=SystemClock())
    lent = url == "memory://"
    async with AsyncExitStack() as stack:

        async def join(**more: Any) -> Driver:
            usual = {"engine": url, "data": str(tmp_path), "upstream.url": upstream.url}
            usual |= {"profile": "shared", "blobs": f"file:///{tmp_path}/blobs"}
            flags = usual | more
            node = Node(
                load(environment={}, flags=flags),
                environment={},
                wrap=lambda own: Shared(common if lent else own, lent=lent),
            )
            await node.open()
            stack.push_async_callback(node.close)
            return Driver(node)

        yield join
    assert [finding async for finding in common.verify()] == []
    await common.close()


def engine_of(driver: Driver) -> Shared:
    engine = driver.node.state.engine
    assert isinstance(engine, Shared)
    return engine


# proves R4
async def test_a_response_is_followed_wherever_it_is_made(join: Join) -> None:
    first, second = await join(), await join()
    await wait_until(lambda: knows(second, first), WITHIN_S, "the second knows the first")
    started = await first.ask("slow 0.02 10", stream=True)
    seen = await second.events(started)
    assert said(seen) == "1 2 3 4 5 6 7 8 9 10"
    assert seen == await first.events(started)
    joined = await first.ask("slow 0.02 10")
    answer = await second.node.gateway.finished(Started(joined.key, stored=True, stream=False))
    assert b'"status":"completed"' in answer


# proves R5
async def test_work_of_a_process_that_stands_still_is_taken_over_and_its_writes_refused(
    join: Join,
) -> None:
    first = await join()
    started = await first.ask("gate go 3 8", background=True)
    waiting = await first.ask("gate go 3 8", stream=True)
    await heard(first, started, "1 2 3")
    await heard(first, waiting, "1 2 3")
    second = await join()
    engine_of(first).awake.clear()
    seen = await heard(second, started, "1 2 3", attempt=2)
    assert seen[-1]["type"]
    ended = await second.events(waiting)
    assert ended[-1]["response"]["perdure"] == {"reason": "process_restart"}
    assert ended[-1]["response"]["output"][0]["content"][0]["text"] == "1 2 3"
    job = await job_of(second, started.key)
    assert (job.value.runner, job.value.attempt) == (second.node.boot_id, 2)
    engine_of(first).awake.set()
    await asyncio.wait_for(first.node.fleet.lost.wait(), WITHIN_S)
    before = len(await stored(second))
    with pytest.raises(Unavailable, match="took it for dead"):
        await first.ask("echo too late", stream=True)
    assert len(await stored(second)) == before


# proves R5
async def test_what_nobody_runs_is_run_by_whoever_has_room(join: Join) -> None:
    first = await join()
    started = await first.ask("gate go 3 8", background=True)
    await heard(first, started, "1 2 3")
    second = await join()
    await first.node.drain(0)
    await first.node.close()
    await heard(second, started, "1 2 3", attempt=2)
    job = await job_of(second, started.key)
    attempts = await second.node.state.jobs.attempts(job.key)
    assert attempts[0].reason == "server_stopped"
    assert job.value.attempts_max == 6


# proves R5
async def test_a_job_is_cancelled_wherever_it_runs(join: Join) -> None:
    first, second = await join(), await join()
    started = await first.ask("hang 3", background=True)
    await heard(first, started, "1 2 3")
    there = Stored(second.node.state, second.node.gateway, second.node.jobs)
    assert b'"status":"cancelled"' in await there.cancel("default", started.id)
    await wait_until(lambda: idle(first), WITHIN_S, "the run ends where it was")
    assert (await body(first, started.id))["output"][0]["content"][0]["text"] == "1 2 3"


async def test_a_process_that_would_keep_files_elsewhere_is_refused(
    join: Join, tmp_path: Path
) -> None:
    first = await join(blobs="memory://")
    with pytest.raises(PromiseBroken, match="Give all of them one place"):
        await join(blobs="memory://")
    await first.node.close()
    await join(blobs=f"file:///{tmp_path}/blobs")
    with pytest.raises(PromiseBroken, match="Give all of them one place"):
        await join(blobs=f"file:///{tmp_path}/elsewhere")
    await join(blobs=f"file:///{tmp_path}/blobs")


async def test_one_that_would_keep_files_elsewhere_stops_nobody_who_begins_beside_it(
    join: Join, tmp_path: Path
) -> None:
    await join()
    stranger, settle = asyncio.Event(), Fleet.settle

    async def at_once(fleet: Fleet) -> Any:
        """Both have begun, and neither is ready, when they look who else is there."""
        stranger.set() if len(await fleet.leaseholders()) == 3 else await stranger.wait()
        return await settle(fleet)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Fleet, "settle", at_once)
        own, other = await asyncio.gather(
            join(), join(blobs=f"file:///{tmp_path}/elsewhere"), return_exceptions=True
        )
    assert isinstance(own, Driver)
    assert isinstance(other, PromiseBroken)


# proves C15
async def test_processes_over_one_data_directory_are_told_apart(join: Join) -> None:
    first, second = await join(), await join()
    names = {driver.node.boot.instance_id for driver in (first, second)}
    assert len(names) == 2
    await second.node.close()
    third = await join()
    assert third.node.boot.instance_id == second.node.boot.instance_id
    assert third.node.boot.previous_boot_id == second.node.boot_id
    assert third.node.boot.previous_ended_clean


class Clock(SystemClock):
    """Time that a test lets pass."""

    passed_s = 0.0

    def monotonic_s(self) -> float:
        return self.passed_s


# proves R5
async def test_nobody_is_taken_for_dead_because_the_store_was_away() -> None:
    """Whoever looks first after it is back has seen no sign of life for longer than a lease."""
    clock = Clock()
    engine = Shared(await open_engine("memory://", LAYOUTS, clock=clock), lent=False)
    watched, watching = (Fleet(State(engine), clock, f"boot_{number}") for number in (1, 2))
    await watched.join(None)
    await watching.join(None)
    alive = Instance("inst_2", "boot_2", 2, "", True, 0.0)
    for pause_s in (1.0, 3600.0, 1.0, 1.0, 1.0, 1.0, 1.0):
        clock.passed_s += pause_s
        await watching.watch()
        await watching.beat(alive, Batch())
        assert await watching.lives("boot_1"), pause_s
    for _ in range(2):
        clock.passed_s += 1.0
        await watching.beat(alive, Batch())
        await watching.watch()
    assert not await watching.lives("boot_1")
    assert watching.gone == {"boot_1"}
    await engine.close()


# proves C2
async def test_a_process_beside_another_has_to_be_meant(join: Join) -> None:
    first = await join(profile="local")
    with pytest.raises(PromiseBroken, match="profile 'local' is for one process"):
        await join(profile="local")
    await first.node.close()
    await join(profile="local")


# proves R5
async def test_who_begins_while_others_recover_is_left_alone(join: Join) -> None:
    first, second = await join(), await join()
    await second.node._supervisor.stop()  # it looks no more at who is alive
    third = await join()
    started = await third.ask("gate go 3 8", background=True)
    waiting = await third.ask("gate go 3 8", stream=True)
    await heard(third, started, "1 2 3")
    await heard(third, waiting, "1 2 3")
    await second.node._recovered()
    assert (await body(third, waiting.id))["status"] == "in_progress"
    assert (await job_of(third, started.key)).value.attempt == 1
    assert first.node.boot_id != third.node.boot_id


# proves R5
async def test_what_could_not_be_recovered_is_owed(
    join: Join, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = await join()
    started = await first.ask("gate go 3 8", background=True)
    await heard(first, started, "1 2 3")
    second = await join()
    recover, failures = Recovery.run, iter([Unavailable("as planned")] * 3)

    async def fails(self: Recovery, progress: Any) -> Any:
        for failure in failures:
            raise failure
        return await recover(self, progress)

    monkeypatch.setattr(Recovery, "run", fails)
    engine_of(first).awake.clear()
    await heard(second, started, "1 2 3", attempt=2)

    async def settled() -> bool:
        return not second.node.fleet.gone

    await wait_until(settled, 30, "the end of what is owed")
    engine_of(first).awake.set()


# proves R7, R3
async def test_what_is_deleted_elsewhere_lets_go_of_its_conversation(join: Join) -> None:
    first, second = await join(), await join()
    conversation = await first.conversation("hello")
    started = await first.ask("hang 2", stream=True, conversation=conversation)
    await heard(first, started, "1 2")
    there = Stored(second.node.state, second.node.gateway, second.node.jobs)
    await there.delete("default", started.id)
    await second.answer("echo me", conversation=conversation)


# proves C4, R10
async def test_who_was_taken_for_dead_acknowledges_no_file_and_drops_no_bytes(join: Join) -> None:
    first, second = await join(), await join()
    await second.node._supervisor.stop()  # it has not seen to what the other has left
    claim = await first.node.blobs.put("default", chunks(b"bytes"), size_bytes_max=9)
    await second.node.state.commit(second.node.state.boots.end_lease(first.node.boot_id))
    with pytest.raises(Conflict):
        await first.node.state.commit(first.node.blobs.refer(claim, "files/1"))
    with pytest.raises(Conflict):
        await first.node.blobs.put("default", chunks(b"more"), size_bytes_max=9)
    await first.node.blobs._drop(claim.value.digest)
    assert await first.node.blobs.blobs.size(claim.value.digest) == 5


# proves C4
async def test_who_stands_still_while_it_drops_bytes_takes_none_that_were_put_since(
    join: Join, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blobs_local, "_DROPPED_WITHIN_S", 0.2)
    first, second = await join(), await join()
    drop, stands, wakes = first.node.blobs.blobs.drop, asyncio.Event(), asyncio.Event()

    async def paused(digest: str) -> None:
        stands.set()
        await wakes.wait()
        await drop(digest)

    monkeypatch.setattr(first.node.blobs.blobs, "drop", paused)
    claim = await first.node.blobs.put("default", chunks(b"bytes"), size_bytes_max=9)
    dropping = asyncio.create_task(first.node.blobs.give_up(claim))
    await stands.wait()
    await second.node.state.commit(second.node.state.boots.end_lease(first.node.boot_id))
    for _ in range(2):
        await second.node.blobs.clear_marks()
    with pytest.raises(Unavailable, match="stands still"):
        await second.node.blobs.put("default", chunks(b"bytes"), size_bytes_max=9)
    wakes.set()
    await dropping
    again = await second.node.blobs.put("default", chunks(b"bytes"), size_bytes_max=9)
    await second.node.state.commit(second.node.blobs.refer(again, "files/1"))
    assert await second.node.blobs.blobs.size(again.value.digest) == 5


# proves C4
async def test_marks_that_were_left_are_taken_away_and_those_of_the_living_stay(
    join: Join,
) -> None:
    first, second = await join(), await join()
    keeper, uses = second.node.blobs, second.node.blobs.uses
    for digest, boot_id in (("a", "boot_dead"), ("b", second.node.boot_id), ("c", "boot_dead")):
        await second.node.state.commit(uses.mark(digest, boot_id))
    await second.node.state.commit(uses.mark("d", first.node.boot_id))
    await keeper.clear_marks()
    await second.node.state.commit(uses.unmark("c", 1) + Batch())
    await second.node.state.commit(uses.mark("c", "boot_dead"))
    await keeper.clear_marks()
    assert sorted([mark.key[-1] async for mark in uses.drops()]) == ["c", "d"]


# proves C12, R5
@pytest.mark.parametrize("join", ["postgres"], indirect=True)
@pytest.mark.parametrize("where", ["commit", "statement"])
async def test_a_process_stopped_inside_a_transaction_makes_nobody_else_look_dead(
    where: str, join: Join, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It holds what another wants to write, and what its own burial needs, until the database
    ends its session."""
    monkeypatch.setattr(fleet, "LEASE_S", 2.0)
    first, second = await join(), await join()
    key = ("default", await first.conversation("hello"))
    stopped = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.services.stopped", where, postgres_url(tmp_path), *key),
        stdout=asyncio.subprocess.PIPE,
    )
    assert stopped.stdout is not None
    boot_id = (await asyncio.wait_for(stopped.stdout.readline(), 30)).decode().strip()
    status = Path(f"/proc/{stopped.pid}/stat")
    await wait_until(lambda: is_stopped(status), 30, "a process that is stopped")
    engine = first.node.state.engine
    held = await engine.get(CONVERSATIONS, key)
    assert held is not None
    waiting = asyncio.create_task(engine.commit(put(CONVERSATIONS, key, held.value)))
    for _ in range(3):
        since = await signs(first)
        await wait_until(partial(more_signs, first, since), 30, "a sign of life")
    assert not waiting.done()
    await wait_until(lambda: buried(second, boot_id), WITHIN_S, "the end of its lease")
    await waiting
    assert not first.node.fleet.lost.is_set()
    assert not second.node.fleet.lost.is_set()
    stopped.send_signal(signal.SIGKILL)
    await stopped.wait()


# proves O2
async def test_a_process_that_takes_long_to_stop_gives_signs_of_life_to_the_end(
    join: Join, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = await join(), await join()
    close = first.node.jobs.close

    async def slowly() -> None:
        await wait_until(partial(more_signs, first, await signs(first) + 2), 30, "signs of life")
        await close()

    monkeypatch.setattr(first.node.jobs, "close", slowly)
    await first.node.close()
    boot, _ = await second.node.state.boots.newest(first.node.boot.instance_id)
    assert boot is not None
    assert boot.value.ended_clean


async def is_stopped(status: Path) -> bool:
    return status.read_text().rsplit(")", 1)[1].split()[0] == "T"


async def signs(driver: Driver) -> int:
    node = driver.node
    found = await node.state.engine.get(INSTANCES, (SYSTEM_TENANT, node.boot.instance_id))
    return 0 if found is None else found.version


async def more_signs(driver: Driver, since: int) -> bool:
    return await signs(driver) > since


async def buried(driver: Driver, boot_id: str) -> bool:
    return boot_id not in await driver.node.fleet.leaseholders()


# proves R7
async def test_a_conversation_is_locked_for_everybody(
    join: Join, upstream: ScriptedUpstream
) -> None:
    first, second = await join(), await join()
    conversation = await first.conversation("hello")
    started = await first.ask("gate end 2 4", stream=True, conversation=conversation)
    await heard(first, started, "1 2")
    with pytest.raises(ConversationLocked):
        await second.ask("echo me", conversation=conversation)
    await upstream.open("end")
    await second.events(started)
    await second.answer("echo me", conversation=conversation)
    words = await first.words(conversation)
    assert words == ["hello", "gate end 2 4", "1 2 3 4", "echo me", "me"]


# proves C22
@pytest.mark.parametrize("key", [None, "named"])
async def test_who_leaves_does_not_stop_what_a_retry_waits_for_at_another_process(
    key: str | None, join: Join, upstream: ScriptedUpstream
) -> None:
    first, second = await join(), await join()
    sent, again = (someone(digest="same", key=key, retried=retried) for retried in (False, True))
    started = await first.ask("gate end 2 4", caller=sent)
    await heard(first, started, "1 2")
    joined = await second.ask("gate end 2 4", caller=again)
    assert joined.id == started.id
    await first.node.gateway.abandon(started, sent)
    await upstream.open("end")
    assert b'"status":"completed"' in await second.node.gateway.finished(joined)


# proves C22
async def test_a_retry_joins_a_first_sending_that_is_accepted_while_it_is_looked_for(
    join: Join,
) -> None:
    first, second = await join(), await join()
    sent, again = (someone(digest="same", retried=retried) for retried in (False, True))
    engine_of(second).awake.clear()
    retried = asyncio.create_task(second.ask("echo me", caller=again))
    await wait_until(lambda: held_up(second), WITHIN_S, "a retry that is about to be accepted")
    started = await first.ask("echo me", caller=sent)
    engine_of(second).awake.set()
    assert (await retried).id == started.id
    assert len(await stored(first)) == 1


async def held_up(driver: Driver) -> bool:
    return engine_of(driver).creating > 0


async def knows(driver: Driver, other: Driver) -> bool:
    return other.node.boot_id in driver.node.fleet.living


async def idle(driver: Driver) -> bool:
    return driver.node.jobs.counts().running == 0


async def stored(driver: Driver) -> list[Any]:
    page = await driver.node.state.engine.scan(RESPONSES, ("default",), limit=100)
    return page.items
