"""Rows: all that a store holds, in a form in which another store can take it over unchanged.

Through batches a record that moves would begin again at version 1, and tombstones, incarnations and
operation ids cannot be seen at all. Rows carry them as they are. Every engine gives them in one
order, so that two stores can be compared side by side: by kind, then by collection, then by key.

A stream travels in stretches. One that is half there is a sound stream that ends earlier, so a
store that is half loaded is sound as well.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator, Sequence

import msgspec

from perdure.core import keys
from perdure.core.errors import Invalid
from perdure.core.keys import SEPARATOR
from perdure.core.layouts import Layout, Log, Records
from perdure.core.limits import PAGE_MAX, ROWS_BYTES_MAX
from perdure.core.values import Tip, record_sum


class Kind(enum.IntEnum):
    """The kinds of rows, in their order."""

    RECORDS = 0
    TOMBSTONES = 1
    STREAMS = 2
    FLOORS = 3
    OPERATIONS = 4


JUST_ABOVE = "\x01"
"""Behind a key, it is above that key and below every other that is above it."""

_ABOVE_ALL = keys.span(())[1]


class At(msgspec.Struct, frozen=True, array_like=True, order=True):
    """The place of a row in the order. `number` is of the last entry of a stretch."""

    kind: Kind
    name: str
    place: str = ""
    number: int = 0


class RecordRow(msgspec.Struct, frozen=True, gc=False, tag="record"):
    """A record in its version; without a value, the tombstone of one."""

    collection: str
    place: str
    version: int
    value: bytes | None = None
    attachment: bytes | None = None

    @property
    def at(self) -> At:
        kind = Kind.TOMBSTONES if self.value is None else Kind.RECORDS
        return At(kind, self.collection, self.place)

    @property
    def stored(self) -> tuple[int, int]:
        """Its version, negative for a tombstone, and its checksum."""
        checksum = record_sum(
            self.collection, self.place, self.version, self.value, self.attachment
        )
        return (-self.version if self.value is None else self.version), checksum

    @property
    def size_bytes(self) -> int:
        return len(self.place) + len(self.value or b"") + len(self.attachment or b"")


class StreamRow(msgspec.Struct, frozen=True, gc=False, tag="stream"):
    """A stretch of a stream that begins with entry `first`: the entries numbered above `after`.
    Only of an empty stream there is one without values."""

    log: str
    place: str
    incarnation: int
    first: int
    after: int
    values: tuple[bytes, ...] = ()

    @property
    def tip(self) -> Tip:
        """Where the stream stands if it ends here."""
        return Tip(self.incarnation, self.first, self.after + len(self.values))

    @property
    def at(self) -> At:
        return At(Kind.STREAMS, self.log, self.place, self.tip.last)

    @property
    def size_bytes(self) -> int:
        return len(self.place) + sum(map(len, self.values))


class FloorRow(msgspec.Struct, frozen=True, gc=False, tag="floor"):
    """The highest incarnation among the dropped streams of a log that were forgotten since: none
    that is made anew may begin below it."""

    log: str
    incarnation: int

    @property
    def at(self) -> At:
        return At(Kind.FLOORS, self.log)

    @property
    def size_bytes(self) -> int:
        return len(self.log)


class OperationRow(msgspec.Struct, frozen=True, gc=False, tag="operation"):
    """An operation id, what it stands for and what it was answered; "" is the common partition."""

    id: str
    partition: str
    digest: int
    numbers: tuple[int, ...]

    @property
    def at(self) -> At:
        return At(Kind.OPERATIONS, self.id, self.partition)

    @property
    def size_bytes(self) -> int:
        return len(self.id) + 8 * len(self.numbers)


Row = RecordRow | StreamRow | FloorRow | OperationRow


class Rows(msgspec.Struct, frozen=True):
    """A page of rows. `after` is where the next page goes on; None at the end."""

    items: tuple[Row, ...]
    after: At | None


class Section(msgspec.Struct, frozen=True):
    """What is left of one kind of rows, of one collection where the kind is divided by them.

    It begins at the key `low`; a stream at `low` after its entry `number`.
    """

    kind: Kind
    layout: Layout | None
    low: str = ""
    number: int = 0


def sections(
    layouts: Sequence[Layout], after: At | None, partition: str | None
) -> Iterator[Section]:
    """The sections that lie after a place, in order."""
    for kind in (Kind.RECORDS, Kind.TOMBSTONES, Kind.STREAMS):
        wanted = Log if kind == Kind.STREAMS else Records
        for layout in sorted(layouts, key=lambda layout: layout.name):
            if not isinstance(layout, wanted) or (partition and layout.partition is None):
                continue
            here = (kind, layout.name)
            if after is None or here > (after.kind, after.name):
                yield Section(kind, layout)
            elif here == (after.kind, after.name) and kind == Kind.STREAMS:
                yield Section(kind, layout, after.place, after.number)
            elif here == (after.kind, after.name):
                yield Section(kind, layout, after.place + JUST_ABOVE)
    if after is None or after.kind <= Kind.FLOORS:
        yield Section(Kind.FLOORS, None)
    yield Section(Kind.OPERATIONS, None)


class Span(msgspec.Struct, frozen=True):
    """Keys from `low` on and below `high`; after them the search goes on from `beyond`, if any."""

    low: str
    high: str
    beyond: str | None = None


EVERYTHING = Span("", _ABOVE_ALL)


def span_of(layout: Layout, partition: str, low: str, found: str) -> Span:
    """Where the keys of a partition lie among those that begin as `found` does, the first key from
    `low` on. So a partition is found in as many steps as there are tenants."""
    head = keys.split(found)[: layout.partition]
    start = SEPARATOR.join((*head, partition))
    beyond = SEPARATOR.join(head) + " " if head else None
    return Span(max(low, start), start + " ", beyond)


class Filling:
    """A page that is being filled: bounded in rows and entries, and in bytes but for its first."""

    def __init__(self) -> None:
        self.left_rows = PAGE_MAX
        self.left_bytes = ROWS_BYTES_MAX
        self._items: list[Row] = []
        self._stretch: list[bytes] = []

    def take(self, row: Row) -> bool:
        """Add a row, or an entry that goes on where the last one ended; False where it is full."""
        size_bytes = row.size_bytes
        if self._items and not (self.left_rows and size_bytes <= self.left_bytes):
            return False
        self.left_rows -= 1
        self.left_bytes -= size_bytes
        last = self._items[-1] if self._items else None
        if isinstance(row, StreamRow) and isinstance(last, StreamRow):
            ends = last.after + len(self._stretch)
            if (last.log, last.place, ends) == (row.log, row.place, row.after):
                self._stretch += row.values
                return True
        self._end_stretch()
        self._items.append(row)
        if isinstance(row, StreamRow):
            self._stretch += row.values
        return True

    def page(self, *, whole: bool) -> Rows:
        """What was taken; `whole` says that there is no more."""
        self._end_stretch()
        return Rows(tuple(self._items), None if whole else self._items[-1].at)

    def _end_stretch(self) -> None:
        if self._stretch:
            self._items[-1] = msgspec.structs.replace(self._items[-1], values=tuple(self._stretch))
            self._stretch = []


def fill(found: Iterable[Row]) -> Rows:
    """The first page of `found`, each entry of a stream being a row of its own."""
    filling = Filling()
    for row in found:
        if not filling.take(row):
            return filling.page(whole=False)
    return filling.page(whole=True)


def each(rows: Iterable[Row]) -> Iterator[Row]:
    """The same rows however they were cut into pages: each entry of a stream as one of its own."""
    for row in rows:
        if isinstance(row, StreamRow) and row.values:
            for after, value in enumerate(row.values, row.after):
                yield msgspec.structs.replace(row, after=after, values=(value,))
        else:
            yield row


def check_known(stored: Iterable[str], layouts: Iterable[Layout], where: str) -> None:
    """Raises `Invalid` where a store holds collections that it was opened without: what nobody
    knows cannot be given whole."""
    if unknown := set(stored) - {layout.name for layout in layouts}:
        raise Invalid(
            f"{where} holds {min(unknown)}, which this release does not know. Use the Perdure that "
            "wrote it, or a newer one."
        )
