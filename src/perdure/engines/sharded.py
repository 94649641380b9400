"""Shards: one store of several. What is partitioned is spread over all of them, each partition with
its home in one; everything else is kept by the primary. See `sharded_map` for who is who.

A batch lies in one partition and so in one shard, which commits it as any engine does. A list that
is not of one partition is merged from all. A shard that is down fails what lives in it, and lists,
unless a part of them will do.
"""

from __future__ import annotations

import asyncio
import functools
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from perdure.core import cursors, keys
from perdure.core.addresses import of_shards
from perdure.core.batch import NOTHING, Batch, partition_of
from perdure.core.clock import Clock
from perdure.core.cursors import Position, Question
from perdure.core.disk import Disk
from perdure.core.engine import (
    Engine,
    EngineStats,
    Moving,
    Progress,
    Recovered,
    Sharding,
    ShardState,
    Snapshot,
    Survives,
    Usage,
    Written,
)
from perdure.core.errors import Invalid, SpansPartitions, Unavailable
from perdure.core.keys import Key
from perdure.core.layouts import Column, Layout, Log, Records
from perdure.core.offload import off_loop_to_write
from perdure.core.paging import every
from perdure.core.rows import At, FloorRow, Row, Rows, fill
from perdure.core.values import Committed, Entry, Finding, Page, Record, Tip
from perdure.engines.sharded_map import Absent, Shard, assemble
from perdure.engines.sharded_merge import Answers, Listing, listed, merged_rows, round_of
from perdure.engines.sharded_move import Mover
from perdure.engines.sharded_places import Places
from perdure.engines.sharded_rows import OWN, misplaced, partition_of_row
from perdure.engines.sharded_watch import Watch

T = TypeVar("T")

_SLICE_S = 1.0
"""How long a wait may hear nothing of its stream having moved."""


class ShardedEngine:
    """See `core.engine.Engine`."""

    places_max: int | None = None

    def __init__(self, places: Places, layouts: Sequence[Layout], disk: Disk) -> None:
        engines = [shard.engine for shard in places.shards.values()]
        urls = [engine.url for engine in engines] + [absent.url for absent in places.absent]
        self.url = of_shards(urls)
        self.store_id = places.primary.engine.store_id
        self.shared = places.shared
        self.survives = Survives(
            **{
                what: all(getattr(engine.survives, what) for engine in engines)
                for what in Survives.__struct_fields__
            }
        )
        self.recovered = _recovered([engine.recovered for engine in engines])
        self.written = Written(
            min(engine.written.format for engine in engines),
            max(engine.written.newest for engine in engines),
            tuple(step for engine in engines for step in engine.written.steps),
            None if self.shared else sum(engine.written.number or 0 for engine in engines),
        )
        self.places = places
        self.watch = Watch(places, layouts, self.survives)
        self._layouts = {layout.name: layout for layout in layouts}
        self.mover = Mover(places, self._layouts)
        self._disk = disk

    @classmethod
    async def open(
        cls,
        engines: Sequence[Engine],
        layouts: Sequence[Layout],
        *,
        clock: Clock,
        disk: Disk,
        read_only: bool,
        absent: Sequence[Absent] = (),
    ) -> ShardedEngine:
        """The store that `engines` are together, each opened with `SHARD_LAYOUTS` as well, and
        those that are `absent`, which `watch` joins. They stay the caller's until this returns.
        Raises `WrongShards`, and `Unavailable` where it does not go without who is absent."""
        map, shards = await assemble(engines, absent, layouts, clock)
        places = Places(map, shards, absent, clock)
        if not read_only:
            for shard in shards:
                if shard.id in map.every:
                    await places.tell_one(shard, map)
        for shard in shards:
            await shard.count_left()
        return cls(places, layouts, disk)

    @property
    def sharding(self) -> Sharding:
        """The shards, as each was seen last."""
        map = self.places.map

        def state(shard: Shard) -> ShardState:
            return ShardState(
                id=shard.id,
                url=shard.engine.url,
                primary=shard.id == map.primary,
                member=shard.id in map.members,
                down=shard.down,
                recovered=shard.engine.recovered,
            )

        known = tuple(state(shard) for shard in self.places.shards.values())
        absent = tuple(ShardState(url=one.url, down=str(one.why)) for one in self.places.absent)
        return Sharding(known + absent, self.places.missing, self._moving())

    def _moving(self) -> Moving | None:
        map = self.places.map
        if not map.next:
            return None
        left = [shard.left for shard in self.places.shards.values() if shard.left is not None]
        return Moving(
            members=map.members,
            to=map.next,
            here=self.mover.resharding.locked(),
            partitions=sum(left) if left else None,
        )

    @property
    def latched(self) -> str | None:
        return _latched(self.places.shards.values())

    def latched_for(self, log: Log[Any], stream: Key) -> str | None:
        partition, places = _partition(log, stream), self.places
        map = places.map
        homes = (map.primary,) if partition is None else map.homes(partition)
        return _latched(places.shards[id] for id in set(homes) if id in places.shards)

    @property
    def stats(self) -> EngineStats:
        """Of all shards together; a time that was the last is the longest of them."""
        every = [shard.engine.stats for shard in self.places.shards.values()]
        return EngineStats(
            **{
                name: (max if name == "sync_last_s" else sum)(getattr(one, name) for one in every)
                for name in EngineStats.__struct_fields__
            }
        )

    async def commit(self, batch: Batch) -> Committed:
        partition, places = partition_of(batch), self.places
        if partition is None:
            with places.primary.named():
                return await places.primary.engine.commit(batch)
        while True:
            map = places.map
            home = await places.home(partition)
            if home.id != map.homes(partition)[1]:
                await self.mover.before_write(partition)
            elif places.map is map:
                committed = await places.commit(home, map, batch)
                if committed is not None:
                    return committed

    async def get(self, records: Records[T], key: Key) -> Record[T] | None:
        return await self.places.read(
            _partition(records, key), lambda engine: engine.get(records, key)
        )

    async def get_many(self, records: Records[T], keys: Sequence[Key]) -> list[Record[T] | None]:
        cursors.check_limit(len(keys))
        wanted: dict[str | None, list[int]] = {}
        for at, key in enumerate(keys):
            wanted.setdefault(_partition(records, key), []).append(at)
        found: list[Record[T] | None] = [None] * len(keys)

        async def ask(partition: str | None, own: list[int]) -> None:
            asked = [keys[at] for at in own]
            answers = await self.places.read(
                partition, lambda engine: engine.get_many(records, asked)
            )
            for at, answer in zip(own, answers, strict=True):
                found[at] = answer

        await asyncio.gather(*(ask(*part) for part in (wanted or {None: []}).items()))
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
        def question(store_id: str) -> Question:
            return Question(store_id, records.name, prefix, index, tuple(where), descending)

        def ask(engine: Engine, cursor: str | None) -> Any:
            return engine.scan(
                records,
                prefix,
                index=index,
                where=where,
                limit=limit,
                cursor=cursor,
                descending=descending,
            )

        asked = question(self.store_id)
        cursors.check_limit(limit)
        cursors.check_question(records, asked)
        return await self._listed(
            records,
            prefix,
            cursor,
            Listing(
                question=question,
                ask=ask,
                position=lambda record: cursors.position_of(records, record, asked),
                partition=lambda record: _partition(records, record.key),
                limit=limit,
                partial=partial,
            ),
        )

    async def count(
        self, records: Records[Any], prefix: Key, *, index: str | None = None, group: int = 0
    ) -> dict[tuple[Column | None, ...], int]:
        places = self.places
        if not _spread(records, prefix):
            return await places.read(
                _partition(records, prefix),
                lambda engine: engine.count(records, prefix, index=index, group=group),
            )

        async def ask(shard: Shard) -> dict[tuple[Column | None, ...], int]:
            with shard.named():
                return await shard.engine.count(records, prefix, index=index, group=group)

        while not (map := places.map).next:
            counts: Counter[tuple[Column | None, ...]] = Counter()
            asked = [places.shard(id) for id in map.members]
            for part in await asyncio.gather(*(ask(shard) for shard in asked)):
                counts.update(part)
            if await places.still(map, asked):
                return dict(counts)
        return await self._count_each(records, prefix, index, group)

    async def _count_each(
        self, records: Records[Any], prefix: Key, index: str | None, group: int
    ) -> dict[tuple[Column | None, ...], int]:
        """The same, record by record: while partitions move, some are in two shards."""
        declared = None if index is None else records.index(index)
        cursors.check_group(records, declared, group)
        counts: Counter[tuple[Column | None, ...]] = Counter()
        async for record in every(self, records, prefix, index=index):
            columns = records.columns(record.value)
            counts[records.column_of(declared, columns)[:group] if declared else ()] += 1
        return dict(counts)

    async def read(
        self,
        log: Log[T],
        stream: Key,
        *,
        after: int = 0,
        incarnation: int | None = None,
        limit: int,
    ) -> list[Entry[T]]:
        return await self.places.read(
            _partition(log, stream),
            lambda engine: engine.read(
                log, stream, after=after, incarnation=incarnation, limit=limit
            ),
        )

    async def tip(self, log: Log[Any], stream: Key) -> Tip:
        return await self.places.read(
            _partition(log, stream), lambda engine: engine.tip(log, stream)
        )

    async def wait(self, log: Log[Any], stream: Key, after: int, *, timeout_s: float) -> Tip:
        partition, clock = _partition(log, stream), self.places.clock
        deadline_s = clock.monotonic_s() + timeout_s
        while True:
            left_s = deadline_s - clock.monotonic_s()
            some_s = left_s if partition is None else min(left_s, _SLICE_S)
            tip = await self.places.read(
                partition, functools.partial(_wait, log, stream, after, timeout_s=some_s)
            )
            if tip.last > after or left_s <= some_s:
                return tip

    async def streams(
        self,
        log: Log[Any],
        prefix: Key,
        *,
        limit: int,
        cursor: str | None = None,
        partial: bool = False,
    ) -> Page[Key]:
        cursors.check_limit(limit)
        keys.span(prefix)
        return await self._listed(
            log,
            prefix,
            cursor,
            Listing(
                question=lambda store_id: Question(store_id, log.name, prefix),
                ask=lambda engine, on: engine.streams(log, prefix, limit=limit, cursor=on),
                position=lambda key: Position((), keys.join(key)),
                partition=lambda key: _partition(log, key),
                limit=limit,
                partial=partial,
            ),
        )

    async def verify(self) -> AsyncIterator[Finding]:
        for shard in tuple(self.places.shards.values()):
            try:
                async for finding in shard.engine.verify():
                    where = f"shard {shard.name}: {finding.where}"
                    yield msgspec.structs.replace(finding, where=where)
                async for finding in misplaced(self.places, shard, self._layouts):
                    yield finding
            except Unavailable as error:
                yield Finding(f"shard {shard.name}", str(error), "unreadable")
        for absent in self.places.absent:
            yield Finding(f"the shard at {absent.url}", str(absent.why), "unreadable")

    async def usage(self) -> Usage:
        parts = await asyncio.gather(*(shard.engine.usage() for shard in self.places.every()))
        collections: dict[str, int] = {}
        for part in parts:
            for name, size_bytes in part.collections.items():
                collections[name] = collections.get(name, 0) + size_bytes
        return Usage(
            collections,
            other_bytes=sum(part.other_bytes for part in parts),
            free_bytes=sum(part.free_bytes for part in parts),
            total_bytes=sum(part.total_bytes for part in parts),
        )

    async def backup(self, into: Path, progress: Progress) -> Snapshot:
        """Each shard in a directory of its own, the primary first, and each as of a moment of its
        own. That tears nothing, as a batch is in one shard; what one shard has others do for it
        is asked for again, being later there."""
        self._require_rest("backed up")
        far: dict[str, tuple[int, int]] = {}

        def told(id: str) -> Callable[[int, int], None]:
            def tell(done: int, total: int) -> None:
                far[id] = (done, total)
                progress(sum(done for done, _ in far.values()), sum(of for _, of in far.values()))

            return tell

        snapshots: list[Snapshot] = []
        for shard in self.places.every():
            place = into / f"{len(snapshots)}"
            await off_loop_to_write(self._disk.make_directory, place)
            with shard.named():
                snapshots.append(await shard.engine.backup(place, told(shard.id)))
        number = sum(snapshot.number for snapshot in snapshots)
        return Snapshot(self.store_id, number, snapshots[0].format, tuple(snapshots))

    async def rows(self, *, after: At | None = None, partition: str | None = None) -> Rows:
        if partition is not None:
            return await self.places.read(
                partition, lambda engine: engine.rows(after=after, partition=partition)
            )
        self._require_rest("copied")
        while True:
            pages = await asyncio.gather(
                *(self._rows(shard, after) for shard in self.places.every())
            )
            found, end = merged_rows(pages)
            page = fill(row for row in found if row.at.name not in OWN)
            if page.items and (page.after or end):
                return Rows(page.items, page.items[-1].at)
            if page.items or end is None:
                return Rows(page.items, None)
            after = end

    async def _rows(self, shard: Shard, after: At | None) -> Rows:
        with shard.named():
            return await shard.engine.rows(after=after)

    def _require_rest(self, done: str) -> None:
        if self.places.map.next:
            raise Unavailable(
                f"partitions are being moved between shards, and until that has ended the store "
                f"cannot be {done}. `perdure reshard` goes on with it."
            )

    async def load(
        self, rows: Sequence[Row], *, complete: bool = False, under: Batch = NOTHING
    ) -> None:
        """As one moment in each shard: the primary, which most rows belong to, is the last. Under
        checks, all of it in the shard that they are about."""
        if complete:
            raise Invalid("a store of shards is not made as a copy.")
        await self._move(rows, under, lambda engine, own: engine.load(own, under=under))

    async def unload(self, rows: Sequence[Row], *, under: Batch = NOTHING) -> None:
        """See `load`."""
        await self._move(rows, under, lambda engine, own: engine.unload(own, under=under))

    async def _move(
        self,
        rows: Sequence[Row],
        under: Batch,
        move: Callable[[Engine, list[Row]], Awaitable[None]],
    ) -> None:
        self._require_rest("moved")
        places = self.places
        parts: dict[str, list[Row]] = {shard.id: [] for shard in places.every()}
        for row in rows:
            if isinstance(row, FloorRow):
                for part in parts.values():
                    part.append(row)
            else:
                home = await self._home(partition_of_row(row, self._layouts))
                parts[home.id].append(row)
        if under:
            about = (await self._home(partition_of(under))).id
            if any(part for id, part in parts.items() if id != about):
                raise SpansPartitions("the checks and the rows are of different shards.")
            parts = {about: parts[about]}
        for id, part in reversed(parts.items()):
            with places.shards[id].named():
                await move(places.shards[id].engine, part)

    async def _home(self, partition: str | None) -> Shard:
        return self.places.primary if partition is None else await self.places.home(partition)

    def announce(self, note: str) -> None:
        self.watch.note = note
        for shard in self.places.shards.values():
            shard.engine.announce(note)

    async def close(self) -> None:
        await self.watch.end()
        await self.mover.close()
        closing = (shard.engine.close() for shard in self.places.shards.values())
        for outcome in await asyncio.gather(*closing, return_exceptions=True):
            if outcome is not None:
                raise outcome

    async def _asked(self, partition: str | None) -> str:
        """The name of the shard that a partition is in, or of the one that should say which."""
        places = self.places
        if partition is None:
            return places.primary.name
        try:
            return places.name(await places.home_id(partition))
        except Unavailable:
            return places.name(places.map.homes(partition)[0])

    async def _listed(
        self, layout: Layout, prefix: Key, cursor: str | None, listing: Listing[T]
    ) -> Page[T]:
        places = self.places
        if _spread(layout, prefix):
            return await listed(
                listing, lambda after: round_of(places, listing, after), self.store_id, cursor
            )
        partition = _partition(layout, prefix)

        async def ask(after: Position | None) -> Answers[T]:
            try:
                part = await places.read(partition, lambda engine: listing.part(engine, after))
            except Unavailable as unavailable:
                return [(await self._asked(partition), unavailable)]
            return [(self.url, part)]

        return await listed(listing, ask, self.store_id, cursor)


def _latched(shards: Iterable[Shard]) -> str | None:
    told = [f"{shard.name}: {shard.engine.latched}" for shard in shards if shard.engine.latched]
    return "; ".join(told) or None


async def _wait(log: Log[Any], stream: Key, after: int, engine: Engine, *, timeout_s: float) -> Tip:
    return await engine.wait(log, stream, after, timeout_s=timeout_s)


def _partition(layout: Layout, key: Key) -> str | None:
    """The partition of a key as it was given, which may be none of the layout's."""
    at = layout.partition
    return None if at is None or len(key) <= at else key[at]


def _spread(layout: Layout, prefix: Key) -> bool:
    """Whether what is under a prefix may be of several partitions."""
    return layout.partition is not None and len(prefix) <= layout.partition


def _recovered(found: Sequence[Recovered]) -> Recovered:
    return Recovered(
        clean=all(one.clean for one in found),
        replayed=sum(one.replayed for one in found),
        cut=tuple(cut for one in found for cut in one.cut),
        findings=tuple(finding for one in found for finding in one.findings),
        duration_s=max(one.duration_s for one in found),
    )
