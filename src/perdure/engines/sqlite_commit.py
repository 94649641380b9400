"""The committer: the one thread that writes, and the groups it makes durable with one fsync each.

Invariants
- A future is resolved with a result only after the fsync of its group has returned.
- The log is in commit order within every stream because one thread decides and writes the groups
  one after another, and each group sees the effects of all before it.
- After a failed sync or rollback nothing is written any more: a commit whose fsync failed may or
  may not come back, and SQLite itself would acknowledge the next one. Nor is it once another
  process has written, though none should be able to: see `sqlite_wal`.
"""

from __future__ import annotations

import queue
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from typing import Any

import apsw
import msgspec

from perdure.core import batch as batches
from perdure.core.clock import Clock
from perdure.core.deciding import LogWrite, Place, RecordWrite
from perdure.core.engine import EngineStats
from perdure.core.errors import (
    CommitUnknown,
    Damaged,
    Invalid,
    Latched,
    LimitExceeded,
    PerdureError,
)
from perdure.core.keys import show, split
from perdure.core.layouts import Layout, Records
from perdure.core.limits import CLOCK_OFF_S, OPERATION_KEPT_S, TOMBSTONE_KEPT_S
from perdure.core.loading import Unloading, check_under
from perdure.core.mark import Mark
from perdure.core.stored import operation_sum
from perdure.core.values import Committed, Tip, entry_sum, record_sum, tip_sum
from perdure.engines.group import (
    Effects,
    Known,
    Outcome,
    Request,
    Settle,
    decide_group,
)
from perdure.engines.sqlite_checkpoint import Checkpointer
from perdure.engines.sqlite_driver import known_full, leaves_doubt, translate
from perdure.engines.sqlite_rows import find_present
from perdure.engines.sqlite_schema import (
    SEQ_MAX,
    SQL,
    STREAM_ID_MAX,
    STREAM_SHIFT,
    Table,
    absent_tip,
    incarnations,
)
from perdure.engines.sqlite_wal import FRAME_BYTES, advance

_GROUP_MAX = 512
_GROUP_BYTES = 8 * 1024 * 1024


class _Effects(Effects):
    """`stream_id` gives a stream's id, and a new one to a stream that has none."""

    def __init__(self, stream_id: Callable[[Place], int]) -> None:
        super().__init__()
        self.entries: dict[int, dict[int, tuple[int, int, bytes]]] = defaultdict(dict)
        """The rows to add by stream and number."""
        self.forgotten: list[tuple[int, int]] = []
        self._stream_id = stream_id

    def add_entries(self, write: LogWrite) -> None:
        name, place, tip = write.log.name, write.place, write.tip
        stream_id = self._stream_id((name, place))
        base = stream_id << STREAM_SHIFT
        if write.forget is not None:
            first, last = write.forget
            self.forgotten.append((base + first, base + last))
            added = self.entries[stream_id]
            few = last - first < len(added)
            for seq in range(first, last + 1) if few else tuple(added):
                if seq <= last:
                    added.pop(seq, None)
        seq = tip.last - len(write.entries)
        for value in write.entries:
            seq += 1
            checksum = entry_sum(name, place, tip.incarnation, seq, value)
            self.entries[stream_id][seq] = (base + seq, checksum, value)


class Committer:
    """`submit` belongs to the event loop, everything else to the committer's own thread."""

    def __init__(
        self,
        connection: apsw.Connection,
        checkpointer: Checkpointer,
        layouts: Sequence[Layout],
        mark: Mark,
        number: int,
        *,
        where: str,
        clock: Clock,
        stats: EngineStats,
        settle: Settle,
    ) -> None:
        self.latched: str | None = None
        self.number = number
        self._connection = connection
        self._checkpointer = checkpointer
        self._layouts = {layout.name: layout for layout in layouts}
        self._tables = {
            layout.name: Table(layout) for layout in layouts if isinstance(layout, Records)
        }
        self._logs = self._layouts.keys() - self._tables.keys()
        self._mark = mark
        self._where = where
        self._clock = clock
        self._stats = stats
        self._settle = settle
        self._requests: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self._frames = 0
        self._newest_stream_id = 0
        self._over = False
        self._has_tombstones: dict[str, bool] = {}
        connection.set_wal_hook(self._log_grew)
        self._thread = threading.Thread(target=self._run, name="perdure-commit", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> None:
        """Hand a batch over; its future is resolved on the loop."""
        self._requests.put(request)
        if self._over:
            self._abandon([])

    def latch(self, why: str) -> None:
        """Refuse every later write; the first reason stays."""
        self.latched = self.latched or why

    def stop(self) -> None:
        """Finish what was handed over, then end the thread."""
        self._requests.put(None)
        self._thread.join()

    def _run(self) -> None:
        group: list[Request] = []
        try:
            while (first := self._requests.get()) is not None:
                group = self._gather(first)
                for _, alike in groupby(group, key=lambda one: one.load and id(one)):
                    self._commit(list(alike))  # rows are loaded alone
                batches_done, group = len(group), []
                self._checkpointer.after_group(self._connection, self._frames, batches_done)
        except BaseException:
            self.latch("the committer stopped by an internal error")
            raise
        finally:
            self._abandon(group)

    def _gather(self, first: Request) -> list[Request]:
        """Everything that waits, within bounds: it shares one fsync."""
        group = [first]
        size_bytes = batches.size_bytes(first.batch)
        waiting = self._requests
        while len(group) < _GROUP_MAX and size_bytes < _GROUP_BYTES and not waiting.empty():
            request = waiting.get()
            if request is None:  # to be met again when this group is done
                waiting.put(None)
                break
            group.append(request)
            size_bytes += batches.size_bytes(request.batch)
        self._stats.queued = self._requests.qsize()
        return group

    def _commit(self, group: list[Request]) -> None:
        """Settle a group. Where it fails as a whole and is known to be undone, each of its batches
        is tried alone, so that one that touches damage does not take the others with it."""
        tips: dict[Place, Tip] = {}
        try:
            if self.latched:
                raise Latched(f"{self._where}: {self.latched}. Reopen the store to recover it.")
            outcomes, tips = self._attempt(group)
        except PerdureError as error:
            if len(group) > 1 and not self.latched:
                for request in group:
                    self._commit([request])
                return
            outcomes = [(request.future, error) for request in group]
        self._settle(outcomes, tips)

    def _attempt(self, group: list[Request]) -> tuple[list[Outcome], dict[Place, Tip]]:
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                known = Known()
                effects = _Effects(partial(self._stream_id, known))
                if (taken := group[0].load) is not None:
                    self._load(group, known)
                    check_under(group[0].batch, known.facts)
                    found = find_present(self._connection, self._tables, taken.rows)
                    present, known.stream_ids = found
                    effects.take(taken, self._layouts, present)
                    outcomes: list[Outcome] = [(group[0].future, Committed(()))]
                else:
                    self._load(group, known)
                    outcomes = decide_group(group, known, effects, self._stats)
                if not effects:
                    return outcomes, {}
                self._write(effects, known)
                self._seal()
            finally:
                self._roll_back()
        except apsw.Error as failure:
            error = known_full(failure, self._connection)
            if leaves_doubt(error):
                self.latch(f"writing failed ({error})")
            meaning = translate(error, self._where)
            if meaning is failure:
                raise
            raise meaning from failure
        self._note_durable(outcomes)
        return outcomes, effects.tips

    def _load(self, group: list[Request], known: Known) -> None:
        records: dict[str, set[str]] = defaultdict(set)
        streams: dict[str, set[str]] = defaultdict(set)
        operations: set[str] = set()
        for request in group:
            for op in request.batch.ops:
                if isinstance(op, batches.RecordOp):
                    records[op.records.name].add(op.place)
                else:
                    streams[op.log.name].add(op.place)
            if request.operation is not None:
                operations.add(request.operation[0])
        if absent := (records.keys() - self._tables.keys()) | (streams.keys() - self._logs):
            raise Invalid(f"the store was opened without the collection {min(absent)}.")
        for name, places in records.items():
            self._load_versions(known, name, places)
        for name, places in streams.items():
            self._load_tips(known, name, places)
        if operations:
            self._load_operations(known, operations)

    def _load_versions(self, known: Known, name: str, places: set[str]) -> None:
        table, versions = self._tables[name], known.facts.versions
        wanted = (apsw.carray(tuple(places)),)
        for place, version in self._rows(table.versions, wanted):
            versions[(name, place)] = version
        if name not in self._has_tombstones:
            ((found,),) = self._rows(SQL["has_tombstones"], (name,))
            self._has_tombstones[name] = bool(found)
        if not self._has_tombstones[name]:
            return
        for place, version, checksum in self._rows(SQL["tombstones_at"], (name, *wanted)):
            if record_sum(name, place, version, None, None) != checksum:
                raise Damaged(f"{name} {show(split(place))}", "its tombstone is not as written")
            versions[(name, place)] = -version
            known.buried.add((name, place))

    def _load_tips(self, known: Known, name: str, places: set[str]) -> None:
        rows = self._rows(SQL["tips_at"], (name, apsw.carray(tuple(places))))
        for stream_id, place, incarnation, first, last, checksum in rows:
            tip = Tip(incarnation, first, last)
            if tip_sum(name, place, tip) != checksum:
                raise Damaged(f"{name} {show(split(place))}", "its tip is not as written")
            known.facts.tips[(name, place)] = tip
            known.stream_ids[(name, place)] = stream_id
        if len(rows) < len(places):
            known.facts.floors[name] = absent_tip(self._connection, name).incarnation

    def _load_operations(self, known: Known, ids: set[str]) -> None:
        rows = self._rows(SQL["operations_at"], (apsw.carray(tuple(ids)),))
        for id, partition, digest, numbers, checksum in rows:
            if operation_sum((id, partition), digest, numbers) != checksum:
                raise Damaged(f"operation {id}", "it is not as written")
            committed = Committed(msgspec.json.decode(numbers, type=tuple[int, ...]))
            known.operations[(id, partition)] = (digest, committed)

    def _rows(self, sql: str, values: tuple[Any, ...]) -> list[Any]:
        """All rows at once: a query left half-read would keep its snapshot, and the log with it."""
        return self._connection.execute(sql, values).fetchall()

    def _stream_id(self, known: Known, place: Place) -> int:
        if place not in known.stream_ids:
            known.stream_ids[place] = self._new_stream_id()
        return known.stream_ids[place]

    def _new_stream_id(self) -> int:
        """An id above all others. One whose transaction is undone is not given out again."""
        if not self._newest_stream_id:
            ((self._newest_stream_id,),) = self._rows(SQL["newest_stream"], ())
        self._newest_stream_id += 1
        return self._newest_stream_id

    def _write(self, effects: _Effects, known: Known) -> None:
        now_s = int(self._clock.now_s())
        for name, writes in effects.records.items():
            self._write_records(name, writes, known, now_s)
        if effects.tips:
            self._write_streams(effects, known, now_s)
        if effects.operations:
            self._write_operations(effects, now_s)
        for log, incarnation in effects.floors.items():
            self._connection.execute(SQL["raise_fact"], (incarnations(log), incarnation))
        if effects.gone:
            self._remove(effects.gone, known)
        if effects.complete:
            self._connection.execute(SQL["forget_fact"], ("copy_of",))
        if not advance(self._connection, self.number + 1):
            self.latch("another process has taken it over since, as its lock file was removed")
            raise Latched(f"{self._where}: {self.latched}. Nothing was written.")

    def _write_records(
        self, name: str, writes: dict[str, RecordWrite], known: Known, now_s: int
    ) -> None:
        table = self._tables[name]
        many = self._connection.executemany
        puts, gone, revived = [], [], []
        for place, write in writes.items():
            if write.value is None:
                gone.append((place, write.version))
                continue
            puts.append(
                table.values(place, write.version, write.columns, write.value, write.attachment)
            )
            if (name, place) in known.buried:
                revived.append((name, place))
        if puts:
            many(table.put, puts)
        if revived:
            many(SQL["unbury"], revived)
        if gone:
            many(table.delete, [(place,) for place, _ in gone])
            sums = (record_sum(name, place, version, None, None) for place, version in gone)
            many(
                SQL["bury"],
                [(name, *row, checksum, now_s) for row, checksum in zip(gone, sums, strict=True)],
            )
            self._has_tombstones[name] = True
            self._sweep("sweep_tombstones", now_s - TOMBSTONE_KEPT_S, len(gone))

    def _write_streams(self, effects: _Effects, known: Known, now_s: int) -> None:
        rows = []
        dropped = 0
        for (name, place), tip in effects.tips.items():
            stream_id = known.stream_ids[(name, place)]
            where = f"{name} {show(split(place))}"
            if tip.last > SEQ_MAX:
                raise LimitExceeded(f"{where}: the number of its last entry", tip.last, SEQ_MAX)
            if stream_id > STREAM_ID_MAX:
                raise LimitExceeded("the number of streams", stream_id, STREAM_ID_MAX)
            gone = tip.last == 0
            dropped += gone
            rows.append(
                (
                    *(stream_id, name, place, tip.incarnation, tip.first, tip.last),
                    *(tip_sum(name, place, tip), now_s if gone else None),
                )
            )
        many = self._connection.executemany
        if effects.forgotten:
            many(SQL["forget_entries"], effects.forgotten)
        for added in effects.entries.values():
            many(SQL["add_entry"], added.values())
        many(SQL["set_tip"], rows)
        if dropped:
            self._forget_streams(now_s - TOMBSTONE_KEPT_S, 2 * dropped)

    def _remove(self, gone: Unloading, known: Known) -> None:
        many = self._connection.executemany
        for name, place in gone.records:
            self._connection.execute(self._tables[name].delete, (place,))
        many(SQL["unbury"], gone.tombstones)
        ids = [known.stream_ids[at] for at, _ in gone.streams]
        bases = [(id << STREAM_SHIFT, tip) for id, (_, tip) in zip(ids, gone.streams, strict=True)]
        many(SQL["forget_entries"], [(base + tip.first, base + tip.last) for base, tip in bases])
        many(SQL["forget_stream"], [(id,) for id in ids])
        many(SQL["forget_operation"], gone.operations)

    def _forget_streams(self, before_s: int, most: int) -> None:
        """Forget old drops, at the pace of `_sweep`. A log remembers the highest incarnation among
        them, so that no cursor of one fits a stream that is made again."""
        old = self._rows(SQL["dropped_streams"], (before_s, most))
        for stream_id, name, incarnation in old:
            self._connection.execute(SQL["raise_fact"], (incarnations(name), incarnation))
            self._connection.execute(SQL["forget_stream"], (stream_id,))

    def _write_operations(self, effects: _Effects, now_s: int) -> None:
        rows = []
        for operation, digest, committed in effects.operations:
            numbers = msgspec.json.encode(committed.numbers)
            checksum = operation_sum(operation, digest, numbers)
            rows.append((*operation, digest, numbers, checksum, now_s))
        self._connection.executemany(SQL["add_operation"], rows)
        self._sweep("sweep_operations", now_s - OPERATION_KEPT_S - CLOCK_OFF_S, len(rows))

    def _sweep(self, statement: str, before_s: int, written: int) -> None:
        """Forget old rows at twice the pace new ones come, so that none pile up."""
        self._connection.execute(SQL[statement], (before_s, 2 * written))

    def _seal(self) -> None:
        """Commit and sync. SQLite has undone a commit that found no space; the outcome of one that
        failed in any other way cannot be known."""
        started_s = self._clock.monotonic_s()
        try:
            self._connection.execute("COMMIT")
        except apsw.Error as error:
            if isinstance(known_full(error, self._connection), apsw.FullError):
                raise
            self.latch(f"a commit failed at its sync ({error})")
            raise CommitUnknown(
                f"{self._where}: the disk failed while committing ({error}), so this write may or "
                "may not be there. Reopen the store, then ask again with its operation id."
            ) from error
        self.number += 1
        self._stats.sync_last_s = self._clock.monotonic_s() - started_s
        self._stats.sync_s += self._stats.sync_last_s

    def _roll_back(self) -> None:
        """End a transaction that was not committed."""
        if self._connection.in_transaction:
            try:
                self._connection.execute("ROLLBACK")
            except apsw.Error as error:
                self.latch(f"a rollback failed ({error})")
                raise

    def _note_durable(self, outcomes: list[Outcome]) -> None:
        """After the fsync and before anyone is told: see the invariant of the mark."""
        try:
            self._mark.write(self.number)
        except OSError as error:
            self.latch(f"the mark of the last commit could not be written ({error})")
        self._stats.groups += 1
        self._stats.commits += sum(isinstance(done, Committed) for _, done in outcomes)
        self._stats.log_size_bytes = self._frames * FRAME_BYTES

    def _log_grew(self, connection: apsw.Connection, database: str, frames: int) -> int:
        self._frames = frames
        return apsw.SQLITE_OK

    def _abandon(self, group: list[Request]) -> None:
        """Nobody waits for ever where the thread ends by a mistake of ours, not even who comes
        after that: a batch is put into the queue first, and `_over` looked at then."""
        self._over = True
        left = list(group)
        while True:
            try:
                request = self._requests.get_nowait()
            except queue.Empty:
                break
            if request is not None:
                left.append(request)
        if left:
            unknown = CommitUnknown(f"{self._where}: {self.latched}; reopen the store.")
            self._settle([(request.future, unknown) for request in left], {})
