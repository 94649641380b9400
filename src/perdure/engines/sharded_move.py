"""Moving partitions to where another set of shards has them, while everything goes on.

One partition after another: copied row by row, compared with what was copied, marked as moved in
its old home, removed there. Every step may be repeated, by whoever comes next: what is half copied
is not read, what is marked is complete, and what is not removed yet is not read any more. So a move
that was cut off anywhere goes on where it was; meanwhile a partition moves when it is first written
to, before that write.

Rows of a partition stand still while they are copied, as everybody who would write them moves them
first. Should two processes move the same one, the second finds equal rows, or a `Conflict` because
the first is done and the partition was written to in its new home.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import islice

import msgspec
import xxhash

from perdure.core.addresses import without_credentials
from perdure.core.batch import Batch, delete, join, put
from perdure.core.engine import Engine, Resharded
from perdure.core.errors import Conflict, Damaged, Invalid, Unavailable
from perdure.core.keys import SYSTEM_TENANT
from perdure.core.layouts import Layout
from perdure.core.limits import PAGE_MAX
from perdure.core.rows import FloorRow, Row, each
from perdure.engines.sharded_map import MOVED, Moved, Shard, ShardMap
from perdure.engines.sharded_places import CHANGED, Places
from perdure.engines.sharded_rows import pages_of, partitions

WAIT_S = 5.0
"""How long a write waits for its partition to move before it is told to come back."""

_AT_ONCE = 16

Progress = Callable[[int, int], None]
"""Told partitions and rows that were moved, from the event loop."""


class Mover:
    """Moves partitions between the shards of `places`."""

    def __init__(self, places: Places, layouts: Mapping[str, Layout]) -> None:
        self._places = places
        self._layouts = layouts
        self._moving: dict[str, asyncio.Task[None]] = {}
        self.resharding = asyncio.Lock()

    async def before_write(self, partition: str) -> None:
        """Move a partition that is about to be written to. Raises `Unavailable` where it is so
        large that it is still moving after `WAIT_S`; it goes on."""
        moving = self._begin(partition)
        await asyncio.wait((moving,), timeout=WAIT_S)
        if not moving.done():
            raise Unavailable(
                f"the partition {partition} is being moved to another shard. Try again in a moment."
            )
        moving.result()

    async def reshard(self, drain: Collection[str], progress: Progress) -> Resharded:
        """Spread the partitions over all shards that were given but those to `drain`, by id or URL.
        Where that was begun and cut off, it goes on. `progress` is told partitions and rows moved.

        Raises `Invalid` for a shard that is not there, or while another reshard is to be ended.
        """
        async with self.resharding:
            places = self._places
            await self._require_all()
            wanted, target = places.map, self._target(drain)
            if wanted.next and set(wanted.next) != target:
                raise Invalid(
                    f"partitions are being moved to the shards {', '.join(wanted.next)}, and that "
                    "was cut off. Let it come to its end first: give the same shards as then."
                )
            if not wanted.next and set(wanted.members) == target:
                return Resharded(wanted.members, 0, 0)
            if not wanted.next:
                wanted = ShardMap(
                    wanted.number + 1, wanted.primary, wanted.members, tuple(sorted(target))
                )
            await places.tell(wanted)
            far = [0, 0]
            for id in wanted.members:
                await self._leave(places.shard(id), wanted, far, progress)
            done = ShardMap(wanted.number + 1, wanted.primary, wanted.next)
            for id in wanted.every:
                if not await places.settle(places.shard(id), done):
                    raise Unavailable(CHANGED)
            places.adopt(done)
            marks = [
                mark
                for id in wanted.members
                for mark in await self._clear_marks(places.shard(id), wanted)
            ]
            partitions = sum(mark.rows > 0 for mark in marks)
            return Resharded(done.members, partitions, sum(mark.rows for mark in marks))

    async def close(self) -> None:
        """Leave off; whoever comes next goes on."""
        moving = tuple(self._moving.values())
        for task in moving:
            task.cancel()
        if moving:
            await asyncio.wait(moving)

    async def _require_all(self) -> None:
        """Raises `Unavailable` while any of the shards that were given is down: a move that was
        begun then could not end, and one that was never seen cannot be added."""
        for absent in self._places.absent:
            raise Unavailable(
                f"nothing is moved while a shard is down; {absent.url} is: {absent.why}"
            )
        for shard in self._places.shards.values():
            await self._places.look(shard)

    def _target(self, drain: Collection[str]) -> set[str]:
        shards = self._places.shards
        names = {shard.engine.url: id for id, shard in shards.items()}
        drained = {names.get(without_credentials(name), name) for name in drain}
        if unknown := drained - shards.keys():
            raise Invalid(
                f"there is no shard {', '.join(sorted(unknown))} to drain; there are "
                f"{', '.join(shard.name for shard in shards.values())}."
            )
        if drained == shards.keys():
            raise Invalid("no shard would be left; drain all but one at most.")
        return shards.keys() - drained

    async def _leave(
        self, source: Shard, wanted: ShardMap, far: list[int], progress: Progress
    ) -> None:
        """Move all that is to leave a shard. None of it is written there any more."""
        async for found in partitions(source, self._layouts):
            homes = {partition: wanted.homes(partition) for partition in found}
            leaving = iter([one for one, (old, new) in homes.items() if old == source.id != new])
            while some := list(islice(leaving, _AT_ONCE)):
                moving = [self._begin(partition) for partition in some]
                await asyncio.wait(moving)
                for task in moving:
                    task.result()
                far[0] += len(some)
                far[1] += sum(found[partition] for partition in some)
                progress(*far)

    def _begin(self, partition: str) -> asyncio.Task[None]:
        """The move of a partition that is under way, or begins now."""
        moving = self._moving.get(partition)
        if moving is None:
            moving = self._moving[partition] = asyncio.create_task(self._move(partition))
            moving.add_done_callback(lambda task: self._ended(partition, task))
        return moving

    def _ended(self, partition: str, task: asyncio.Task[None]) -> None:
        del self._moving[partition]
        if not task.cancelled():
            task.exception()  # whoever waited has it; nobody may have

    async def _move(self, partition: str) -> None:
        places = self._places
        while True:
            wanted = places.map
            old, new = wanted.homes(partition)
            if old == new:
                return
            source, target = places.shard(old), places.shard(new)
            if not await places.settle(source, wanted):
                continue
            if await places.home(partition) is source:
                await target.tell(wanted, places.clock)
                rows = await self._copy(source, target, partition, wanted)
                if rows is None:
                    continue
                mark = put(MOVED, (SYSTEM_TENANT, partition), Moved(wanted.number, rows))
                if await places.commit(source, wanted, mark) is None:
                    continue
            if await self._remove(source, partition, wanted):
                return

    async def _copy(
        self, source: Shard, target: Shard, partition: str, wanted: ShardMap
    ) -> int | None:
        """Copy all rows of a partition, and compare what came of it; how many, None where somebody
        else has moved it meanwhile. Raises `Damaged` where it came out otherwise."""
        copied, digest, there = 0, xxhash.xxh3_128(), xxhash.xxh3_128()
        try:
            async for rows in pages_of(source, partition):
                copied += _add(digest, rows)
                load = functools.partial(_load, rows)
                if not await self._places.move(target, wanted, load):
                    return None
        except Conflict as conflict:
            why = str(conflict)
        else:
            async for rows in pages_of(target, partition):
                _add(there, rows)
            if there.digest() == digest.digest():
                return copied
            why = f"its rows sum up to {there.hexdigest()}, and not to {digest.hexdigest()}"
        if not await self._places.settle(source, wanted):
            return None
        if await self._places.home(partition) is not source:
            return None
        where = f"the partition {partition} of shard {source.name}, copied to {target.name}"
        raise Damaged(where, why)

    async def _remove(self, source: Shard, partition: str, wanted: ShardMap) -> bool:
        """Remove a partition where it was; False where the map no longer says so."""
        async for rows in pages_of(source, partition):
            own = [row for row in rows if not isinstance(row, FloorRow)]
            if own and not await self._places.move(source, wanted, functools.partial(_unload, own)):
                return False
        return True

    async def _clear_marks(self, source: Shard, wanted: ShardMap) -> list[Moved]:
        """Forget the marks in a shard, and give those of this move."""
        found: list[Moved] = []
        with source.named():
            while marks := (await source.engine.scan(MOVED, (), limit=PAGE_MAX)).items:
                await source.engine.commit(join(delete(MOVED, mark.key) for mark in marks))
                found += [mark.value for mark in marks if mark.value.number == wanted.number]
        return found


async def _load(rows: Sequence[Row], engine: Engine, under: Batch) -> None:
    await engine.load(rows, under=under)


async def _unload(rows: Sequence[Row], engine: Engine, under: Batch) -> None:
    await engine.unload(rows, under=under)


def _add(digest: xxhash.xxh3_128, rows: Iterable[Row]) -> int:
    """Add rows to a digest that does not depend on how they were cut into pages; how many. Floors
    belong to a shard and not to a partition."""
    count = 0
    for row in each(rows):
        if not isinstance(row, FloorRow):
            digest.update(msgspec.msgpack.encode(row))
            count += 1
    return count
