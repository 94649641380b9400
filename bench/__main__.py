"""`make bench`: every question in one run, printed and written to docs/performance.md."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from bench import chain, engine, files, http, recovery, report, streams, tracing
from bench.contenders import ROOT
from bench.report import Section

PAGE = ROOT / "docs" / "performance.md"


def main() -> None:
    asked = _arguments()
    if not tracing.available():
        sys.exit("the slow regime and the counts of fsyncs come from strace, which is not here.")
    questions: dict[str, Callable[[], Section]] = {
        "engine": lambda: engine.measure(asked.turns, asked.duration_s),
        "http": lambda: http.measure(asked.turns, max(1.0, asked.duration_s)),
        "streams": lambda: streams.measure(asked.turns),
        "chain": lambda: chain.measure(asked.turns),
        "files": lambda: files.measure(asked.turns),
        "recovery": lambda: recovery.measure(
            min(asked.turns, 3), asked.responses, asked.duration_s
        ),
    }
    load_before = _load()
    sections, page = [], ""
    for name in asked.only or questions:
        started_s = time.monotonic()
        sections.append(questions[name]())
        print(f"{name}: {time.monotonic() - started_s:.0f} s", file=sys.stderr, flush=True)
        page = report.render(
            sections,
            f"python -m bench {' '.join(sys.argv[1:])}".strip(),
            f"Load average over a minute {load_before} before, {_load()} after.",
        )
        if asked.write:  # after each, so that a failure later costs only what comes later
            report.write(asked.write, page)
    print(page)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument(
        "--only", nargs="+", choices=("engine", "http", "streams", "chain", "files", "recovery")
    )
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--duration-s", type=float, default=0.8)
    parser.add_argument("--responses", type=int, nargs="+", default=[1_000, 100_000, 1_000_000])
    parser.add_argument(
        "--write", type=Path, help=f"the page to write; {PAGE.name} in `make bench`"
    )
    return parser.parse_args()


def _load() -> str:
    return f"{os.getloadavg()[0]:.1f}"


if __name__ == "__main__":
    main()
