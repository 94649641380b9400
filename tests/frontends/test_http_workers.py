"""The worker runtime over HTTP: the same answers as in process, and its events as they come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import msgspec

from perdure.proving.waiting import wait_until
from tests.frontends.conftest import Serve, Served

ONE = "/v1/runtimes/lab/workers/scout"
WITHIN_S = 60.0


async def made(server: Served, worker: str = "scout") -> Any:
    await server.json("POST", "/v1/runtimes", {"id": "lab", "config": {"model": "m"}})
    return await server.json("POST", "/v1/runtimes/lab/workers", {"id": worker})


async def code(server: Served, method: str, path: str, body: Any = None) -> tuple[int, str]:
    answer = await server.client.request(method, path, json=body)
    return answer.status_code, answer.json()["error"]["code"]


# proves W1, W5, W6, W7
async def test_a_client_drives_a_worker_to_its_end(serve: Serve) -> None:
    server = await serve()
    worker = await made(server)
    assert await made(server) == worker
    assert await code(server, "POST", "/v1/runtimes", {"id": "lab"}) == (409, "other_fingerprint")
    sent = {"content": "look", "submission_id": "s1"}
    accepted = await server.json("POST", f"{ONE}/input", sent)
    assert await server.json("POST", f"{ONE}/input", sent) == accepted
    run = {"generation": (await server.json("POST", f"{ONE}/start"))["generation"]}
    assert await code(server, "POST", f"{ONE}/start") == (409, "not_possible")
    assert await code(server, "POST", f"{ONE}/start", {"x": 1}) == (400, "unknown_parameter")
    (given,) = (await server.json("GET", f"{ONE}/inputs"))["data"]
    assert (given["submission_id"], given["content"]) == ("s1", "look")
    step = {"taken": 1, "state": {"at": 1}, "usage": {"tokens": 3}, "name": "turn"}
    state = await server.json("POST", f"{ONE}/progress", run | step)
    assert await server.json("GET", f"{ONE}/state") == state
    assert (await server.json("POST", f"{ONE}/release", run))["status"] == "ready"
    late = await server.client.post(f"{ONE}/progress", json=run)
    assert late.status_code == 409
    assert late.json()["error"]["code"] == "stale_generation"
    assert late.headers["x-should-retry"] == "false"
    stopped = await server.json("POST", f"{ONE}/stop", {"reason": "enough"})
    assert await server.json("POST", f"{ONE}/cancel") == stopped
    assert await server.json("GET", ONE) == stopped
    assert await code(server, "POST", f"{ONE}/input", sent | {"submission_id": "s2"}) == (
        409,
        "worker_ended",
    )
    view = await server.json("GET", f"{ONE}/overview")
    assert (view["status"], view["runs"], view["taken"]) == ("stopped", 1, 1)
    assert (await server.json("GET", f"{ONE}/usage"))["counted"] == {"tokens": 3}
    page = await server.json("GET", f"{ONE}/events?limit=2")
    rest = await server.json("GET", f"{ONE}/events?after={page['cursor']}")
    types = [one["type"] for one in page["data"] + rest["data"]]
    assert types == ["created", "accepted", "started", "progressed", "released", "stopped"]
    listed = await server.json("GET", "/v1/runtimes/lab/workers?status=stopped")
    assert (listed["data"], listed["damaged"]) == ([stopped], [])
    assert (await server.json("GET", "/v1/runtimes/lab/workers?status=ready"))["data"] == []
    assert [one["id"] for one in (await server.json("GET", "/v1/runtimes"))["data"]] == ["lab"]
    assert (await server.json("GET", "/v1/runtimes/lab/diagnostics"))["data"] == []


@asynccontextmanager
async def followed(
    server: Served, headers: dict[str, str] | None = None
) -> AsyncIterator[AsyncIterator[tuple[str, str, Any]]]:
    """Id, name and data of each event of a stream, comments left out."""

    async def told(answer: httpx.Response) -> AsyncIterator[tuple[str, str, Any]]:
        rest = ""
        async for chunk in answer.aiter_text():
            *blocks, rest = (rest + chunk).split("\n\n")
            for block in blocks:
                fields = dict(line.split(": ", 1) for line in block.split("\n"))
                if "id" in fields:
                    yield fields["id"], fields["event"], msgspec.json.decode(fields["data"])

    async with (
        asyncio.timeout(WITHIN_S),
        server.client.stream("GET", f"{ONE}/events?stream=true", headers=headers) as answer,
    ):
        assert answer.headers["content-type"].startswith("text/event-stream")
        yield told(answer)


# proves W10
async def test_a_stream_begins_with_all_there_is_and_resumes(serve: Serve) -> None:
    server = await serve()
    await made(server)
    await server.json("POST", f"{ONE}/input", {"content": 1})
    async with followed(server) as told:
        cursor, name, snapshot = await anext(told)
        assert (name, snapshot["overview"]["inputs"], snapshot["state"]["events"]) == (
            "snapshot",
            1,
            2,
        )
        for number in (2, 3):
            await server.json("POST", f"{ONE}/input", {"content": number})
        live = [await anext(told), await anext(told)]
    assert [(one["type"], one["number"]) for _, _, one in live] == [
        ("accepted", 3),
        ("accepted", 4),
    ]
    async with followed(server, {"last-event-id": cursor}) as told:
        assert [await anext(told), await anext(told)] == live
    async with followed(server, {"last-event-id": live[0][0]}) as told:
        assert await anext(told) == live[1]
    await made(server, "other")
    other = "/v1/runtimes/lab/workers/other/events?stream=true"
    refused = await server.client.get(other, headers={"last-event-id": cursor})
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "cursor_refused")
    nobody = await server.client.get("/v1/runtimes/lab/workers/nobody/events?stream=true")
    assert nobody.status_code == 404


# proves W10
async def test_a_reader_that_takes_nothing_delays_no_writer_and_resumes(serve: Serve) -> None:
    server = await serve(limits__stall_timeout_s=2.0)
    await made(server)
    run = {"generation": (await server.json("POST", f"{ONE}/start"))["generation"]}
    cursor = (await server.json("GET", f"{ONE}/events"))["cursor"]
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port, limit=1024)
    reader._transport.pause_reading()  # type: ignore[attr-defined]
    asked = f"GET {ONE}/events?stream=true&after={cursor} HTTP/1.1\r\nhost: localhost\r\n\r\n"
    writer.write(asked.encode())
    steps = 160
    for _ in range(steps):
        await server.json("POST", f"{ONE}/progress", run | {"data": "x" * 65_000})

    async def dropped() -> bool:
        return server.service.connections.stalled == 1

    await wait_until(dropped, WITHIN_S, "the drop of a reader that takes nothing")
    writer.close()
    async with followed(server, {"last-event-id": cursor}) as told:
        resumed = [(await anext(told))[2]["number"] for _ in range(steps)]
    assert resumed == list(range(3, 3 + steps))
