"""`make bench`: every question one after another, printed and written to docs/performance.md."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from bench import (
    abuse,
    background,
    chain,
    engine,
    files,
    http,
    indexes,
    postgres,
    recovery,
    report,
    streams,
    tracing,
    workers,
)
from bench.contenders import ROOT
from bench.report import Section

PAGE = ROOT / "docs" / "performance.md"

QUESTIONS: dict[str, tuple[ModuleType, Callable[[argparse.Namespace], Section]]] = {
    "engine": (engine, lambda asked: engine.measure(asked.turns, asked.duration_s)),
    "postgres": (postgres, lambda asked: postgres.measure(asked.turns, asked.duration_s)),
    "indexes": (indexes, lambda asked: indexes.measure(asked.turns, asked.duration_s)),
    "http": (http, lambda asked: http.measure(asked.turns, max(1.0, asked.duration_s))),
    "http-postgres": (http, lambda asked: http.shared(asked.turns, max(1.0, asked.duration_s))),
    "streams": (streams, lambda asked: streams.measure(asked.turns)),
    "chain": (chain, lambda asked: chain.measure(asked.turns)),
    "background": (background, lambda asked: background.measure(asked.turns)),
    "abuse": (abuse, lambda asked: abuse.measure(min(asked.turns, 3))),
    "files": (files, lambda asked: files.measure(asked.turns)),
    "workers": (workers, lambda asked: workers.measure(asked.turns, asked.duration_s)),
    "recovery": (
        recovery,
        lambda asked: recovery.measure(min(asked.turns, 3), asked.responses, asked.duration_s),
    ),
}
"""What can be asked for, the module that answers it, and how it is asked."""


def main() -> None:
    asked = _arguments()
    if not tracing.available():
        sys.exit("the slow regime and the counts of fsyncs come from strace, which is not here.")
    for name in asked.only or QUESTIONS:
        started_s, load_before = time.monotonic(), _load()
        section = QUESTIONS[name][1](asked)
        print(f"{name}: {time.monotonic() - started_s:.0f} s", file=sys.stderr, flush=True)
        load = f"Load average over a minute {load_before} before, {_load()} after."
        measured = report.render(section, load)
        print(measured, end="\n\n", flush=True)
        if asked.write:
            report.write(asked.write, {name: measured}, QUESTIONS)


def _arguments() -> argparse.Namespace:
    heads = ((name, module.__doc__ or "") for name, (module, _) in QUESTIONS.items())
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=__doc__,
        epilog="\n".join(f"{name:14}{head.splitlines()[0]}" for name, head in heads),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--only", nargs="+", choices=QUESTIONS, metavar="QUESTION", help="some of those below"
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
