"""What a drill is, and what it tells: cases judged, and what did not hold."""

from __future__ import annotations

import os
import random
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, Protocol

import msgspec

from perdure.core.disk import Disk
from perdure.proving.faults import Fault

Subject = Literal[
    "engine",
    "files",
    "process",
    "files-process",
    "history",
    "http",
    "ext4",
    "files-ext4",
    "blobs",
    "server",
    "postgres",
    "shards",
    "workers",
]
"""The `engine` is that of sqlite, `files` that of plain files. A `process` is an engine in a
process of its own, seen from the kernel's side; a `history` is what several clients of an engine
were told, `http` what those of a server were, `ext4` that file system under engine and blobs,
`postgres` a database of its own under an engine, `shards` several stores that are one, and
`workers` those of agents in a store."""

_SQLITE = ("sqlite", "state.db", "state.db.lock")
_FILES = ("file", "state", "state/.perdure/lock")
_STORES: dict[Subject, tuple[str, str, str]] = {
    "engine": _SQLITE,
    "process": _SQLITE,
    "ext4": _SQLITE,
    "files": _FILES,
    "files-process": _FILES,
    "files-ext4": _FILES,
}


def path_in(place: Path, subject: Subject) -> Path:
    """Where a subject's store lies in a directory; the subject is an engine with one owner."""
    return place / _STORES[subject][1]


def url_in(place: Path, subject: Subject) -> str:
    """The URL of that store."""
    return f"{_STORES[subject][0]}:///{path_in(place, subject)}"


def lock_in(place: Path, subject: Subject) -> Path:
    """Its lock file."""
    return place / _STORES[subject][2]


_MEMORY = Path("/dev/shm")

_VIOLATIONS_MAX = 5
"""A drill ends when so much is wrong: more of the same says nothing new."""


class Violation(msgspec.Struct, frozen=True):
    """One thing that should have held. `kept` is where the store lies that shows it."""

    case: int
    what: str
    kept: str


class Trial:
    """One run of a drill in a directory of its own. Every choice comes from `seed`.

    Cases are numbered from 1 in an order that the seed decides. A drill goes through them until
    `over`: after so many that they are `enough`, or after its seconds and the `least` it has to
    judge. Where only one is asked for it judges that one alone.
    """

    def __init__(
        self,
        home: Path,
        seed: str,
        *,
        seconds: float,
        case: int | None = None,
        enough: int | None = None,
        least: int = 1,
        wrong_max: int = _VIOLATIONS_MAX,
        told: Callable[[int, int | None], None] = lambda done, planned: None,
    ) -> None:
        self.home = home
        self.seed = seed
        self.case = case
        self.enough = enough
        self.least = least
        self.cases = 0
        self.at = 1
        """The case that was looked at last."""
        self.planned: int | None = None
        """How many cases there are, where they can be counted."""
        self.violations: list[Violation] = []
        self.notes: dict[str, int] = {}
        """Counts that say what the cases were made of."""
        self.disk = Disk()
        self._wrong_max = wrong_max
        self._told = told
        self._began_s = time.monotonic()
        self._ends_s = self._began_s + seconds
        home.mkdir(parents=True, exist_ok=True)

    @property
    def over(self) -> bool:
        """Whether the time is used up, by `least` cases, or enough was judged or is known to be
        wrong."""
        if len(self.violations) >= self._wrong_max:
            return True
        judged = self.enough is not None and self.cases >= self.enough
        late = self.cases >= self.least and time.monotonic() > self._ends_s
        return self.case is None and (judged or late)

    @property
    def taken_s(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self._began_s

    def rng(self, *of: object) -> random.Random:
        """A source of choices that depends on the seed and on what they are for."""
        return random.Random("/".join(map(str, (self.seed, *of))))

    def wants(self, case: int) -> bool:
        """Whether this case is to be judged."""
        self.at = case
        return self.case in (None, case)

    @contextmanager
    def place(self, case: int) -> Iterator[Path]:
        """An empty directory for one case; it stays where the case shows a violation."""
        place = self.home / f"case-{case}"
        place.mkdir()
        known = len(self.violations)
        yield place
        if len(self.violations) == known:
            self.disk.remove_tree(place)

    @contextmanager
    def in_memory(self) -> Iterator[Path]:
        """A directory that is on no disk, if this machine has such: for stores that are looked at
        once, and lie where they lie only to be read again."""
        within = _MEMORY if os.access(_MEMORY, os.W_OK) else self.home
        with tempfile.TemporaryDirectory(prefix="perdure-proof-", dir=within) as place:
            yield Path(place)

    async def each(self, judge: Callable[[int, Path], Awaitable[Iterable[str]]]) -> None:
        """Judge one case after another, each in a place of its own, until the trial is over."""
        case = 0 if self.case is None else self.case - 1
        while not self.over and case != self.case:
            case += 1
            if self.wants(case):
                with self.place(case) as place:
                    self.judged(case, await judge(case, place), place)

    def judged(self, case: int, troubles: Iterable[str], store: Path) -> None:
        """A case was judged by what lies in `store`; `troubles` should be empty."""
        self.cases += 1
        self.violations += [Violation(case, trouble, str(store)) for trouble in troubles]
        self._told(self.cases, self.planned)

    def count(self, what: str, by: int = 1) -> None:
        """Count something that says what the cases were made of."""
        self.notes[what] = self.notes.get(what, 0) + by


class Drill(Protocol):
    """One fault put to one part of the program, as often and in as many ways as time allows."""

    fault: Fault
    subject: Subject
    says: str
    """What is done and judged, in a line for the evidence page."""

    def lacks(self) -> str | None:
        """Why it cannot run on this machine, and what to do about it; None if it can."""
        ...

    async def run(self, trial: Trial) -> None:
        """Judge cases until the trial is over or all are judged."""
        ...
