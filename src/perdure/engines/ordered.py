"""The keys of a collection in memory, in every order in which they can be scanned.

For engines whose store has no order of its own. Rows are found by their joined key; each declared
index is a sorted list of what it orders by, so a page is two bisections.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping
from typing import Any

from perdure.core import cursors, keys
from perdure.core.cursors import Position, Question
from perdure.core.layouts import Column, Columns, Index, Records


class Ordered:
    """The live places of one collection with their index columns."""

    def __init__(self, records: Records[Any]) -> None:
        self.records = records
        self.columns: dict[str, Columns] = {}
        self._orders: dict[Index | None, list[tuple[Any, ...]]] = {None: []}
        self._orders.update({index: [] for index in records.indexes})

    def fill(self, columns: Mapping[str, Columns]) -> None:
        """Hold these places and no others: to sort many is cheaper than as many `set`s."""
        self.columns = dict(columns)
        for index, order in self._orders.items():
            found = (self._sort_key(index, place, own) for place, own in columns.items())
            order[:] = sorted(key for key in found if key is not None)

    def set(self, place: str, columns: Columns | None) -> None:
        """Put a place where its columns belong; None takes it away."""
        before = self.columns.pop(place, None)
        if columns is not None:
            self.columns[place] = columns
        for index, order in self._orders.items():
            old = None if before is None else self._sort_key(index, place, before)
            new = None if columns is None else self._sort_key(index, place, columns)
            if old == new:
                continue
            if old is not None:
                del order[bisect.bisect_left(order, old)]
            if new is not None:
                bisect.insort(order, new)

    def page(self, question: Question, cursor: str | None, limit: int) -> tuple[list[str], bool]:
        """Places that answer a question, at most `limit`, and whether there are more."""
        index = cursors.check_question(self.records, question)
        order = self._orders[index]
        low, high = _bounds(order, index, question)
        if cursor is not None:
            position = cursors.unpack(question, cursor)
            seen = (*_lead(index, question), *cursors.order_of(position))
            if question.descending:
                high = min(high, bisect.bisect_left(order, seen))
            else:
                low = max(low, bisect.bisect_right(order, seen))
        wanted = range(high - 1, low - 1, -1) if question.descending else range(low, high)
        return [order[at][-1] for at in wanted[:limit]], len(wanted) > limit > 0

    def cursor(self, question: Question, place: str) -> str:
        """The cursor that goes on after a place."""
        columns: Columns = ()
        if question.index is not None:
            index = self.records.index(question.index)
            own = self.records.column_of(index, self.columns[place])
            columns = own[len(question.where) :]
        return cursors.pack(question, Position(columns, place))

    def count(self, question: Question, group: int) -> dict[tuple[Column | None, ...], int]:
        """See `core.engine.Engine.count`."""
        index = cursors.check_question(self.records, question)
        cursors.check_group(self.records, index, group)
        order = self._orders[index]
        low, high = _bounds(order, index, question)
        counts: dict[tuple[Column | None, ...], int] = {}
        for at in range(low, high):
            own: Columns = ()
            if index is not None and group:
                own = self.records.column_of(index, self.columns[order[at][-1]])[:group]
            counts[own] = counts.get(own, 0) + 1
        return counts

    def _sort_key(
        self, index: Index | None, place: str, columns: Columns
    ) -> tuple[Any, ...] | None:
        """Where a row stands in an order; None where an index leaves it out."""
        if index is None:
            return (place,)
        own = self.records.column_of(index, columns)
        if own[0] is None:
            return None
        tenant = () if index.every_tenant else (keys.split(place)[0],)
        return (*tenant, *map(cursors.sortable, own), place)


def _lead(index: Index | None, question: Question) -> tuple[Any, ...]:
    if index is None:
        return ()
    return (*question.prefix, *map(cursors.sortable, question.where))


def _bounds(
    order: list[tuple[Any, ...]], index: Index | None, question: Question
) -> tuple[int, int]:
    """Positions in `order` that a question covers, before its cursor."""
    if index is None:
        low, high = keys.span(question.prefix)
        return bisect.bisect_right(order, (low,)), bisect.bisect_left(order, (high,))
    lead = _lead(index, question)
    size = len(lead)
    return (
        bisect.bisect_left(order, lead, key=lambda at: at[:size]),
        bisect.bisect_right(order, lead, key=lambda at: at[:size]),
    )


class Listed:
    """The streams of one log that have entries, by key."""

    def __init__(self) -> None:
        self._order: list[str] = []

    def set(self, place: str, *, kept: bool) -> None:
        """List a stream, or do not."""
        at = bisect.bisect_left(self._order, place)
        listed = at < len(self._order) and self._order[at] == place
        if kept and not listed:
            self._order.insert(at, place)
        elif listed and not kept:
            del self._order[at]

    def page(self, question: Question, cursor: str | None, limit: int) -> tuple[list[str], bool]:
        """Streams under the question's prefix, at most `limit`, and whether there are more."""
        after, high = keys.span(question.prefix)
        if cursor is not None:
            after = cursors.unpack(question, cursor).place
        low = bisect.bisect_right(self._order, after)
        found = self._order[low : bisect.bisect_left(self._order, high)]
        return found[:limit], len(found) > limit > 0
