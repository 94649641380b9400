"""Clients that mean harm, against the real server: what they make it hold is bounded, they are
refused or dropped by name, and everybody else is served as if they were not there.

No time is asserted here; `python -m bench --only abuse` measures.
"""

from __future__ import annotations

import asyncio
import re
import resource
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from perdure.proving.upstream import ScriptedUpstream
from perdure.proving.waiting import wait_until
from tests.e2e.http_server import Server, serving

MB = 1_000_000
GET = b"GET /livez HTTP/1.1\r\nhost: localhost\r\n"
POST = b"POST /v1/conversations HTTP/1.1\r\nhost: localhost\r\ncontent-length: 9000000\r\n\r\n"


@pytest.fixture
async def upstream() -> AsyncIterator[ScriptedUpstream]:
    async with ScriptedUpstream() as server:
        yield server


def resident_bytes(server: Server) -> int:
    status = Path(f"/proc/{server.pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert found
    return int(found[1]) * 1024


async def counted(client: httpx.AsyncClient, name: str) -> int:
    """A figure of `/metrics`."""
    found = re.search(rf"^{name} (\S+)$", (await client.get("/metrics")).text, re.MULTILINE)
    assert found, name
    return int(float(found[1]))


def reaching(client: httpx.AsyncClient, name: str, least: int) -> Callable[[], Awaitable[bool]]:
    async def reached() -> bool:
        return await counted(client, name) >= least

    return reached


async def works(client: httpx.AsyncClient) -> None:
    """Somebody else's durable write and read."""
    made = await client.post("/v1/conversations", json={})
    assert made.status_code == 200
    assert (await client.get(f"/v1/conversations/{made.json()['id']}")).status_code == 200


@asynccontextmanager
async def connected(
    server: Server, count: int, sent: bytes
) -> AsyncIterator[list[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]:
    """So many connections, each of which has sent something."""
    url = httpx.URL(server.url)
    opened = []
    try:
        for _ in range(count):
            reader, writer = await asyncio.open_connection(url.host, url.port)
            opened.append((reader, writer))
            writer.write(sent)
        yield opened
    finally:
        for _, writer in opened:
            writer.close()


async def streaming(client: httpx.AsyncClient) -> AsyncIterator[str]:
    """The id of a response that is being generated up to its gate; then what is left of it."""
    asked = {"model": "scripted", "input": "gate on 3 9", "stream": True}
    async with client.stream("POST", "/v1/responses", json=asked) as stream:
        text = ""
        async for part in stream.aiter_text():
            text += part
            found = re.search(r'"id":"(resp_\w+)".*output_text.delta', text, re.DOTALL)
            if found:
                yield found[1]
                break


# proves O6, O7
async def test_large_bodies_are_refused_or_streamed_and_never_held(tmp_path: Path) -> None:
    async with serving(tmp_path / "data") as server, server.client() as client:
        await works(client)
        before = resident_bytes(server)
        announced = await client.post("/v1/conversations", content=b"x" * 100 * MB)
        assert announced.status_code == 413

        async def parts() -> AsyncIterator[bytes]:
            for _ in range(1600):
                yield b"x" * 65536

        unannounced = await client.post("/v1/conversations", content=parts())
        assert unannounced.status_code == 413
        assert resident_bytes(server) - before < 10 * MB
        form = {"data": {"purpose": "assistants"}, "files": {"file": ("a.txt", b"y" * 100 * MB)}}
        uploaded = await client.post("/v1/files", **form)
        assert uploaded.json()["bytes"] == 100 * MB
        assert resident_bytes(server) - before < 10 * MB
        await works(client)


# proves O6, O7
@pytest.mark.parametrize("sent", [GET + b"x-slow: ", POST], ids=["in the head", "in the body"])
async def test_slow_sockets_are_cut_and_nobody_else_notices(tmp_path: Path, sent: bytes) -> None:
    limits = {"PERDURE_LIMITS_HEAD_TIMEOUT_S": "2", "PERDURE_LIMITS_READ_TIMEOUT_S": "2"}
    async with serving(tmp_path / "data", **limits) as server, server.client() as client:
        await works(client)
        before = resident_bytes(server)
        async with connected(server, 500, sent) as slow:

            async def all_cut() -> bool:
                for _, writer in slow:
                    if not writer.is_closing():
                        writer.write(b"x")
                await works(client)
                return all(reader.at_eof() or reader.exception() for reader, _ in slow)

            await wait_until(all_cut, 60, "the end of every slow socket")
            answers = [await reader.read() for reader, _ in slow if reader.exception() is None]
        assert await counted(client, "perdure_connections_late_total") == 500
        assert all(b"request_timeout" in answer for answer in answers)
        assert resident_bytes(server) - before < 500 * 65536


# proves O7
async def test_every_one_of_many_idle_streams_gets_its_events(
    tmp_path: Path, upstream: ScriptedUpstream
) -> None:
    count = 600
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert soft > count + 200, f"this opens {count} connections, and may open {soft} files"
    settings = {"PERDURE_LIMITS_HEARTBEAT_S": "1"}
    async with (
        serving(tmp_path / "data", "--upstream", upstream.url, **settings) as server,
        server.client() as client,
    ):
        async for response_id in streaming(client):
            before = resident_bytes(server)
            get = f"GET /v1/responses/{response_id}?stream=true&starting_after=3 HTTP/1.1\r\n"
            async with connected(server, count, get.encode() + b"host: localhost\r\n\r\n") as idle:
                for reader, _ in idle:
                    await reader.readuntil(b": still here\n\n")
                assert resident_bytes(server) - before < count * 48 * 1024
                await works(client)
                await upstream.open("on")
                for reader, _ in idle:
                    rest = await asyncio.wait_for(reader.readuntil(b"[DONE]"), 60)
                    assert b'"type":"response.completed"' in rest
        await works(client)


# proves O6, O7
async def test_readers_that_never_read_are_dropped_and_held_for_in_bounds(
    tmp_path: Path, upstream: ScriptedUpstream
) -> None:
    settings = {"PERDURE_LIMITS_STALL_TIMEOUT_S": "2"}
    async with (
        serving(tmp_path / "data", "--upstream", upstream.url, **settings) as server,
        server.client() as client,
    ):
        asked = {"model": "scripted", "input": "count 3", "instructions": "x" * 3 * MB}
        response_id = (await client.post("/v1/responses", json=asked)).json()["id"]
        path = f"/v1/responses/{response_id}?stream=true"
        whole = (await client.get(path)).text
        before = resident_bytes(server)
        held = []
        for _ in range(50):
            reader = socket.socket()
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            reader.connect((httpx.URL(server.url).host, httpx.URL(server.url).port))
            reader.sendall(f"GET {path} HTTP/1.1\r\nhost: localhost\r\n\r\n".encode())
            held.append(reader)
        dropped = reaching(client, "perdure_connections_stalled_total", 50)
        await wait_until(dropped, 60, "the drop of every reader that takes nothing")
        most = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{server.pid}/status").read_text())
        assert most
        assert int(most[1]) * 1024 - before < 60 * MB, "3 MB for each would be 150 MB"
        for reader in held:
            reader.close()
        rest = (await client.get(f"{path}&starting_after=1")).text
        assert rest
        assert whole.endswith(rest), "they resume where they were"


# proves O6
async def test_at_the_limit_of_files_connections_are_refused_by_name(tmp_path: Path) -> None:
    few = ("prlimit", "--nofile=200:200", "--")
    async with serving(tmp_path / "data", around=few) as server, server.client() as client:
        await works(client)
        async with connected(server, 300, b"") as held:
            full = reaching(client, "perdure_connections_over_limit_total", 200)
            await wait_until(full, 20, "the refusal of what is too much")
            for reader, _ in held[100:]:
                assert b"server_busy" in await asyncio.wait_for(reader.read(), 20)
            file = {"files": {"file": ("a.txt", b"y" * MB)}, "data": {"purpose": "assistants"}}
            assert (await client.post("/v1/files", **file)).status_code == 200
            await works(client)
        async with server.client() as later:
            await works(later)
        assert await server.end() == 0
        refusals = [line for line in server.log.read_text().splitlines() if "server_busy" in line]
        assert len(refusals) <= 201, "a line each and no more"
        assert "Traceback" not in server.log.read_text()
