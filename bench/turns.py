"""Turns: every contender once, then again in rotated order, so that what the machine does
meanwhile falls on all of them; and what is made of the samples."""

from __future__ import annotations

import json
import statistics
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.contenders import ROOT, python_of

Sample = dict[str, Any]
Samples = dict[tuple[str, str], list[Sample]]
"""By contender and case: one sample a turn."""


class Spread(NamedTuple):
    """A median and the extremes around it."""

    median: float
    low: float
    high: float

    def __format__(self, spec: str) -> str:
        spec = spec or ",.0f"
        return f"{self.median:{spec}} [{self.low:{spec}}..{self.high:{spec}}]"


def spread(values: Iterable[float]) -> Spread:
    """The median of some values with their extremes."""
    known = sorted(values)
    return Spread(statistics.median(known), known[0], known[-1])


def take_turns(
    contenders: Sequence[str],
    turns: int,
    take: Callable[[str], dict[str, Sample]],
) -> Samples:
    """`take` gives a contender's samples by case."""
    samples: Samples = defaultdict(list)
    for turn in range(turns):
        for place in range(len(contenders)):
            contender = contenders[(turn + place) % len(contenders)]
            for case, sample in take(contender).items():
                samples[(contender, case)].append(sample)
    return samples


def of(samples: Samples, contender: str, case: str, field: str) -> Spread:
    """One field over all turns."""
    return spread(sample[field] for sample in samples[(contender, case)])


def ratio(
    samples: Samples, case: str, field: str, ours: str, theirs: str, their_case: str = ""
) -> Spread:
    """Our field over theirs, turn by turn."""
    pairs = zip(samples[(ours, case)], samples[(theirs, their_case or case)], strict=True)
    return spread(mine[field] / other[field] for mine, other in pairs)


def run_worker(
    contender: str,
    module: str,
    cases: Sequence[str],
    *,
    duration_s: float,
    before: Sequence[str] = (),
) -> dict[str, Sample]:
    """Run a module of `bench.peers` in its own process and environment, on fresh files."""
    with tempfile.TemporaryDirectory(prefix="perdure-bench-") as directory:
        command = [*before, str(python_of(contender)), "-m", f"bench.peers.{module}", *cases]
        command += ["--directory", directory, "--duration-s", str(duration_s)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{contender} ended with {done.returncode}:\n{done.stderr[-4000:]}")
    found: dict[str, Sample] = json.loads(done.stdout)
    return found


def scratch() -> tempfile.TemporaryDirectory[str]:
    """A directory for one measurement."""
    return tempfile.TemporaryDirectory(prefix="perdure-bench-")


def size_bytes(directory: Path) -> int:
    """What the files under a directory take."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
