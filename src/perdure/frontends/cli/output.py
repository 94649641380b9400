"""How commands speak: JSON for programs, short tables for people, one line for an error."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Table

from perdure.core import errors
from perdure.core.errors import PerdureError
from perdure.surfaces.boots import SurfaceRecovery

EXIT_NOT_READY = 1
EXIT_NOT_RUNNING = 3
EXITS: dict[type[PerdureError], int] = {
    errors.Invalid: 2,
    errors.Missing: 3,
    errors.Conflict: 4,
    errors.Unavailable: 5,
    errors.Damaged: 6,
    errors.Closed: 7,
}
"""Exit codes by error kind. 1 says that the answer to a question is no; 2 is also bad usage."""

_COUNTS = ("loaded", "replayed", "cut", "requeued", "interrupted", "orphaned", "damaged")

console = Console(highlight=False, soft_wrap=True)
wide = Console(highlight=False, width=1_000)
"""For tables of ids, which are to be copied and so never cut."""

complaints = Console(stderr=True, highlight=False, soft_wrap=True)


def exit_code(error: PerdureError) -> int:
    """The code a process ends with because of an error."""
    for kind in type(error).__mro__:
        if kind in EXITS:
            return EXITS[kind]
    return 1


def say_json(value: Any) -> None:
    """One JSON document on standard output."""
    sys.stdout.buffer.write(msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n")
    sys.stdout.buffer.flush()


def say_error(error: PerdureError, *, as_json: bool) -> None:
    """The one place where an error is shown: a line for people, an object for programs."""
    if as_json:
        say_json({"error": {"code": error.code, "message": str(error)}})
    complaints.print(f"[bold red]perdure:[/] {_plain(str(error))}")


def table(*heads: str) -> Table:
    """A table without lines, and without a head unless columns are named."""
    return Table(*heads, box=None, show_header=bool(heads), pad_edge=False, padding=(0, 2, 0, 0))


def moment(at_s: float) -> str:
    """A point in time for people."""
    return f"{datetime.fromtimestamp(at_s, UTC):%Y-%m-%d %H:%M:%S}"


@contextmanager
def shown_progress() -> Iterator[Callable[[str, int, int], None]]:
    """Progress on standard error, where that is a terminal."""
    bar = Bar(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        console=complaints,
        transient=True,
        disable=not complaints.is_terminal,
    )
    with bar:
        shown = bar.add_task("starting", total=None)

        def progress(what: str, done: int, total: int) -> None:
            bar.update(shown, description=what, completed=done, total=total or None)

        yield progress


def seconds(duration_s: float | None) -> str:
    """A duration for people."""
    if duration_s is None:
        return "running"
    return f"{duration_s * 1000:.1f} ms" if duration_s < 1 else f"{duration_s:.1f} s"


def recovered(found: SurfaceRecovery) -> str:
    """What a recovery did, empty where there was nothing to do."""
    counts = [(name, getattr(found, name)) for name in _COUNTS]
    return ", ".join(f"{count} {name}" for name, count in counts if count)


def _plain(text: str) -> str:
    return text.replace("[", r"\[")
