"""Chat completions: passed through byte for byte, cancelled with their client, stored nowhere."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from perdure.proving.upstream import ScriptedUpstream
from perdure.proving.waiting import wait_until
from perdure.services.breaker import FAILURES_MAX
from perdure.surfaces.idempotency import IDEMPOTENCY
from perdure.surfaces.items import ITEMS
from perdure.surfaces.responses import RESPONSES
from tests.frontends.conftest import Serve, Served

PATH = "/v1/chat/completions"


def asked(said: str, **fields: Any) -> dict[str, Any]:
    return {"model": "scripted", "messages": [{"role": "user", "content": said}]} | fields


@pytest.fixture
async def server(serve: Serve, upstream: ScriptedUpstream) -> Served:
    return await serve(upstream__url=upstream.url, limits__heartbeat_s=0.1)


# proves R12
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("said", ["count 3", "tool f {}", "whole one two", "fail after 2"])
async def test_an_answer_is_the_upstreams_own(
    server: Served, upstream: ScriptedUpstream, said: str, stream: bool
) -> None:
    body = asked(said, stream=stream, unknown={"kept": [1.50, None]})
    async with httpx.AsyncClient() as direct:
        wanted = await direct.post(f"{upstream.url}/chat/completions", json=body)
    got = await server.client.post(PATH, json=body)
    if wanted.status_code == 200:
        assert got.content == wanted.content
        assert got.headers["content-type"].split(";")[0] == wanted.headers["content-type"]
    else:
        assert got.status_code == 502
    first, *_, last = await upstream.received(2)
    assert first == last == body


# proves R12
async def test_nothing_of_it_is_stored(server: Served) -> None:
    headers = {"idempotency-key": "k"}
    for stream in (False, True):
        answer = await server.client.post(PATH, json=asked("hi", stream=stream), headers=headers)
        assert answer.status_code == 200
    engine = server.node.state.engine
    for records in (RESPONSES, ITEMS, IDEMPOTENCY):
        assert sum((await engine.count(records, ())).values()) == 0
    refused = await server.client.post(PATH, json=asked("hi", store=True))
    assert refused.status_code == 400
    error = refused.json()["error"]
    assert error["param"] == "store"
    assert "/v1/responses" in error["message"]


# proves R12
@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"model": "m"}, "messages"),
        ({"messages": []}, "model"),
        ({"model": "", "messages": []}, "model"),
        ({"model": "m", "messages": "hi"}, "messages"),
        ([], None),
    ],
)
async def test_what_cannot_be_sent_on_is_refused_by_name(
    server: Served, upstream: ScriptedUpstream, body: Any, param: str | None
) -> None:
    refused = await server.client.post(PATH, json=body)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == param
    assert await upstream.received() == []


# proves R12
@pytest.mark.parametrize(("said", "status"), [("fail 400", 400), ("fail 401", 502)])
async def test_what_an_upstream_refuses_is_mapped(server: Served, said: str, status: int) -> None:
    refused = await server.client.post(PATH, json=asked(said))
    assert refused.status_code == status
    assert "scripted" in refused.json()["error"]["message"]


# proves R12
async def test_a_stream_that_breaks_says_so(server: Served) -> None:
    answer = await server.client.post(PATH, json=asked("cut 3", stream=True))
    *_, last = answer.text.removesuffix("\n\n").split("\n\n")
    assert "broke off" in json.loads(last.removeprefix("data: "))["error"]["message"]


# proves R12
@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_takes_the_upstream_along(
    server: Served, upstream: ScriptedUpstream, stream: bool
) -> None:
    asking = asyncio.create_task(server.client.post(PATH, json=asked("hang 2", stream=stream)))
    await upstream.received(1)
    asking.cancel()
    assert await upstream.left_early(1) == 1


# proves R12, O2
async def test_a_stream_is_not_cut_in_silence_when_the_server_stops(
    server: Served, upstream: ScriptedUpstream
) -> None:
    asking = asyncio.create_task(server.client.post(PATH, json=asked("hang 2", stream=True)))
    await upstream.received(1)

    async def open() -> bool:
        return server.service.streams.stats.open > 0

    await wait_until(open, 10, "an open stream")
    await server.service.streams.end(0.2)
    text = (await asking).text
    assert '"content":" 2"' in text.replace(": ", ":")
    assert "the server is stopping" in text
    assert "resume" not in text
    assert await upstream.left_early(1) == 1


# proves R12
async def test_without_an_upstream_there_is_nothing_to_pass_to(serve: Serve) -> None:
    server = await serve()
    refused = await server.client.post(PATH, json=asked("hi"))
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "model_not_found")


# proves R12, O3
async def test_metrics_tell_each_upstream_by_its_name(
    serve: Serve, upstream: ScriptedUpstream
) -> None:
    one = {"name": "one", "url": upstream.url, "attempts_max": 1}
    server = await serve(upstreams=[one, one | {"name": "two"}])
    for said in ("hi", *["fail 503"] * FAILURES_MAX, "hi"):
        await server.client.post(PATH, json=asked(said, model="one/scripted"))
    lines = (await server.client.get("/metrics")).text.splitlines()
    for line in (
        'perdure_upstream_requests_total{upstream="one"} 6.0',
        'perdure_upstream_failures_total{upstream="one"} 5.0',
        'perdure_upstream_circuit_opened_total{upstream="one"} 1.0',
        'perdure_upstream_circuit_open{upstream="one"} 1.0',
        'perdure_upstream_circuit_open{upstream="two"} 0.0',
        'perdure_upstream_streaming{upstream="one"} 0.0',
    ):
        assert line in lines
    refused = await server.client.post(PATH, json=asked("hi", model="one/scripted"))
    assert refused.status_code == 503
    assert int(refused.headers["retry-after-ms"]) > 0
