"""Rows of a store of files, as another store takes them over: in the one order of `core.rows`, and
what is there already at the places of rows that are to be loaded."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence

from perdure.core.keys import split
from perdure.core.limits import PAGE_MAX
from perdure.core.loading import Present
from perdure.core.rows import (
    EVERYTHING,
    At,
    FloorRow,
    Kind,
    OperationRow,
    RecordRow,
    Row,
    Section,
    StreamRow,
    span_of,
)
from perdure.core.values import Committed, entry_sum, record_sum
from perdure.engines.files_format import StreamFile
from perdure.engines.files_manifest import StreamRow as StoredStream
from perdure.engines.files_read import lacks_entry, reading, where_of
from perdure.engines.files_recovery import Store
from perdure.engines.files_state import identity_of


def rows_in(
    store: Store, section: Section, after: At | None, partition: str | None
) -> Iterator[Row]:
    """The rows of a section, in order, one an entry."""
    state, layout = store.state, section.layout
    if section.kind == Kind.FLOORS:
        for log, incarnation in sorted(state.incarnations.items()):
            if after is None or At(Kind.FLOORS, log) > after:
                yield FloorRow(log, incarnation)
        return
    if section.kind == Kind.OPERATIONS:
        for id, part in sorted(state.operations):
            if (after is None or At(Kind.OPERATIONS, id, part) > after) and (
                partition is None or part == partition
            ):
                done = state.operations[(id, part)]
                yield OperationRow(id, part, done.digest, done.numbers)
        return
    assert layout is not None
    places = (
        [place for log, place in state.streams if log == layout.name]
        if section.kind == Kind.STREAMS
        else [
            place
            for (name, place), row in state.records.items()
            if name == layout.name and (row.version < 0) == (section.kind == Kind.TOMBSTONES)
        ]
    )

    def asked_for(place: str) -> bool:
        span = EVERYTHING if partition is None else span_of(layout, partition, "", place)
        return place >= section.low and span.low <= place < span.high

    for place in heapq.nsmallest(PAGE_MAX + 2, filter(asked_for, places)):
        if section.kind == Kind.STREAMS:
            begun = section.number if place == section.low else 0
            yield from _stream_rows(store, state.streams[(layout.name, place)], begun)
        else:
            yield _record_row(store, layout.name, place)


def _record_row(store: Store, name: str, place: str) -> RecordRow:
    row = store.state.records[(name, place)]
    if row.version < 0:
        return RecordRow(name, place, -row.version)
    return RecordRow(name, place, row.version, *store.value(row))


def _stream_rows(store: Store, row: StoredStream, begun: int) -> Iterator[StreamRow]:
    tip = row.tip
    start = (row.log, row.place, tip.incarnation, tip.first)
    if tip.last < tip.first:
        if not begun:
            yield StreamRow(*start, tip.last)
        return
    first = max(tip.first, begun + 1)
    for seq, value in enumerate(entries_from(store, row, first), first):
        yield StreamRow(*start, seq - 1, (value,))


def entries_from(store: Store, row: StoredStream, seq: int) -> Iterator[bytes]:
    """The entries of a stream from a number on, read as they are asked for. Raises `Damaged`."""
    waiting = store.state.waiting_streams.get((row.log, row.place))
    behind = row.tip.last + 1 if waiting is None else waiting.first
    if seq < behind:
        path, where = store.tree.stream(row.log, split(row.place)), where_of(row)
        with reading(where), StreamFile(path, identity_of(row)) as file:
            for found, value, _ in file.entries(seq, behind - 1):
                if found != seq:
                    break
                yield value
                seq += 1
        if seq < behind:
            raise lacks_entry(where, seq)
    while seq <= row.tip.last and waiting is not None:
        yield waiting.at(seq)
        seq += 1


def find_present(store: Store, rows: Sequence[Row]) -> Present:
    """What the store holds at the places of some rows."""
    present, state = Present(), store.state
    for row in rows:
        if isinstance(row, RecordRow):
            place = (row.collection, row.place)
            if (record := state.records.get(place)) is not None:
                checksum = record.sum
                if record.version < 0:
                    checksum = record_sum(*place, -record.version, None, None)
                present.records[place] = (record.version, checksum)
        elif isinstance(row, StreamRow):
            place = (row.log, row.place)
            if (stream := state.streams.get(place)) is not None:
                present.tips[place] = stream.tip
                present.entries.update(_checksums(store, stream, row))
        elif isinstance(row, OperationRow):
            done = state.operations.get((row.id, row.partition))
            if done is not None:
                answer = (done.digest, Committed(done.numbers))
                present.operations[(row.id, row.partition)] = answer
    return present


def _checksums(
    store: Store, stream: StoredStream, row: StreamRow
) -> Iterable[tuple[tuple[tuple[str, str], int], int]]:
    """Of the entries that a stream and a stretch have both."""
    tip, place = stream.tip, (stream.log, stream.place)
    first, last = max(tip.first, row.after + 1), min(tip.last, row.tip.last)
    if (tip.incarnation, tip.first) != (row.incarnation, row.first) or last < first:
        return
    for seq, value in enumerate(entries_from(store, stream, first), first):
        if seq > last:
            return
        yield (place, seq), entry_sum(*place, tip.incarnation, seq, value)
