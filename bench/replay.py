"""Restarting on plain files: a store of a million entries, killed under load, opened again; beside
reading as many documents that stand in one file, a line each.

Answers goal 10 for files. The manifest is the snapshot: what it covers is not read, and what the
journal has beyond it is applied to the files again, and synced, before anybody may write.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from bench.contenders import PERDURE, ROOT, python_of
from bench.report import Goal, Section, table
from bench.turns import Sample, scratch, spread

ENTRIES = 1_000_000
_OPEN, _DECODE = "open", "decode"


def measure(turns: int) -> Section:
    """Everything, in one run."""
    with scratch() as name:
        store, lines = Path(name) / "store", Path(name) / "lines.jsonl"
        _run(_OPEN, store)
        left = [_run(_OPEN, store)["left"]]
        opened, read = [], []
        for _ in range(min(turns, 3)):
            opened.append(_run(_OPEN, store))
            left.append(opened[-1]["left"])
            read.append(_run(_DECODE, lines))
    replays = spread(count / one["opened_s"] for count, one in zip(left, opened, strict=False))
    reads = spread(ENTRIES / one["opened_s"] for one in read)
    pairs = list(zip(left, opened, read, strict=False))
    rates = [count / one["opened_s"] * all["opened_s"] / ENTRIES for count, one, all in pairs]
    parts = [one["opened_s"] / all["opened_s"] for _, one, all in pairs]
    what = "files, opened after SIGKILL"
    goals = [
        Goal("10", f"{what}: entries applied a second, over reading lines", spread(rates), 0.5),
        Goal(
            "10",
            f"{what}: {ENTRIES:,} entries, over reading all of them",
            spread(parts),
            0.2,
            at_most=True,
            spec=".3f",
        ),
    ]
    heads = (f"{ENTRIES:,} entries of 1 KiB in 64 streams", "s", "entries/s", "entries in it")
    rows = [
        (
            "opened after SIGKILL",
            f"{spread(one['opened_s'] for one in opened):.3f}",
            f"{replays}",
            f"{spread(left)}",
        ),
        (
            "read from one file, a line each",
            f"{spread(one['opened_s'] for one in read):.2f}",
            f"{reads}",
            f"{ENTRIES:,}",
        ),
    ]
    return Section("", goals, table(heads, rows))


def _run(which: str, path: Path) -> Sample:
    command = [str(python_of(PERDURE)), "-m", "bench.peers.killed_files", which, str(path)]
    done = subprocess.run(
        [*command, str(ENTRIES)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.stderr:
        raise RuntimeError(f"{which} of {path} failed:\n{done.stderr[-4000:]}")
    told: Sample = json.loads(done.stdout or "{}")
    return told
