"""Indexes of responses: what each costs whoever stores one.

A response is created and ended, two commits, by 64 writers, over 20,000 that are there; with every
index, with none but the one that recovery needs, and with one left out at a time.
"""

from __future__ import annotations

from bench.contenders import PERDURE
from bench.report import Section, table
from bench.turns import Sample, of, ratio, run_worker, take_turns
from perdure.surfaces.responses import RESPONSES

MODULE = "response_indexes"
WRITERS = 64
ALL, NONE = "all", "none"
CASE = "create and end"
CONTENDERS = (ALL, NONE, *(f"without_{index.name}" for index in RESPONSES.indexes[1:]))


def measure(turns: int, duration_s: float) -> Section:
    """Everything, in one run."""
    samples = take_turns(CONTENDERS, turns, lambda which: {CASE: _take(which, duration_s)})
    rows = [
        (
            which.replace("_", " ", 1),
            f"{of(samples, which, CASE, 'rate')}",
            f"{of(samples, which, CASE, 'p50_ms').median:.1f}",
            f"{ratio(samples, CASE, 'rate', which, ALL):.2f}x",
            f"{of(samples, which, CASE, 'cpu_us')}",
        )
        for which in CONTENDERS
    ]
    heads = ("indexes", f"responses/s, {WRITERS} writers", "p50 ms", "rate over all", "CPU us each")
    return Section("Indexes of responses: created and ended", [], table(heads, rows))


def _take(which: str, duration_s: float) -> Sample:
    case = f"{which}:{WRITERS}"
    return run_worker(PERDURE, MODULE, [case], duration_s=duration_s)[case]
