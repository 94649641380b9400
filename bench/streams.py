"""Streams: many at once, 100 events a second each, through Perdure and straight from the upstream.

Every text delta carries the moment the upstream sent it. What a client sees later through Perdure
than it does without, is the price of making each event durable before it is shown.
"""

from __future__ import annotations

import asyncio
import re
import sys
import time
from pathlib import Path

import msgspec
import uvloop

from bench import tracing
from bench.load import percentile
from bench.report import Goal, Section, table
from bench.servers import Server, free_port, perdure
from bench.turns import Sample, Samples, of, scratch, spread, take_turns
from bench.upstream import EVENTS, EVENTS_PER_S

STREAMS = (64, 16)
"""How many at once: the number the goal names, and a quarter of it."""

DIRECT, THROUGH = "straight from the upstream", "through Perdure"
_DELTA = b'"type":"response.output_text.delta"'
_CHUNK = b'"object":"chat.completion.chunk"'
_STAMP = re.compile(rb" (\d{12,20})")


def measure(turns: int) -> Section:
    """Everything, in one run."""
    idle = take_turns((DIRECT, THROUGH), turns, _take)
    slow = take_turns((DIRECT, THROUGH), turns, lambda who: _take(who, slow=True))
    sync_ms = tracing.DELAY_US / 1e3
    goals = []
    for count in STREAMS:
        added, slowly = _added(idle, count), _added(slow, count)
        what = f"{count} streams, {{}}: added latency of an event, p99"
        goals += [
            Goal("streams", what.format("idle"), spread(added), 10, True, ".1f", "ms"),
            Goal(
                "streams",
                f"{what.format('slow')}, in fsyncs of {sync_ms:g} ms",
                spread(ms / sync_ms for ms in slowly),
                5,
                True,
                ".1f",
                "",
            ),
        ]
    title = f"Streams: {EVENTS_PER_S} events a second each"
    return Section(title, goals, _table(idle, slow))


def _take(who: str, *, slow: bool = False) -> dict[str, Sample]:
    with scratch() as name:
        directory, port = Path(name), free_port()
        upstream = [sys.executable, "-m", "bench.upstream", str(port)]
        with Server(upstream, port, directory / "upstream.log") as direct:
            direct.wait_listening()
            if who == DIRECT:
                return _follow_each(port, "/v1/chat/completions", _CHUNK)
            return _through(port, directory, slow=slow)


def _through(upstream_port: int, directory: Path, *, slow: bool) -> dict[str, Sample]:
    port = free_port()
    upstream = ["--upstream", f"http://127.0.0.1:{upstream_port}/v1"]
    command = [*(tracing.SLOWLY if slow else ()), *perdure(port, directory / "data", *upstream)]
    with Server(command, port, directory / "perdure.log") as server:
        server.wait_ready()
        return _follow_each(port, "/v1/responses", _DELTA)


def _follow_each(port: int, path: str, marker: bytes) -> dict[str, Sample]:
    return {str(count): uvloop.run(_follow_all(count, port, path, marker)) for count in STREAMS}


async def _follow_all(count: int, port: int, path: str, marker: bytes) -> Sample:
    following = (_follow(port, path, marker) for _ in range(count))
    latencies = sorted(ms for found in await asyncio.gather(*following) for ms in found)
    if len(latencies) != count * EVENTS:
        raise RuntimeError(f"{path}: {len(latencies)} of {count * EVENTS} events arrived.")
    return {
        "p50_ms": percentile(latencies, 0.5),
        "p99_ms": percentile(latencies, 0.99),
        "max_ms": latencies[-1],
    }


async def _follow(port: int, path: str, marker: bytes) -> list[float]:
    """Read one stream to its end; milliseconds from each chunk's sending to its arrival."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**20)
    body = msgspec.json.encode({"model": "bench", "stream": True, "input": "go"})
    writer.write(
        b"POST %b HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Connection: close\r\nContent-Length: %d\r\n\r\n%b" % (path.encode(), len(body), body)
    )
    latencies = []
    async for line in reader:
        if marker in line:
            now_ns = time.monotonic_ns()
            latencies += [(now_ns - int(sent)) / 1e6 for sent in _STAMP.findall(line)]
    writer.close()
    return latencies


def _added(samples: Samples, count: int) -> list[float]:
    pairs = zip(samples[(THROUGH, str(count))], samples[(DIRECT, str(count))], strict=True)
    return [through["p99_ms"] - direct["p99_ms"] for through, direct in pairs]


def _table(idle: Samples, slow: Samples) -> str:
    heads = ("an event after it was sent, ms", "idle p50", "p99", "max", "slow p50", "p99", "max")
    fields = ("p50_ms", "p99_ms", "max_ms")
    rows = [
        (
            f"{count} streams, {who}",
            *(
                f"{of(samples, who, str(count), field):.1f}"
                for samples in (idle, slow)
                for field in fields
            ),
        )
        for count in STREAMS
        for who in (DIRECT, THROUGH)
    ]
    return table(heads, rows)
