"""Scans of a collection in one of its orders, each bounded by its limit and an index.

An order is a list of columns ending in the key. What comes after a position in it is not one range
of the index but a few: equal on all columns but the last and beyond it there, then equal on one
fewer, and so on. Asked one by one, in order, each is one walk along the index.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import asyncpg

from perdure.core import cursors, keys
from perdure.core.cursors import Position, Question
from perdure.core.errors import Damaged
from perdure.core.layouts import Column, Index
from perdure.core.values import Page, Record
from perdure.engines.postgres_driver import is_damage
from perdure.engines.postgres_schema import Table

if TYPE_CHECKING:
    from perdure.engines.postgres_driver import Session


Condition = tuple[tuple[str, ...], tuple[Any, ...]]
"""Parts that all hold, each with a `?` for every value."""


async def scan_page(
    session: Session, table: Table, question: Question, after: Position | None, limit: int
) -> Page[Record[Any]]:
    """At most `limit` records of the question, those after the position.

    A page ends before a record that is damaged. When it stands first, `Damaged` is raised with
    the cursor that goes on behind it.
    """
    index = None if question.index is None else table.records.index(question.index)
    if index is not None and not table.holds(index, question.where):
        return Page([])
    try:
        # One row more than asked tells whether there is a next page.
        rows = await _rows(session, table, question, after, limit + 1, table.row)
        items = [table.record(row) for row in rows[:limit]]
        more = len(rows) > limit
    except (asyncpg.PostgresError, UnicodeDecodeError, Damaged) as error:
        if not is_damage(error):
            raise
        items = await _before_damage(session, table, question, after, limit)
        more = True
    return Page(items, _cursor(table, question, items[-1]) if more and items else None)


async def _before_damage(
    session: Session, table: Table, question: Question, after: Position | None, limit: int
) -> list[Record[Any]]:
    """The sound records at the front of a page that cannot be read as a whole, read one by one."""
    items: list[Record[Any]] = []
    index = None if question.index is None else table.records.index(question.index)
    own = () if index is None else table.fields_of(index)[len(question.where) :]
    columns = ", ".join((*own, "key"))
    for *seen, place in await _rows(session, table, question, after, limit, columns):
        try:
            items += map(table.record, await session.fetch(table.get_many, [place]))
        except (asyncpg.PostgresError, UnicodeDecodeError, Damaged) as error:
            if not is_damage(error):
                raise
            if items:
                return items
            where = f"{table.records.name} {keys.show(keys.split(place))}"
            why = error.why if isinstance(error, Damaged) else f"it cannot be read ({error})"
            resume = cursors.pack(question, Position(tuple(seen), place))
            raise Damaged(where, why, resume=resume) from error
    return items


async def count_rows(
    session: Session, table: Table, question: Question, group: int
) -> dict[tuple[Column | None, ...], int]:
    """See `core.engine.Engine.count`."""
    index = None if question.index is None else table.records.index(question.index)
    (parts, values), _ = _order(table, index, question)
    grouped = ", ".join(() if index is None else table.fields_of(index)[:group])
    sql = (
        f"SELECT {grouped}{',' * bool(grouped)} count(*) FROM {table.name} "
        f"WHERE {' AND '.join(parts)}{' GROUP BY ' * bool(grouped)}{grouped}"
    )
    rows = await session.fetch(_numbered(sql), *values)
    return {tuple(own): number for *own, number in rows if number}


async def _rows(
    session: Session,
    table: Table,
    question: Question,
    after: Position | None,
    limit: int,
    columns: str,
) -> list[asyncpg.Record]:
    index = None if question.index is None else table.records.index(question.index)
    lead, order = _order(table, index, question)
    # An index is declared NULLS FIRST; walked backwards it has them last.
    direction = "DESC NULLS LAST" if question.descending else "ASC NULLS FIRST"
    rows: list[asyncpg.Record] = []
    for parts, values in _ranges(lead, order, after, descending=question.descending):
        sql = (
            f"SELECT {columns} FROM {table.name} WHERE {' AND '.join(parts)} "
            f"ORDER BY {', '.join(_directed(column, direction) for column in order)} LIMIT ?"
        )
        rows += await session.fetch(_numbered(sql), *values, limit - len(rows))
        if len(rows) == limit:
            break
    return rows


def _order(
    table: Table, index: Index | None, question: Question
) -> tuple[Condition, tuple[str, ...]]:
    """What every item of the question satisfies, and the columns that order them."""
    if index is None:
        return (("key > ?", "key < ?"), keys.span(question.prefix)), ("key",)
    fields = table.fields_of(index)
    parts = [f"{fields[0]} IS NOT NULL"]
    values: list[Any] = []
    if not index.every_tenant:
        parts.append("tenant = ?")
        values.append(question.prefix[0])
    for field, value in zip(fields, question.where, strict=False):
        parts.append(f"{field} = ?")
        values.append(value)
    return (tuple(parts), tuple(values)), (*fields[len(question.where) :], "key")


def _ranges(
    lead: Condition, order: tuple[str, ...], after: Position | None, *, descending: bool
) -> Iterator[Condition]:
    """Conditions whose rows, one condition after another, are those after the position in order."""
    if after is None:
        yield lead
        return
    seen = (*after.columns, after.place)
    for depth in range(len(order) - 1, -1, -1):
        column, bound = order[depth], seen[depth]
        start = lead
        for name, value in zip(order[:depth], seen, strict=False):
            start = _and(start, name, "IS NULL" if value is None else "= ?", value)
        if not descending:
            yield _and(start, column, "IS NOT NULL" if bound is None else "> ?", bound)
        elif bound is not None:
            yield _and(start, column, "< ?", bound)
            if column != "key":
                yield _and(start, column, "IS NULL", None)


def _and(condition: Condition, column: str, test: str, value: Column | None) -> Condition:
    parts, values = condition
    return (*parts, f"{column} {test}"), values if value is None else (*values, value)


def _directed(column: str, direction: str) -> str:
    """The key is never NULL, and its index is not declared to have them anywhere."""
    return f"{column} {direction.split(' ')[0] if column == 'key' else direction}"


def _numbered(sql: str) -> str:
    """The `?` of a statement as PostgreSQL counts them. No name of ours holds one."""
    head, *rest = sql.split("?")
    return head + "".join(f"${at}{part}" for at, part in enumerate(rest, 1))


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
