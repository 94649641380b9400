"""One list of what several shards list, each in the one order of `core.cursors`, and their rows in
the order of `core.rows`.

A position is a place in that order and not in some store, so one cursor continues all shards. Every
round asks each for what follows the same position. What is sure then is what lies up to the nearest
end of a page behind which there is more.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

import msgspec

from perdure.core import cursors
from perdure.core.cursors import Position, Question
from perdure.core.engine import Engine
from perdure.core.errors import Damaged, Unavailable
from perdure.core.rows import At, FloorRow, Row, Rows, each
from perdure.core.values import Page
from perdure.engines.sharded_map import ShardMap
from perdure.engines.sharded_places import Places

T = TypeVar("T")


class Part(msgspec.Struct, Generic[T], frozen=True):
    """What one shard answered: up to `end` that is all there is, or altogether where it is None. A
    page that cannot be read ends at the damage."""

    items: list[T]
    end: Position | None = None
    damage: Damaged | None = None


Answers = list[tuple[str, Part[T] | Unavailable]]
"""What each shard answered, by name."""


class Listing(msgspec.Struct, Generic[T], frozen=True, kw_only=True):
    """What is asked of each shard: `question` as a store of some id knows it, `ask` for the page
    behind a cursor; where an item stands, and the partition it is of."""

    question: Callable[[str], Question]
    ask: Callable[[Engine, str | None], Awaitable[Page[T]]]
    position: Callable[[T], Position]
    partition: Callable[[T], str | None]
    limit: int
    partial: bool

    async def part(self, engine: Engine, after: Position | None) -> Part[T]:
        """What a store has behind a position."""
        question = self.question(engine.store_id)
        cursor = None if after is None else cursors.pack(question, after)
        try:
            page = await self.ask(engine, cursor)
        except Damaged as damage:
            if damage.resume is None:
                raise
            return Part([], cursors.unpack(question, damage.resume), damage)
        return Part(page.items, self.position(page.items[-1]) if page.cursor else None)


async def listed(
    listing: Listing[T],
    ask: Callable[[Position | None], Awaitable[Answers[T]]],
    store_id: str,
    cursor: str | None,
) -> Page[T]:
    """A page of what several shards list, for the store that they are together. `ask` is one round:
    what each has behind a position."""
    question = listing.question(store_id)
    after = None if cursor is None else cursors.unpack(question, cursor)
    found: list[T] = []
    missing: set[str] = set()
    while True:
        parts: list[Part[T]] = []
        for name, answer in await ask(after):
            if isinstance(answer, Part):
                parts.append(answer)
            elif listing.partial:
                missing.add(name)
            else:
                raise answer
        sure, last = merged(listing, parts, descending=question.descending)
        left = listing.limit - len(found)
        found += sure[:left]
        damage = last.damage if last else None
        if len(found) == listing.limit or last is None or (damage and found):
            more = bool(found) and (len(sure) > left or last is not None)
            on = cursors.pack(question, listing.position(found[-1])) if more else None
            return Page(found, on, tuple(sorted(missing)))
        assert last.end is not None
        if damage:
            raise Damaged(damage.where, damage.why, cursors.pack(question, last.end))
        after = last.end


async def round_of(places: Places, listing: Listing[T], after: Position | None) -> Answers[T]:
    """What every shard has behind a position, of the partitions that are at home there.

    While partitions move, the shards they leave are asked first, then where these partitions are,
    and then those they come to. So each is found whole, in its old home or in its new one: it is
    removed here only when it is complete there. Who answered, and cannot be asked any more where
    something of theirs is, has not answered: it might be left out.
    """
    while True:
        whole = places.map
        homes: dict[str | None, str] = {}
        silent: dict[str, Unavailable] = {}
        answers: list[tuple[str, Part[T] | Unavailable]] = []
        for group in whole.groups:
            asked = sorted(group)
            told = await asyncio.gather(*(_told(places, id, listing, after) for id in asked))
            answers += zip(asked, told, strict=True)
            for part in told:
                if isinstance(part, Part):
                    for partition in {*map(listing.partition, part.items)} - homes.keys():
                        homes[partition] = await _home(places, whole, partition or "", silent)
        told_by = [places.shard(id) for id, answer in answers if isinstance(answer, Part)]
        if await places.still(whole, told_by):
            return [
                (places.name(id), silent.get(id) or _kept(id, answer, listing, homes))
                for id, answer in answers
            ]


async def _told(
    places: Places, id: str, listing: Listing[T], after: Position | None
) -> Part[T] | Unavailable:
    try:
        shard = places.shard(id)
        with shard.named():
            return await listing.part(shard.engine, after)
    except Unavailable as unavailable:
        return unavailable


async def _home(
    places: Places, map: ShardMap, partition: str, silent: dict[str, Unavailable]
) -> str:
    old, new = map.homes(partition)
    if old == new:
        return old
    try:
        return await places.home_id(partition)
    except Unavailable as unavailable:
        silent[old] = unavailable
        return old


def _kept(
    shard: str,
    answer: Part[T] | Unavailable,
    listing: Listing[T],
    homes: dict[str | None, str],
) -> Part[T] | Unavailable:
    if isinstance(answer, Unavailable):
        return answer
    own = [item for item in answer.items if homes[listing.partition(item)] == shard]
    return Part(own, answer.end, answer.damage)


def merged(
    listing: Listing[T], parts: Sequence[Part[T]], *, descending: bool
) -> tuple[list[T], Part[T] | None]:
    """The items that are sure, in order, and the part at whose end that stops; None if at none."""

    def order(item: T) -> tuple[object, ...]:
        return cursors.order_of(listing.position(item))

    items = sorted((item for part in parts for item in part.items), key=order, reverse=descending)
    nearest = max if descending else min
    ended = [(cursors.order_of(part.end), part) for part in parts if part.end is not None]
    if not ended:
        return items, None
    end, last = nearest(ended, key=lambda at: at[0])
    sure = [item for item in items if (order(item) >= end if descending else order(item) <= end)]
    return sure, last


def merged_rows(pages: Sequence[Rows]) -> tuple[list[Row], At | None]:
    """The rows that are sure, in order and one an entry, and how far; None if there are no more. A
    log's floor is the highest of any shard, so it is only sure when all have told theirs."""
    end = min((page.after for page in pages if page.after is not None), default=None)
    found: dict[At, Row] = {}
    for row in each(row for page in pages for row in page.items):
        if end is None or row.at <= end:
            known = found.setdefault(row.at, row)
            if isinstance(row, FloorRow) and isinstance(known, FloorRow):
                found[row.at] = max(row, known, key=lambda floor: floor.incarnation)
    return [found[at] for at in sorted(found)], end
