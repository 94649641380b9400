"""Scans of a collection in one of its orders, each bounded by its limit and an index.

An order is a list of columns ending in the key. What comes after a position in it is not one range
of the index but a few: equal on all columns but the last and beyond it there, then equal on one
fewer, and so on. Asked one by one, in order, each is one seek, and None needs no special order:
SQLite too sorts it before numbers and those before text.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import apsw

from perdure.core import cursors, keys
from perdure.core.cursors import Position, Question
from perdure.core.errors import Damaged
from perdure.core.layouts import Column, Index
from perdure.core.values import Page, Record
from perdure.engines.sqlite_driver import is_damage
from perdure.engines.sqlite_schema import Table

Condition = tuple[str, tuple[Any, ...]]


def scan_page(
    connection: apsw.Connection,
    table: Table,
    question: Question,
    after: Position | None,
    limit: int,
) -> Page[Record[Any]]:
    """At most `limit` records of the question, those after the position.

    A page ends before a record that is damaged. When it stands first, `Damaged` is raised with
    the cursor that goes on behind it.
    """
    try:
        # One row more than asked tells whether there is a next page.
        rows = _rows(connection, table, question, after, limit + 1, table.row)
        items = [table.record(row) for row in rows[:limit]]
        more = len(rows) > limit
    except (apsw.Error, Damaged) as error:
        if not is_damage(error):
            raise
        items = _before_damage(connection, table, question, after, limit)
        more = True
    return Page(items, _cursor(table, question, items[-1]) if more and items else None)


def _before_damage(
    connection: apsw.Connection,
    table: Table,
    question: Question,
    after: Position | None,
    limit: int,
) -> list[Record[Any]]:
    """The sound records at the front of a page that cannot be read as a whole. Their places are
    taken from the index alone, so that damage in a row does not hide where it stands."""
    items: list[Record[Any]] = []
    index = None if question.index is None else table.records.index(question.index)
    own = () if index is None else table.fields_of(index)[len(question.where) :]
    for *columns, place in _rows(
        connection, table, question, after, limit, ", ".join((*own, "key"))
    ):
        try:
            found = connection.execute(table.get_many, (apsw.carray((place,)),)).fetchall()
            items += map(table.record, found)
        except (apsw.Error, Damaged) as error:
            if not is_damage(error):
                raise
            if items:
                return items
            where = f"{table.records.name} {keys.show(keys.split(place))}"
            why = error.why if isinstance(error, Damaged) else f"its page cannot be read ({error})"
            position = Position(tuple(columns), place)
            raise Damaged(where, why, resume=cursors.pack(question, position)) from error
    return items


def _rows(
    connection: apsw.Connection,
    table: Table,
    question: Question,
    after: Position | None,
    limit: int,
    columns: str,
) -> list[tuple[Any, ...]]:
    index = None if question.index is None else table.records.index(question.index)
    lead, order = _order(table, index, question)
    direction = " DESC" if question.descending else ""
    rows: list[tuple[Any, ...]] = []
    for condition, values in _ranges(lead, order, after, descending=question.descending):
        sql = (
            f"SELECT {columns} FROM {_source(table, index)} WHERE {condition} "
            f"ORDER BY {', '.join(column + direction for column in order)} LIMIT ?"
        )
        rows += connection.execute(sql, (*values, limit - len(rows))).fetchall()
        if len(rows) == limit:
            break
    return rows


def _cursor(table: Table, question: Question, last: Record[Any]) -> str:
    return cursors.at_record(
        question.store_id,
        table.records,
        question.prefix,
        last,
        index=question.index,
        where=question.where,
        descending=question.descending,
    )


def count_rows(
    connection: apsw.Connection, table: Table, question: Question, group: int
) -> dict[tuple[Column | None, ...], int]:
    """See `core.engine.Engine.count`."""
    index = None if question.index is None else table.records.index(question.index)
    (condition, values), _ = _order(table, index, question)
    grouped = ", ".join(() if index is None else table.fields_of(index)[:group])
    sql = (
        f"SELECT {grouped}{',' * bool(grouped)} count(*) FROM {_source(table, index)} "
        f"WHERE {condition}{' GROUP BY ' * bool(grouped)}{grouped}"
    )
    rows = connection.execute(sql, values)
    return {tuple(own): number for *own, number in rows if number}


def _source(table: Table, index: Index | None) -> str:
    """The table, with the index it must be read by: a scan of it all is a mistake, not a plan."""
    return table.name if index is None else f"{table.name} INDEXED BY {table.index_name(index)}"


def _order(
    table: Table, index: Index | None, question: Question
) -> tuple[Condition, tuple[str, ...]]:
    """What every item of the question satisfies, and the columns that order them."""
    if index is None:
        return ("key > ? AND key < ?", keys.span(question.prefix)), ("key",)
    fields = table.fields_of(index)
    parts = [f"{fields[0]} IS NOT NULL"]
    values: list[Column | None] = []
    if not index.every_tenant:
        parts.append("tenant = ?")
        values.append(question.prefix[0])
    for field, value in zip(fields, question.where, strict=False):
        parts.append(f"{field} IS ?")
        values.append(value)
    return (" AND ".join(parts), tuple(values)), (*fields[len(question.where) :], "key")


def _ranges(
    lead: Condition, order: tuple[str, ...], after: Position | None, *, descending: bool
) -> Iterator[Condition]:
    """Conditions whose rows, one condition after another, are those after the position in order."""
    condition, values = lead
    if after is None:
        yield lead
        return
    seen = (*after.columns, after.place)
    for depth in range(len(order) - 1, -1, -1):
        column, bound = order[depth], seen[depth]
        equal = "".join(f" AND {name} IS ?" for name in order[:depth])
        start = (condition + equal, (*values, *seen[:depth]))
        if not descending:
            beyond = f"{column} IS NOT NULL" if bound is None else f"{column} > ?"
            yield f"{start[0]} AND {beyond}", (*start[1], *(() if bound is None else (bound,)))
        elif bound is not None:
            yield f"{start[0]} AND {column} < ?", (*start[1], bound)
            if column != "key":
                yield f"{start[0]} AND {column} IS NULL", start[1]
