"""The shared engine: durable puts on a PostgreSQL of our own, beside asyncpg alone and a peer.

Answers goals 7 and 8: rate of acknowledged puts with 64 writers over asyncpg with 64 rows a
statement, over asyncpg with a row a statement on 64 connections, and over LangGraph's checkpointer;
and what four shards cost one process beside one. Server and contenders share the machine; the
server syncs every commit and is the same for all, so shards cannot be faster here, only dearer.
"""

from __future__ import annotations

import os

from bench.contenders import ASYNCPG, LANGGRAPH_POSTGRES, PERDURE, PERDURE_SHARDS
from bench.report import Goal, Section, table
from bench.turns import Sample, of, ratio, run_worker, take_turns
from perdure.proving.postgres import DSN, make_server

MODULES = {
    PERDURE: "perdure_postgres",
    PERDURE_SHARDS: "perdure_shards",
    ASYNCPG: "raw_asyncpg",
    LANGGRAPH_POSTGRES: "langgraph_postgres",
}
ONE, MANY, GET, TOGETHER = "put:1", "put:64", "get:1", "together:1"
SHARD, SHARDS = "shards-1:64", "shards-4:64"
CASES = {
    PERDURE: [ONE, MANY, GET],
    PERDURE_SHARDS: [SHARD, SHARDS],
    ASYNCPG: [ONE, MANY, GET, TOGETHER],
    LANGGRAPH_POSTGRES: [ONE, MANY],
}


def measure(turns: int, duration_s: float) -> Section:
    """Everything, in one run."""
    if DSN not in os.environ:
        os.environ[DSN] = make_server().dsn  # peers make their tables where only its owner may

    def take(who: str) -> dict[str, Sample]:
        return run_worker(who, MODULES[who], CASES[who], duration_s=duration_s)

    samples = take_turns(list(MODULES), turns, take)
    many = "PostgreSQL, 64 writers: rate over"
    goals = [
        Goal("7", f"{many} {who}", ratio(samples, MANY, "rate", PERDURE, theirs, case), floor)
        for who, theirs, case, floor in (
            ("asyncpg, 64 rows a statement", ASYNCPG, TOGETHER, 0.3),
            ("asyncpg, a row a statement", ASYNCPG, MANY, 2.5),
            (LANGGRAPH_POSTGRES, LANGGRAPH_POSTGRES, MANY, 20),
        )
    ]
    shards = "4 shards beside 1, 64 writers:"
    of_shards = {
        field: ratio(samples, SHARDS, field, PERDURE_SHARDS, PERDURE_SHARDS, SHARD)
        for field in ("rate", "cpu_us")
    }
    goals += [
        Goal("8", f"{shards} rate", of_shards["rate"], 0.9),
        Goal("8", f"{shards} CPU of a put", of_shards["cpu_us"], 1.15, at_most=True),
    ]
    rows = []
    for who, cases in CASES.items():
        for case in cases:
            rate = of(samples, who, case, "rate")
            tails = (f"{of(samples, who, case, name):.2f}" for name in ("p50_ms", "p99_ms"))
            rows.append([who, case, f"{rate}", *tails])
    head = ["PostgreSQL, 1 KiB", "case", "a second", "p50, ms", "p99, ms"]
    return Section("Shared engine: PostgreSQL on this machine", goals, table(head, rows))
