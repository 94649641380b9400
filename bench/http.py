"""The server: a durable POST and reads over HTTP, beside servers that store nothing durably.

Answers goal 11. wrk (one thread) sends `POST /v1/conversations/{id}/items` with one message of
1 KiB, `GET /v1/responses/{id}` and `GET /v1/conversations/{id}` to each server in turn; client
and server share the CPUs. Access logs are off everywhere. `shared` asks the same of servers
that are durable in one PostgreSQL, which shares the CPUs too.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from bench import tracing
from bench.contenders import (
    FASTAPI,
    FASTAPI_DURABLE,
    PERDURE,
    ROOT,
    STARLETTE,
    STARLETTE_ASYNCPG,
    STARLETTE_LANGGRAPH,
    python_of,
)
from bench.report import Goal, Section, table
from bench.servers import Server, free_port, perdure
from bench.turns import Sample, Samples, of, ratio, scratch, take_turns
from perdure.proving.postgres import DSN, make_server
from perdure.proving.subjects import postgres_url

SERVERS = (PERDURE, STARLETTE, FASTAPI, FASTAPI_DURABLE)
SHARED = (PERDURE, STARLETTE_ASYNCPG, STARLETTE_LANGGRAPH)
_MODULES = {
    STARLETTE: ("starlette_server",),
    FASTAPI: ("fastapi_server",),
    FASTAPI_DURABLE: ("fastapi_server", "{directory}/items.db"),
    STARLETTE_ASYNCPG: ("starlette_postgres", "asyncpg", "{dsn}"),
    STARLETTE_LANGGRAPH: ("starlette_postgres", "langgraph", "{dsn}"),
}
CONVERSATIONS = 1_024
RESPONSES = 64
MESSAGE = {"role": "user", "content": [{"type": "input_text", "text": "x" * 900}]}
ITEMS = {"items": [{"type": "message"} | MESSAGE]}


Engine = Callable[[Path], str] | None
"""The URL of Perdure's store for a directory of its own; None for the default."""


class Case(NamedTuple):
    """What is sent, to which paths, over how many connections."""

    name: str
    method: str
    paths: str
    connections: int
    body: Any = None


POST = Case("POST items", "POST", "items", 64, ITEMS)
POST_ONE = Case("POST items, 1 connection", "POST", "items", 1, ITEMS)
CREATE = Case("POST conversation", "POST", "collection", 64, {"metadata": {"topic": "bench"}})
GET = Case("GET response", "GET", "responses", 64)
GET_ONE = Case("GET response, 1 connection", "GET", "responses", 1)
GET_CONVERSATION = Case("GET conversation", "GET", "conversations", 64)
IDLE = (POST, POST_ONE, CREATE, GET, GET_ONE, GET_CONVERSATION)
SLOW = (POST, POST_ONE)


def measure(turns: int, duration_s: float) -> Section:
    """Everything, in one run."""
    if shutil.which("wrk") is None:
        raise RuntimeError("the load comes from wrk, which is not installed.")
    shown = _responses()
    idle = take_turns(SERVERS, turns, lambda who: _take(who, IDLE, duration_s, shown))
    slow = take_turns(SERVERS, turns, lambda who: _take(who, SLOW, duration_s, shown, slow=True))
    return Section(
        "HTTP: one worker process, 64 connections unless said",
        _goals(idle),
        f"{_table(idle, SERVERS, IDLE, 'idle')}\n\n{_table(slow, SERVERS, SLOW, 'slow')}",
    )


def shared(turns: int, duration_s: float) -> Section:
    """The same on the shared engine, beside what stores in it with less above it."""
    if DSN not in os.environ:
        os.environ[DSN] = make_server().dsn  # peers make their tables where only its owner may
    shown = _responses()
    idle = take_turns(
        SHARED, turns, lambda who: _take(who, IDLE, duration_s, shown, engine=postgres_url)
    )
    heads = [
        (POST, "durable POST items"),
        (GET, "GET response"),
        (GET_CONVERSATION, "GET conversation"),
    ]
    goals = [
        Goal("11", f"{what}: rate over {who}", ratio(idle, case.name, "rate", PERDURE, who), floor)
        for case, what in heads
        for who, floor in ((STARLETTE_ASYNCPG, 0.6), (STARLETTE_LANGGRAPH, 1.5))
    ]
    return Section(
        "HTTP on PostgreSQL: one worker process, 64 connections unless said",
        goals,
        _table(idle, SHARED, IDLE, "idle"),
    )


def _responses() -> dict[str, Any]:
    """Stored responses by path, as Perdure gives them out: what every server is then asked for."""
    with scratch() as name, _start(PERDURE, Path(name)) as server:
        server.wait_ready()
        return {f"/v1/responses/{one['id']}": one for one in map(_respond, [server] * RESPONSES)}


def _respond(server: Server) -> dict[str, Any]:
    asked = {"model": "perdure-extract", "input": f"The topic is storage. {'x' * 700}"}
    answer: dict[str, Any] = server.ask("POST", "/v1/responses", asked)
    return answer


def _start(who: str, directory: Path, *, slow: bool = False, engine: Engine = None) -> Server:
    port = free_port()
    if who == PERDURE:
        flags = () if engine is None else ("--engine", engine(directory))
        command = perdure(port, directory / "data", *flags)
    else:
        module, *more = _MODULES[who]
        more = [part.format(directory=directory, dsn=os.environ.get(DSN)) for part in more]
        command = [str(python_of(who)), "-m", f"bench.peers.{module}", str(port), *more]
    return Server([*(tracing.SLOWLY if slow else ()), *command], port, directory / "log")


def _take(
    who: str,
    cases: tuple[Case, ...],
    duration_s: float,
    shown: dict[str, Any],
    *,
    slow: bool = False,
    engine: Engine = None,
) -> dict[str, Sample]:
    with scratch() as name, _start(who, Path(name), slow=slow, engine=engine) as server:
        server.wait_ready()
        paths = _fill(server, who, shown, conversations=64 if slow else CONVERSATIONS)
        samples = {}
        for case in (cases[0], *cases):  # the first one warms the server up
            listed = Path(name) / "paths"
            listed.write_text("".join(f"{path}\n" for path in paths[case.paths]))
            samples[case.name] = _wrk(server.port, case, listed, duration_s=duration_s)
        return samples


def _fill(
    server: Server, who: str, shown: dict[str, Any], *, conversations: int
) -> dict[str, list[str]]:
    """Give a server what it will be asked for; the paths of it."""
    made = [server.ask("POST", "/v1/conversations", {})["id"] for _ in range(conversations)]
    if who == PERDURE:
        responses = [f"/v1/responses/{_respond(server)['id']}" for _ in shown]
    else:
        responses = list(shown)
        for path, body in shown.items():
            server.ask("PUT", path, body)
    return {
        "collection": ["/v1/conversations"],
        "conversations": [f"/v1/conversations/{id}" for id in made],
        "items": [f"/v1/conversations/{id}/items" for id in made],
        "responses": responses,
    }


def _wrk(port: int, case: Case, paths: Path, *, duration_s: float) -> Sample:
    """One burst of whole seconds, which is what wrk counts in."""
    environment = os.environ | {
        "BENCH_METHOD": case.method,
        "BENCH_PATHS": str(paths),
        "BENCH_BODY": "" if case.body is None else msgspec.json.encode(case.body).decode(),
    }
    command = ["wrk", "-t1", f"-c{case.connections}", f"-d{max(1, round(duration_s))}s"]
    command += ["-s", "bench/requests.lua", f"http://127.0.0.1:{port}"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    sample: Sample = json.loads(done.stdout.strip().splitlines()[-1])
    if sample["failed"]:
        raise RuntimeError(f"{case.name}: {sample['failed']} requests failed")
    return sample


def _goals(idle: Samples) -> list[Goal]:
    def rate(case: Case, theirs: str) -> Any:
        return ratio(idle, case.name, "rate", PERDURE, theirs)

    return [
        Goal(
            "11",
            f"durable POST items: rate over {STARLETTE}, not durable",
            rate(POST, STARLETTE),
            0.6,
        ),
        Goal(
            "11", f"durable POST items: rate over {FASTAPI}, not durable", rate(POST, FASTAPI), 1.5
        ),
        Goal("11", f"GET response: rate over {STARLETTE}", rate(GET, STARLETTE), 0.7),
        Goal("11", f"GET response: rate over {FASTAPI}", rate(GET, FASTAPI), 1.5),
        Goal(
            "11", f"GET conversation: rate over {STARLETTE}", rate(GET_CONVERSATION, STARLETTE), 0.7
        ),
    ]


def _table(samples: Samples, servers: Sequence[str], cases: Sequence[Case], regime: str) -> str:
    heads = [f"requests a second, {regime} (p50 / p99 ms)", *(case.name for case in cases)]
    rows = []
    for who in servers:
        row = [who]
        for case in cases:
            rate = of(samples, who, case.name, "rate")
            p50 = of(samples, who, case.name, "p50_ms").median
            p99 = of(samples, who, case.name, "p99_ms").median
            row.append(f"{rate} ({p50:.2f} / {p99:.1f})")
        rows.append(row)
    return table(heads, rows)
