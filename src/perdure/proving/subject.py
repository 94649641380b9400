"""A store under test: what somebody who proves an engine supplies, and what a rule is given."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from perdure.core.clock import Clock, SystemClock
from perdure.core.engine import Engine
from perdure.core.errors import Invalid, PerdureError
from perdure.core.keys import Key
from perdure.core.layouts import Index, Layout, Log, Records
from perdure.core.values import Record
from perdure.engines.checked import Broken, Checked

T = TypeVar("T")
E = TypeVar("E", bound=PerdureError)


class Note(msgspec.Struct):
    """A value with every kind of indexed field, and room for anything else."""

    status: str | None = None
    rank: int = 0
    due_s: int | None = None
    body: Any = None


NOTES = Records(
    "notes",
    Note,
    key=("tenant", "box", "id"),
    indexes=(
        Index("by_status", ("status", "rank")),
        Index("by_rank", ("rank", "due_s")),
        Index("due", ("due_s",), every_tenant=True),
    ),
)
FACTS = Records("facts", Note, key=("tenant", "id"), path="things/*/fact")
MOVES = Records(
    "moves", Note, key=("tenant", "game", "id"), partition="game", path="games/*/moves/*"
)
EVENTS = Log("events", Note, key=("tenant", "id"), path="things/*/events")
PLIES = Log("plies", Note, key=("tenant", "game"), partition="game", path="games/*/plies")

LAYOUTS: tuple[Layout, ...] = (NOTES, FACTS, MOVES, EVENTS, PLIES)


class Subject(msgspec.Struct, frozen=True):
    """How to open the engine that is to be proven.

    `open` opens the store in a directory (empty at first); opened there again after `close`, a
    durable engine finds the same store. `restore` makes a store in a directory (the second) of
    what `Engine.backup` wrote into another; an engine that survives its process needs one.
    `copy` opens in a directory a store that becomes a copy of the one whose id it is given.
    `damage`, where it can be given, changes a stored byte of the record of `NOTES` at a key, in a
    store that is closed.
    """

    name: str
    open: Callable[[Path, Sequence[Layout], Clock], Awaitable[Engine]]
    damage: Callable[[Path, Key], None] | None = None
    restore: Callable[[Path, Path], Awaitable[None]] | None = None
    copy: Callable[[Path, Sequence[Layout], Clock, str], Awaitable[Engine]] | None = None


class LateClock(SystemClock):
    """The machine's clocks, moved on by `late_s` as a rule wishes."""

    late_s = 0.0

    def now_s(self) -> float:
        return super().now_s() + self.late_s

    def monotonic_s(self) -> float:
        return super().monotonic_s() + self.late_s


class Store:
    """One store, fresh for each rule. Engines come wrapped in `Checked`, which trusts nothing and
    runs `verify` as they are closed."""

    def __init__(self, subject: Subject, directory: Path) -> None:
        self.subject = subject
        self.directory = directory
        self.clock = LateClock()
        self._opened: list[Checked] = []

    async def open(self, *, around: Callable[[Engine], Engine] | None = None) -> Checked:
        """Open the store; `around` puts a wrapper between the engine and its checks."""
        engine = await self.open_unchecked()
        checked = Checked(around(engine) if around else engine)
        self._opened.append(checked)
        return checked

    async def open_unchecked(self) -> Engine:
        """Open a store in which something is known to be wrong; whoever asks closes it."""
        return await self.subject.open(self.directory, LAYOUTS, self.clock)

    async def reopen(self, engine: Engine) -> Checked:
        """Close the engine and open its store again."""
        await engine.close()
        return await self.open()

    async def restored(self, copy: Path) -> Store:
        """A store beside this one, made of a backup; whoever asks closes it."""
        if self.subject.restore is None:
            raise Invalid(f"{self.subject.name} was given no way to restore a backup.")
        other = self.directory / "restored"
        await self.subject.restore(copy, other)
        return Store(self.subject, other)

    async def open_copy(self, store_id: str) -> Checked:
        """Open the store as one that becomes a copy of another."""
        if self.subject.copy is None:
            raise Invalid(f"{self.subject.name} was given no way to make a copy.")
        engine = await self.subject.copy(self.directory, LAYOUTS, self.clock, store_id)
        self._opened.append(checked := Checked(engine))
        return checked

    def beside(self, name: str) -> Store:
        """Another store, empty at first; whoever asks closes it."""
        other = Store(self.subject, self.directory / name)
        other.clock = self.clock
        return other

    def damage(self, key: Key) -> None:
        """Change a stored byte of the record of `NOTES` at `key`; the store is closed."""
        if self.subject.damage is None:
            raise Invalid(f"{self.subject.name} was given no way to damage a store.")
        self.subject.damage(self.directory, key)

    async def close(self) -> None:
        """Close, and so verify, whatever a rule left open."""
        for engine in self._opened:
            await engine.close()


def same(actual: T, expected: T, what: str = "") -> None:
    """Demand that two things are equal."""
    if actual != expected:
        raise Broken(f"{what + ': ' if what else ''}expected {expected!r}, found {actual!r}")


def holds(condition: bool, what: str) -> None:
    """Demand a condition."""
    if not condition:
        raise Broken(what)


def there(record: Record[T] | None) -> Record[T]:
    """Demand that a record was found."""
    if record is None:
        raise Broken("a record that was written is absent")
    return record


async def refused(kind: type[E], asked: Awaitable[Any], *, exactly: bool = True) -> E:
    """Demand that a call raises this kind of error (or a finer one, unless `exactly`)."""
    try:
        answer = await asked
    except kind as error:
        if exactly and type(error) is not kind:
            raise Broken(f"expected {kind.__name__}, found {type(error).__name__}") from error
        return error
    raise Broken(f"expected {kind.__name__}, found the answer {answer!r}")


async def all_refused(
    kind: type[E], *asked: Coroutine[Any, Any, Any], exactly: bool = True
) -> None:
    """Demand of each of some calls what `refused` demands of one."""
    try:
        for call in asked:
            await refused(kind, call, exactly=exactly)
    finally:
        for call in asked:
            call.close()


async def stored(engine: Engine) -> list[Any]:
    """Everything in the store, to show that something changed nothing."""
    found: list[Any] = []
    for records in (NOTES, FACTS, MOVES):
        page = await engine.scan(records, (), limit=1_000)
        found += [(records.name, record) for record in page.items]
    for log in (EVENTS, PLIES):
        for stream in (await engine.streams(log, (), limit=1_000)).items:
            tip = await engine.tip(log, stream)
            entries = await engine.read(log, stream, after=tip.first - 1, limit=1_000)
            found.append((log.name, stream, tip, entries))
    return found
