"""What an accepted background response keeps: nothing that is deleted later takes it away."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from perdure.core.errors import Conflict
from perdure.proving.upstream import ScriptedUpstream
from perdure.proving.waiting import wait_until
from perdure.services.gateway import Started
from perdure.services.holds import Holds
from perdure.surfaces.blobs import CLAIMS, REFERENCES
from perdure.surfaces.jobs import JOB_INPUTS
from perdure.wire.errors import NotFound
from tests.services.conftest import Driver, Open
from tests.services.test_attachments import keep
from tests.services.test_background import WITHIN_S, body, cancel, heard, stored
from tests.services.test_recovery import Deaf, die

TEXT = "The harbour of the first file."
OTHER = "The harbour of the second file."


def named(file_id: str, prompt: str) -> list[dict[str, Any]]:
    file = {"type": "input_file", "file_id": file_id}
    return [{"role": "user", "content": [file]}, {"role": "user", "content": prompt}]


async def owners(driver: Driver) -> list[str]:
    """Who refers to blobs."""
    page = await driver.node.state.engine.scan(REFERENCES, (), limit=100)
    return sorted(record.key[-1].split("/")[0] for record in page.items)


async def kept_blobs(driver: Driver) -> int:
    return len([blob async for blob in driver.node.blobs.blobs.list()])


async def nothing_is_held(driver: Driver) -> None:
    async def free() -> bool:
        engine = driver.node.state.engine
        pages = [await engine.scan(it, (), limit=9) for it in (JOB_INPUTS, REFERENCES, CLAIMS)]
        return not any(page.items for page in pages) and await kept_blobs(driver) == 0

    await wait_until(free, WITHIN_S, "the end of what was held")


async def accepted(driver: Driver, prompt: str) -> tuple[Started, list[str]]:
    """A background response over an earlier turn, each with a file; all but it deleted."""
    files = [await keep(driver.node, "a.txt", TEXT.encode())]
    files.append(await keep(driver.node, "b.txt", OTHER.encode()))
    first = await driver.answer(named(files[0], "echo earlier words"))
    started = await driver.ask(
        named(files[1], prompt), background=True, previous_response_id=first["id"]
    )
    await stored(driver).delete("default", first["id"])
    for file_id in files:
        await driver.node.files.delete("default", file_id)
        with pytest.raises(NotFound):
            await driver.node.files.get("default", file_id)
    return started, files


def heard_by(asked: dict[str, Any]) -> str:
    return msgspec.json.encode(asked["messages"]).decode()


# proves R5, R10
async def test_deleting_what_it_builds_on_does_not_end_an_accepted_response(
    opened: Open, upstream: ScriptedUpstream
) -> None:
    driver = await opened({"jobs.running_max": 1})
    first = await driver.ask("hang 3", background=True)
    await upstream.received(1)
    started, _ = await accepted(driver, "count 3")
    assert await owners(driver) == ["jobs", "jobs"]
    assert await kept_blobs(driver) == 2
    await cancel(driver, first.id)
    await driver.events(started)
    ended = await body(driver, started.id)
    assert (ended["status"], ended["output"][0]["content"][0]["text"]) == ("completed", "1 2 3")
    said = heard_by((await upstream.received())[-1])
    for words in (TEXT, OTHER, "echo earlier words"):
        assert words in said
    await nothing_is_held(driver)


# proves R5, R10
async def test_a_second_attempt_is_asked_what_the_first_was_whatever_was_deleted(
    opened: Open, upstream: ScriptedUpstream
) -> None:
    first = await opened(wrap=Deaf)
    if first.node.state.engine.url == "memory://":
        return  # nothing of it outlives its process
    started, _ = await accepted(first, "slow 0.05 40")
    await heard(first, started, "1 2 3")
    await die(first.node)
    second = await opened()
    await second.events(started)
    assert (await body(second, started.id))["status"] == "completed"
    *_, before, after = await upstream.received()
    assert before["messages"] == after["messages"]
    assert TEXT in heard_by(after)
    await nothing_is_held(second)


# proves R5, R10
async def test_cancelling_or_deleting_it_lets_go_of_what_it_held(
    opened: Open, upstream: ScriptedUpstream
) -> None:
    driver = await opened({"jobs.running_max": 1})
    first = await driver.ask("hang 3", background=True)
    await upstream.received(1)
    for end in (stored(driver).cancel, stored(driver).delete):
        started, _ = await accepted(driver, "count 3")
        assert await kept_blobs(driver) == 2
        await end("default", started.id)
        await nothing_is_held(driver)
    await cancel(driver, first.id)


# proves R10
async def test_a_file_that_others_need_stays_when_the_job_ends(driver: Driver) -> None:
    file_id = await keep(driver.node, "a.txt", TEXT.encode())
    started = await driver.ask(named(file_id, "count 2"), background=True)
    await driver.events(started)

    async def free() -> bool:
        return await owners(driver) == ["files"]

    await wait_until(free, WITHIN_S, "the end of what was held")
    await driver.node.blobs.tend()
    held = await driver.node.files.get("default", file_id)
    assert b"".join([part async for part in driver.node.files.content(held)]) == TEXT.encode()


async def test_a_file_deleted_at_the_same_moment_is_not_held(driver: Driver) -> None:
    """Or its bytes would be named by a job, and gone."""
    state, files = driver.node.state, driver.node.files
    file_id = await keep(driver.node, "a.txt", TEXT.encode())
    taken = await Holds(state, files).take(("default", "job_1"), [], named(file_id, "x"))
    await files.delete("default", file_id)
    with pytest.raises(Conflict):
        await state.commit(taken.batch)
    assert (await owners(driver), await kept_blobs(driver)) == ([], 0)
