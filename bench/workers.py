"""Workers: their logs on plain files, beside one file that shares its syncs and session stores.

Answers goals 9, 13 and, for files, 10: appends of 64 writers for a minute, with everything that the
files cost behind them, and what grows meanwhile; one item appended to a session, and its newest 20
read; 100 entries out of a log of 1 GB; a store that was killed, opened again. A step is one call of
the worker runtime: state, event and transcript of a run in one commit.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench import replay, tracing
from bench.contenders import (
    ADK,
    AGENTS,
    EVENTSOURCING,
    PERDURE_FILES,
    PERDURE_MEMORY,
    PERDURE_SQLITE,
    RAW_APPEND,
)
from bench.load import LONG_READ, SESSION_ITEMS, SESSION_LAST
from bench.report import Goal, Section, table
from bench.turns import Sample, Samples, of, ratio, run_worker, scratch, spread, take_turns

MODULES = {
    PERDURE_FILES: "perdure_logs",
    PERDURE_SQLITE: "perdure_logs",
    PERDURE_MEMORY: "perdure_logs",
    RAW_APPEND: "raw_append",
    AGENTS: "agents_session",
    ADK: "adk_session",
    EVENTSOURCING: "eventsourcing_aggregate",
}
ENGINES = {PERDURE_FILES: "files-", PERDURE_SQLITE: "sqlite-", PERDURE_MEMORY: "memory-"}
"""What comes before the cases of a module that several contenders share."""

ONE, MANY, READ = "append:1", "append:64", "read:1"
STEP, STEPS, TRANSCRIPT = "step:1", "step:64", "transcript:1"
SUSTAINED, LONG = "sustained:64", "long:1"
PEERS = (AGENTS, ADK, EVENTSOURCING)
LONG_IN = (PERDURE_FILES, PERDURE_SQLITE, AGENTS, EVENTSOURCING)
SUSTAINED_S, RAW_S = 60.0, 10.0

_IDLE = {
    PERDURE_FILES: (ONE, MANY, READ, STEP, STEPS, TRANSCRIPT),
    PERDURE_SQLITE: (ONE, MANY, READ, STEP, STEPS, TRANSCRIPT),
    PERDURE_MEMORY: (MANY,),
    RAW_APPEND: (ONE, MANY),
    AGENTS: (ONE, MANY, READ),
    ADK: (ONE, MANY, READ),
    EVENTSOURCING: (ONE, MANY, READ),
}
_SYNCED = tuple(who for who, cases in _IDLE.items() if ONE in cases)


def measure(turns: int, duration_s: float) -> Section:
    """Everything, in one run."""
    idle = take_turns(list(_IDLE), turns, lambda who: _take(who, _IDLE[who], duration_s))
    slow = take_turns(
        _SYNCED,
        min(turns, 2),
        lambda who: _take(who, (ONE, MANY), duration_s, tracing.SLOWLY),
    )
    minute = take_turns((RAW_APPEND, PERDURE_FILES), min(turns, 2), _take_sustained)
    long = take_turns(LONG_IN, 1, lambda who: _take(who, (LONG,), duration_s))
    counted = {who: _count_syncs(who, duration_s) for who in _SYNCED}
    restarts = replay.measure(turns)
    goals = [*_goal_9(idle, minute), *_goal_13(idle, slow), *restarts.goals]
    tables = (
        _appends_table(idle, slow, counted),
        _reads_table(idle),
        _steps_table(idle),
        _minute_table(minute),
        _long_table(long),
        restarts.text,
    )
    return Section("Workers: logs of sessions, on plain files", goals, "\n\n".join(tables))


def _take(
    who: str, cases: Sequence[str], duration_s: float, before: Sequence[str] = ()
) -> dict[str, Sample]:
    engine = ENGINES.get(who, "")
    named = [f"{engine}{case}" for case in cases]
    found = run_worker(who, MODULES[who], named, duration_s=duration_s, before=before)
    return {case.removeprefix(engine): sample for case, sample in found.items()}


def _take_sustained(who: str) -> dict[str, Sample]:
    if who == RAW_APPEND:
        return {SUSTAINED: _take(who, (MANY,), RAW_S)[MANY]}
    return _take(who, (SUSTAINED,), SUSTAINED_S)


def _count_syncs(who: str, duration_s: float) -> dict[str, float]:
    """fsyncs per acknowledged append, by case; those of files that follow behind count as well."""
    counted = {}
    for case in (ONE, MANY):
        with scratch() as directory:
            trace = Path(directory) / "trace"
            sample = _take(who, (case,), duration_s, tracing.counting(trace))[case]
            syncs = tracing.syncs_between(trace, sample["began_s"], sample["ended_s"])
            counted[case] = syncs / sample["operations"]
    return counted


def _goal_9(idle: Samples, minute: Samples) -> list[Goal]:
    return [
        Goal(
            "9",
            f"files, 64 streams, {SUSTAINED_S:.0f} s: rate over appends that share their syncs",
            ratio(minute, SUSTAINED, "rate", PERDURE_FILES, RAW_APPEND),
            0.3,
        ),
        Goal(
            "9",
            "memory engine, 64 writers: rate over the SQLite engine",
            ratio(idle, MANY, "rate", PERDURE_MEMORY, PERDURE_SQLITE),
            1.5,
        ),
    ]


def _goal_13(idle: Samples, slow: Samples) -> list[Goal]:
    goals = []
    for ours in (PERDURE_FILES, PERDURE_SQLITE):
        for what, samples, case, theirs, floor in (
            ("append, 1 writer, idle", idle, ONE, AGENTS, 1.5),
            ("append, 64 writers, idle", idle, MANY, AGENTS, 12),
            ("append, 64 writers, slow", slow, MANY, AGENTS, 12),
            ("append, 1 writer, idle", idle, ONE, ADK, 20),
            (f"read the last {SESSION_LAST}", idle, READ, AGENTS, 2),
            (f"read the last {SESSION_LAST}", idle, READ, ADK, 20),
        ):
            rate = ratio(samples, case, "rate", ours, theirs)
            goals.append(Goal("13", f"{_engine(ours)}, {what}: rate over {theirs}", rate, floor))
        for case, own in ((ONE, STEP), (MANY, STEPS)):
            pairs = zip(idle[(ours, own)], idle[(AGENTS, case)], strict=True)
            rate = spread(mine["rate"] / other["rate"] for mine, other in pairs)
            writers = case.partition(":")[2]
            floor = 1.5 if case == ONE else 12
            what = f"step of a run, {writers} at once, idle"
            goals.append(Goal("13", f"{_engine(ours)}, {what}: rate over {AGENTS}", rate, floor))
    return goals


def _engine(who: str) -> str:
    return who.partition(", ")[2]


def _appends_table(idle: Samples, slow: Samples, counted: dict[str, dict[str, float]]) -> str:
    heads = (
        "one item of 1 KiB, durable",
        "1 writer /s",
        "p50 ms",
        "64 writers /s",
        "p50 ms",
        "p99 ms",
        "slow: 1 /s",
        "slow: 64 /s",
        "fsyncs an item, 1 / 64",
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
            f"{counted[who][ONE]:.3f} / {counted[who][MANY]:.3f}",
        )
        for who in _SYNCED
    ]
    return table(heads, rows)


def _reads_table(idle: Samples) -> str:
    heads = (f"the last {SESSION_LAST} of {SESSION_ITEMS} items", "1 reader /s", "p50 ms", "p99 ms")
    rows = [
        (
            f"{who}{how}",
            f"{of(idle, who, case, 'rate')}",
            f"{of(idle, who, case, 'p50_ms').median:.3f}",
            f"{of(idle, who, case, 'p99_ms').median:.2f}",
        )
        for who, case, how in (
            (PERDURE_FILES, READ, ": log"),
            (PERDURE_FILES, TRANSCRIPT, ": transcript of a worker"),
            (PERDURE_SQLITE, READ, ": log"),
            (PERDURE_SQLITE, TRANSCRIPT, ": transcript of a worker"),
            *((who, READ, "") for who in PEERS),
        )
    ]
    return table(heads, rows)


def _steps_table(idle: Samples) -> str:
    heads = ("steps of runs", "1 worker /s", "p50 ms", "64 workers /s", "p50 ms", "p99 ms")
    rows = [
        (
            who,
            f"{of(idle, who, STEP, 'rate')}",
            f"{of(idle, who, STEP, 'p50_ms').median:.3f}",
            f"{of(idle, who, STEPS, 'rate')}",
            f"{of(idle, who, STEPS, 'p50_ms').median:.2f}",
            f"{of(idle, who, STEPS, 'p99_ms'):.1f}",
        )
        for who in (PERDURE_FILES, PERDURE_SQLITE)
    ]
    return table(heads, rows)


def _minute_table(minute: Samples) -> str:
    """What a store takes in the first third of the minute and in the last."""
    heads = (
        f"files, 64 writers, {SUSTAINED_S:.0f} s",
        "appends/s",
        "not in the files yet, most MiB",
        "journal, most MiB",
        "resident memory, most MiB",
    )
    fields = {"rate": ",.0f", "overlay_mib": ".1f", "journal_mib": ".1f", "resident_mib": ".1f"}
    samples = minute[(PERDURE_FILES, SUSTAINED)]
    rows = [
        (
            what,
            *(f"{spread(it[part][field] for it in samples):{fields[field]}}" for field in fields),
        )
        for what, part in (("first 20 s", "first"), ("last 20 s", "last"))
    ]
    text = table(heads, rows)
    stored = of(minute, PERDURE_FILES, SUSTAINED, "stored_mib")
    tail, closed = (of(minute, PERDURE_FILES, SUSTAINED, it) for it in ("p99_ms", "close_s"))
    raw = of(minute, RAW_APPEND, SUSTAINED, "rate")
    return (
        f"{text}\n\nStored meanwhile: {stored} MiB; p99 of an append {tail:.1f} ms; closing, "
        f"which brings the files up to date, {closed:.2f} s. One file that shares its syncs: "
        f"{raw} appends a second over {RAW_S:.0f} s."
    )


def _long_table(long: Samples) -> str:
    heads = (
        f"{LONG_READ} entries out of a log of 1 GB, ms",
        "at its start",
        "in its middle",
        "at its end",
        "p99 at its end",
        "filled in, s",
    )
    fields = ("start_ms", "middle_ms", "end_ms", "end_p99_ms", "built_s")
    rows = [(who, *(_told(long[(who, LONG)][0].get(field)) for field in fields)) for who in LONG_IN]
    return f"{table(heads, rows)}\n\nSQLiteSession reads the newest items or all of them."


def _told(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
