"""The report: goals with their verdicts, and the tables they come from, as Markdown."""

from __future__ import annotations

import datetime
import os
import platform
import re
import sqlite3
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import apsw

from bench.turns import Spread

MARK = "<!-- Below this line `make bench` writes; above it people do. -->"
"""What a person wrote about the figures stays when they are measured again."""


_BLOCK = re.compile(r"<!-- ([\w-]+) -->\n(.*?)(?=\n<!-- |\Z)", re.DOTALL)


class Goal(NamedTuple):
    """A floor and where we stand. `at_most` says that smaller is better."""

    number: str
    question: str
    measured: Spread
    floor: float
    at_most: bool = False
    spec: str = ".2f"
    unit: str = "x"

    @property
    def met(self) -> bool:
        median = self.measured.median
        return median <= self.floor if self.at_most else median >= self.floor

    def row(self) -> tuple[str, ...]:
        sign = "<=" if self.at_most else ">="
        unit = f" {self.unit}" if self.unit not in ("x", "") else self.unit
        return (
            self.number,
            self.question,
            f"{self.measured:{self.spec}}{unit}",
            f"{sign} {self.floor:g}{unit}",
            "met" if self.met else "**missed**",
        )


class Section(NamedTuple):
    """The answer to one question: goals, and tables of what was measured."""

    title: str
    goals: list[Goal]
    text: str


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def render(section: Section, load: str) -> str:
    """What was measured for one question: when and where, its goals, its tables."""
    goals = [goal.row() for goal in section.goals]
    heads = ("goal", "what", "measured", "floor", "verdict")
    parts = [
        f"## {section.title}",
        f"{machine()} {load}",
        *([table(heads, goals)] if goals else []),
        *([section.text] if section.text else []),
    ]
    return "\n\n".join(parts)


def write(path: Path, measured: Mapping[str, str], order: Iterable[str]) -> None:
    """Put what was measured below the mark, question by question in `order`. What stands above it
    stays, and so does what was measured before for other questions."""
    above, _, below = (
        path.read_text().partition(MARK) if path.exists() else ("# Performance", "", "")
    )
    known = {block[1]: block[2].strip() for block in _BLOCK.finditer(below)} | measured
    blocks = [f"<!-- {name} -->\n{known[name]}" for name in order if name in known]
    path.write_text("\n\n".join([above.rstrip(), MARK, *blocks]) + "\n")


def machine() -> str:
    """Where this ran."""
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    today = datetime.datetime.now(datetime.UTC)
    return (
        f"Measured {today:%Y-%m-%d %H:%M} UTC on {os.cpu_count()} CPUs, {memory_gib:.0f} GiB, "
        f"{platform.system()} {platform.release()}, Python {sys.version.split()[0]}, "
        f"SQLite {sqlite3.sqlite_version} (apsw carries {apsw.sqlite_lib_version()})."
    )
