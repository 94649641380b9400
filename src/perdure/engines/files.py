"""`file:///dir`: plain files that a person can read. No database, one owner, every
acknowledgement synced.

A record is `NAME.json`, a stream `NAME.jsonl`, in directories named by their keys. A commit is one
frame in a journal; the files follow behind (`files_commit`). What is where, with versions, tips and
index columns, is in memory (`files_state`): opening takes time by the number of records, and there
is a limit to that. A value is read from its file when it is asked for, and held to the checksum
that the store has of it.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from perdure.core import cursors, keys
from perdure.core.batch import NOTHING, Batch, layout_of, partition_of
from perdure.core.clock import Clock
from perdure.core.cursors import Position, Question
from perdure.core.deciding import Place as Touched
from perdure.core.disk import Disk, translated
from perdure.core.engine import EngineStats, Progress, Recovered, Snapshot, Survives, Usage, Written
from perdure.core.errors import (
    Closed,
    Damaged,
    Invalid,
    Latched,
    LimitExceeded,
    StorageFull,
    Unavailable,
)
from perdure.core.keys import Key
from perdure.core.layouts import Column, Layout, Log, Records
from perdure.core.loading import Load
from perdure.core.offload import off_loop, steps_off_loop
from perdure.core.rows import At, Row, Rows, check_known, fill, sections
from perdure.core.stored import shape_of
from perdure.core.values import Committed, Entry, Finding, Page, Record, Tip
from perdure.engines.files_accept import acceptances
from perdure.engines.files_backup import Moment, backup_steps
from perdure.engines.files_commit import Committer
from perdure.engines.files_read import stored_entries
from perdure.engines.files_recovery import STEPS, Place, Steps, Store, open_store
from perdure.engines.files_rows import rows_in
from perdure.engines.files_verify import files_of, judge_records, judge_stream, strays, usage_of
from perdure.engines.group import Outcome, Request
from perdure.engines.waiting import Waiting

T = TypeVar("T")

PLACES_MAX = 200_000
"""Most records, streams and operation ids together, deleted ones included until they are forgotten:
all of them are in memory, and are read when the store is opened."""

_STEP_FILES = 200
"""Files that a verify reads before others may be written."""


class FilesEngine:
    """See `core.engine.Engine`."""

    shared = False
    survives = Survives(process_crash=True, power_cut=True, failed_sync=True, damage=True)

    def __init__(self, store: Store, layouts: Sequence[Layout], *, read_only: bool) -> None:
        self.url = f"file:///{store.place.root}"
        self.places_max: int | None = PLACES_MAX
        self.store_id = store.state.store_id
        self.recovered: Recovered = store.recovered
        self.written: Written = store.written
        self.stats = EngineStats()
        self._store = store
        self._state = store.state
        self._tree = store.tree
        self._layouts = tuple(layouts)
        self._waiting = Waiting(store.place.clock)
        self._backing_up = False
        self._closing: asyncio.Future[None] | None = None
        self._committer: Committer | None = None
        if not read_only:
            self._committer = Committer(store, layouts, self.stats, self._settle)

    @classmethod
    async def open(
        cls,
        path: str,
        layouts: Sequence[Layout],
        *,
        clock: Clock,
        disk: Disk,
        read_only: bool = False,
        note: Callable[[str], None] = lambda detail: None,
        copy_of: str | None = None,
        snapshots: Sequence[Snapshot] = (),
        steps: Steps = STEPS,
    ) -> FilesEngine:
        """See `engines.open_engine`; `steps` lead to the format that is written."""
        place = Place(Path(path), clock, disk, steps)
        store = await off_loop(
            open_store,
            place,
            layouts,
            read_only=read_only,
            note=note,
            copy_of=copy_of,
            snapshots=snapshots,
        )
        try:
            return cls(store, layouts, read_only=read_only)
        except BaseException:
            store.release()
            raise

    @property
    def latched(self) -> str | None:
        if self._committer is None:
            return "the store was opened for reading only"
        return self._committer.latched

    def latched_for(self, log: Log[Any], stream: Key) -> str | None:
        return self.latched

    async def commit(self, batch: Batch) -> Committed:
        self._check_open(*map(layout_of, batch.ops))
        partition = partition_of(batch)
        if not batch:
            return Committed(())
        self._check_room(len(batch.ops))
        return await self._submit(batch, partition)

    async def load(
        self, rows: Sequence[Row], *, complete: bool = False, under: Batch = NOTHING
    ) -> None:
        self._check_open()
        self._check_room(len(rows))
        await self._submit(under, None, Load(rows, complete))

    async def unload(self, rows: Sequence[Row], *, under: Batch = NOTHING) -> None:
        self._check_open()
        raise Invalid(f"{self.url}: plain files are whole by themselves, and never a shard.")

    async def rows(self, *, after: At | None = None, partition: str | None = None) -> Rows:
        self._check_open()
        check_known(self._state.layouts, self._layouts, self.url)
        left = sections(self._layouts, after, partition)
        return fill(row for one in left for row in rows_in(self._store, one, after, partition))

    async def _submit(
        self, batch: Batch, partition: str | None, load: Load | None = None
    ) -> Committed:
        if self._committer is None:
            raise Latched(f"{self.url}: {self.latched}. Open it for writing.")
        future: asyncio.Future[Committed] = asyncio.get_running_loop().create_future()
        self._committer.submit(Request(batch, partition, future, load))
        return await future

    def _check_room(self, added: int) -> None:
        """Refuse what might be more than is kept in memory."""
        places = self._state.places + added
        if places > PLACES_MAX:
            what = f"the number of records, streams and operation ids in {self.url}"
            raise LimitExceeded(what, places, PLACES_MAX)

    async def get(self, records: Records[T], key: Key) -> Record[T] | None:
        self._check_open(records)
        return self._get(records, keys.join(key))

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
        order = self._state.orders[records.name]
        places, more = order.page(question, cursor, limit)
        items: list[Record[T]] = []
        for place in places:
            try:
                record = self._get(records, place)
            except Damaged as damage:
                if items:
                    return Page(items, order.cursor(question, keys.join(items[-1].key)))
                resume = order.cursor(question, place)
                raise Damaged(damage.where, damage.why, resume=resume) from damage
            if record is not None:
                items.append(record)
        return Page(items, order.cursor(question, places[-1]) if more else None)

    async def count(
        self, records: Records[Any], prefix: Key, *, index: str | None = None, group: int = 0
    ) -> dict[tuple[Column | None, ...], int]:
        self._check_open(records)
        question = Question(self.store_id, records.name, prefix, index)
        return self._state.orders[records.name].count(question, group)

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
        place = (log.name, keys.join(stream))
        tip = await self.tip(log, stream)
        cursors.check_position(log, stream, tip, after, incarnation)
        last = min(tip.last, after + limit)
        waiting = self._state.waiting_streams.get(place)
        behind = tip.last + 1 if waiting is None else waiting.first
        values: list[bytes] = []
        if after + 1 < min(behind, last + 1):
            row = self._state.streams[place]
            values = stored_entries(self._tree, row, after + 1, min(behind - 1, last))
        if waiting is not None:
            start = max(after + 1, behind)
            values += [waiting.at(seq) for seq in range(start, last + 1)]
        return [Entry(seq, log.decode(stream, it)) for seq, it in enumerate(values, after + 1)]

    async def tip(self, log: Log[Any], stream: Key) -> Tip:
        self._check_open(log)
        return self._state.tip((log.name, keys.join(stream)))

    async def wait(self, log: Log[Any], stream: Key, after: int, *, timeout_s: float) -> Tip:
        place = (log.name, keys.join(stream))
        return await self._waiting.wait(place, after, timeout_s, lambda: self.tip(log, stream))

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
        found, more = self._state.listed[log.name].page(question, cursor, limit)
        items = [keys.split(place) for place in found]
        return Page(items, cursors.pack(question, Position((), found[-1])) if more else None)

    async def verify(self) -> AsyncIterator[Finding]:
        self._check_open()
        for finding in self.recovered.findings:
            yield finding
        if self._committer is not None:
            with suppress(StorageFull, Latched):  # then what the files lack is looked at no further
                await self._committer.flush()
        for step in (self._judge_records, self._judge_streams, self._judge_others):
            async for finding in step():
                yield finding
                self._check_open()

    async def _judge_records(self) -> AsyncIterator[Finding]:
        state = self._state
        declared = {
            layout.name: layout
            for layout in self._layouts
            if isinstance(layout, Records)
            and (stored := state.layouts.get(layout.name)) is not None
            and stored.shape == shape_of(layout)
        }
        for name, places in _by_collection(state.records):
            for start in range(0, len(places), _STEP_FILES):
                async with self._still():
                    rows = [
                        row
                        for place in places[start : start + _STEP_FILES]
                        if (row := state.records.get(place)) is not None
                        and row.version > 0
                        and place not in state.waiting_records
                    ]
                    found = await off_loop(judge_records, self._tree, declared.get(name), rows)
                for finding in found:
                    yield finding

    async def _judge_streams(self) -> AsyncIterator[Finding]:
        state = self._state
        for place in list(state.streams):
            async with self._still():
                row = state.streams.get(place)
                if row is None or not row.size_bytes or place in state.waiting_streams:
                    continue
                found = await off_loop(judge_stream, self._tree, row)
            for finding in found:
                yield finding

    async def _judge_others(self) -> AsyncIterator[Finding]:
        async with self._still():
            known = files_of(self._tree, self._state)
            found = await off_loop(list, strays(self._tree.root, known))
        for finding in found:
            yield finding

    async def accept(self) -> AsyncIterator[Finding]:
        """Take for what is stored what somebody changed in the files, and say what that was; see
        `files_accept`. Nobody else may use the store meanwhile."""
        self._check_open()
        if self._committer is not None:
            await self._committer.flush()
        records = [row for row in self._state.records.values() if row.version > 0]
        streams = [row for row in self._state.streams.values() if row.size_bytes]
        layouts = {layout.name: layout for layout in self._layouts}
        steps = acceptances(self._tree, layouts, records, streams)
        async with aclosing(steps_off_loop(steps)) as found:
            async for accepted in found:
                if accepted is not None:
                    for batch in accepted[1]:
                        await self.commit(batch)
                    yield accepted[0]

    async def usage(self) -> Usage:
        self._check_open()
        if self._committer is not None:
            await self._committer.flush()
        async with self._still():
            usage = await off_loop(usage_of, self._tree, self._state)
        self.stats.stored_size_bytes = usage.total_bytes
        return usage

    async def backup(self, into: Path, progress: Progress) -> Snapshot:
        self._check_open()
        if self._backing_up:
            raise Unavailable(f"{self.url}: a backup is under way already; wait for its end.")
        if self.recovered.findings:
            raise Damaged(self.recovered.findings[0].where, self.recovered.findings[0].why)
        self._backing_up = True
        try:
            async with self._still():
                return await self._back_up(into, progress)
        finally:
            self._backing_up = False

    async def _back_up(self, into: Path, progress: Progress) -> Snapshot:
        place = self._store.place
        moment, now_s = Moment(self._state), int(place.clock.now_s())
        steps = backup_steps(place.disk, self._tree, moment, into, now_s)
        with translated(into):
            async with aclosing(steps_off_loop(steps)) as copying:
                async for step in copying:
                    if isinstance(step, Snapshot):
                        return step
                    progress(*step)
                    self._check_open()
                    if self._committer is not None and self._committer.held_too_long:
                        raise Unavailable(
                            f"{self.url}: too much was committed during this backup. Back up "
                            "while less is written."
                        )
        raise AssertionError("a backup ends with what it holds")

    @asynccontextmanager
    async def _still(self) -> AsyncIterator[None]:
        """The files as they are, not written meanwhile."""
        if self._committer is None:
            yield
            return
        async with self._committer.holding():
            yield

    def announce(self, note: str) -> None:
        if self._committer is not None:
            self._store.lock.note(note)

    async def close(self) -> None:
        if self._closing is None:
            self._closing = asyncio.ensure_future(self._close())
            self._waiting.end()
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        """Commits under way are finished, and the files brought up to date; then the store is let
        go."""
        committer = self._committer
        try:
            if committer is not None:
                with suppress(Latched):  # the journal has it all, and the next start applies it
                    await committer.stop()
        except BaseException:
            self._store.release()
            raise
        if committer is None or committer.latched:
            self._store.release()
        else:
            with translated(self._tree.root):
                await off_loop(self._store.finish)

    def _get(self, records: Records[T], place: str) -> Record[T] | None:
        row = self._state.records.get((records.name, place))
        if row is None or row.version < 0:
            return None
        value, attachment = self._store.value(row)
        key = keys.split(place)
        return Record(key, row.version, records.decode(key, value), attachment)

    def _settle(self, outcomes: list[Outcome], tips: dict[Touched, Tip]) -> None:
        """Answer those who committed, and wake those who wait for what they committed."""
        for future, outcome in outcomes:
            if future.done():
                continue
            if isinstance(outcome, Committed):
                future.set_result(outcome)
            else:
                future.set_exception(outcome)
        self._waiting.tell(tips)

    def _check_open(self, *layouts: Layout) -> None:
        if self._closing is not None:
            raise Closed(f"{self.url} was closed.")
        for layout in layouts:
            if layout.name not in self._state.orders and layout.name not in self._state.listed:
                raise Invalid(f"the store was opened without the collection {layout.name}.")


def _by_collection(places: Iterable[Touched]) -> list[tuple[str, list[Touched]]]:
    """The places of each collection."""
    found: dict[str, list[Touched]] = defaultdict(list)
    for place in places:
        found[place[0]].append(place)
    return list(found.items())
