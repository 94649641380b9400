"""Background responses: 64 at once, and how soon a killed server's are taken over.

Answers the floors of background work. 64 are asked for at once; each answer takes 5 s of the
upstream's time, so they are at work at the same time only if none waits for another. Then a server
that has 64 in progress is killed, and another started on what it left.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import uvloop

from bench.report import Goal, Section, table
from bench.servers import Server, free_port, perdure
from bench.turns import Sample, Samples, of, scratch, take_turns
from bench.upstream import Upstream

RESPONSES = 64
EVENTS, EVENTS_PER_S = 100, 20
ENDED_S = 60.0
AT_ONCE, TAKEOVER = "at once", "takeover"


def measure(turns: int) -> Section:
    """Everything, in one run."""
    samples = take_turns((AT_ONCE, TAKEOVER), turns, lambda which: {which: _take(which)})
    at_once = of(samples, AT_ONCE, AT_ONCE, "most")
    asked_s = of(samples, TAKEOVER, TAKEOVER, "asked_s")
    completed = [of(samples, which, which, "completed") for which in (AT_ONCE, TAKEOVER)]
    goals = [
        Goal("background", "answered at the same time", at_once, RESPONSES, spec=".0f", unit=""),
        Goal(
            "background", f"completed of {RESPONSES}", completed[0], RESPONSES, spec=".0f", unit=""
        ),
        Goal(
            "takeover",
            f"start of the next process until it has asked for all {RESPONSES} again",
            asked_s,
            10,
            at_most=True,
            unit="s",
        ),
        Goal("takeover", f"completed of {RESPONSES}", completed[1], RESPONSES, spec=".0f", unit=""),
    ]
    return Section(f"Background: {RESPONSES} responses", goals, _table(samples))


def _take(which: str) -> Sample:
    with scratch() as name:
        return uvloop.run((_at_once if which == AT_ONCE else _take_over)(Path(name)))


async def _at_once(directory: Path) -> Sample:
    async with Upstream(EVENTS, EVENTS_PER_S) as upstream:
        with _server(directory, upstream) as server:
            await asyncio.to_thread(server.wait_ready)
            began_s = time.perf_counter()
            ids = await _create(server)
            accepted_s = time.perf_counter() - began_s
            await upstream.asked(RESPONSES)
            asked_s = upstream.asked_s[RESPONSES - 1] - began_s
            completed = await _completed(server, ids)
            ended_s = time.perf_counter() - began_s
    return {
        "most": upstream.most,
        "accepted_s": accepted_s,
        "asked_s": asked_s,
        "ended_s": ended_s,
        "completed": completed,
    }


async def _take_over(directory: Path) -> Sample:
    async with Upstream(EVENTS, EVENTS_PER_S) as upstream:
        with _server(directory, upstream) as server:
            await asyncio.to_thread(server.wait_ready)
            ids = await _create(server)
            await upstream.asked(RESPONSES)
            await asyncio.sleep(1.0)  # so that each has said something
            server.kill()
        with _server(directory, upstream) as server:
            ready_s = await asyncio.to_thread(server.wait_ready)
            await upstream.asked(2 * RESPONSES)
            again_s = [at_s - server.started_s for at_s in upstream.asked_s[RESPONSES:]]
            completed = await _completed(server, ids)
            ended_s = time.perf_counter() - server.started_s
    return {
        "ready_s": ready_s,
        "first_s": again_s[0],
        "asked_s": again_s[RESPONSES - 1],
        "ended_s": ended_s,
        "completed": completed,
    }


def _server(directory: Path, upstream: Upstream) -> Server:
    port = free_port()
    command = perdure(port, directory / "data", "--upstream", upstream.url)
    return Server(command, port, directory / "log")


async def _create(server: Server) -> list[str]:
    asked = {"model": "bench", "input": "go", "background": True}
    asking = (
        asyncio.to_thread(server.ask, "POST", "/v1/responses", asked) for _ in range(RESPONSES)
    )
    return [made["id"] for made in await asyncio.gather(*asking)]


async def _completed(server: Server, ids: list[str]) -> int:
    """How many of them complete in time."""
    until_s = time.perf_counter() + ENDED_S

    async def completes(id: str) -> bool:
        while time.perf_counter() < until_s:
            made: Any = await asyncio.to_thread(server.ask, "GET", f"/v1/responses/{id}")
            if made["status"] not in ("queued", "in_progress"):
                return bool(made["status"] == "completed")
            await asyncio.sleep(0.5)
        return False

    return sum(await asyncio.gather(*map(completes, ids)))


def _table(samples: Samples) -> str:
    rows = [
        (what, f"{of(samples, which, which, field):.2f}")
        for which, field, what in (
            (AT_ONCE, "accepted_s", f"{RESPONSES} at once: all accepted"),
            (AT_ONCE, "asked_s", "the upstream asked for all"),
            (AT_ONCE, "ended_s", "all seen to have ended"),
            (TAKEOVER, "ready_s", "after a kill: ready"),
            (TAKEOVER, "first_s", "the upstream asked again for the first"),
            (TAKEOVER, "asked_s", "the upstream asked again for all"),
            (TAKEOVER, "ended_s", "all seen to have ended"),
        )
    ]
    return table(("what happened", "s after the first request, or after the start"), rows)
