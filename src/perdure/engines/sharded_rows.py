"""What a shard holds, by partition: what moves, and what does not belong there."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping

from perdure.core import keys
from perdure.core.errors import Damaged, Unavailable
from perdure.core.layouts import Layout
from perdure.core.rows import At, FloorRow, Kind, OperationRow, RecordRow, Row, StreamRow
from perdure.core.values import Finding
from perdure.engines.sharded_map import SHARD_LAYOUTS, Shard
from perdure.engines.sharded_places import Places

Layouts = Mapping[str, Layout]
"""By name."""

OWN = {layout.name for layout in SHARD_LAYOUTS}
"""Collections of the shards' own, which are no part of the store that they are together."""

_END = keys.span(())[1]


def partition_of_row(row: RecordRow | StreamRow | OperationRow, layouts: Layouts) -> str | None:
    """The partition that a row is of; None for the common one."""
    if isinstance(row, OperationRow):
        return row.partition or None
    layout = layouts.get(row.at.name)
    return None if layout is None else layout.partition_of(keys.split(row.place))


async def pages_of(shard: Shard, partition: str) -> AsyncIterator[tuple[Row, ...]]:
    """All rows of a partition that are in a shard; among them the floors of logs, which belong to
    the shard."""
    after: At | None = None
    while True:
        with shard.named():
            page = await shard.engine.rows(after=after, partition=partition)
        yield page.items
        if (after := page.after) is None:
            return


async def partitions(shard: Shard, layouts: Layouts) -> AsyncIterator[dict[str, int]]:
    """How many rows there are of each partition, page by page."""
    async for page in _pages(shard, layouts):
        found: dict[str, int] = {}
        for row in _placed(page):
            if partition := partition_of_row(row, layouts):
                found[partition] = found.get(partition, 0) + 1
        yield found


async def misplaced(places: Places, shard: Shard, layouts: Layouts) -> AsyncIterator[Finding]:
    """What lies in a shard and has its home elsewhere, so that nobody reads it; each partition and
    each collection once. Damage ends the walk, and that is told."""
    told: set[str] = set()
    try:
        async for page in _pages(shard, layouts):
            for row in _placed(page):
                partition = partition_of_row(row, layouts)
                common = partition is None
                if common and (shard.id == places.map.primary or isinstance(row, OperationRow)):
                    continue
                what = f"the collection {row.at.name}" if common else f"the partition {partition}"
                if what in told or row.at.name in OWN:
                    continue
                told.add(what)
                why: str | None
                if partition is None:
                    why = "it is not partitioned, so its home is the primary"
                else:
                    why = await _astray(places, shard, partition)
                if why:
                    yield Finding(f"shard {shard.name}: {what}", why, "misplaced")
    except Damaged as damage:
        why = f"where things belong was looked at up to {damage.where} only: {damage.why}"
        yield Finding(f"shard {shard.name}", why, "unreadable")


async def _astray(places: Places, shard: Shard, partition: str) -> str | None:
    """Why a partition that was seen in a shard should not be there; None where it should, or has
    gone. While it moves it may be in two."""
    while True:
        map = places.map
        old, new = map.homes(partition)
        if shard.id in (old, new) or not (here := await _count(shard, partition)):
            return None
        try:
            there = await _count(places.shard(new), partition)
            what = f"keeps {there} rows of it too" if there else "has nothing of it"
        except Unavailable as unavailable:
            what = f"could not be asked ({unavailable})"
        if await places.still(map, [shard]):
            return f"{here} rows of it lie here, and its home is {places.name(new)}, which {what}"


async def _count(shard: Shard, partition: str) -> int:
    return sum([len(list(_placed(page))) async for page in pages_of(shard, partition)])


async def _pages(shard: Shard, layouts: Layouts) -> AsyncIterator[tuple[Row, ...]]:
    """All rows in a shard; of a collection that is not partitioned, some at its beginning."""
    after: At | None = None
    while True:
        with shard.named():
            page = await shard.engine.rows(after=after)
        yield page.items
        if page.after is None:
            return
        after = _past_common(page.after, layouts)


def _past_common(after: At, layouts: Layouts) -> At:
    layout = layouts.get(after.name)
    if after.kind >= Kind.FLOORS or (layout and layout.partition is not None):
        return after
    return At(after.kind, after.name, _END)


def _placed(page: tuple[Row, ...]) -> Iterator[RecordRow | StreamRow | OperationRow]:
    """Rows that have a partition or are of the common one."""
    return (row for row in page if not isinstance(row, FloorRow))
