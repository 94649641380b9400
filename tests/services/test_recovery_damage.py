"""Recovery past damage: what cannot be read is named, what can be is recovered."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import apsw
import msgspec
import pytest

from perdure.core.keys import SYSTEM_TENANT, Key, join, show
from perdure.library import open as open_store
from perdure.services.reports import last_seen
from perdure.services.stored import Stored
from tests.services.conftest import Driver, Open
from tests.services.test_background import body, heard, job_of
from tests.services.test_recovery import Deaf, die


@pytest.fixture
def engine_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'perdure.db'}"


# proves C7
async def test_a_damaged_response_is_named_and_the_others_are_recovered(
    opened: Open, tmp_path: Path
) -> None:
    first = await opened(wrap=Deaf)
    started = [await first.ask("hang 1") for _ in range(3)]
    await die(first.node)
    hurt = sorted(one.key for one in started)[1]
    damage(tmp_path, "records_responses", hurt)
    second = await opened()
    found = {one.surface: one for one in second.node.boot.recovery}["responses"]
    assert (found.interrupted, found.damaged) == (2, 1)
    assert hurt[-1] in found.findings[0].where
    assert any(hurt[-1] in warning for warning in second.node.readiness().warnings)
    for one in started:
        if one.key != hurt:
            held = await second.node.state.responses.get(*one.key)
            assert msgspec.json.decode(held.attachment or b"")["status"] == "failed"
    await left_damaged(second)


# proves C7, R5
async def test_a_response_whose_job_is_damaged_ends_with_what_it_said(
    opened: Open, tmp_path: Path
) -> None:
    first = await opened(wrap=Deaf)
    started = [await first.ask("hang 3", background=True) for _ in range(3)]
    for one in started:
        await heard(first, one, "1 2 3")
    hurt = await job_of(first, started[1].key)
    await die(first.node)
    damage(tmp_path, "records_jobs", hurt.key)
    second = await opened()
    found = {one.surface: one for one in second.node.boot.recovery}["jobs"]
    assert (found.requeued, found.interrupted, found.damaged) == (2, 1, 1)
    assert hurt.key[-1] in found.findings[0].where
    ended = await body(second, started[1].id)
    assert (ended["status"], ended["perdure"]["reason"]) == ("failed", "job_lost")
    assert ended["output"][0]["content"][0]["text"] == "1 2 3"
    for one in (started[0], started[2]):
        await heard(second, one, "1 2 3", attempt=2)
    stored = Stored(second.node.state, second.node.gateway, second.node.jobs)
    await stored.delete("default", started[1].id)
    assert await second.node.state.jobs.find(hurt.key) is None
    assert [finding async for finding in second.node.state.engine.verify()] == []


# proves C7, R5
async def test_a_job_whose_events_are_damaged_is_named_and_its_response_ends(
    opened: Open, tmp_path: Path
) -> None:
    """A job was given back with an event of its own, so a bit in the tip of its events kept the
    server from starting."""
    first = await opened(wrap=Deaf)
    started = [await first.ask("hang 3", background=True) for _ in range(2)]
    for one in started:
        await heard(first, one, "1 2 3")
    hurt = await job_of(first, started[0].key)
    await die(first.node)
    connection = apsw.Connection(str(tmp_path / "perdure.db"), vfs="cksmvfs")
    connection.execute("UPDATE streams SET sum = sum - 1 WHERE key = ?", (join(hurt.key),))
    assert connection.changes() == 1
    connection.close()
    second = await opened()
    found = {one.surface: one for one in second.node.boot.recovery}["jobs"]
    assert (found.requeued, found.interrupted, found.damaged) == (1, 1, 1)
    assert f"job_events {show(hurt.key)}" == found.findings[0].where
    ended = await body(second, started[0].id)
    assert (ended["status"], ended["perdure"]["reason"]) == ("failed", "job_lost")
    await heard(second, started[1], "1 2 3", attempt=2)
    await left_damaged(second)


# proves C7, R5
async def test_a_job_that_is_damaged_while_it_waits_ends_its_response(
    opened: Open, tmp_path: Path
) -> None:
    driver = await opened({"jobs.running_max": 1})
    running = await driver.ask("hang 3", background=True)
    await heard(driver, running, "1 2 3")
    waits, cancelled = [await driver.ask("echo hi", background=True) for _ in range(2)]
    for one in (waits, cancelled):
        damage(tmp_path, "records_jobs", (await job_of(driver, one.key)).key)
    stored = Stored(driver.node.state, driver.node.gateway, driver.node.jobs)
    assert b"job_lost" in await stored.cancel("default", cancelled.id)
    await stored.cancel("default", running.id)
    (*_, last) = await driver.events(waits)
    assert last["response"]["perdure"] == {"reason": "job_lost"}
    await left_damaged(driver)


# proves C7
async def test_a_damaged_boot_is_named_and_keeps_no_server_from_starting(
    opened: Open, engine_url: str, tmp_path: Path
) -> None:
    """The number of a boot was that of the last one and one more, so a server whose last boot could
    not be read did not start again."""
    for _ in range(2):
        node = (await opened()).node
        hurt = (SYSTEM_TENANT, node.boot.instance_id, f"{node.boot.number:010d}")
        await node.close()
    damage(tmp_path, "records_boots", hurt, "value")
    async with open_store(engine_url, read_only=True) as state:
        seen = await last_seen(state)
    assert seen.boot is not None
    assert seen.boot.number == 1
    assert [finding.where for finding in seen.damaged] == [f"boots {show(hurt)}"]
    node = (await opened()).node
    told = {one.surface: one for one in node.boot.recovery}["boots"]
    assert (node.boot.number, node.boot.previous_boot_id) == (3, None)
    assert node.boot.previous_ended_clean is False
    assert [finding.where for finding in told.findings] == [f"boots {show(hurt)}"]
    assert any(show(hurt) in warning for warning in node.readiness().warnings)
    await node.close()


def damage(tmp_path: Path, table: str, key: Key, column: str = "attachment") -> None:
    """Change what is stored of a record behind the engine's back."""
    connection = apsw.Connection(str(tmp_path / "perdure.db"), vfs="cksmvfs")
    connection.execute(f"UPDATE {table} SET {column} = zeroblob(9) WHERE key = ?", (join(key),))
    assert connection.changes() == 1
    connection.close()


async def left_damaged(driver: Driver) -> None:
    """Close a node over a store that is not sound."""
    driver.node.opened = False
    await driver.node._supervisor.stop()
    await driver.node.upstreams.close()
    await driver.node.state.engine.close()


async def chunks() -> AsyncIterator[bytes]:
    yield b"some bytes"


# proves C7
async def test_a_damaged_claim_is_named_and_what_it_may_stand_for_stays(
    opened: Open, tmp_path: Path
) -> None:
    """Who had claimed what before a crash was read without a thought for damage, so a bit in one
    claim kept the server from starting."""
    first = (await opened(wrap=Deaf)).node
    hurt, other = [
        await first.blobs.put(tenant, chunks(), size_bytes_max=99) for tenant in ("one", "two")
    ]
    await die(first)
    damage(tmp_path, "records_blob_claims", hurt.key, "value")
    node = (await opened()).node
    told = {one.surface: one for one in node.boot.recovery}["blobs"]
    assert told.damaged >= 1
    assert f"blob_claims {show(hurt.key)}" in [finding.where for finding in told.findings]
    assert [blob.digest async for blob in node.blobs.blobs.list()] == [other.value.digest]
    await node.close()
