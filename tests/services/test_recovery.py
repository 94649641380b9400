"""Recovery: what a boot does about what the last one left. The death is real in tests/crash; here
it is a node that is dropped without a stop, so that every outcome can be looked at closely."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from perdure.core.batch import Batch, put
from perdure.core.values import Committed, Page
from perdure.engines.wrapping import Wrapping
from perdure.services.gateway import Started
from perdure.services.lifecycle import Node
from perdure.surfaces.responses import RESPONSES, wire_body
from tests.services.conftest import Driver, Open
from tests.services.test_files import keep


class Deaf(Wrapping):
    """An engine that stops hearing writes, as a process does when it dies."""

    dead = False

    async def commit(self, batch: Batch) -> Committed:
        if self.dead:
            return await self._never()
        return await super().commit(batch)

    async def _never(self) -> Committed:
        raise ConnectionAbortedError("the process is dead")


@pytest.fixture
def engine_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'perdure.db'}"


async def die(node: Node) -> None:
    """Leave the node's engine as a kill would: nothing more is written, the lock is let go."""
    engine = node.state.engine
    assert isinstance(engine, Deaf)
    engine.dead = True
    node.opened = False
    await node._supervisor.stop()
    await node.gateway.close()
    await node.jobs.close()
    await node.upstreams.close()
    await node.blobs.blobs.close()
    await engine.engine.close()


def said(seen: list[dict]) -> str:
    return "".join(event["delta"] for event in seen if event["type"].endswith("text.delta"))


async def interrupted(opened: Open, conversation: bool = False) -> tuple[Driver, str, list[dict]]:
    """A node opened after one that died while a stream was under way."""
    first = await opened(wrap=Deaf)
    fields = {"conversation": await first.conversation("hello")} if conversation else {}
    started = await first.ask("hang 5", stream=True, **fields)
    seen: list[dict] = []
    async for group in first.node.gateway.events(started, after=-1):
        seen += [msgspec.json.decode(event) for event in group]
        if said(seen) == "1 2 3 4 5":
            break
    await die(first.node)
    return await opened(), started.id, seen


# proves R5
async def test_a_response_whose_process_died_fails_and_keeps_what_was_seen(opened: Open) -> None:
    driver, response_id, seen = await interrupted(opened)
    held = await driver.node.state.responses.get("default", response_id)
    body = msgspec.json.decode(held.attachment or b"")
    assert body["status"] == "failed"
    assert body["error"]["code"] == "server_error"
    assert "restarted" in body["error"]["message"]
    assert body["perdure"] == {"reason": "process_restart"}
    (item,) = body["output"]
    assert (item["status"], item["content"][0]["text"]) == ("incomplete", "1 2 3 4 5")
    events = await driver.events(Started(held.key, stored=True, stream=True))
    assert events[: len(seen)] == seen
    assert [event["type"] for event in events[len(seen) :]] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.failed",
    ]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))


# proves R7
async def test_the_lock_of_a_dead_process_is_released(opened: Open) -> None:
    driver, response_id, _ = await interrupted(opened, conversation=True)
    body = (await driver.node.state.responses.get("default", response_id)).attachment or b""
    conversation = msgspec.json.decode(body)["conversation"]["id"]
    assert await driver.words(conversation) == ["hello"]
    await driver.answer("echo on", conversation=conversation)
    assert await driver.words(conversation) == ["hello", "echo on", "on"]


# proves C13
async def test_every_boot_says_what_it_found(opened: Open) -> None:
    driver, _, _ = await interrupted(opened)
    boot = driver.node.boot
    assert (boot.number, boot.previous_ended_clean) == (2, False)
    found = {one.surface: one for one in boot.recovery}
    assert list(found) == ["engine", "responses", "jobs", "workers", "blobs"]
    assert found["responses"].interrupted == 1
    assert all(one.duration_s > 0 for one in boot.recovery)
    await driver.node.drain(0)
    await driver.node.close()
    third = await opened()
    assert (third.node.boot.number, third.node.boot.previous_ended_clean) == (3, True)
    assert {one.surface: one.interrupted for one in third.node.boot.recovery}["responses"] == 0
    history = await third.node.state.boots.history(boot.instance_id, limit=10)
    assert [item.value.boot_id for item in history.items] == [
        third.node.boot_id,
        boot.boot_id,
        boot.previous_boot_id,
    ]


class Counted(Deaf):
    """Counts the records that scans give."""

    scanned = 0

    async def scan(self, *asked: Any, **how: Any) -> Page[Any]:
        page: Page[Any] = await super().scan(*asked, **how)
        self.scanned += len(page.items)
        return page


# proves C14
async def test_a_start_looks_at_what_is_unfinished_however_much_is_stored(opened: Open) -> None:
    scanned = []
    for stored in (0, 1, 10):
        driver = await opened(wrap=Counted)
        for number in range(stored):
            await driver.answer("echo once")
            await keep(driver.node, f"file {number} of {stored}".encode())
        await driver.ask("hang 5", stream=True)
        await die(driver.node)
        driver = await opened(wrap=Counted)
        scanned.append(driver.node.state.engine.scanned)  # type: ignore[attr-defined]
        await driver.node.drain(0)
        await driver.node.close()
    assert scanned[0] > 0
    assert scanned == scanned[:1] * 3


# proves C13
async def test_a_crash_during_recovery_changes_nothing_but_the_boot_record(opened: Open) -> None:
    class DiesRecovering(Deaf):
        commits = 0

        async def commit(self, batch: Batch) -> Committed:
            self.commits += 1
            self.dead = self.dead or self.commits > 1
            return await super().commit(batch)

    first = await opened(wrap=Deaf)
    started = await first.ask("hang 5", stream=True)
    async for group in first.node.gateway.events(started, after=-1):
        if b"text.delta" in b"".join(group):
            break
    await die(first.node)
    with pytest.raises(ConnectionAbortedError):
        await opened(wrap=DiesRecovering)
    driver = await opened()
    assert driver.node.boot.number == 3
    body = (await driver.node.state.responses.get(*started.key)).attachment or b""
    assert msgspec.json.decode(body)["status"] == "failed"
    after = await driver.events(started)
    assert [event["type"] for event in after].count("response.failed") == 1


# proves C7
async def test_a_response_without_its_events_ends_and_keeps_no_other_from_recovering(
    opened: Open,
) -> None:
    first = await opened(wrap=Deaf)
    started = await first.ask("hang 5", stream=True)
    state = first.node.state
    held = await state.responses.get(*started.key)
    orphan = ("default", "resp_orphan")
    await state.commit(put(RESPONSES, orphan, held.value, attachment=held.attachment))
    await die(first.node)
    driver = await opened()
    found = {one.surface: one for one in driver.node.boot.recovery}["responses"]
    assert (found.interrupted, found.damaged) == (1, 1)
    assert found.findings[0].where == "response_events resp_orphan"
    recovered = await driver.node.state.responses.get(*started.key)
    assert recovered.value.status.terminal
    (last,) = await driver.events(Started(orphan, stored=True, stream=True))
    assert last["response"]["perdure"] == {"reason": "damaged"}
    assert last["response"]["output"] == []
    ended = await driver.node.state.responses.get(*orphan)
    assert msgspec.json.decode(wire_body(ended)) == last["response"]
