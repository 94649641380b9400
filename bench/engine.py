"""The engine: durable puts and reads in process, beside raw SQLite and what others embed.

Answers goals 1 to 6: rate and tail of acknowledged puts with one writer and with 64, idle and with
slow fsyncs; fsyncs a put; that no put is acknowledged before its fsync has returned; reads by key.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench import tracing
from bench.contenders import AGENTS, LANGGRAPH, PERDURE, RAW
from bench.report import Goal, Section, table
from bench.turns import Sample, Samples, Spread, of, ratio, run_worker, scratch, spread, take_turns

MODULES = {
    PERDURE: "perdure_engine",
    RAW: "raw_sqlite",
    LANGGRAPH: "langgraph_saver",
    AGENTS: "agents_session",
}
ONE, MANY, GET = "put:1", "put:64", "get:1"


def measure(turns: int, duration_s: float) -> Section:
    """Everything, in one run."""
    idle = take_turns(list(MODULES), turns, lambda who: _take(who, duration_s))
    slow = take_turns(list(MODULES), turns, lambda who: _take(who, duration_s, tracing.SLOWLY))
    counted = {who: _count_syncs(who, duration_s) for who in MODULES}
    orders = {case: _order(case) for case in ("traced:1", "traced:64")}
    goals = [*_rates(idle, slow), *_syncs(counted[PERDURE], orders), *_tails(idle, slow)]
    goals += _reads(idle)
    text = "\n\n".join((_puts_table(idle, slow, counted), _gets_table(idle), _told(orders)))
    return Section("Engine: one put of 1 KiB an acknowledgement", goals, text)


def _take(who: str, duration_s: float, before: Sequence[str] = ()) -> dict[str, Sample]:
    cases = [ONE, MANY] if before or who == AGENTS else [ONE, MANY, GET]
    return run_worker(who, MODULES[who], cases, duration_s=duration_s, before=before)


def _count_syncs(who: str, duration_s: float) -> dict[str, float]:
    """fsyncs per acknowledged put, by case."""
    counted = {}
    for case in (ONE, MANY):
        with scratch() as directory:
            trace = Path(directory) / "trace"
            before = tracing.counting(trace)
            found = run_worker(who, MODULES[who], [case], duration_s=duration_s, before=before)
            sample = found[case]
            syncs = tracing.syncs_between(trace, sample["began_s"], sample["ended_s"])
            counted[case] = syncs / sample["operations"]
    return counted


def _order(case: str) -> tracing.Order:
    with scratch() as directory:
        trace = Path(directory) / "trace"
        before = tracing.ordering(trace)
        run_worker(PERDURE, MODULES[PERDURE], [case], duration_s=0.5, before=before)
        return tracing.order_of(trace)


def _rates(idle: Samples, slow: Samples) -> list[Goal]:
    def rate(samples: Samples, case: str, theirs: str) -> Spread:
        return ratio(samples, case, "rate", PERDURE, theirs)

    return [
        Goal("1", "64 writers, idle: rate over raw grouped SQLite", rate(idle, MANY, RAW), 0.5),
        Goal("1", "64 writers, slow: rate over raw grouped SQLite", rate(slow, MANY, RAW), 0.8),
        Goal("2", f"64 writers, idle: rate over {LANGGRAPH}", rate(idle, MANY, LANGGRAPH), 12),
        Goal("2", f"64 writers, slow: rate over {LANGGRAPH}", rate(slow, MANY, LANGGRAPH), 40),
        Goal(
            "3",
            "1 writer, idle: p50 over raw SQLite",
            ratio(idle, ONE, "p50_ms", PERDURE, RAW),
            2.5,
            at_most=True,
        ),
        Goal("3", f"1 writer, idle: rate over {LANGGRAPH}", rate(idle, ONE, LANGGRAPH), 1.5),
    ]


def _syncs(counted: dict[str, float], orders: dict[str, tracing.Order]) -> list[Goal]:
    early = sum(len(order.early) for order in orders.values())
    exact = {"at_most": True, "spec": ".3f", "unit": ""}
    return [
        Goal("4", "1 writer: fsyncs per acknowledged put", spread([counted[ONE]]), 1.05, **exact),
        Goal(
            "4", "64 writers: fsyncs per acknowledged put", spread([counted[MANY]]), 0.02, **exact
        ),
        Goal(
            "4",
            "puts acknowledged before their fsync returned",
            spread([early]),
            0,
            True,
            ".0f",
            "",
        ),
    ]


def _tails(idle: Samples, slow: Samples) -> list[Goal]:
    return [
        Goal(
            "5",
            "64 writers, idle: p99 over raw grouped SQLite",
            ratio(idle, MANY, "p99_ms", PERDURE, RAW),
            1.0,
            at_most=True,
        ),
        Goal(
            "5",
            "64 writers, slow: p99 over one fsync (p50 of raw SQLite, 1 writer)",
            spread(
                mine["p99_ms"] / sync["p50_ms"]
                for mine, sync in zip(slow[(PERDURE, MANY)], slow[(RAW, ONE)], strict=True)
            ),
            2.5,
            at_most=True,
        ),
    ]


def _reads(idle: Samples) -> list[Goal]:
    return [
        Goal(
            "6",
            "get by key, decoded: rate over raw SQLite, not decoded",
            ratio(idle, GET, "rate", PERDURE, RAW),
            0.4,
        ),
        Goal(
            "6",
            "get by key: rate over LangGraph SqliteSaver.get_tuple",
            ratio(idle, GET, "rate", PERDURE, LANGGRAPH),
            1.3,
        ),
    ]


def _puts_table(idle: Samples, slow: Samples, counted: dict[str, dict[str, float]]) -> str:
    heads = (
        "contender",
        "1 writer /s",
        "p50 ms",
        "64 writers /s",
        "p50 ms",
        "p99 ms",
        "slow: 1 /s",
        "slow: 64 /s",
        "slow: 64 p99 ms",
        "fsyncs a put, 1 / 64",
    )
    rows = [
        (
            who,
            f"{of(idle, who, ONE, 'rate')}",
            f"{of(idle, who, ONE, 'p50_ms').median:.3f}",
            f"{of(idle, who, MANY, 'rate')}",
            f"{of(idle, who, MANY, 'p50_ms').median:.2f}",
            f"{of(idle, who, MANY, 'p99_ms'):.1f}",
            f"{of(slow, who, ONE, 'rate')}",
            f"{of(slow, who, MANY, 'rate')}",
            f"{of(slow, who, MANY, 'p99_ms'):.1f}",
            f"{counted[who][ONE]:.3f} / {counted[who][MANY]:.3f}",
        )
        for who in MODULES
    ]
    return table(heads, rows)


def _gets_table(idle: Samples) -> str:
    rows = [
        (who, f"{of(idle, who, GET, 'rate')}", f"{of(idle, who, GET, 'p50_ms').median:.4f}")
        for who in (PERDURE, RAW, LANGGRAPH)
    ]
    return table(("get by key, 5,000 records of 1 KiB", "1 reader /s", "p50 ms"), rows)


def _told(orders: dict[str, tracing.Order]) -> str:
    one, many = orders["traced:1"], orders["traced:64"]
    return (
        f"Order, from a trace of system calls: {one.acknowledged} puts of one writer and "
        f"{many.acknowledged} of 64 were followed from the write of their key through an fsync "
        f"begun after it to their acknowledgement; {len(one.early)} and {len(many.early)} were "
        "acknowledged before that fsync had returned."
    )
