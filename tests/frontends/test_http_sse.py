"""Streams: their form, heartbeats, resumption, and every way they end."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from perdure.core.errors import Damaged
from perdure.proving.upstream import ScriptedUpstream
from perdure.proving.waiting import wait_until
from tests.frontends.conftest import Serve, Served

DONE = "data: [DONE]\n\n"


def events_of(text: str) -> list[dict[str, Any]]:
    """The events of a stream, after checking its form."""
    found = []
    assert text.endswith("\n\n")
    for block in text.removesuffix(DONE).removesuffix("\n\n").split("\n\n"):
        if block.startswith(":"):
            continue
        event, data = block.split("\n")
        body = json.loads(data.removeprefix("data: "))
        assert event == f"event: {body['type']}"
        found.append(body)
    return found


def asked(said: str, **fields: Any) -> dict[str, Any]:
    return {"model": "scripted", "input": said, "stream": True} | fields


async def begun(parts: AsyncIterator[str], *, holding: str) -> str:
    """What has come of a stream once it holds a text."""
    text = ""
    async for part in parts:
        text += part
        if holding in text:
            return text
    raise AssertionError(f"the stream ended without {holding!r}: {text}")


@pytest.fixture
async def server(serve: Serve, upstream: ScriptedUpstream) -> Served:
    return await serve(upstream__url=upstream.url, limits__heartbeat_s=0.1)


# proves R4
async def test_a_stream_can_be_read_again_from_anywhere(server: Served) -> None:
    first = await server.client.post("/v1/responses", json=asked("count 5"))
    assert first.headers["content-type"].startswith("text/event-stream")
    events = events_of(first.text)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert events[0]["type"] == "response.created"
    assert events[-1]["type"] == "response.completed"
    assert first.text.count(DONE) == 1
    assert first.text.endswith(DONE)
    path = f"/v1/responses/{events[0]['response']['id']}"
    for after in (None, 0, 3, len(events) - 1, len(events) + 5):
        query = "?stream=true" + ("" if after is None else f"&starting_after={after}")
        again = await server.client.get(path + query)
        assert again.status_code == 200
        assert again.text.endswith(DONE)
        rest = [] if again.text == DONE else events_of(again.text)
        assert rest == events[0 if after is None else after + 1 :]
    stored = await server.client.get(path)
    assert stored.json() == events[-1]["response"]


async def test_a_sign_of_life_does_not_come_after_the_end(
    serve: Serve, upstream: ScriptedUpstream
) -> None:
    server = await serve(upstream__url=upstream.url, limits__heartbeat_s=0.0002)
    first = await server.client.post("/v1/responses", json=asked("count 1"))
    path = f"/v1/responses/{events_of(first.text)[0]['response']['id']}?stream=true"
    for _ in range(200):  # on one connection, which a fault of the server's would end
        again = await server.client.get(path)
        assert again.text.endswith(DONE)


# proves R4
async def test_a_quiet_stream_has_heartbeats_and_its_client_may_leave(
    server: Served, upstream: ScriptedUpstream
) -> None:
    async with server.client.stream("POST", "/v1/responses", json=asked("hang 2")) as stream:
        text = await begun(stream.aiter_text(), holding=": still here\n\n")
        response_id = events_of(text[: text.rindex("\n\n") + 2])[0]["response"]["id"]
        assert server.service.streams.stats.open == 1

    async def closed() -> bool:
        return server.service.streams.stats.open == 0

    await wait_until(closed, 20, "the stream's end")
    assert server.service.streams.stats.disconnected == 1
    stored = await server.client.get(f"/v1/responses/{response_id}")
    assert stored.json()["status"] == "in_progress", "a stored response goes on without its client"
    assert await upstream.left_early() == 0


# proves R4
@pytest.mark.parametrize("stream", [True, False])
async def test_an_unstored_response_ends_with_its_client(
    server: Served, upstream: ScriptedUpstream, stream: bool
) -> None:
    body = asked("hang 2", store=False, stream=stream)
    asking = asyncio.create_task(server.client.post("/v1/responses", json=body))
    await upstream.received(1)
    asking.cancel()
    assert await upstream.left_early(1) == 1


async def test_the_operator_may_let_stored_responses_end_with_their_client(
    serve: Serve, upstream: ScriptedUpstream
) -> None:
    server = await serve(upstream__url=upstream.url, on_disconnect="cancel")
    async with server.client.stream("POST", "/v1/responses", json=asked("hang 2")) as stream:
        text = await begun(stream.aiter_text(), holding="response.output_text.delta")
    assert await upstream.left_early(1) == 1
    response_id = events_of(text[: text.index("\n\n") + 2])[0]["response"]["id"]

    async def ended() -> bool:
        stored = await server.client.get(f"/v1/responses/{response_id}")
        return bool(stored.json()["status"] != "in_progress")

    await wait_until(ended, 5, "the end of a response whose client left")
    stored = await server.client.get(f"/v1/responses/{response_id}")
    assert stored.json()["status"] != "completed"


# proves O2
async def test_a_stop_ends_streams_in_good_form_and_they_resume(
    server: Served, upstream: ScriptedUpstream
) -> None:
    async with server.client.stream("POST", "/v1/responses", json=asked("gate on 3 20")) as stream:
        parts = stream.aiter_text()
        text = await begun(parts, holding="response.output_text.delta")
        await server.service.streams.end(0)
        text += "".join([part async for part in parts])
    seen = events_of(text)
    assert "the server is stopping" in text
    assert seen[-1]["type"] != "response.completed"
    assert server.service.streams.stats.stopped == 1
    await upstream.open("on")
    started = await server.service.stored.follow("default", seen[0]["response"]["id"])

    async def stored(after: int) -> list[dict[str, Any]]:
        groups = server.node.gateway.events(started, after=after)
        return [msgspec.json.decode(event) async for group in groups for event in group]

    rest = await stored(seen[-1]["sequence_number"])
    assert seen + rest == await stored(-1)
    assert rest[-1]["type"] == "response.completed"


# proves R4
async def test_nothing_is_said_in_the_middle_of_a_large_event(
    serve: Serve, upstream: ScriptedUpstream
) -> None:
    server = await serve(upstream__url=upstream.url, limits__heartbeat_s=0.01)
    large = asked("count 3", instructions="x" * 3_000_000, stream=False)
    made = await server.json("POST", "/v1/responses", large)
    path = f"/v1/responses/{made['id']}?stream=true"
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port, limit=4096)
    get = f"GET {path} HTTP/1.0\r\nhost: localhost\r\n\r\n"
    writer.write(get.encode())
    await reader.readuntil(b"\r\n\r\n")
    taken = []
    while part := await reader.read(4096):
        taken.append(part)
    writer.close()
    chunked = b"".join(taken)
    text = b""
    while chunked:
        size, _, chunked = chunked.partition(b"\r\n")
        text += chunked[: int(size, 16)]
        chunked = chunked[int(size, 16) + 2 :]
    events = events_of(text.decode())
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert events[-1]["response"]["instructions"] == large["instructions"]


# proves O2
async def test_a_stop_in_the_middle_of_a_large_event_says_nothing_into_it(
    serve: Serve, upstream: ScriptedUpstream
) -> None:
    server = await serve(upstream__url=upstream.url)
    large = asked("count 3", instructions="x" * 8_000_000, stream=False)
    made = await server.json("POST", "/v1/responses", large)
    path = f"/v1/responses/{made['id']}?stream=true"
    async with server.client.stream("GET", path) as stream:
        parts = stream.aiter_text()
        text = await begun(parts, holding="response.created")
        await server.service.streams.end(0)
        text += "".join([part async for part in parts])
    assert server.service.streams.stats.stopped == 1
    assert "the server is stopping" not in text


# proves O6
async def test_a_client_that_asked_for_more_behind_a_stream_can_leave_it(server: Served) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    body = json.dumps(asked("hang 2")).encode()
    head = b"POST /v1/responses HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n"
    writer.write(head % len(body) + body + b"GET /livez HTTP/1.1\r\nhost: localhost\r\n\r\n")
    await asyncio.wait_for(reader.readuntil(b"response.created"), 20)
    writer.close()

    async def closed() -> bool:
        return server.service.streams.stats.open == 0

    await wait_until(closed, 20, "the stream's end")


# proves R4
async def test_a_reader_that_takes_nothing_is_dropped_and_delays_nobody(
    serve: Serve, upstream: ScriptedUpstream
) -> None:
    server = await serve(upstream__url=upstream.url, limits__stall_timeout_s=2)
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port, limit=1024)
    reader._transport.pause_reading()  # type: ignore[attr-defined]
    body = json.dumps(asked("long 6000000")).encode()
    writer.write(
        b"POST /v1/responses HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n" % len(body)
    )
    writer.write(body)

    async def dropped() -> bool:
        return server.service.connections.stalled == 1

    await wait_until(dropped, 20, "the drop of a reader that takes nothing")
    writer.close()
    assert (await server.client.get("/livez")).status_code == 200


async def test_damage_in_the_middle_of_a_stream_is_an_error_event(
    server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = events_of((await server.client.post("/v1/responses", json=asked("count 3"))).text)
    path = f"/v1/responses/{events[0]['response']['id']}?stream=true"
    engine = server.node.state.engine
    read = engine.read

    async def damaged(log: Any, stream: Any, *, after: int = 0, **more: Any) -> Any:
        if after >= 4:
            raise Damaged("response_events entry 5", "does not match its checksum")
        return await read(log, stream, after=after, **{**more, "limit": 4})

    monkeypatch.setattr(engine, "read", damaged)
    told = events_of((await server.client.get(path)).text)
    assert told[:-1] == events[:4]
    assert told[-1]["type"] == "error"
    assert told[-1]["code"] == "damaged"
    assert told[-1]["sequence_number"] == 3, "resuming after it misses nothing"
