"""Two real servers on one real PostgreSQL: killed, paused, stopped and restarted under load."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path

import msgspec
import openai
import pytest
from openai import AsyncOpenAI

from perdure.proving.subjects import postgres_url
from perdure.proving.upstream import ScriptedUpstream
from perdure.proving.waiting import wait_until
from tests.e2e.http_server import Server, perdure, serving

SHARED = {"PERDURE_PROFILE": "shared"}
TAKEN_OVER_S = 10.0


@pytest.fixture
async def upstream() -> AsyncIterator[ScriptedUpstream]:
    async with ScriptedUpstream() as server:
        yield server


@pytest.fixture
async def pair(upstream: ScriptedUpstream, tmp_path: Path) -> AsyncIterator[tuple[Server, Server]]:
    data, engine = tmp_path / "data", postgres_url(tmp_path)
    options = ("--engine", engine, "--upstream", upstream.url)
    async with (
        serving(data, *options, **SHARED) as first,
        serving(data, *options, **SHARED) as second,
    ):
        yield first, second


# proves R5, R4, R10, C15
async def test_what_a_killed_server_had_begun_is_gone_on_with_by_the_other(
    pair: tuple[Server, Server],
) -> None:
    first, second = pair
    async with first.sdk() as before, second.sdk() as after:
        await judge_killed(first, second, before, after)


async def judge_killed(
    first: Server, second: Server, before: AsyncOpenAI, after: AsyncOpenAI
) -> None:
    stream = await before.responses.create(
        model="any", input="slow 0.1 40", background=True, stream=True
    )
    seen = []
    async for event in stream:
        seen.append(event)
        if len(seen) == 12:
            break
    waiting = await before.responses.create(model="any", input="slow 0.1 40", background=True)
    file = await before.files.create(file=("a.txt", b"kept once"), purpose="user_data")
    assert (await after.files.content(file.id)).content == b"kept once"
    assert await first.end(signal.SIGKILL) == -signal.SIGKILL
    made = seen[0].response.id
    rest = await after.responses.retrieve(made, stream=True, starting_after=11)
    numbers = [event.sequence_number async for event in rest]
    assert numbers == list(range(12, 12 + len(numbers)))
    for id in (made, waiting.id):
        answer = await after.responses.retrieve(id)
        assert answer.status in ("completed", "in_progress", "queued")
        await wait_until(partial(completed, second, id), 20, f"the end of {id}")
    assert (await after.responses.retrieve(made)).output_text.endswith("39 40")
    async with second.client() as client:
        fleet = (await client.get("/v1/instances")).json()["data"]
        job = (await client.get("/v1/jobs?limit=1")).json()["data"][0]
    assert sorted(one["ready"] for one in fleet) == [False, True]
    assert job["status"] == "succeeded"
    assert job["attempt"] == 2


# proves R5
async def test_a_server_that_was_paused_ends_itself_when_it_wakes(
    pair: tuple[Server, Server],
) -> None:
    first, second = pair
    async with first.sdk() as sdk:
        made = await sdk.responses.create(model="any", input="slow 0.2 60", background=True)
    await wait_until(lambda: attempted(first, made.id, 1), TAKEN_OVER_S, "the first attempt")
    first.process.send_signal(signal.SIGSTOP)
    await wait_until(lambda: attempted(second, made.id, 2), 2 * TAKEN_OVER_S, "a second attempt")
    first.process.send_signal(signal.SIGCONT)
    assert await asyncio.wait_for(first.process.wait(), 20) == 5
    assert "took it for dead" in first.log.read_text()
    async with second.sdk() as sdk:
        ended = await sdk.responses.cancel(made.id)
    assert ended.status == "cancelled"


# proves O2
async def test_a_rolling_restart_loses_nothing_that_was_acknowledged(
    pair: tuple[Server, Server], upstream: ScriptedUpstream, tmp_path: Path
) -> None:
    """Clients go to whoever answers, as a load balancer would have them."""
    options = ("--engine", postgres_url(tmp_path), "--upstream", upstream.url)
    asked: list[str] = []
    servers = list(pair)
    over = asyncio.Event()

    async def load() -> None:
        while not over.is_set():
            for server in list(servers):
                async with server.sdk() as sdk:
                    try:
                        made = await sdk.responses.create(
                            model="any", input="slow 0.05 6", background=True
                        )
                    except (openai.APIConnectionError, openai.InternalServerError):
                        continue  # it is down, or says that it is going: another is asked
                    asked.append(made.id)

    loading = [asyncio.create_task(load()) for _ in range(3)]
    async with AsyncExitStack() as stack:
        for place, old in enumerate(pair):
            await wait_until(partial(more_than, asked, 10 * (place + 1)), 20, "some load")
            assert await old.end() == 0
            again = await stack.enter_async_context(serving(tmp_path / "data", *options, **SHARED))
            servers[place] = again
        over.set()
        await asyncio.gather(*loading)
        for id in asked:
            await wait_until(partial(completed, servers[0], id), 20, f"the end of {id}")


# proves R13
async def test_operators_ask_any_process_of_this_machine_or_the_store_itself(
    pair: tuple[Server, Server], tmp_path: Path
) -> None:
    first, second = pair
    options = ("--data", str(tmp_path / "data"), "--engine", postgres_url(tmp_path))
    found = await perdure("status", *options, "--json")
    assert found.code == 0, found.err
    assert len(msgspec.json.decode(found.out)["instances"]) == 2
    await first.end(signal.SIGKILL)
    assert (await perdure("responses", "ls", *options)).code == 0
    await second.end()
    assert (await perdure("status", *options)).code == 3  # not running, and told all the same
    verified = await perdure("verify", *options)
    assert verified.code == 0, verified.err


async def completed(server: Server, id: str) -> bool:
    async with server.client() as client:
        answer = (await client.get(f"/v1/responses/{id}")).json()
    return bool(answer["status"] == "completed")


async def attempted(server: Server, id: str, number: int) -> bool:
    async with server.client() as client:
        jobs = (await client.get("/v1/jobs")).json()["data"]
    return any(job["subject"] == id and job["attempt"] >= number for job in jobs)


async def more_than(asked: list[str], number: int) -> bool:
    return len(asked) > number
