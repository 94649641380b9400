"""`memory://`: the reference engine. The shortest way to keep every rule of `core.engine`.

It holds all but durability: nothing outlives the process, and it says so. Its answers define what
other engines must answer. State lives on the event loop and no method awaits while changing it,
so a commit is atomic because nothing else can run.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from perdure.core import cursors, keys
from perdure.core.batch import NOTHING, Batch, digest, layout_of, partition_of
from perdure.core.clock import Clock
from perdure.core.cursors import Position, Question
from perdure.core.deciding import Facts, LogWrite, RecordWrite, Write, decide
from perdure.core.engine import EngineStats, Progress, Recovered, Snapshot, Survives, Usage, Written
from perdure.core.errors import Closed, Conflict, Invalid
from perdure.core.keys import Key
from perdure.core.layouts import Column, Layout, Log, Records
from perdure.core.limits import OPERATION_KEPT_S
from perdure.core.loading import Present, check_under, decide_load, decide_unload
from perdure.core.rows import (
    EVERYTHING,
    At,
    FloorRow,
    Kind,
    OperationRow,
    RecordRow,
    Row,
    Rows,
    Section,
    StreamRow,
    fill,
    sections,
    span_of,
)
from perdure.core.values import (
    Committed,
    Entry,
    Finding,
    Page,
    Record,
    Tip,
    entry_sum,
)
from perdure.engines.ordered import Listed, Ordered

T = TypeVar("T")


class _Row(msgspec.Struct, frozen=True, gc=False):
    version: int
    value: bytes
    attachment: bytes | None


class _Done(msgspec.Struct, frozen=True):
    digest: int
    committed: Committed
    at_s: float


class MemoryEngine:
    """See `core.engine.Engine`."""

    url = "memory://"
    survives = Survives(damage=True)
    shared = False
    places_max: int | None = None
    latched: str | None = None

    def __init__(
        self, layouts: Sequence[Layout], clock: Clock, *, copy_of: str | None = None
    ) -> None:
        self.store_id = copy_of or clock.new_id("store")
        self.recovered = Recovered(clean=True)
        self.written = Written(1, 1)
        self.stats = EngineStats()
        self._clock = clock
        self._layouts = {layout.name: layout for layout in layouts}
        self._facts = Facts()
        self._held: dict[str, dict[str, _Row]] = {layout.name: {} for layout in layouts}
        self._orders = {
            layout.name: Ordered(layout) for layout in layouts if isinstance(layout, Records)
        }
        self._entries: dict[tuple[str, str], dict[int, bytes]] = defaultdict(dict)
        self._streams = {layout.name: Listed() for layout in layouts if isinstance(layout, Log)}
        self._operations: dict[tuple[str | None, str], _Done] = {}
        self._changed = asyncio.Event()
        self._closed = False

    def latched_for(self, log: Log[Any], stream: Key) -> str | None:
        return self.latched

    async def commit(self, batch: Batch) -> Committed:
        self._check_open(*map(layout_of, batch.ops))
        partition = partition_of(batch)
        if not batch:
            return Committed(())
        operation = None if batch.operation_id is None else (partition, batch.operation_id)
        if operation is not None:
            self._forget_old_operations()
            if (done := self._operations.get(operation)) is not None:
                if done.digest != digest(batch):
                    raise Invalid(
                        f"the operation id {batch.operation_id!r} was used for another batch."
                    )
                return done.committed
        try:
            decision = decide(batch, self._facts)
        except Conflict:
            self.stats.conflicts += 1
            raise
        self._write(decision.writes)
        committed = Committed(decision.numbers)
        if operation is not None:
            self._operations[operation] = _Done(digest(batch), committed, self._clock.monotonic_s())
        self.stats.commits += 1
        self.stats.groups += 1
        return committed

    async def get(self, records: Records[T], key: Key) -> Record[T] | None:
        self._check_open(records)
        place = keys.join(key)
        row = self._held[records.name].get(place)
        return None if row is None else _record(records, place, row)

    async def get_many(self, records: Records[T], keys: Sequence[Key]) -> list[Record[T] | None]:
        self._check_open(records)
        cursors.check_limit(len(keys))
        return [await self.get(records, key) for key in keys]

    async def scan(
        self,
        records: Records[T],
        prefix: Key,
        *,
        index: str | None = None,
        where: Sequence[Column] = (),
        limit: int,
        cursor: str | None = None,
        descending: bool = False,
        partial: bool = False,
    ) -> Page[Record[T]]:
        self._check_open(records)
        cursors.check_limit(limit)
        question = Question(self.store_id, records.name, prefix, index, tuple(where), descending)
        order, rows = self._orders[records.name], self._held[records.name]
        places, more = order.page(question, cursor, limit)
        items = [_record(records, place, rows[place]) for place in places]
        return Page(items, order.cursor(question, places[-1]) if more else None)

    async def count(
        self, records: Records[Any], prefix: Key, *, index: str | None = None, group: int = 0
    ) -> dict[tuple[Column | None, ...], int]:
        self._check_open(records)
        question = Question(self.store_id, records.name, prefix, index)
        return self._orders[records.name].count(question, group)

    async def read(
        self,
        log: Log[T],
        stream: Key,
        *,
        after: int = 0,
        incarnation: int | None = None,
        limit: int,
    ) -> list[Entry[T]]:
        cursors.check_limit(limit)
        tip = await self.tip(log, stream)
        cursors.check_position(log, stream, tip, after, incarnation)
        entries = self._entries.get((log.name, keys.join(stream)), {})
        last = min(tip.last, after + limit)
        return [Entry(seq, log.decode(stream, entries[seq])) for seq in range(after + 1, last + 1)]

    async def tip(self, log: Log[Any], stream: Key) -> Tip:
        self._check_open(log)
        return self._facts.tip((log.name, keys.join(stream)))

    async def wait(self, log: Log[Any], stream: Key, after: int, *, timeout_s: float) -> Tip:
        deadline_s = self._clock.monotonic_s() + timeout_s
        while True:
            tip = await self.tip(log, stream)
            left_s = deadline_s - self._clock.monotonic_s()
            if tip.last > after or left_s <= 0:
                return tip
            try:
                await asyncio.wait_for(self._changed.wait(), left_s)
            except TimeoutError:
                return await self.tip(log, stream)

    async def streams(
        self,
        log: Log[Any],
        prefix: Key,
        *,
        limit: int,
        cursor: str | None = None,
        partial: bool = False,
    ) -> Page[Key]:
        self._check_open(log)
        cursors.check_limit(limit)
        question = Question(self.store_id, log.name, prefix)
        found, more = self._streams[log.name].page(question, cursor, limit)
        items = [keys.split(place) for place in found]
        return Page(items, cursors.pack(question, Position((), found[-1])) if more else None)

    async def verify(self) -> AsyncIterator[Finding]:
        self._check_open()
        for (name, place), tip in self._facts.tips.items():
            kept = sorted(self._entries[(name, place)])
            if kept != list(range(tip.first, tip.last + 1)):
                yield Finding(f"{name} {keys.show(keys.split(place))}", "numbers have holes")

    async def usage(self) -> Usage:
        self._check_open()
        taken = {
            name: sum(len(row.value) + len(row.attachment or b"") for row in held.values())
            for name, held in self._held.items()
        }
        for (name, _), entries in self._entries.items():
            taken[name] = taken.get(name, 0) + sum(map(len, entries.values()))
        return Usage(taken, other_bytes=0, free_bytes=0, total_bytes=sum(taken.values()))

    async def backup(self, into: Path, progress: Progress) -> Snapshot:
        self._check_open()
        raise Invalid("memory:// promises to forget, so there is nothing to back up.")

    async def rows(self, *, after: At | None = None, partition: str | None = None) -> Rows:
        self._check_open()
        left = sections(tuple(self._layouts.values()), after, partition)
        return fill(row for section in left for row in self._rows(section, after, partition))

    async def load(
        self, rows: Sequence[Row], *, complete: bool = False, under: Batch = NOTHING
    ) -> None:
        self._check_open()
        check_under(under, self._facts)
        loading = decide_load(rows, self._layouts, self._present(rows))
        for write in loading.writes:
            if isinstance(write, LogWrite):
                self._facts.tips[(write.log.name, write.place)] = write.tip
            else:
                stored = -write.version if write.value is None else write.version
                self._facts.versions[(write.records.name, write.place)] = stored
        self._write(loading.writes)
        for (id, partition), code, committed in loading.operations:
            done = _Done(code, committed, self._clock.monotonic_s())
            self._operations[(partition or None, id)] = done
        for log, incarnation in loading.floors.items():
            self._facts.floors[log] = max(self._facts.floors.get(log, 1), incarnation)

    async def unload(self, rows: Sequence[Row], *, under: Batch = NOTHING) -> None:
        self._check_open()
        check_under(under, self._facts)
        gone = decide_unload(rows, self._layouts, self._present(rows))
        for name, place in (*gone.records, *gone.tombstones):
            del self._facts.versions[(name, place)]
            self._held[name].pop(place, None)
            self._orders[name].set(place, None)
        for write in gone.trimmed:
            self._facts.tips[(write.log.name, write.place)] = write.tip
        self._write(gone.trimmed)
        for at, _ in gone.streams:
            del self._facts.tips[at]
            self._entries.pop(at, None)
            self._streams[at[0]].set(at[1], kept=False)
        for id, partition in gone.operations:
            del self._operations[(partition or None, id)]

    def announce(self, note: str) -> None:
        """Nobody else can ask for this process's memory."""

    async def close(self) -> None:
        self._closed = True
        self._changed.set()

    def _present(self, rows: Sequence[Row]) -> Present:
        """What is there in the places of some rows."""
        present = Present()
        for row in rows:
            if isinstance(row, RecordRow):
                place = (row.collection, row.place)
                if version := self._facts.versions.get(place):
                    present.records[place] = self._record_row(*place, version).stored
            elif isinstance(row, StreamRow):
                place = (row.log, row.place)
                if place in self._facts.tips:
                    present.tips[place] = tip = self._facts.tips[place]
                    for seq, value in self._entries[place].items():
                        checksum = entry_sum(*place, tip.incarnation, seq, value)
                        present.entries[(place, seq)] = checksum
            elif isinstance(row, OperationRow) and (
                done := self._operations.get((row.partition or None, row.id))
            ):
                present.operations[(row.id, row.partition)] = (done.digest, done.committed)
        return present

    def _rows(self, section: Section, after: At | None, partition: str | None) -> Iterator[Row]:
        """The rows of a section, in order, one an entry."""
        layout, facts = section.layout, self._facts
        if section.kind == Kind.FLOORS:
            for log, incarnation in sorted(facts.floors.items()):
                if after is None or At(Kind.FLOORS, log) > after:
                    yield FloorRow(log, incarnation)
            return
        if section.kind == Kind.OPERATIONS:
            for key in sorted((id, part or "") for part, id in self._operations):
                if (after is None or At(Kind.OPERATIONS, *key) > after) and partition in (
                    None,
                    key[1],
                ):
                    done = self._operations[(key[1] or None, key[0])]
                    yield OperationRow(*key, done.digest, done.committed.numbers)
            return
        assert layout is not None
        found = (
            [place for name, place in facts.tips if name == layout.name]
            if section.kind == Kind.STREAMS
            else [
                place
                for (name, place), version in facts.versions.items()
                if name == layout.name and (version < 0) == (section.kind == Kind.TOMBSTONES)
            ]
        )
        for place in sorted(found):
            span = EVERYTHING if partition is None else span_of(layout, partition, "", place)
            if not (place >= section.low and span.low <= place < span.high):
                continue
            if section.kind != Kind.STREAMS:
                yield self._record_row(layout.name, place, facts.versions[(layout.name, place)])
                continue
            tip = facts.tips[(layout.name, place)]
            start = (layout.name, place, tip.incarnation, tip.first)
            begun = section.number if place == section.low else 0
            for seq in range(max(tip.first, begun + 1), tip.last + 1):
                yield StreamRow(*start, seq - 1, (self._entries[(layout.name, place)][seq],))
            if tip.last < tip.first and place > section.low:
                yield StreamRow(*start, tip.last)

    def _record_row(self, collection: str, place: str, version: int) -> RecordRow:
        if version < 0:
            return RecordRow(collection, place, -version)
        row = self._held[collection][place]
        return RecordRow(collection, place, row.version, row.value, row.attachment)

    def _write(self, writes: Sequence[Write]) -> None:
        for write in writes:
            if isinstance(write, RecordWrite):
                self._write_record(write)
            else:
                self._write_log(write)
        self._changed.set()
        self._changed = asyncio.Event()

    def _write_record(self, write: RecordWrite) -> None:
        rows, order = self._held[write.records.name], self._orders[write.records.name]
        if write.value is None:
            rows.pop(write.place, None)
            order.set(write.place, None)
        else:
            rows[write.place] = _Row(write.version, write.value, write.attachment)
            order.set(write.place, write.columns)

    def _write_log(self, write: LogWrite) -> None:
        entries = self._entries[(write.log.name, write.place)]
        if write.forget is not None:
            for seq in range(write.forget[0], write.forget[1] + 1):
                del entries[seq]
        first = write.tip.last - len(write.entries) + 1
        entries.update(enumerate(write.entries, first))
        self._streams[write.log.name].set(write.place, kept=bool(entries))

    def _forget_old_operations(self) -> None:
        """Ids are in the order they were committed, so the old ones stand first."""
        oldest_s = self._clock.monotonic_s() - OPERATION_KEPT_S
        for operation, done in tuple(islice(self._operations.items(), 2)):
            if done.at_s < oldest_s:
                del self._operations[operation]

    def _check_open(self, *layouts: Layout) -> None:
        if self._closed:
            raise Closed("the memory engine was closed.")
        for layout in layouts:
            if layout.name not in self._layouts:
                raise Invalid(f"the store was opened without the collection {layout.name}.")


def _record(records: Records[T], place: str, row: _Row) -> Record[T]:
    key = keys.split(place)
    return Record(key, row.version, records.decode(key, row.value), row.attachment)
