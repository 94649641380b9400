"""Reading in pages: one page that goes on after a record, or every record one by one.

Here once, because a page loop written by hand is where a record gets left out.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Generic, TypeVar

import msgspec

from perdure.core import cursors
from perdure.core.engine import Engine
from perdure.core.errors import Damaged
from perdure.core.keys import Key
from perdure.core.layouts import Column, Records
from perdure.core.limits import PAGE_MAX
from perdure.core.values import Finding, Page, Record

T = TypeVar("T")

_FIRST = 64
"""Records in the first page of `every`: most questions have no more answers than that, and an
engine may answer a small page without leaving its thread."""


class Slice(msgspec.Struct, Generic[T], frozen=True):
    """Which part of a scan: at most `limit` records, from `cursor` on or else after the record
    `after`."""

    limit: int
    after: Record[T] | None = None
    cursor: str | None = None
    descending: bool = False


async def page_of(
    engine: Engine,
    records: Records[T],
    prefix: Key,
    wanted: Slice[T],
    *,
    index: str | None = None,
    where: Sequence[Column] = (),
) -> Page[Record[T]]:
    """That part of `Engine.scan`. Raises `Damaged`, which can resume."""
    cursor, descending = wanted.cursor, wanted.descending
    if wanted.after is not None and cursor is None:
        at = (engine.store_id, records, prefix, wanted.after)
        cursor = cursors.at_record(*at, index=index, where=where, descending=descending)
    return await engine.scan(
        records,
        prefix,
        index=index,
        where=where,
        limit=wanted.limit,
        cursor=cursor,
        descending=descending,
    )


async def every(
    engine: Engine,
    records: Records[T],
    prefix: Key,
    *,
    index: str | None = None,
    where: Sequence[Column] = (),
    damaged: list[Finding] | None = None,
) -> AsyncIterator[Record[T]]:
    """Every record of a scan, in its order, read in bounded pages. Raises `Damaged` at a damaged
    one, or notes it in `damaged` and goes on behind it."""
    limit, cursor = _FIRST, None
    while True:
        try:
            page = await engine.scan(
                records, prefix, index=index, where=where, limit=limit, cursor=cursor
            )
        except Damaged as damage:
            if damaged is None:
                raise
            damaged.append(Finding(damage.where, damage.why))
            if (cursor := damage.resume) is None:
                return
            continue
        for record in page.items:
            yield record
        if page.cursor is None:
            return
        limit, cursor = PAGE_MAX, page.cursor
