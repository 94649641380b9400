"""Limits of connections, bodies and rates, and who is admitted at all."""

from __future__ import annotations

import asyncio
import json

import httpx
import msgspec
import pytest

from perdure.frontends.http.limits import Bucket
from perdure.proving.waiting import wait_until
from tests.frontends.conftest import Serve

GET = b"GET /livez HTTP/1.1\r\nhost: localhost\r\n"


def told(answer: bytes) -> tuple[int, dict[str, str]]:
    """Status and error object of a raw answer."""
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split(b" ")[1]), json.loads(body)["error"]


def test_a_bucket_gives_its_burst_and_then_its_rate() -> None:
    bucket = Bucket(60, 3, now_s=100.0)
    assert [bucket.take(100.0) for _ in range(3)] == [0, 0, 0]
    assert bucket.take(100.0) == pytest.approx(1.0)
    assert bucket.take(100.5) == pytest.approx(0.5)
    assert bucket.take(101.0) == 0
    assert [bucket.take(1000.0) for _ in range(4)].count(0) == 3


# proves O6
async def test_a_body_over_the_limit_is_refused_before_it_is_kept(serve: Serve) -> None:
    server = await serve(limits__body_bytes_max=2048)
    refused = await server.client.post("/v1/conversations", content=b"x" * 4096)
    assert refused.status_code == 413
    assert refused.json()["error"]["code"] == "request_too_large"
    assert refused.headers["x-should-retry"] == "false"

    async def endless() -> object:
        for _ in range(8):
            yield b"x" * 1024

    chunked = await server.client.post("/v1/conversations", content=endless())
    assert chunked.status_code == 413
    announced = await server.raw(
        b"POST /v1/conversations HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
        b"content-length: 99999999999999999999\r\n\r\n"
    )
    assert told(announced)[0] in (400, 413)
    large = await server.client.post("/v1/conversations", content=b"x" * 100_000_000)
    assert large.status_code == 413, "an honest client gets to read why"
    assert (await server.client.post("/v1/conversations", json={})).status_code == 200


# proves O6
async def test_a_head_that_never_ends_is_hung_up_on(serve: Serve) -> None:
    server = await serve(limits__head_timeout_s=0.2)
    status, error = told(await server.raw(GET + b"x-slow: "))
    assert status == 408
    assert error["code"] == "request_timeout"
    for silent in (b"", b"\r\n"):
        assert await server.raw(silent) == b"", "who asks nothing is told nothing"
    again = b"GET /livez HTTP/1.1\r\nhost: localhost\r\n\r\nGET /"
    assert (await server.raw(again)).count(b"HTTP/1.1 ") == 2, "and so are later requests"
    assert server.service.connections.late == 4
    assert (await server.client.get("/livez")).status_code == 200


# proves O6
async def test_a_body_that_stops_arriving_is_hung_up_on(serve: Serve) -> None:
    server = await serve(limits__read_timeout_s=0.2)
    head = b"POST /v1/conversations HTTP/1.1\r\nhost: localhost\r\ncontent-length: 50\r\n\r\n"
    status, error = told(await server.raw(head + b'{"metadata"'))
    assert (status, error["code"]) == (408, "request_timeout")


# proves O6
async def test_heads_are_bounded_and_nonsense_is_told_so(serve: Serve) -> None:
    server = await serve(limits__head_bytes_max=2048)
    status, error = told(await server.raw(GET + b"x-long: " + b"y" * 4096))
    assert (status, error["code"]) == (431, "headers_too_large")
    status, error = told(await server.raw(b"\x16\x03\x01 not http\r\n\r\n"))
    assert (status, error["type"]) == (400, "invalid_request_error")
    assert server.service.connections.malformed == 1


# proves O6
async def test_a_body_that_comes_byte_by_byte_is_hung_up_on(serve: Serve) -> None:
    server = await serve(limits__read_timeout_s=0.4)
    _, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(
        b"POST /v1/conversations HTTP/1.1\r\nhost: localhost\r\ncontent-length: 5000\r\n\r\n"
    )

    async def hung_up() -> bool:
        writer.write(b" ")  # far more often than once in the timeout
        return server.service.connections.late == 1

    await wait_until(hung_up, 20, "the end of a body that hardly arrives")
    writer.close()


# proves O6
async def test_small_headers_are_counted(serve: Serve) -> None:
    server = await serve()
    status, error = told(await server.raw(GET + b"x:\r\n" * 1000))
    assert (status, error["code"]) == (431, "headers_too_large")


# proves O6
async def test_fields_behind_a_body_are_dropped(serve: Serve) -> None:
    server = await serve(environment={"PERDURE_API_KEY": "secret"})
    head = b"POST /v1/conversations HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
    chunked = b"transfer-encoding: chunked\r\n\r\n0\r\nauthorization: Bearer %b\r\n\r\n"
    key = b"authorization: Bearer secret\r\n"
    assert told(await server.raw(head + chunked % b"secret"))[0] == 401
    assert b" 200 OK" in await server.raw(head + key + chunked % b"wrong")


# proves O6
async def test_requests_far_ahead_of_their_answers_are_refused(serve: Serve) -> None:
    server = await serve()
    whole = GET + b"\r\n"
    few = whole * 7 + GET + b"connection: close\r\n\r\n"
    assert (await server.raw(few)).count(b"HTTP/1.1 200 OK") == 8
    status, error = told(await server.raw(whole * 40))
    assert (status, error["type"]) == (400, "invalid_request_error")
    assert server.service.connections.malformed == 1
    assert (await server.client.get("/livez")).status_code == 200


# proves R1
@pytest.mark.parametrize("path", ["/v1/responses", "/livez", "/nowhere", "/v1/responses/compact"])
async def test_a_websocket_is_refused_on_every_path(
    serve: Serve, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    server = await serve()
    asked = (
        f"GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: keep-alive, Upgrade\r\n"
        "upgrade: WebSocket\r\nsec-websocket-version: 13\r\n"
        "sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    ).encode()
    for sent in (asked, asked + b"\x81\x85frame", asked + asked):
        answer = await server.raw(sent)
        status, error = told(answer)
        assert (status, error["code"]) == (400, "websocket_not_supported")
        assert error["type"] == "invalid_request_error"
        assert b"\r\nconnection: close\r\n" in answer
        assert answer.count(b"HTTP/1.1 ") == 1
        server.application.log.flush()
        line = msgspec.json.decode(server.log.getvalue().splitlines()[-1])
        assert (line["status"], line["code"]) == (400, "websocket_not_supported")
        assert f"\r\nx-request-id: {line['request_id']}\r\n".encode() in answer
        assert path not in str(line)
    after = await server.raw(GET + b"\r\n" + asked)
    assert b"websocket_not_supported" in after
    assert server.service.connections.upgrades == 4
    assert caplog.records == [], "nothing of it is a fault of this server"
    assert (await server.client.get("/livez")).status_code == 200


# proves R1
async def test_another_upgrade_is_an_offer_that_is_left_be(serve: Serve) -> None:
    server = await serve(limits__idle_timeout_s=1, limits__head_timeout_s=1)
    offer = b"connection: upgrade, http2-settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABk\r\n"
    answer = await server.raw(GET + offer + b"\r\n")
    assert answer.startswith(b"HTTP/1.1 200 OK")
    assert answer.endswith(b'{"alive":true}')


# proves O6
async def test_connections_are_capped(serve: Serve) -> None:
    server = await serve(limits__connections_max=2)
    held = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(2)]
    status, error = told(await server.raw(GET + b"\r\n"))
    assert (status, error["code"]) == (503, "server_busy")
    for _, writer in held:
        writer.close()

    async def welcome() -> bool:
        return (await server.client.get("/livez")).status_code == 200

    await wait_until(welcome, 20, "a place for another connection")


# proves O6
async def test_a_key_has_a_rate(serve: Serve) -> None:
    server = await serve(limits__requests_per_minute=6, limits__burst=2)
    answers = [await server.client.get("/v1/models") for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    refused = answers[2]
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert 1 <= int(refused.headers["retry-after"]) <= 10
    assert 1 <= int(refused.headers["retry-after-ms"]) <= 10_000
    assert refused.headers["x-should-retry"] == "true"
    assert (await server.client.get("/readyz")).status_code == 200


# proves O6
async def test_unknown_keys_share_a_rate_and_take_nobody_elses(serve: Serve) -> None:
    server = await serve(
        environment={"PERDURE_API_KEY": "known"},
        limits__requests_per_minute=6,
        limits__burst=2,
    )

    async def ask(key: str | None) -> httpx.Response:
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        return await server.client.get("/v1/models", headers=headers)

    guesses = [await ask(key) for key in ("knowm", "first", None, "k", "knownn")]
    assert [guess.status_code for guess in guesses] == [401, 401, 429, 429, 429]
    assert guesses[4].headers["retry-after"]
    assert [(await ask("known")).status_code for _ in range(3)] == [200, 200, 429]


# proves O6
async def test_keys_are_needed_where_there_are_any(serve: Serve) -> None:
    server = await serve(environment={"PERDURE_API_KEY": "first,second"})
    for sent in (None, "Bearer third", "Bearer", "Basic first", "first", "Bearer first\xe9"):
        headers = {} if sent is None else {"authorization": sent.encode("latin-1")}
        refused = await server.client.get("/v1/models", headers=headers)
        assert refused.status_code == 401, sent
        assert refused.json()["error"]["code"] == "invalid_api_key"
    for key in ("first", "second"):
        headers = {"authorization": f"Bearer {key}"}
        assert (await server.client.get("/v1/models", headers=headers)).status_code == 200
    assert (await server.client.get("/metrics")).status_code == 401
    for open_path in ("/livez", "/readyz", "/openapi.json", "/"):
        assert (await server.client.get(open_path)).status_code == 200
    assert (
        await server.client.get("/v1/models", headers={"host": "example.org"})
    ).status_code == 401


# proves O6
async def test_pages_of_strangers_cannot_use_a_browser_here(serve: Serve) -> None:
    server = await serve()
    for headers in (
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": "http://localhost.evil.example:8420"},
        {"host": "evil.example"},
        {"host": "127.0.0.1.evil.example:8420"},
    ):
        refused = await server.client.post("/v1/conversations", headers=headers, content=b"{}")
        assert refused.status_code == 403, headers
    for headers in (
        {"origin": "http://localhost:3000"},
        {"origin": "http://[::1]:3000", "host": "[::1]:8420"},
        {"host": "LOCALHOST"},
    ):
        answer = await server.client.post("/v1/conversations", headers=headers, content=b"{}")
        assert answer.status_code == 200, headers
