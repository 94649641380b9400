"""An engine that is not believed: every answer is compared with the rules, and with what this
wrapper was answered before. Closing it runs `verify` and demands that nothing is found.

It checks what must hold whatever others do meanwhile, so concurrent use is fine. A rule that does
not hold raises `Broken`: a defect of the engine below, not a condition to handle.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from perdure.core import keys
from perdure.core.batch import NOTHING, Append, Batch, Check, Delete, Put, RecordOp
from perdure.core.cursors import sortable
from perdure.core.deciding import Place
from perdure.core.engine import Engine
from perdure.core.errors import Closed, CursorRefused, Trimmed
from perdure.core.keys import Key, show
from perdure.core.layouts import Column, Log, Records
from perdure.core.limits import PAGE_MAX
from perdure.core.rows import At, RecordRow, Row, Rows, StreamRow
from perdure.core.values import Committed, Entry, Page, Record, Tip
from perdure.engines.wrapping import Wrapping

T = TypeVar("T")

NO_TIP = Tip()


class Broken(AssertionError):
    """The engine below broke a rule of `core.engine`."""


class Checked(Wrapping):
    """`given` holds, for each record, the versions that writes were answered with: no version is
    given to two writes. `tips` holds the furthest tip seen of each stream: none goes back."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self.given: dict[Place, set[int]] = {}
        self.tips: dict[Place, Tip] = {}
        self.closed = False

    async def commit(self, batch: Batch) -> Committed:
        committed = await super().commit(batch)
        _demand(
            len(committed.numbers) == len(batch.ops),
            f"{len(batch.ops)} operations were answered with {len(committed.numbers)} numbers",
        )
        try:
            for op, number in zip(batch.ops, committed.numbers, strict=True):
                if isinstance(op, RecordOp):
                    await self._check_record(op, number, repeatable=batch.operation_id is not None)
                elif isinstance(op, Append):
                    await self._check_append(op, number)
        except Closed:
            return committed  # closed since it was acknowledged: nothing can be asked any more
        return committed

    async def get(self, records: Records[T], key: Key) -> Record[T] | None:
        known = max(self.given.get((records.name, keys.join(key)), ()), default=0)
        record = await super().get(records, key)
        if record is not None:
            where = f"{records.name} {show(key)}"
            _demand(record.key == key, f"{where} was answered with {show(record.key)}")
            _demand(
                record.version >= known,
                f"{where} was read at version {record.version} after {known} was acknowledged",
            )
        return record

    async def get_many(self, records: Records[T], keys: Sequence[Key]) -> list[Record[T] | None]:
        found = await super().get_many(records, keys)
        _demand(len(found) == len(keys), f"{len(keys)} keys were answered by {len(found)} records")
        for key, record in zip(keys, found, strict=True):
            _demand(record is None or record.key == key, f"another record stands for {show(key)}")
        return found

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
        page = await super().scan(
            records,
            prefix,
            index=index,
            where=where,
            limit=limit,
            cursor=cursor,
            descending=descending,
            partial=partial,
        )
        _check_page(records.name, page, limit)
        order: list[tuple[Any, ...]] = []
        for record in page.items:
            _demand(
                record.key[: len(prefix)] == prefix and len(record.key) > len(prefix),
                f"{records.name} {show(record.key)} is not under {show(prefix)}",
            )
            fields: tuple[Column | None, ...] = ()
            if index is not None:
                own = records.column_of(records.index(index), records.columns(record.value))
                _demand(
                    own[: len(where)] == tuple(where) and own[0] is not None,
                    f"{records.name} {show(record.key)} has {own}, asked for {tuple(where)}",
                )
                fields = own[len(where) :]
            order.append((*map(sortable, fields), keys.join(record.key)))
        _check_order(f"a scan of {records.name}", order, descending)
        return page

    async def read(
        self,
        log: Log[T],
        stream: Key,
        *,
        after: int = 0,
        incarnation: int | None = None,
        limit: int,
    ) -> list[Entry[T]]:
        entries = await super().read(log, stream, after=after, incarnation=incarnation, limit=limit)
        numbers = [entry.seq for entry in entries]
        _demand(
            len(numbers) <= limit and numbers == list(range(after + 1, after + 1 + len(numbers))),
            f"{log.name} {show(stream)} after {after}, at most {limit}, was answered by {numbers}",
        )
        return entries

    async def tip(self, log: Log[Any], stream: Key) -> Tip:
        known = self.tips.get((log.name, keys.join(stream)), NO_TIP)
        tip = await super().tip(log, stream)
        return self._seen(log, stream, known, tip)

    async def wait(self, log: Log[Any], stream: Key, after: int, *, timeout_s: float) -> Tip:
        known = self.tips.get((log.name, keys.join(stream)), NO_TIP)
        tip = await super().wait(log, stream, after, timeout_s=timeout_s)
        return self._seen(log, stream, known, tip)

    async def streams(
        self,
        log: Log[Any],
        prefix: Key,
        *,
        limit: int,
        cursor: str | None = None,
        partial: bool = False,
    ) -> Page[Key]:
        page = await super().streams(log, prefix, limit=limit, cursor=cursor, partial=partial)
        _check_page(log.name, page, limit)
        for key in page.items:
            _demand(key[: len(prefix)] == prefix, f"{log.name} {show(key)} is not asked for")
        _check_order(f"the streams of {log.name}", [(keys.join(key),) for key in page.items], False)
        return page

    async def rows(self, *, after: At | None = None, partition: str | None = None) -> Rows:
        page = await super().rows(after=after, partition=partition)
        places = [row.at for row in page.items]
        entries = [len(row.values) or 1 for row in page.items if isinstance(row, StreamRow)]
        _demand(
            len(places) - len(entries) + sum(entries) <= PAGE_MAX,
            f"a page of rows holds {len(places)} rows and {sum(entries)} entries",
        )
        order = places if after is None else [after, *places]
        _demand(order == sorted(set(order)), f"rows are out of order or repeat themselves: {order}")
        _demand(
            page.after is None or [page.after] == places[-1:],
            f"rows up to {places[-1:]} go on at {page.after}",
        )
        return page

    async def unload(self, rows: Sequence[Row], *, under: Batch = NOTHING) -> None:
        await super().unload(rows, under=under)
        for row in rows:
            if isinstance(row, RecordRow | StreamRow):
                self.given.pop((row.at.name, row.place), None)
                self.tips.pop((row.at.name, row.place), None)

    async def close(self) -> None:
        """Verify, then close. Raises `Broken` with everything found; closes all the same."""
        try:
            if not self.closed:
                found = [finding async for finding in self.engine.verify()]
                _demand(not found, f"verify found {found}")
        finally:
            self.closed = True
            await super().close()

    async def _check_record(self, op: RecordOp, number: int, *, repeatable: bool) -> None:
        where = f"{type(op).__name__.lower()} {op.records.name} {show(op.key)}"
        _demand(number >= _least(op), f"{where}, expecting {op.expect}, was answered {number}")
        if isinstance(op, Check):
            return
        if op.expect and not repeatable:
            _demand(number == op.expect + 1, f"{where} went from {op.expect} to {number}")
        given = self.given.setdefault((op.records.name, op.place), set())
        if isinstance(op, Put):
            fresh = number not in given
            _demand(fresh or repeatable, f"{where} was given version {number} a second time")
            given.add(number)
        record = await self.get(op.records, op.key)
        if isinstance(op, Put) and record is not None and record.version == number:
            same = record.value == op.records.decode(op.key, op.value)
            _demand(same and record.attachment == op.attachment, f"{where} reads back otherwise")
        if isinstance(op, Delete) and record is not None:
            _demand(record.version > number, f"{where} left version {record.version}")

    async def _check_append(self, op: Append, number: int) -> None:
        where = f"append to {op.log.name} {show(op.key)}"
        size = len(op.entries)
        if op.after is not None:
            _demand(number == op.after + size, f"{where} after {op.after} gave {number}")
        _demand(number >= size, f"{where} of {size} gave {number}")
        tip = await self.tip(op.log, op.key)
        if tip.incarnation > 1:
            return  # it may have been dropped since, and what it says now is another's
        _demand(tip.last >= number, f"{where} gave {number}, and the stream ends at {tip.last}")
        try:
            kept = await self.engine.read(
                op.log, op.key, after=number - size, incarnation=1, limit=min(size, PAGE_MAX)
            )
        except (Trimmed, CursorRefused):
            return
        written = [op.log.decode(op.key, text) for text in op.entries[:PAGE_MAX]]
        _demand([entry.value for entry in kept] == written, f"{where} reads back otherwise")

    def _seen(self, log: Log[Any], stream: Key, known: Tip, tip: Tip) -> Tip:
        """Compare a tip with the furthest one known before it was asked for."""
        forward = tip.incarnation > known.incarnation or (
            tip.incarnation == known.incarnation
            and tip.first >= known.first
            and tip.last >= known.last
        )
        sound = 1 <= tip.first <= tip.last + 1
        _demand(forward and sound, f"{log.name} {show(stream)} went from {known} to {tip}")
        place = (log.name, keys.join(stream))
        furthest = self.tips.get(place, NO_TIP)
        if (tip.incarnation, tip.last, tip.first) > (
            furthest.incarnation,
            furthest.last,
            furthest.first,
        ):
            self.tips[place] = tip
        return tip


def _least(op: RecordOp) -> int:
    """The smallest number a record operation can be answered with."""
    if isinstance(op, Check):
        return op.expect
    return 1 if isinstance(op, Put) else 0


def _check_page(name: str, page: Page[Any], limit: int) -> None:
    _demand(len(page.items) <= limit, f"{name} answered {len(page.items)} for a limit of {limit}")
    _demand(bool(page.items) or page.cursor is None, f"{name} gave a cursor after an empty page")


def _check_order(what: str, order: list[tuple[Any, ...]], descending: bool) -> None:
    expected = sorted(set(order), reverse=descending)
    _demand(order == expected, f"{what} is out of order or repeats itself: {order}")


def _demand(holds: bool, what: str) -> None:
    if not holds:
        raise Broken(what)
