"""`perdure serve --workers`: several real servers behind one port, killed, replaced and stopped,
and a parent that is killed itself."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI

from perdure.proving.subjects import postgres_url
from perdure.proving.upstream import ScriptedUpstream
from perdure.proving.waiting import wait_until
from tests.e2e.http_server import Server, perdure, serving
from tests.e2e.test_fleet import SHARED, TAKEN_OVER_S, attempted, completed

WITHIN_S = 60.0


@pytest.fixture
async def upstream() -> AsyncIterator[ScriptedUpstream]:
    async with ScriptedUpstream() as server:
        yield server


@pytest.fixture
async def crew(upstream: ScriptedUpstream, tmp_path: Path) -> AsyncIterator[Server]:
    options = ("--engine", postgres_url(tmp_path), "--upstream", upstream.url, "--workers", "2")
    async with serving(tmp_path / "data", *options, **SHARED) as server:
        yield server


async def living(server: Server) -> dict[str, int]:
    """The processes that serve, by their boots."""
    async with server.client() as client:
        fleet = (await client.get("/v1/instances")).json()["data"]
    return {one["boot_id"]: one["pid"] for one in fleet if one["ready"]}


async def replaced(server: Server, before: set[int]) -> bool:
    """Whether two serve, and none of those before."""
    pids = set((await living(server)).values())
    return len(pids) == 2 and not pids & before


class Caller:
    """Asks again and again, each time over a new connection. Whoever is killed may have had it; but
    the port is open all the while."""

    def __init__(self) -> None:
        self.answered = 0
        self.cut = 0
        self.asked: list[str] = []
        self._over = False

    async def call(self, server: Server, **body: Any) -> None:
        while not self._over:
            async with server.client() as client:
                try:
                    answer = await client.post("/v1/responses", json={"model": "any", **body})
                except (httpx.ReadError, httpx.RemoteProtocolError):
                    self.cut += 1
                    continue
            if answer.status_code == 503:  # it stops, and clients try again
                self.cut += 1
                continue
            assert answer.status_code == 200, answer.text
            self.answered += 1
            self.asked.append(answer.json()["id"])

    @asynccontextmanager
    async def calling(self, server: Server, **body: Any) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(self.call(server, **body)) for _ in range(2)]
        yield
        self._over = True
        await asyncio.gather(*tasks)

    async def more(self, number: int) -> bool:
        return self.answered >= number


# proves R5, C15
async def test_a_worker_that_is_killed_is_replaced_and_its_work_goes_on(crew: Server) -> None:
    before = await living(crew)
    assert len(set(before.values()) - {crew.pid}) == 2
    async with crew.sdk() as sdk:
        made = await sdk.responses.create(model="any", input="slow 0.1 60", background=True)
    await wait_until(lambda: attempted(crew, made.id, 1), WITHIN_S, "the first attempt")
    async with crew.client() as client:
        (job,) = (await client.get("/v1/jobs")).json()["data"]
    caller = Caller()
    async with caller.calling(crew, input="echo me"):
        os.kill(before[job["lease"]["owner"]], signal.SIGKILL)
        # Six seconds without a sign of life, or a successor in its place, whichever is first.
        await wait_until(lambda: attempted(crew, made.id, 2), 2 * TAKEN_OVER_S, "a second attempt")
        await wait_until(partial(caller.more, caller.answered + 20), WITHIN_S, "answers")
    assert caller.cut <= 2, "each caller lost what it had asked of the one that was killed"
    await wait_until(partial(two, crew), WITHIN_S, "a worker in its place")
    await wait_until(lambda: completed(crew, made.id), WITHIN_S, "the end of it")
    assert "a worker ended, and is started again" in crew.log.read_text()


async def two(server: Server) -> bool:
    return len(await living(server)) == 2


class Application:
    """What people run over the official SDK, as it comes: it sends again what it is told to, and
    every other failure is the test's. `made` is what was acknowledged, with what has to be read."""

    def __init__(self, sdk: AsyncOpenAI) -> None:
        self.made: dict[str, str] = {}
        self.files: dict[str, bytes] = {}
        self._sdk = sdk
        self._over = False
        self._turns: dict[str, int] = {}

    async def more(self, turns: int) -> bool:
        return min(self._turns.values()) >= turns

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        kinds = (self._waits, self._follows, self._chats, self._leaves, self._uploads)
        self._turns = {kind.__name__: 0 for kind in kinds}
        async with asyncio.TaskGroup() as group:
            for kind in kinds:
                group.create_task(self._repeat(kind))
            yield
            self._over = True

    async def _repeat(self, kind: Callable[[str], Awaitable[None]]) -> None:
        while not self._over:
            self._turns[kind.__name__] += 1
            await kind(f"{kind.__name__[1:]} {self._turns[kind.__name__]}")

    async def _ask(self, words: str, **more: Any) -> Any:
        return await self._sdk.responses.create(model="any", input=words, **more)

    async def _waits(self, name: str) -> None:
        answer = await self._ask("slow 0.05 4", metadata={"name": name})
        assert answer.output_text == "1 2 3 4"
        self.made[answer.id] = answer.output_text

    async def _follows(self, name: str) -> None:
        events = [event async for event in await self._ask("slow 0.1 6", stream=True)]
        assert [event.sequence_number for event in events] == list(range(len(events)))
        assert events[-1].response.output_text == "1 2 3 4 5 6"
        self.made[events[-1].response.id] = "1 2 3 4 5 6"

    async def _chats(self, name: str) -> None:
        first = await self._ask(f"echo {name}")
        second = await self._ask("echo and on", previous_response_id=first.id)
        self.made |= {first.id: first.output_text, second.id: "and on"}

    async def _leaves(self, name: str) -> None:
        self.made[(await self._ask("slow 0.1 4", background=True)).id] = "1 2 3 4"

    async def _uploads(self, name: str) -> None:
        kept = await self._sdk.files.create(file=("a.txt", name.encode()), purpose="user_data")
        self.files[kept.id] = name.encode()


async def reads(sdk: AsyncOpenAI, id: str, words: str) -> bool:
    answer = await sdk.responses.retrieve(id)
    return answer.status == "completed" and answer.output_text == words


async def stored(server: Server) -> set[str]:
    """The ids of all responses there are."""
    found: list[str] = []
    page: dict[str, Any] = {"has_more": True}
    async with server.client() as client:
        while page["has_more"]:
            after = {"after": found[-1]} if found else {}
            page = (await client.get("/v1/responses", params={"limit": 100, **after})).json()
            found += [one["id"] for one in page["data"]]
    return set(found)


# proves O2
async def test_a_rolling_restart_fails_no_request_of_the_official_client(crew: Server) -> None:
    """Each process drains and is followed by another, and every request has one effect."""
    before = set((await living(crew)).values())
    async with crew.sdk(max_retries=openai.DEFAULT_MAX_RETRIES) as sdk:
        application = Application(sdk)
        async with application.running():
            await wait_until(partial(application.more, 2), WITHIN_S, "some load")
            crew.process.send_signal(signal.SIGHUP)
            await wait_until(partial(replaced, crew, before), WITHIN_S, "others in their places")
            await wait_until(partial(application.more, 6), WITHIN_S, "more load")
        for id, words in application.made.items():
            await wait_until(partial(reads, sdk, id, words), WITHIN_S, f"the end of {id}")
        for id, content in application.files.items():
            assert (await sdk.files.content(id)).content == content
        assert {file.id async for file in sdk.files.list()} == application.files.keys()
    assert await stored(crew) == application.made.keys()
    after = set((await living(crew)).values())
    assert await crew.end() == 0
    assert not any(map(alive, before | after))


# proves C15
async def test_a_parent_that_is_killed_leaves_nothing_running(crew: Server) -> None:
    workers = set((await living(crew)).values())
    await crew.end(signal.SIGKILL)

    async def over() -> bool:
        return not any(map(alive, workers))

    await wait_until(over, WITHIN_S, "the end of its workers")
    with pytest.raises(httpx.ConnectError):
        await living(crew)


# proves C2
async def test_workers_without_a_store_to_share_are_refused(tmp_path: Path) -> None:
    engine = postgres_url(tmp_path)
    elsewhere = engine.replace("/postgres?", "/nowhere?")
    for code, said, options, environment in (
        (2, "workers = 3 are processes that share a store", (), SHARED),
        (2, 'profile = "shared"', ("--engine", engine), {}),
        (3, "Create it, or correct the URL", ("--engine", elsewhere), SHARED),
    ):
        ended = await perdure("serve", "--workers", "3", "--port", "0", *options, **environment)
        assert (ended.code, said in ended.err) == (code, True), ended.err


def alive(pid: int) -> bool:
    """Whether a process runs: one that has ended and that nobody has asked about does not."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rsplit(")", 1)[1].split()[0] != "Z"
