"""Engines with one bug each: the rules of the conformance suite must catch every one of them, alone
and without the checks of every call. A suite that cannot fail proves nothing.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from perdure.core.batch import NOTHING, Append, Batch, Drop, Put, Trim, drop
from perdure.core.clock import Clock
from perdure.core.engine import Engine
from perdure.core.errors import Conflict, CursorRefused, Trimmed
from perdure.core.keys import Key
from perdure.core.layouts import Layout, Log, Records
from perdure.core.rows import At, RecordRow, Row, Rows
from perdure.core.values import Committed, Entry, Page, Record, Tip
from perdure.engines.memory import MemoryEngine
from perdure.engines.wrapping import Wrapping
from perdure.proving.subject import Subject


class IgnoresExpectations(Wrapping):
    async def commit(self, batch: Batch) -> Committed:
        return await super().commit(_without(batch, "expect"))


class IgnoresOperationIds(Wrapping):
    async def commit(self, batch: Batch) -> Committed:
        return await super().commit(Batch(batch.ops))


class AppliesInParts(Wrapping):
    async def commit(self, batch: Batch) -> Committed:
        if batch.operation_id:
            return await super().commit(batch)
        parts = [(await super(AppliesInParts, self).commit(Batch((op,)))) for op in batch.ops]
        return Committed(tuple(itertools.chain.from_iterable(part.numbers for part in parts)))


class UsesUpIdsOfRefusedBatches(Wrapping):
    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self.used: dict[str, Conflict] = {}

    async def commit(self, batch: Batch) -> Committed:
        name = batch.operation_id or ""
        if name in self.used:
            raise self.used[name]
        try:
            return await super().commit(batch)
        except Conflict as conflict:
            if name:
                self.used[name] = conflict
            raise


class NeverTrims(Wrapping):
    async def read(self, *args: Any, **named: Any) -> list[Entry[Any]]:
        try:
            return await super().read(*args, **named)
        except Trimmed:
            return []


class NeverTellsIncarnations(Wrapping):
    async def read(self, *args: Any, incarnation: int | None = None, **named: Any) -> list[Any]:
        return await super().read(*args, **named)


class SleepsThroughCommits(Wrapping):
    async def wait(self, log: Log[Any], stream: Key, after: int, *, timeout_s: float) -> Tip:
        if (tip := await self.tip(log, stream)).last > after:
            return tip
        await asyncio.sleep(0)  # what is committed now goes unseen until the next commit
        last = (await self.tip(log, stream)).last
        return await super().wait(log, stream, max(after, last), timeout_s=timeout_s)


class ForgetsTheLastPage(Wrapping):
    async def scan(self, *args: Any, **named: Any) -> Page[Any]:
        page = await super().scan(*args, **named)
        return Page(page.items)


class TakesAnyCursor(Wrapping):
    async def scan(self, *args: Any, cursor: str | None = None, **named: Any) -> Page[Any]:
        try:
            return await super().scan(*args, cursor=cursor, **named)
        except CursorRefused:
            return await super().scan(*args, **named)


class ClampsLimits(Wrapping):
    async def scan(self, *args: Any, limit: int, **named: Any) -> Page[Any]:
        return await super().scan(*args, limit=max(0, min(limit, 1000)), **named)


class LosesAttachments(Wrapping):
    async def get(self, records: Records[Any], key: Key) -> Record[Any] | None:
        record = await super().get(records, key)
        return record and Record(record.key, record.version, record.value)


class TakesEmptyForAbsent(Wrapping):
    async def get(self, records: Records[Any], key: Key) -> Record[Any] | None:
        record = await super().get(records, key)
        return record and Record(
            record.key, record.version, record.value, record.attachment or None
        )


class CountsTombstones(Wrapping):
    async def count(self, records: Records[Any], prefix: Key, **named: Any) -> dict[Any, int]:
        counts = await super().count(records, prefix, **named)
        return {group: number + 1 for group, number in counts.items()}


class FoldsCase(Wrapping):
    async def commit(self, batch: Batch) -> Committed:
        ops: list[Any] = []
        for op in batch.ops:
            if isinstance(op, Put):
                op = Put(*(_lower(getattr(op, field)) for field in op.__struct_fields__))
            ops.append(op)
        return await super().commit(Batch(tuple(ops), batch.operation_id))

    async def get(self, records: Records[Any], key: Key) -> Record[Any] | None:
        return await super().get(records, _lower(key))


class IgnoresPartitions(Wrapping):
    async def commit(self, batch: Batch) -> Committed:
        for op in batch.ops:
            layout = op.log if isinstance(op, Append | Trim | Drop) else op.records
            layout.partition = None
        try:
            return await super().commit(batch)
        finally:
            for op in batch.ops:
                layout = op.log if isinstance(op, Append | Trim | Drop) else op.records
                layout.partition = 1 if "game" in layout.key else None


class GivesOneForNone(Wrapping):
    async def scan(self, records: Records[Any], prefix: Key, **how: Any) -> Page[Record[Any]]:
        page = await super().scan(records, prefix, **how)
        if how["limit"]:
            return page
        more = await super().scan(records, prefix, **{**how, "limit": 1})
        return Page(page.items, page.cursor or more.cursor)


class CutsLaterPagesOfAnIndex(Wrapping):
    async def scan(self, records: Records[Any], prefix: Key, **how: Any) -> Page[Record[Any]]:
        page = await super().scan(records, prefix, **how)
        if how.get("index") and how.get("cursor") and len(page.items) > 1:
            return Page(page.items[:1])
        return page


class StaysOpen(Wrapping):
    async def close(self) -> None:
        pass


class ReusesNumbers(Wrapping):
    async def commit(self, batch: Batch) -> Committed:
        ops = (drop(op.log, op.key).ops if isinstance(op, Trim) else (op,) for op in batch.ops)
        return await super().commit(Batch(tuple(itertools.chain(*ops)), batch.operation_id))


class MovesWhatIsLiveOnly(Wrapping):
    async def rows(self, *, after: At | None = None, partition: str | None = None) -> Rows:
        page = await super().rows(after=after, partition=partition)
        return Rows(tuple(row for row in page.items if not _is_tombstone(row)), page.after)


class MovesPartitionsTogether(Wrapping):
    async def rows(self, *, after: At | None = None, partition: str | None = None) -> Rows:
        return await super().rows(after=after)


class LoadsOverWhatIsThere(Wrapping):
    async def load(
        self, rows: Sequence[Row], *, complete: bool = False, under: Batch = NOTHING
    ) -> None:
        with suppress(Conflict):
            await super().load(rows, complete=complete, under=under)


class LoadsInParts(Wrapping):
    async def load(
        self, rows: Sequence[Row], *, complete: bool = False, under: Batch = NOTHING
    ) -> None:
        for row in rows:
            await super().load([row])


def _is_tombstone(row: Row) -> bool:
    return isinstance(row, RecordRow) and row.value is None


PLANTED: dict[str, Callable[[Engine], Wrapping]] = {
    "two writers that expect one version both win: an update is lost": IgnoresExpectations,
    "a commit that is sent again is made again": IgnoresOperationIds,
    "each operation of a batch is committed by itself": AppliesInParts,
    "a refused batch uses up its operation id": UsesUpIdsOfRefusedBatches,
    "trimmed entries are read as absent, and not as trimmed": NeverTrims,
    "a position in a dropped stream is taken for one in its successor": NeverTellsIncarnations,
    "a wait begins after the look at the tip, and sleeps through a commit": SleepsThroughCommits,
    "a page that is not the last ends the list": ForgetsTheLastPage,
    "a page of nothing has a cursor": GivesOneForNone,
    "only the first page of an index is whole": CutsLaterPagesOfAnIndex,
    "a cursor of another question is taken": TakesAnyCursor,
    "a limit beyond what is allowed is quietly made smaller": ClampsLimits,
    "a record comes back without its attachment": LosesAttachments,
    "an empty attachment comes back as none": TakesEmptyForAbsent,
    "deleted records are counted": CountsTombstones,
    "keys that differ in case are one key": FoldsCase,
    "a batch may span two partitions": IgnoresPartitions,
    "a closed engine goes on": StaysOpen,
    "the number of a trimmed entry is given to the next one": ReusesNumbers,
    "a store that moves leaves its tombstones behind": MovesWhatIsLiveOnly,
    "a partition that moves takes others with it": MovesPartitionsTogether,
    "rows that differ from what is there are left out without a word": LoadsOverWhatIsThere,
    "some rows of a page are loaded where another is refused": LoadsInParts,
}
"""What is wrong with an engine, and how to make one."""


def subject_of(planted: Callable[[Engine], Wrapping]) -> Subject:
    """A memory engine with a bug, for the suite."""

    async def open_planted(directory: Path, layouts: Sequence[Layout], clock: Clock) -> Engine:
        return planted(MemoryEngine(layouts, clock))

    async def copy_planted(
        directory: Path, layouts: Sequence[Layout], clock: Clock, store_id: str
    ) -> Engine:
        return planted(MemoryEngine(layouts, clock, copy_of=store_id))

    return Subject("planted", open_planted, copy=copy_planted)


def _without(batch: Batch, field: str) -> Batch:
    ops: list[Any] = []
    for op in batch.ops:
        values = {name: getattr(op, name) for name in op.__struct_fields__}
        if field in values and isinstance(op, Put):
            values[field] = None
        ops.append(type(op)(**values))
    return Batch(tuple(ops), batch.operation_id)


def _lower(part: Any) -> Any:
    if isinstance(part, str):
        return part.lower()
    return tuple(map(_lower, part)) if isinstance(part, tuple) else part
