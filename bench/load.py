"""The closed loop every in-process contender is driven by: so many writers, each asking for its
next operation as soon as the last one is acknowledged.

Only the standard library: a contender runs it inside its own environment.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path

WARM_S = 0.2
PAYLOAD_BYTES = 1024
_LONG_READS = 300
GET_ROWS = 5_000
SESSION_ITEMS, SESSION_LAST = 200, 20
"""What a session holds when its newest items are read, and how many of them."""

LONG_ENTRIES, LONG_READ = 1_000_000, 100
"""A log of 1 GB, and how much of it one read asks for."""

Operation = Callable[[int, int], Awaitable[object]]
"""Does the nth operation of a writer; called as (writer, n)."""

DOCUMENT: dict[str, object] = {
    "id": "doc_5f1c3a7be0924d68",
    "type": "message",
    "role": "user",
    "status": "completed",
    "created_at": 1767225600,
    "position": 17,
    "tags": ["alpha", "beta", "gamma"],
}
DOCUMENT["text"] = "x" * (PAYLOAD_BYTES - len(json.dumps(DOCUMENT)) - len(', "text": ""'))


def key_of(writer: int, n: int) -> str:
    """A key that a trace of system calls can be searched for."""
    return f"k{writer:06d}-{n:06d};"


def percentile(ordered: list[float], share: float) -> float:
    """The value below which `share` of an ordered sample lies; NaN of an empty one."""
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else float("nan")


async def closed_loop(operation: Operation, writers: int, duration_s: float) -> dict[str, float]:
    """Drive `operation`, leave out what began while it warmed up, and say how it went."""
    began_s = time.time() + WARM_S
    clock = time.perf_counter
    warm_s = clock() + WARM_S
    end_s = warm_s + duration_s
    latencies: list[float] = []

    async def write(writer: int) -> None:
        n = 0
        while (started_s := clock()) < end_s:
            await operation(writer, n)
            n += 1
            if started_s >= warm_s:
                latencies.append(clock() - started_s)

    await asyncio.gather(*(write(writer) for writer in range(writers)))
    return told(latencies, clock() - warm_s, began_s)


def plain_loop(operation: Callable[[int], object], duration_s: float) -> dict[str, float]:
    """The same for one writer that needs no event loop."""
    clock = time.perf_counter
    began_s = time.time() + WARM_S
    warm_s = clock() + WARM_S
    end_s = warm_s + duration_s
    latencies: list[float] = []
    n = 0
    while (started_s := clock()) < end_s:
        operation(n)
        n += 1
        if started_s >= warm_s:
            latencies.append(clock() - started_s)
    return told(latencies, clock() - warm_s, began_s)


async def read_places(read: Callable[[int], Awaitable[int]]) -> dict[str, float]:
    """Milliseconds that reads of a long log take at its start, in its middle and at its end;
    `read` is given the number to read behind and says how many entries it got."""
    found: dict[str, float] = {}
    for place, where in (("start", 0), ("middle", LONG_ENTRIES // 2), ("end", LONG_ENTRIES)):
        took_ms = []
        for n in range(_LONG_READS):
            after = max(0, min(where + 37 * n, LONG_ENTRIES) - LONG_READ)
            began_s = time.perf_counter()
            got = await read(after)
            took_ms.append((time.perf_counter() - began_s) * 1e3)
            if got != LONG_READ:
                raise RuntimeError(f"{got} entries instead of {LONG_READ} behind {after}")
        ordered = sorted(took_ms)
        found |= {f"{place}_ms": percentile(ordered, 0.5)}
        found |= {f"{place}_p99_ms": percentile(ordered, 0.99)}
    return found


def told(latencies: Iterable[float], elapsed_s: float, began_s: float) -> dict[str, float]:
    """A sample as it is printed. `began_s` and `ended_s` are wall times, to find it in a trace."""
    ordered = sorted(latencies)
    return {
        "operations": len(ordered),
        "rate": len(ordered) / elapsed_s,
        "p50_ms": percentile(ordered, 0.5) * 1e3,
        "p99_ms": percentile(ordered, 0.99) * 1e3,
        "began_s": began_s,
        "ended_s": began_s + elapsed_s,
    }


Measure = Callable[[Path, int, float], dict[str, float]]


def main(cases: dict[str, Measure]) -> None:
    """Run the cases a command line asks for (`put:64`: a name and how many writers), each in a
    directory of its own, and print a JSON object of their samples."""
    parser = argparse.ArgumentParser()
    parser.add_argument("cases", nargs="+")
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--duration-s", type=float, default=0.8)
    asked = parser.parse_args()
    samples = {}
    for case in asked.cases:
        name, _, writers = case.partition(":")
        directory = asked.directory / case.replace(":", "-")
        directory.mkdir(parents=True)
        samples[case] = cases[name](directory, int(writers or 1), asked.duration_s)
    print(json.dumps(samples))
