"""Chains: what a long one costs its next turn before the model is asked.

Answers the floor of building the input of 1,000 turns. A chain is stored as the server stores one;
then its input is built by itself, in process, and by a server, from the moment a client sends the
next turn until its upstream has the question's head: the request parsed, the input built, the
response durable, the upstream called.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from pathlib import Path
from typing import Any

import msgspec
import uvloop

import perdure
from bench.report import Goal, Section, table
from bench.servers import Server, free_port
from bench.servers import perdure as command
from bench.turns import Sample, Samples, of, scratch, take_turns
from bench.upstream import Upstream
from perdure.core.clock import SystemClock
from perdure.services.attachments import Attachments
from perdure.services.config import load
from perdure.services.context import Context
from perdure.services.conversations import new_items
from perdure.services.lifecycle import Node
from perdure.services.sealing import Sealing
from perdure.surfaces.responses import Response, Status, Turn, ancestors_of
from perdure.wire.items import Item
from perdure.wire.responses import CreateResponse, Outcome, finished, response_body

TURNS = (10, 100, 1_000)
ASKS = 5
ALONE, ASKED = "input built", "request until the upstream is asked"
STORE = "perdure.db"


def measure(turns: int) -> Section:
    """Everything, in one run."""
    with scratch() as name:
        data = Path(name)
        chain = uvloop.run(_grow(data / STORE, max(TURNS)))
        samples = take_turns((ALONE, ASKED), turns, lambda who: _take(who, data, chain))
    longest = f"{max(TURNS)}"
    goals = [
        Goal(
            "chain",
            f"{max(TURNS):,} turns: {what}",
            of(samples, what, longest, "ms"),
            50,
            at_most=True,
            spec=".1f",
            unit="ms",
        )
        for what in (ALONE, ASKED)
    ]
    return Section("Chains: the input of the next turn", goals, _table(samples))


async def _grow(path: Path, turns: int) -> list[str]:
    """Store a chain of so many turns, a question of 200 characters and an answer of 400 each; the
    ids of its responses, the oldest first."""
    clock = SystemClock()
    chain: list[Turn] = []
    async with perdure.library.open(f"sqlite:///{path}") as state:
        for number in range(turns):
            key = ("default", clock.new_id("resp"))
            said = _message(clock.new_id("msg"), "user", "input_text", 200)
            told = _message(clock.new_id("msg"), "assistant", "output_text", 400)
            before = chain[0].key[-1] if chain else None
            request = CreateResponse(model="bench", input="", previous_response_id=before)
            begun = response_body(request, id=key[-1], created_at=number)
            body = finished(begun, Outcome(status="completed"), [told], completed_at=number)
            turn = Turn(key, Status.COMPLETED, 1, before, [])
            response = Response(
                *(Status.COMPLETED, number, "bench", None, before),
                input_count=1,
                ancestors=ancestors_of(chain),
            )
            await state.commit(
                state.responses.create(key, response, msgspec.json.encode(body), [b"{}"])
                + state.items.add(key, "input", new_items([said]))
                + state.items.add(key, "output", new_items([told]))
            )
            chain.insert(0, turn)
    return [turn.key[-1] for turn in reversed(chain)]


def _message(id: str, role: str, type: str, characters: int) -> Item:
    content = [{"type": type, "text": "x" * characters}]
    return {
        "id": id,
        "type": "message",
        "role": role,
        "status": "completed",
        "content": content,
    }


def _take(who: str, data: Path, chain: list[str]) -> dict[str, Sample]:
    return uvloop.run(_build(data, chain) if who == ALONE else _ask(data, chain))


async def _build(data: Path, chain: list[str]) -> dict[str, Sample]:
    """Build inputs in this process, on a store that was just opened."""
    flags = {"engine": f"sqlite:///{data / STORE}", "data": str(data)}
    node = Node(load(environment={}, flags=flags), environment={})
    await node.open()
    try:
        sealing, attachments = Sealing(node.state, node.clock), Attachments(node.files)
        context = Context(node.state, sealing, attachments, "repair")

        async def once(before: str) -> float:
            request = CreateResponse(model="bench", previous_response_id=before)
            began_s = time.perf_counter()
            await context.given("default", request, [])
            return time.perf_counter() - began_s

        return {f"{n}": _sample([await once(chain[n - 1]) for _ in range(ASKS)]) for n in TURNS}
    finally:
        await node.close()


async def _ask(data: Path, chain: list[str]) -> dict[str, Sample]:
    """Send next turns to a server, and see when it asks the upstream that is in this process."""
    async with Upstream() as upstream:
        port = free_port()
        with Server(command(port, data, "--upstream", upstream.url), port, data / "log") as server:
            await asyncio.to_thread(server.wait_ready)
            return await _ask_each(server, upstream, chain)


async def _ask_each(server: Server, upstream: Upstream, chain: list[str]) -> dict[str, Sample]:
    async def once(before: str) -> float:
        asked = {"model": "bench", "input": "go", "previous_response_id": before}
        began_s = time.perf_counter()
        await asyncio.to_thread(server.ask, "POST", "/v1/responses", asked)
        return upstream.asked_s[-1] - began_s

    return {f"{n}": _sample([await once(chain[n - 1]) for _ in range(ASKS)]) for n in TURNS}


def _sample(took_s: list[float]) -> dict[str, Any]:
    """The first one is the first that a process reads of these turns."""
    return {"first_ms": took_s[0] * 1e3, "ms": statistics.median(took_s[1:]) * 1e3}


def _table(samples: Samples) -> str:
    heads = ("ms", *(f"{n:,} turns{which}" for n in TURNS for which in ("", ", first read")))
    rows = [
        (
            what,
            *(
                f"{of(samples, what, f'{n}', field):.1f}"
                for n in TURNS
                for field in ("ms", "first_ms")
            ),
        )
        for what in (ALONE, ASKED)
    ]
    return table(heads, rows)
