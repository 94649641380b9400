"""Where partitions are, also while they move, and reading and writing there.

A move has this order (see `sharded_move`): every shard is told the map that says what moves; from
then on nothing is written to a partition that is to move but where it moves to, after it has moved.
It is copied and compared, marked as moved in its old home, and only then removed there.

Invariants
- A write carries a check of the record in which its shard keeps the map. Whoever has an older map
  is refused, learns the newer one and tries again.
- A read is believed if the map is still the same when it is done, and the partition still there.
  Where other processes may move partitions, the shard itself is asked for its map when that was
  last done more than half of `LEASE_S` ago; and nobody moves anything before a shard has had its
  map for that long.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import TypeVar

from perdure.core.batch import Batch, check
from perdure.core.clock import Clock
from perdure.core.engine import Engine
from perdure.core.errors import Conflict, PerdureError, Unavailable
from perdure.core.keys import SYSTEM_TENANT, show
from perdure.core.values import Committed
from perdure.engines.sharded_map import MOVED, SELF, SHARDS, Absent, Shard, ShardMap

T = TypeVar("T")

Move = Callable[[Engine, Batch], Awaitable[None]]
"""Loads or unloads rows under a batch of checks."""

LEASE_S = 2.0
"""How long a map may be believed without asking, where other processes may change it."""

CHANGED = (
    "the shards were changed by somebody else meanwhile. Look what they are now, and try again."
)

_GUARD = f"check {SHARDS.name} {show(SELF)}"


class Places:
    """The shards, and the newest map that any of them has."""

    def __init__(
        self, map: ShardMap, shards: Sequence[Shard], absent: Sequence[Absent], clock: Clock
    ) -> None:
        self.map = map
        self.shards = {shard.id: shard for shard in shards}
        self.absent = list(absent)
        self.clock = clock
        self.shared = all(shard.engine.shared for shard in shards)
        self._gone: set[str] = set()
        """Partitions that are known to have moved by this map."""

    @property
    def primary(self) -> Shard:
        return self.shards[self.map.primary]

    def every(self) -> list[Shard]:
        """The shards in which there may be something, the primary first. Raises as `shard`."""
        return [self.shard(id) for id in self.map.every]

    @property
    def missing(self) -> tuple[str, ...]:
        """Shards in which there may be something, and which were never seen by this process."""
        return tuple(id for id in self.map.every if id not in self.shards)

    def shard(self, id: str) -> Shard:
        """Raises `Unavailable` for one that is down since before this process was started, or was
        added while it ran without it."""
        if id in self.shards:
            return self.shards[id]
        if self.absent:
            why = " ".join(str(one.why) for one in self.absent)
            raise Unavailable(f"shard {self.name(id)} is down since before the start: {why}")
        raise Unavailable(
            f"shard {id} was added, and this process was started without it. Give it the "
            "address of that shard too, and start it again."
        )

    def name(self, id: str) -> str:
        """For people: which shard, and where it is, or may be."""
        if id in self.shards:
            return self.shards[id].name
        where = " or ".join(one.url for one in self.absent)
        return f"{id} at {where}" if where else id

    def adopt(self, map: ShardMap) -> None:
        """Go by a newer map."""
        if map.number > self.map.number:
            self.map = map
            self._gone.clear()

    async def home(self, partition: str) -> Shard:
        """The shard in which a partition is now."""
        return self.shard(await self.home_id(partition))

    async def home_id(self, partition: str) -> str:
        """Which one that is; the one that it leaves is asked, where it does."""
        map = self.map
        old, new = map.homes(partition)
        if old == new or partition in self._gone:
            return new
        source = self.shard(old)
        with source.named():
            mark = await source.engine.get(MOVED, (SYSTEM_TENANT, partition))
        if mark is None or mark.value.number != map.number:
            return old
        if self.map is map:
            self._gone.add(partition)
        return new

    async def read(self, partition: str | None, ask: Callable[[Engine], Awaitable[T]]) -> T:
        """What the shard answers in which the partition is; None is the common one."""
        while True:
            map = self.map
            home = self.primary if partition is None else await self.home(partition)
            try:
                with home.named():
                    answer = await ask(home.engine)
            except PerdureError:
                if partition is None or await self.still(map, [home], partition):
                    raise
            else:
                if partition is None or await self.still(map, [home], partition):
                    return answer

    async def still(self, map: ShardMap, asked: Iterable[Shard], partition: str = "") -> bool:
        """Whether what was read from some shards by a map was read where it was."""
        if self.shared:
            for shard in asked:
                await self._confirm(shard)
        if self.map is not map:
            return False
        if not map.next or not partition:
            return True
        return await self.home(partition) in asked

    async def commit(self, home: Shard, map: ShardMap, batch: Batch) -> Committed | None:
        """Commit a batch of a partition that by this map is at home there; None where the map is
        out of date."""
        if home.standing is not None and home.standing.map.number > map.number:
            self.adopt(home.standing.map)
            return None
        guard = check(SHARDS, SELF, home.version)
        guarded = Batch((*guard.ops, *batch.ops), batch.operation_id)
        committed = await self._guarded(home, lambda: home.engine.commit(guarded))
        return None if committed is None else Committed(committed.numbers[1:])

    async def move(self, shard: Shard, map: ShardMap, move: Move) -> bool:
        """Load rows into a shard or unload them, if it still has this map; whether it had."""
        if not shard.knows(map):
            return False
        under = check(SHARDS, SELF, shard.version)

        async def moved() -> bool:
            await move(shard.engine, under)
            return True

        return bool(await self._guarded(shard, moved))

    async def _guarded(self, shard: Shard, work: Callable[[], Awaitable[T]]) -> T | None:
        """What comes of work under the check of what the shard knows of itself; None where that
        has changed, which then is known here too."""
        try:
            with shard.named():
                return await work()
        except Conflict as conflict:
            if conflict.where != _GUARD:
                raise
            await self.look(shard)
            if shard.version == conflict.expected:
                raise Unavailable(f"shard {shard.name} no longer knows what it is.") from conflict
            return None

    async def settle(self, shard: Shard, map: ShardMap) -> bool:
        """Return when nobody goes by an older map than this in a shard: False where the shard has
        another one, newer or told by somebody else at the same time."""
        await shard.tell(map, self.clock)
        if not shard.knows(map):
            self._adopt_of(shard)
            return False
        if self.shared:
            left_s = shard.since_s + LEASE_S - self.clock.monotonic_s()
            await self.clock.sleep(max(0.0, left_s))
        return True

    async def tell(self, map: ShardMap) -> None:
        """Tell all shards that a map names, and go by it. The primary is the first: of two who tell
        different maps at the same time one is refused there, with `Unavailable`."""
        for id in map.every:
            await self.tell_one(self.shard(id), map)
        self.adopt(map)

    async def tell_one(self, shard: Shard, map: ShardMap) -> None:
        """Tell a shard. Raises `Unavailable` where it knows another map."""
        await shard.tell(map, self.clock)
        if not shard.knows(map):
            self._adopt_of(shard)
            raise Unavailable(CHANGED)

    async def look(self, shard: Shard) -> None:
        """Learn what a shard knows now, and go by it."""
        await shard.ask(self.clock)
        self._adopt_of(shard)

    async def _confirm(self, shard: Shard) -> None:
        if self.clock.monotonic_s() - shard.seen_s > LEASE_S / 2:
            await self.look(shard)

    def _adopt_of(self, shard: Shard) -> None:
        if shard.standing is not None:
            self.adopt(shard.standing.map)
