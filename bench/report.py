"""The report: goals with their verdicts, and the tables they come from, as Markdown."""

from __future__ import annotations

import datetime
import os
import platform
import sqlite3
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import apsw

from bench.turns import Spread

MARK = "<!-- Below this line `make bench` writes; above it people do. -->"
"""What a person wrote about the figures stays when they are measured again."""


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


def render(sections: Sequence[Section], command: str, load: str) -> str:
    """The measured part of the page."""
    goals = [goal.row() for section in sections for goal in section.goals]
    parts = [
        f"{machine()}\n{load}\nCommand: `{command}`",
        "## Goals\n\nA ratio is the median over the turns, with its extremes in brackets.\n\n"
        + table(("goal", "what", "measured", "floor", "verdict"), goals),
        *(f"## {section.title}\n\n{section.text}" for section in sections if section.text),
    ]
    return "\n\n".join(parts) + "\n"


def write(path: Path, measured: str) -> None:
    """Put the measured part below the mark, keeping what stands above it."""
    above = path.read_text().split(MARK)[0] if path.exists() else "# Performance\n\n"
    path.write_text(f"{above.rstrip()}\n\n{MARK}\n\n{measured}")


def machine() -> str:
    """Where this ran."""
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    today = datetime.datetime.now(datetime.UTC)
    return (
        f"Measured {today:%Y-%m-%d %H:%M} UTC on {os.cpu_count()} CPUs, {memory_gib:.0f} GiB, "
        f"{platform.system()} {platform.release()}, Python {sys.version.split()[0]}, "
        f"SQLite {sqlite3.sqlite_version} (apsw carries {apsw.sqlite_lib_version()})."
    )
