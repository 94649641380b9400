"""Which stores are the shards of one whole, and in which of them a partition lives.

Invariants
- A shard is told by the id in its own record of `SHARDS`, never by its URL or its place in a list.
  A store that has none yet goes by its store id. A copy restored from a backup is the same shard.
- Every shard's record holds the map: who the shards are and which one is the primary, that keeps
  what is not partitioned. Of two maps the one with the higher number is newer. Whoever writes to a
  shard checks this record, so that nobody writes by an older map than the shard has.
- The home of a partition depends on the ids of the shards and on nothing else: the shard whose id
  scores highest with it (rendezvous hashing, Thaler and Ravishankar 1998). So one shard more takes
  an equal part from each of the others, and nothing moves between those.
- Nothing is written before every store is known for what it is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager

import msgspec
import xxhash

from perdure.core import stored
from perdure.core.addresses import without_credentials
from perdure.core.batch import put
from perdure.core.clock import Clock
from perdure.core.engine import Engine
from perdure.core.errors import Conflict, Missing, PerdureError, Unavailable, WrongShards
from perdure.core.keys import SEPARATOR, SYSTEM_TENANT
from perdure.core.layouts import Layout, Log, Records


class ShardMap(msgspec.Struct, frozen=True):
    """Who the shards are, by id, and who they will be where partitions are being moved."""

    number: int
    primary: str
    members: tuple[str, ...]
    next: tuple[str, ...] = ()

    def homes(self, partition: str) -> tuple[str, str]:
        """The shard that keeps a partition, and the one that does once it has moved."""
        home = home_of(self.members, partition)
        return home, home_of(self.next, partition) if self.next else home

    @property
    def every(self) -> tuple[str, ...]:
        """The shards in which there may be something, the primary first."""
        others = {*self.members, *self.next} - {self.primary}
        return (self.primary, *sorted(others))

    @property
    def groups(self) -> tuple[set[str], ...]:
        """The shards in an order in which partitions only move onwards, within no group: those that
        are drained, those that stay, those that are added."""
        old, new = set(self.members), set(self.next or self.members)
        return old - new, old & new, new - old


class Standing(msgspec.Struct, frozen=True):
    """What a shard knows of itself."""

    id: str
    map: ShardMap


class Moved(msgspec.Struct, frozen=True):
    """A partition is no longer here, since the move of the map with this number: so many rows."""

    number: int
    rows: int


SHARDS = Records(stored.SHARDS, Standing, key=("tenant", "id"), everywhere=True)
SELF = (SYSTEM_TENANT, "self")
MOVED = Records("shard_moves", Moved, key=("tenant", "partition"))

SHARD_LAYOUTS: tuple[Layout, ...] = (SHARDS, MOVED)


def home_of(shards: Iterable[str], partition: str) -> str:
    """The one of `shards` in which a partition lives, in whatever order they are given."""
    end = (SEPARATOR + partition).encode(errors="replace")
    return max(shards, key=lambda shard: (xxhash.xxh3_64_intdigest(shard.encode() + end), shard))


class Shard:
    """One of the stores. `standing` is None until it was told what it is; `version` is that of the
    record that says so, as it was at `seen_s`; this map it was first seen with at `since_s`. `down`
    says why it did not answer when it was last looked at, `left` how many partitions have moved
    away by then, while some do."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.id = engine.store_id
        self.down: str | None = None
        self.left: int | None = None
        self.standing: Standing | None = None
        self.version = 0
        self.seen_s = self.since_s = float("-inf")

    @property
    def name(self) -> str:
        """For people: which one, and where it is."""
        return f"{self.id} at {self.engine.url}"

    @contextmanager
    def named(self) -> Iterator[None]:
        """Has whoever is told that a store is unavailable told which one. The store may have told
        the same error to many, who waited together."""
        try:
            yield
        except Unavailable as error:
            told = f"shard {self.name}: "
            if not str(error).startswith(told):
                error.args = (told + str(error),)
            raise

    async def ask(self, clock: Clock) -> None:
        """Learn what the shard knows of itself now."""
        asked_s = clock.monotonic_s()
        with self.named():
            found = await self.engine.get(SHARDS, SELF)
        if found is not None and found.version >= self.version:
            self._learn(found.value, found.version, asked_s, clock.monotonic_s())

    async def tell(self, map: ShardMap, clock: Clock) -> None:
        """Write down what the shard is, durably, unless it knows, or knows better."""
        while self.standing is None or self.standing.map.number < map.number:
            standing, asked_s = Standing(self.id, map), clock.monotonic_s()
            try:
                with self.named():
                    told = await self.engine.commit(
                        put(SHARDS, SELF, standing, expect=self.version)
                    )
            except Conflict:
                await self.ask(clock)
                if self.standing is None:
                    raise
            else:
                self._learn(standing, told.numbers[0], asked_s, clock.monotonic_s())

    async def count_left(self) -> None:
        """Learn how many partitions have left the shard, if any do now."""
        moves = self.standing is not None and self.standing.map.next
        with self.named():
            self.left = (await self.engine.count(MOVED, ())).get((), 0) if moves else None

    def knows(self, map: ShardMap) -> bool:
        """Whether it is this map that the shard was last seen to have."""
        return self.standing is not None and self.standing.map == map

    def _learn(self, standing: Standing, version: int, asked_s: float, now_s: float) -> None:
        if self.standing is None or self.standing.map != standing.map:
            self.since_s = now_s
        self.id, self.standing, self.version, self.seen_s = standing.id, standing, version, asked_s


class Absent:
    """A store that could not be reached when the others were opened: `why`, when it was last tried.
    Which shard it is, it alone can say."""

    def __init__(self, url: str, open: Callable[[], Awaitable[Engine]], why: PerdureError) -> None:
        self.url = without_credentials(url)
        self.open = open
        self.why = why


async def assemble(
    engines: Sequence[Engine], absent: Collection[Absent], layouts: Sequence[Layout], clock: Clock
) -> tuple[ShardMap, list[Shard]]:
    """The stores as shards of one whole, the primary first, and the newest map. The first of stores
    that are all new becomes the primary. If it was used alone so far it is also the only member;
    stores that are no members wait to be added.

    Shards that the map names may be among those that are `absent`, but for the primary. Raises
    `WrongShards`, and `Unavailable` where only those who are absent could tell (`Missing` if one
    of them was never made); having written nothing.
    """
    shards = [Shard(engine) for engine in engines]
    for shard in shards:
        await shard.ask(clock)
    for id, count in Counter(shard.id for shard in shards).items():
        if count > 1:
            raise WrongShards(f"the shard {id} is given {count} times; give each of them once.")
    standings = [shard.standing for shard in shards if shard.standing]
    map = max((one.map for one in standings), key=lambda one: one.number, default=None)
    for one in absent if map is None else ():
        if isinstance(one.why, Missing):
            raise one.why
    if map is None and absent:
        raise Unavailable(
            f"{_told(absent)} None of the others is a shard yet, so this is the first start or the "
            "primary is not there; either needs all of them. Nothing was written."
        )
    if map is None:
        return await _fresh(shards, layouts)
    for shard in shards:
        await admit(shard, map, layouts)
    if absent and map.primary not in {shard.id for shard in shards}:
        raise Unavailable(
            f"{_told(absent)} The primary, {map.primary}, is not among those that answer, and "
            "nothing goes without it: it keeps what is not partitioned. Nothing was written."
        )
    require_given(map, shards, len(absent))
    return map, _ordered(shards, map)


def require_given(map: ShardMap, shards: Collection[Shard], absent: int) -> None:
    """Raises `WrongShards` where the stores, and so many that are absent, cannot be all that the
    map names."""
    given = {shard.id for shard in shards}
    missing = [id for id in map.every if id not in given]
    if len(missing) > absent:
        raise WrongShards(
            f"the shard{'s' if len(missing) > 1 else ''} {', '.join(missing)} of this store "
            f"{'are' if len(missing) > 1 else 'is'} not among those given: "
            f"{', '.join(shard.name for shard in shards)}. Nothing was written; give all of them."
        )


async def admit(shard: Shard, map: ShardMap, layouts: Sequence[Layout]) -> None:
    """Raises `WrongShards` for a store that is no shard of this whole and cannot become one."""
    if shard.standing is None and shard.id not in map.every:
        await _require_empty(shard, layouts)
    elif shard.standing is not None and shard.standing.map.primary != map.primary:
        raise WrongShards(
            f"{shard.name} is a shard of another store (that of {shard.standing.map.primary}, "
            f"and not of {map.primary}). Nothing was written; remove it from the list."
        )


def _told(absent: Iterable[Absent]) -> str:
    return " ".join(f"{one.url} is down: {one.why}" for one in absent)


async def _fresh(shards: list[Shard], layouts: Sequence[Layout]) -> tuple[ShardMap, list[Shard]]:
    first, *others = shards
    for shard in others:
        await _require_empty(shard, layouts)
    used = await _holds(first, layouts)
    members = (first.id,) if used else tuple(sorted(shard.id for shard in shards))
    map = ShardMap(1, first.id, members)
    return map, _ordered(shards, map)


def _ordered(shards: list[Shard], map: ShardMap) -> list[Shard]:
    return sorted(shards, key=lambda shard: (shard.id != map.primary, shard.id))


async def _require_empty(shard: Shard, layouts: Sequence[Layout]) -> None:
    if held := await _holds(shard, layouts):
        raise WrongShards(
            f"{shard.name} is no shard of this store and holds {held} already. Nothing was "
            "written; give an empty store, or put the one that was used so far first in the list."
        )


async def _holds(shard: Shard, layouts: Sequence[Layout]) -> str:
    """A collection of which there is something in the store, if any."""
    for layout in layouts:
        if isinstance(layout, Log):
            found = bool((await shard.engine.streams(layout, (), limit=1)).items)
        else:
            found = bool((await shard.engine.scan(layout, (), limit=1)).items)
        if found:
            return layout.name
    return ""
