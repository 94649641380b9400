"""The torture run: every drill that this machine allows, within a budget, and what came of it.

It works in a directory of its own, on whatever disk that lies, and touches nothing else. Every
choice comes from the seed; how far a drill gets depends on the time it is given.
"""

from __future__ import annotations

import errno
import platform
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import msgspec

from perdure import __version__
from perdure.core.disk import Disk
from perdure.core.errors import Invalid
from perdure.proving.drills import DRILLS
from perdure.proving.drills.drill import Drill, Subject, Trial, Violation
from perdure.proving.faults import FAULTS
from perdure.proving.waiting import TooLate

_PARTS: tuple[Subject, ...] = ("engine", "blobs", "server")
"""What every fault is to be put to."""

PER_CHANGE = {
    "process-crash / engine": 50,
    "process-crash / files": 20,
    "process-crash / process": 5,
    "process-crash / files-process": 10,
    "process-crash / server": 10,
    "process-crash / postgres": 42,
    "process-crash / shards": 200,
    "process-crash / workers": 300,
    "power-cut / engine": 1_000,
    "power-cut / files": 23_500,
    "power-cut / blobs": 300,
    "power-cut / ext4": 20,
    "power-cut / files-ext4": 20,
    "failed-sync / engine": 200,
    "full-disk / engine": 200,
    "failed-sync / files": 100,
    "full-disk / files": 1_000,
    "failed-sync / files-process": 10,
    "full-disk / files-process": 10,
    "failed-sync / blobs": 60,
    "full-disk / blobs": 90,
    "damage / engine": 3_000,
    "damage / files": 4_000,
    "damage / blobs": 2_000,
    "clock-jump / engine": 72,
    "clock-jump / files": 72,
    "clock-jump / blobs": 64,
    "read-only / files": 50,
}
"""Cases that every change of the program has to pass; of other drills, `_FEW`."""

_FEW = 5

Progress = Callable[[str, int, int], None]
"""Told what runs, how many cases were judged, and how many there are (0: nobody can say)."""


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """What to torture. `faults` and `subject` choose drills (empty: all); `seconds` are shared by
    them, or end the run where it is `counted`: then each drill judges what every change has to
    pass. `thorough` is both: so much at least, and more where there is time. `case` repeats one
    case of one drill. `engine` is what the command that repeats one names."""

    home: Path
    seed: str
    seconds: float
    faults: tuple[str, ...] = ()
    subject: str | None = None
    case: int | None = None
    counted: bool = False
    thorough: bool = False
    engine: str | None = None


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """What one drill came to. `planned` is how many cases there are, where they can be counted;
    `wanted` how many were to be judged; `lacks` says why it did not run."""

    fault: str
    subject: str
    says: str
    cases: int = 0
    planned: int | None = None
    wanted: int | None = None
    seconds: float = 0.0
    notes: dict[str, int] = {}
    violations: tuple[Violation, ...] = ()
    again: str | None = None
    lacks: str | None = None

    @property
    def short(self) -> bool:
        """Whether fewer cases were judged than were wanted, and are left."""
        left = self.planned is None or self.cases < self.planned
        return self.lacks is None and left and self.cases < (self.wanted or 0)

    @property
    def verdict(self) -> str:
        """One word for a table."""
        if self.lacks is not None:
            return "not tested here"
        if self.violations:
            return "VIOLATED"
        if self.short:
            return "too few in the time given"
        return "holds" if self.cases else "no case in the time given"


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What a run came to, on which machine. It is not `ok` where nothing could be judged.
    `undrilled` are the faults and parts that no drill of this release brings together."""

    ok: bool
    seed: str
    seconds: float
    version: str
    machine: str
    directory: str
    rows: tuple[Row, ...]
    undrilled: tuple[str, ...] = ()


def undrilled(drilled: Iterable[Drill | Row]) -> tuple[str, ...]:
    """Every fault of the model and part of the program that none of these brings together."""
    known = {_name(one) for one in drilled}
    every = (f"{fault.name} / {part}" for fault in FAULTS for part in _PARTS)
    return tuple(name for name in every if name not in known)


def _name(drilled: Drill | Row) -> str:
    fault = drilled.fault if isinstance(drilled, Row) else drilled.fault.name
    return f"{fault} / {drilled.subject}"


def chosen(order: Order) -> list[Drill]:
    """The drills of an order. Raises `Invalid` where there is none."""
    known = {fault.name for fault in FAULTS}
    if unknown := sorted(set(order.faults) - known):
        raise Invalid(f"no fault is named {', '.join(unknown)}. Known: {', '.join(sorted(known))}.")
    drills = [
        drill
        for drill in DRILLS
        if (not order.faults or drill.fault.name in order.faults)
        and order.subject in (None, drill.subject)
    ]
    if not drills:
        raise Invalid(f"no drill puts {', '.join(order.faults)} to {order.subject}.")
    if not order.seconds > 0:
        raise Invalid(f"--seconds {order.seconds:g} leaves no time to judge anything.")
    if order.case is not None and len(drills) != 1:
        raise Invalid("a case belongs to one drill: name its fault and its subject too.")
    return drills


async def torture(order: Order, progress: Progress) -> Report:
    """Run the drills one after another; what one leaves of its time, the others get."""
    began_s = time.monotonic()
    drills = chosen(order)
    ready = [drill for drill in drills if drill.lacks() is None]
    rows: dict[Drill, Row] = {}
    for at, drill in enumerate(ready):
        left_s = order.seconds - (time.monotonic() - began_s)
        name = f"{at + 1} of {len(ready)}: {_name(drill)}"
        told = partial(progress, name)
        seconds = left_s if order.counted else left_s / (len(ready) - at)
        rows[drill] = await _row(drill, order, max(1.0, seconds), told)
    for drill in drills:
        if (lacks := drill.lacks()) is not None and drill not in rows:
            rows[drill] = _named(drill, lacks=lacks)
    return Report(
        ok=not any(row.violations or row.short for row in rows.values())
        and any(row.cases for row in rows.values()),
        seed=order.seed,
        seconds=round(time.monotonic() - began_s, 1),
        version=__version__,
        machine=f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        directory=str(order.home),
        rows=tuple(rows[drill] for drill in drills),
        undrilled=undrilled(DRILLS),
    )


async def _row(drill: Drill, order: Order, seconds: float, told: Callable[[int, int], None]) -> Row:
    judged = order.counted or order.thorough
    wanted = PER_CHANGE.get(_name(drill), _FEW) if judged and order.case is None else None
    trial = Trial(
        order.home / f"{drill.fault.name}-{drill.subject}",
        order.seed,
        seconds=seconds,
        case=order.case,
        enough=wanted if order.counted else None,
        least=(wanted if order.thorough else None) or 1,
        told=lambda done, planned: told(done, planned or 0),
    )
    told(0, 0)
    try:
        await drill.run(trial)
    except TooLate as late:
        trial.judged(trial.at, [f"a hang: {late}"], trial.home)
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            Disk().remove_tree(trial.home)
            return _named(drill, lacks=f"{trial.home.parent} has no space left for it")
        trial.judged(trial.at, [f"it ended by {_told(error)}"], trial.home)
    if not trial.violations:
        Disk().remove_tree(trial.home)
    return _named(
        drill,
        cases=trial.cases,
        planned=trial.planned,
        wanted=wanted,
        seconds=round(trial.taken_s, 1),
        notes=trial.notes,
        violations=tuple(trial.violations),
        again=_again(drill, order, trial.violations[0]) if trial.violations else None,
    )


def _told(error: Exception) -> str:
    """An error that nobody expected, and where it came from."""
    *_, last = traceback.extract_tb(error.__traceback__)
    return f"{error!r} in {Path(last.filename).name}:{last.lineno}"


def _named(drill: Drill, **what: object) -> Row:
    row = Row(fault=drill.fault.name, subject=drill.subject, says=drill.says)
    return msgspec.structs.replace(row, **what)


def _again(drill: Drill, order: Order, violation: Violation) -> str:
    """The command that judges this case again."""
    engine = f"--engine {shlex.quote(order.engine)} " if order.engine else ""
    return (
        f"perdure torture {engine}--faults {drill.fault.name} --subject {drill.subject} "
        f"--seed {shlex.quote(order.seed)} --case {violation.case}"
    )


def covered(rows: Sequence[Row]) -> str:
    """How many cases of how many drills, in a line."""
    ran = [row for row in rows if row.lacks is None]
    return f"{sum(row.cases for row in ran)} cases of {len(ran)} drills on {sys.platform}"
