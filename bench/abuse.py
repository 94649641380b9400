"""Abuse: what a normal client and the server's memory feel of clients that mean harm.

A normal client makes a conversation and reads it, again and again, alone and then beside each kind
of abuse. The abusers run in this process too, so what they cost it is in the figures.
"""

from __future__ import annotations

import asyncio
import re
import resource
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import uvloop

from bench.load import percentile
from bench.report import Goal, Section, table
from bench.servers import Server, free_port, perdure
from bench.turns import Sample, of, scratch, take_turns
from perdure.proving.upstream import ScriptedUpstream

STREAMS = 10_000
SLOW_SOCKETS = 500
MEASURED_S = 3.0
_SPARE_FILES = 1_000
_OPENED_AT_ONCE = 64
_BODY_BYTES = 100_000_000
_MIB = 2**20

ALONE, BODIES, HEADS, IDLE = "nobody", "100 MB bodies", "500 slow sockets", "idle streams"
_ASKED = b'{"model":"scripted","stream":true,"input":"gate on 3 9"}'
_RESPONSE = re.compile(rb'"id":"(resp_\w+)"')

Abuse = Callable[[int, ScriptedUpstream], AbstractAsyncContextManager[None]]


def measure(turns: int) -> Section:
    """Everything, in one run."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    streams = min(STREAMS, hard - _SPARE_FILES)
    samples = take_turns((ALONE, BODIES, HEADS, IDLE), turns, lambda who: _take(who, streams))

    def at_most(who: str, field: str, what: str, floor: float, unit: str) -> Goal:
        return Goal("O7", what, of(samples, who, who, field), floor, True, ".1f", unit)

    goals = [
        at_most(BODIES, "grown_mib", f"memory while {BODIES} come", 10, "MiB"),
        at_most(HEADS, "p99_ms", f"a normal client's p99 beside {HEADS}", 50, "ms"),
        at_most(IDLE, "p99_ms", f"a normal client's p99 beside {streams} idle streams", 50, "ms"),
    ]
    heads = ("a normal client beside", "p50, ms", "p99, ms", "memory grew, MiB")
    fields = ("p50_ms", "p99_ms", "grown_mib")
    rows = [
        (
            f"{streams} {who}" if who == IDLE else who,
            *(f"{of(samples, who, who, field):.1f}" for field in fields),
        )
        for who in (ALONE, BODIES, HEADS, IDLE)
    ]
    text = f"{table(heads, rows)}\n\nThis process may open {hard} files: {streams} streams."
    return Section("Abuse: one process, its default limits", goals, text)


def _take(who: str, streams: int) -> dict[str, Sample]:
    with scratch() as name:
        return {who: uvloop.run(_beside(who, streams, Path(name)))}


async def _beside(who: str, streams: int, directory: Path) -> Sample:
    abuses: dict[str, Abuse] = {
        ALONE: _nothing,
        BODIES: _bodies,
        HEADS: _slow_sockets,
        IDLE: lambda port, upstream: _idle_streams(port, upstream, streams),
    }
    async with ScriptedUpstream() as upstream:
        port = free_port()
        command = perdure(port, directory / "data", "--upstream", upstream.url)
        with Server(command, port, directory / "log") as server:
            server.wait_ready()
            await _normal(port, 0.5)
            before_bytes = server.resident_bytes()
            async with abuses[who](port, upstream):
                latencies = sorted(await _normal(port, MEASURED_S))
                grown_bytes = server.resident_bytes() - before_bytes
    return {
        "p50_ms": percentile(latencies, 0.5) * 1e3,
        "p99_ms": percentile(latencies, 0.99) * 1e3,
        "grown_mib": grown_bytes / _MIB,
    }


async def _normal(port: int, duration_s: float) -> list[float]:
    """Seconds that each durable write took, one after another on one connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    took = []
    end_s = time.perf_counter() + duration_s
    while (began_s := time.perf_counter()) < end_s:
        writer.write(_post("/v1/conversations", b"{}"))
        head = await reader.readuntil(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(f"a normal client was answered {head!r}")
        found = re.search(rb"content-length: (\d+)", head)
        await reader.readexactly(int(found[1]) if found else 0)
        took.append(time.perf_counter() - began_s)
    writer.close()
    return took


def _post(path: str, body: bytes, size_bytes: int | None = None) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-length: "
    return f"{head}{len(body) if size_bytes is None else size_bytes}\r\n\r\n".encode() + body


@asynccontextmanager
async def _meanwhile(abuse: Callable[[], Coroutine[None, None, None]]) -> AsyncIterator[None]:
    task = asyncio.create_task(abuse())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])
    if not task.cancelled():
        task.result()


@asynccontextmanager
async def _nothing(port: int, upstream: ScriptedUpstream) -> AsyncIterator[None]:
    yield


@asynccontextmanager
async def _bodies(port: int, upstream: ScriptedUpstream) -> AsyncIterator[None]:
    """One 100 MB body after another, without end."""

    async def send() -> None:
        part = b"x" * 65_536
        while True:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(_post("/v1/conversations", b"", _BODY_BYTES))
            for _ in range(_BODY_BYTES // len(part)):
                writer.write(part)
                await writer.drain()
            if not (await reader.readuntil(b"\r\n")).startswith(b"HTTP/1.1 413"):
                raise RuntimeError("a body over the limit was not refused")
            writer.close()

    async with _meanwhile(send):
        yield


@asynccontextmanager
async def _slow_sockets(port: int, upstream: ScriptedUpstream) -> AsyncIterator[None]:
    """Sockets that send a byte a second, half of them in their head."""
    starts = (b"GET /livez HTTP/1.1\r\nx: ", _post("/v1/conversations", b"", 1_000_000))
    writers = []
    for n in range(SLOW_SOCKETS):
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(starts[n % 2])
        writers.append(writer)

    async def trickle() -> None:
        while True:
            await asyncio.sleep(1)
            for writer in writers:
                writer.write(b"x")

    async with _meanwhile(trickle):
        yield
    for writer in writers:
        writer.close()


@asynccontextmanager
async def _idle_streams(port: int, upstream: ScriptedUpstream, count: int) -> AsyncIterator[None]:
    """Followers of one response that says nothing; each must get its end."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(_post("/v1/responses", _ASKED))
    created = await reader.readuntil(b"output_text.delta")
    found = _RESPONSE.search(created)
    if found is None:
        raise RuntimeError("the stream began without a response")
    path = f"/v1/responses/{found[1].decode()}?stream=true&starting_after=3"
    followers = [(reader, writer)]
    turn = asyncio.Semaphore(_OPENED_AT_ONCE)

    async def follow() -> None:
        async with turn:
            one, its = await asyncio.open_connection("127.0.0.1", port)
            its.write(f"GET {path} HTTP/1.1\r\nhost: localhost\r\n\r\n".encode())
            await one.readuntil(b"\r\n\r\n")
            followers.append((one, its))

    await asyncio.gather(*(follow() for _ in range(count)))
    yield
    await upstream.open("on")
    for one, its in followers:
        await one.readuntil(b"[DONE]")
        its.close()
