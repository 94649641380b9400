"""`perdure torture`: put this machine's disk, and Perdure on it, to every fault it can make."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from perdure.core.disk import Disk, translated
from perdure.core.errors import Invalid
from perdure.frontends.cli.options import AsJson
from perdure.frontends.cli.output import complaints, console, say_json, shown_progress, table
from perdure.proving.drills.drill import Subject
from perdure.proving.ending import told_as_interrupted
from perdure.proving.faults import FAULTS
from perdure.proving.torture import Order, Progress, Report, covered
from perdure.proving.torture import torture as run

_NAMES = ", ".join(fault.name for fault in FAULTS)


def torture(
    engine: Annotated[
        str, typer.Option(help="What to torture: a new store, on the disk of this path.")
    ] = "sqlite:///state.db",
    faults: Annotated[str, typer.Option(help=f"Only these, with commas between: {_NAMES}.")] = "",
    subject: Annotated[Subject | None, typer.Option(help="Only drills of this part.")] = None,
    seconds: Annotated[float, typer.Option(help="The time to share among the drills.")] = 120,
    seed: Annotated[str, typer.Option(help="Where every choice comes from.")] = "1",
    case: Annotated[int | None, typer.Option(help="Judge this case again, alone.")] = None,
    counted: Annotated[
        bool,
        typer.Option("--counted", help="Judge what every change must pass; --seconds at most."),
    ] = False,
    json: AsJson = False,
) -> None:
    """Put an engine, its blobs and the server to every fault this machine can make, in a
    directory of its own, and say what held. Needs no root; says what it could not test, and why.

    Exits with 0 if all that was tested holds, with 1 on a violation or where nothing could be
    tested, with 2 if what is asked for makes no sense."""
    order = Order(
        home=_home(engine),
        seed=seed,
        seconds=seconds,
        faults=tuple(name.strip() for name in faults.split(",") if name.strip()),
        subject=subject,
        case=case,
        counted=counted,
        engine=engine,
    )
    kept = False
    try:
        with told_as_interrupted(), _progress() as progress:
            report = asyncio.run(run(order, progress))
        kept = any(row.violations for row in report.rows)
    finally:
        if not kept:
            Disk().remove_tree(order.home)
    if json:
        say_json(report)
    else:
        _show(report)
    if not report.ok:
        raise typer.Exit(1)


@contextmanager
def _progress() -> Iterator[Progress]:
    """A bar on a terminal; elsewhere a line when something begins."""
    with shown_progress() as shown:
        if complaints.is_terminal:
            yield shown
            return

        def told(what: str, done: int, total: int) -> None:
            if done == 0:
                complaints.print(what)

        yield told


def _home(engine: str) -> Path:
    """A new directory on the disk that the engine's path names."""
    prefix = "sqlite:///"
    if not engine.startswith(prefix):
        raise Invalid(
            f"{engine} cannot be tortured: name a sqlite:/// path. What memory:// holds is gone "
            "with its process, and it promises nothing else."
        )
    beside = Path(engine.removeprefix(prefix)).absolute().parent
    with translated(beside):
        Disk().make_directory(beside)
        return Disk().private_directory(beside)


def _show(report: Report) -> None:
    rows = table("fault", "subject", "cases", "of", "seconds", "verdict")
    for row in report.rows:
        of = "" if row.planned is None else f"{row.planned:,}"
        rows.add_row(
            row.fault, row.subject, f"{row.cases:,}", of, f"{row.seconds:.1f}", row.verdict
        )
    for column in rows.columns[2:5]:
        column.justify = "right"
    console.print(rows)
    console.print(f"\n{covered(report.rows)}, seed {report.seed}, {report.seconds:.0f} s")
    for row in report.rows:
        if row.lacks is not None:
            console.print(
                f"not tested here: {row.fault} / {row.subject}: {row.lacks}", markup=False
            )
        for violation in row.violations:
            console.print(f"[red]VIOLATION[/] {row.fault} / {row.subject} case {violation.case}:")
            console.print(f"  {violation.what}", markup=False)
            console.print(f"  kept in {violation.kept}", markup=False)
        if row.again is not None:
            console.print(f"  again: {row.again}", markup=False)
    if report.undrilled:
        console.print(f"in no drill yet: {', '.join(report.undrilled)}")
    console.print(_conclusion(report))


def _conclusion(report: Report) -> str:
    wrong = sum(len(row.violations) for row in report.rows)
    if wrong:
        return f"a promise is broken: {wrong} violation{'s' if wrong > 1 else ''}"
    if any(row.short for row in report.rows):
        return "nothing broke, but not all of it was judged: give it more --seconds"
    if not report.ok:
        return "nothing was tested: give it more --seconds, or what it lacks"
    idle = sum(row.lacks is None and not row.cases for row in report.rows)
    more = f"; {idle} drill{'s' * (idle > 1)} judged nothing: give more --seconds" if idle else ""
    return f"every promise that was tested holds, in the cases above{more}"
