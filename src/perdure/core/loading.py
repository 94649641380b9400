"""How rows are loaded: what is there already is left, what is absent is written as it came, and
what is there otherwise is refused. And how they are unloaded, once they are kept elsewhere.

Pure functions for every engine, beside the one that decides batches: they say what to write in the
same terms.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from perdure.core.batch import Batch, Check
from perdure.core.deciding import Facts, LogWrite, Place, RecordWrite, Write, decide
from perdure.core.errors import Conflict, Invalid
from perdure.core.keys import show, split
from perdure.core.layouts import Layout, Log, Records
from perdure.core.rows import FloorRow, OperationRow, RecordRow, Row, StreamRow
from perdure.core.values import Committed, Tip, entry_sum

Operation = tuple[str, str]
"""An operation id and its partition, "" for the common one."""

Done = tuple[int, Committed]
"""What an operation id stands for, and what it was answered."""


class Load(msgspec.Struct, frozen=True):
    """Rows to be loaded, or to be unloaded; `complete` if the store is a whole copy with them."""

    rows: Sequence[Row]
    complete: bool = False
    unload: bool = False


def check_under(under: Batch, facts: Facts) -> None:
    """Raises `Conflict` unless the checks hold under which rows are to be moved."""
    if not all(isinstance(op, Check) for op in under.ops):
        raise Invalid("rows are moved under checks only; commit everything else by itself.")
    decide(under, facts)


class Present:
    """What an engine holds at the places of some rows."""

    __slots__ = ("entries", "operations", "records", "tips")

    def __init__(self) -> None:
        self.records: dict[Place, tuple[int, int]] = {}
        """Version, negative for a tombstone, and checksum."""
        self.tips: dict[Place, Tip] = {}
        self.entries: dict[tuple[Place, int], int] = {}
        """Checksums of the entries that the rows hold too."""
        self.operations: dict[Operation, Done] = {}


class Loading(msgspec.Struct, frozen=True):
    """What loading rows writes."""

    writes: list[Write]
    operations: list[tuple[Operation, int, Committed]]
    floors: dict[str, int]


def decide_load(rows: Sequence[Row], layouts: Mapping[str, Layout], present: Present) -> Loading:
    """What to write, all or nothing. Raises `Conflict` for what is there otherwise, and `Invalid`
    for a collection that is not there or a place that stands twice among the rows."""
    places = {(type(row), row.at.name, row.at.place) for row in rows}
    if len(places) < len(rows):
        raise Invalid("rows that are loaded together are of different places; take them by pages.")
    loading = Loading([], [], {})
    for row in rows:
        match row:
            case RecordRow() if _is_absent(row, present):
                loading.writes.append(_record_write(row, layouts))
            case StreamRow():
                loading.writes.extend(_stream_write(row, layouts, present))
            case FloorRow():
                loading.floors[row.log] = row.incarnation
            case OperationRow():
                done = (row.digest, Committed(row.numbers))
                found = present.operations.get((row.id, row.partition))
                if found is None:
                    loading.operations.append(((row.id, row.partition), *done))
                elif found != done:
                    raise Conflict(f"load operation {row.id}", "what it stands for", "another")
    return loading


class Unloading(msgspec.Struct, frozen=True):
    """What unloading rows removes. Of the `streams` nothing is left, not even where they stood."""

    records: list[Place]
    tombstones: list[Place]
    trimmed: list[LogWrite]
    streams: list[tuple[Place, Tip]]
    operations: list[Operation]

    def __bool__(self) -> bool:
        return any(getattr(self, field) for field in self.__struct_fields__)


def decide_unload(
    rows: Sequence[Row], layouts: Mapping[str, Layout], present: Present
) -> Unloading:
    """What to remove, all or nothing. Raises `Conflict` for what is there otherwise."""
    gone = Unloading([], [], [], [], [])
    for row in rows:
        match row:
            case RecordRow() if not _is_absent(row, present):
                place = (row.collection, row.place)
                (gone.tombstones if row.value is None else gone.records).append(place)
            case StreamRow():
                _unload_stream(row, layouts, present, gone)
            case OperationRow() if found := present.operations.get((row.id, row.partition)):
                if found != (row.digest, Committed(row.numbers)):
                    raise Conflict(f"unload operation {row.id}", "what it stands for", "another")
                gone.operations.append((row.id, row.partition))
    return gone


def _unload_stream(
    row: StreamRow, layouts: Mapping[str, Layout], present: Present, gone: Unloading
) -> None:
    """A stretch goes from the front of its stream, so that what is left is a sound stream."""
    log, key, place = layouts.get(row.log), split(row.place), (row.log, row.place)
    stored, end = present.tips.get(place), row.tip.last
    if stored is None:
        return
    alike = stored.incarnation == row.incarnation and stored.last >= end
    if not alike or stored.first - 1 < row.after or not isinstance(log, Log):
        raise Conflict(f"unload {row.log} {show(key)}", f"a stream from {row.after + 1}", stored)
    if stored.last == end:
        gone.streams.append((place, stored))
    elif stored.first <= end:
        tip = Tip(stored.incarnation, end + 1, stored.last)
        forget = (stored.first, end)
        gone.trimmed.append(LogWrite(log, key, row.place, stored, tip, forget=forget))


def _is_absent(row: RecordRow, present: Present) -> bool:
    """Whether nothing is there yet. Raises `Conflict` unless what is there is the same."""
    found = present.records.get((row.collection, row.place))
    if found is None:
        return True
    version, checksum = row.stored
    where = f"load {row.collection} {show(split(row.place))}"
    if found[0] != version:
        raise Conflict(where, f"version {_shown(version)}", f"version {_shown(found[0])}")
    if found[1] != checksum:
        raise Conflict(where, f"the value of version {row.version} loaded", "another one")
    return False


def _shown(version: int) -> str:
    return f"{version}" if version > 0 else f"{-version} (deleted)"


def _record_write(row: RecordRow, layouts: Mapping[str, Layout]) -> RecordWrite:
    records = layouts.get(row.collection)
    if not isinstance(records, Records):
        raise Invalid(f"the store was opened without the collection {row.collection}.")
    key = split(row.place)
    columns = (
        (None,) * len(records.fields)
        if row.value is None
        else records.columns(records.decode(key, row.value))
    )
    return RecordWrite(records, key, row.place, row.version, row.value, row.attachment, columns)


def _stream_write(
    row: StreamRow, layouts: Mapping[str, Layout], present: Present
) -> list[LogWrite]:
    """What a stretch adds to the stream it belongs to, which it may overlap."""
    log, key, tip = layouts.get(row.log), split(row.place), row.tip
    if not isinstance(log, Log):
        raise Invalid(f"the store was opened without the collection {row.log}.")
    where = f"load {row.log} {show(key)}"
    stored = present.tips.get((row.log, row.place))
    if stored is None:
        if row.after != row.first - 1:
            raise Conflict(where, f"its entries up to {row.after}", "no such stream")
        return [LogWrite(log, key, row.place, Tip(row.incarnation), tip, row.values)]
    alike = (stored.incarnation, stored.first) == (tip.incarnation, tip.first)
    if not alike or stored.last < row.after or (stored != tip and not row.values):
        raise Conflict(where, f"a stream as far as {tip}", stored)
    known = stored.last - row.after
    for seq, value in enumerate(row.values[:known], row.after + 1):
        checksum = entry_sum(row.log, row.place, row.incarnation, seq, value)
        if present.entries.get(((row.log, row.place), seq)) != checksum:
            raise Conflict(f"{where} entry {seq}", "the entry loaded", "another one")
    added = row.values[known:]
    return [LogWrite(log, key, row.place, stored, tip, added)] if added else []
