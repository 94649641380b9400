"""Partitions move while everything goes on: nothing is lost, nothing stands in two places, and who
is killed in the middle is followed by somebody who goes on."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from random import Random
from typing import Any

import pytest

from perdure import library
from perdure.core.batch import append, delete, drop, put, trim
from perdure.core.clock import SystemClock
from perdure.core.disk import Disk
from perdure.core.engine import Engine
from perdure.core.errors import Conflict, Damaged, Invalid, Unavailable
from perdure.core.paging import every
from perdure.core.rows import FloorRow, RecordRow, Row, each
from perdure.core.values import Committed
from perdure.engines import sharded_move
from perdure.engines.checked import Checked
from perdure.engines.failing import Edge, Failing, Fault
from perdure.engines.sharded import ShardedEngine
from perdure.engines.sharded_map import ShardMap, home_of
from perdure.engines.wrapping import Wrapping
from perdure.proving.subject import FACTS, LAYOUTS, MOVES, PLIES, Note
from perdure.services.shards import shard_warnings
from tests.engines.test_sharded import memory

GAMES = [f"game {number}" for number in range(40)]
FEW = GAMES[:6]


async def together(stores: Sequence[Engine], clock: SystemClock | None = None) -> ShardedEngine:
    clock = clock or SystemClock()
    return await ShardedEngine.open(stores, LAYOUTS, clock=clock, disk=Disk(), read_only=False)


async def fill(engine: Engine, games: Sequence[str]) -> None:
    """In each game some of everything, for two tenants."""
    for at, game in enumerate(games):
        for tenant in ("s", "t"):
            for name in ("1", "2"):
                move = put(MOVES, (tenant, game, name), Note(rank=at), attachment=b"\0")
                await engine.commit(move + append(PLIES, (tenant, game), [Note(rank=at)] * 2))
            await engine.commit(delete(MOVES, (tenant, game, "2")) + trim(PLIES, (tenant, game), 3))
        await engine.commit(append(PLIES, ("u", game), [Note()]))
        await engine.commit(drop(PLIES, ("u", game)))
        await engine.commit(put(MOVES, ("t", game, "once"), Note()).named("an operation"))
    await engine.commit(put(FACTS, ("t", "common"), Note()))


async def rows_of(engine: Engine, partition: str | None = None) -> list[Row]:
    found: list[Row] = []
    after = None
    while True:
        page = await engine.rows(after=after, partition=partition)
        found += [row for row in each(page.items) if not isinstance(row, FloorRow)]
        if (after := page.after) is None:
            return found


async def homes(stores: Sequence[Engine], games: Sequence[str]) -> dict[str, str]:
    """The one store that holds anything of each game."""
    found: dict[str, str] = {}
    for game in games:
        (found[game],) = [one.store_id for one in stores if await rows_of(one, game)]
    return found


async def test_a_write_waits_for_its_partition_so_long_and_no_longer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sharded_move, "WAIT_S", 0.01)
    stores = [Slow(store) for store in memory(3, LAYOUTS)]
    await fill(await together(stores[:2]), FEW)
    engine = await together(stores)
    resharding = asyncio.create_task(engine.mover.reshard((), silent))
    await stores[2].asked.wait()
    (warning,) = shard_warnings(engine.sharding)
    assert "This process is at it" in warning
    game = next(game for game in FEW if engine.places.map.homes(game)[1] == stores[2].store_id)
    with pytest.raises(Unavailable, match=f"{game} is being moved"):
        await engine.commit(put(MOVES, ("t", game, "1"), Note(), expect=1))
    found = await engine.get(MOVES, ("t", game, "1"))
    assert found is not None
    stores[2].go.set()
    await resharding
    assert (await engine.commit(put(MOVES, ("t", game, "1"), Note(), expect=1))).numbers == (2,)


class Slow(Wrapping):
    """A store that loads rows, or unloads them, only once it is told to go on."""

    def __init__(self, engine: Engine, what: str = "load") -> None:
        super().__init__(engine)
        self.what = what
        self.asked, self.go = asyncio.Event(), asyncio.Event()

    async def load(self, rows: Any, **named: Any) -> None:
        await self._wait("load")
        await super().load(rows, **named)

    async def unload(self, rows: Any, **named: Any) -> None:
        await self._wait("unload")
        await super().unload(rows, **named)

    async def _wait(self, what: str) -> None:
        if what == self.what:
            self.asked.set()
            await self.go.wait()


def silent(partitions: int, rows: int) -> None:
    pass


# proves S7
async def test_a_shard_is_added_and_drained_and_everything_is_as_it_was() -> None:
    stores = memory(3, LAYOUTS)
    engine = await together(stores[:2])
    await fill(engine, GAMES)
    before, at_first = await rows_of(engine), await homes(stores, GAMES)
    engine = await together(stores)
    assert await rows_of(engine) == before
    assert await homes(stores, GAMES) == at_first, "a store that was given moves nothing by itself"
    told: list[tuple[int, int]] = []
    done = await engine.mover.reshard((), lambda *far: told.append(far))
    assert set(done.shards) == {store.store_id for store in stores}
    assert await rows_of(engine) == before
    then = await homes(stores, GAMES)
    moved = {game for game in GAMES if then[game] != at_first[game]}
    assert all(then[game] == stores[2].store_id for game in moved)
    assert len(moved) == pytest.approx(len(GAMES) / 3, abs=6)
    assert (done.partitions, told[-1][0]) == (len(moved), len(moved))
    assert done.rows == sum([len(await rows_of(stores[2], game)) for game in moved])
    for game in GAMES:
        again = put(MOVES, ("t", game, "once"), Note()).named("an operation")
        assert (await engine.commit(again)).numbers == (1,)
    assert (await engine.mover.reshard((), silent)).partitions == 0
    back = await engine.mover.reshard([stores[2].store_id], silent)
    assert (back.partitions, back.rows) == (done.partitions, done.rows)
    assert await rows_of(engine) == before
    assert await homes(stores, GAMES) == at_first
    engine = await together(stores[:2])
    assert await rows_of(engine) == before


async def test_what_cannot_be_drained_is_refused() -> None:
    stores = memory(2, LAYOUTS)
    engine = await together(stores)
    with pytest.raises(Invalid, match="there is no shard elsewhere"):
        await engine.mover.reshard(["elsewhere"], silent)
    with pytest.raises(Invalid, match="no shard would be left"):
        await engine.mover.reshard([store.store_id for store in stores], silent)
    with pytest.raises(Invalid, match="memory:// is one store"):
        await library.reshard("memory://", (), lambda what, done, total: None)


class Life:
    """A process that dies at an edge of a commit, in whichever store, and does nothing after."""

    def __init__(self, at: int) -> None:
        self.at = at
        self.edges = 0

    async def step(self) -> None:
        self.edges += 1
        if self.edges >= self.at:
            raise Unavailable("this process is dead.")

    def around(self, stores: Sequence[Engine]) -> list[Engine]:
        faults = [Fault(edge, self.step) for edge in Edge]
        return [Failing(store, faults) for store in stores]


async def half_moved(at: int, drained: bool) -> tuple[list[Engine], list[Row], Life]:
    """Stores of which the reshard was cut off at an edge, and the rows there are in all."""
    stores = memory(3, LAYOUTS)
    engine = await together(stores if drained else stores[:2])
    await fill(engine, FEW)
    before, life = await rows_of(engine), Life(at)
    await together(stores)
    try:
        mortal = await together(life.around(stores))
        await mortal.mover.reshard([stores[2].store_id] if drained else (), silent)
        await mortal.mover.close()
    except Unavailable:
        pass
    return stores, before, life


async def readable(engine: Engine) -> None:
    """Every key is there, by every way to ask for it."""
    for at, game in enumerate(FEW):
        for tenant in ("s", "t"):
            found = await engine.get(MOVES, (tenant, game, "1"))
            assert found is not None, game
            assert (found.version, found.value.rank, found.attachment) == (1, at, b"\0")
            assert (await engine.tip(PLIES, (tenant, game))).first == 3
            entries = await engine.read(PLIES, (tenant, game), after=2, limit=9)
            assert [entry.seq for entry in entries] == [3, 4]
        assert (await engine.tip(PLIES, ("u", game))).incarnation == 2
    found = [record.key[1] async for record in every(engine, MOVES, ("s",))]
    assert found == sorted(FEW)
    assert await engine.count(MOVES, ("s",)) == {(): len(FEW)}
    streams = await engine.streams(PLIES, (), limit=99)
    assert len(streams.items) == 2 * len(FEW)


async def writable(engine: Engine) -> None:
    for game in FEW:
        again = put(MOVES, ("t", game, "once"), Note()).named("an operation")
        assert (await engine.commit(again)).numbers == (1,)
        other = put(MOVES, ("t", game, "once"), Note(rank=9)).named("an operation")
        with pytest.raises(Invalid):
            await engine.commit(other)
        with pytest.raises(Conflict):
            await engine.commit(put(MOVES, ("t", game, "1"), Note(), expect=0))
        revived = await engine.commit(put(MOVES, ("t", game, "2"), Note(), expect=0))
        assert revived.numbers == (3,)
        assert (await engine.commit(append(PLIES, ("t", game), [Note()], after=4))).numbers == (5,)
    await engine.commit(put(MOVES, ("t", "a new game", "1"), Note()))


# proves S7
@pytest.mark.parametrize("drained", [False, True], ids=["added", "drained"])
async def test_whoever_comes_after_a_kill_goes_on(drained: bool) -> None:
    """The process dies at every edge in turn; the next reads, moves on, and has lost nothing. Or
    it is written to first, and moves on then."""
    *_, whole = await half_moved(10**9, drained)
    assert whole.edges > 20
    for at in range(1, whole.edges + 1):
        for first in ("move", "write"):
            stores, before, _ = await half_moved(at, drained)
            engine = await together(stores)
            await readable(engine)
            if first == "write":
                await writable(engine)
                before = []
            await engine.mover.reshard([stores[2].store_id] if drained else (), silent)
            if before:
                assert await rows_of(engine) == before, f"killed at {at}"
                await readable(engine)
                await writable(engine)
            left = stores[:2] if drained else stores
            assert await rows_of(await together(left)) == await rows_of(engine)
            at_home = await homes(stores, [*FEW, "a new game"])
            assert at_home == {
                game: engine.places.map.homes(game)[0] for game in [*FEW, "a new game"]
            }


class Held(Wrapping):
    """A store that answers a `get` of a record only once it is told to go on."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self.holding = False
        self.asked, self.go = asyncio.Event(), asyncio.Event()

    async def get(self, records: Any, key: Any) -> Any:
        if self.holding and records is MOVES:
            self.holding = False
            self.asked.set()
            await self.go.wait()
        return await super().get(records, key)


def leaving(engine: ShardedEngine, added: Engine) -> str:
    """A game that lives elsewhere as long as this store is not added."""
    after = [*engine.places.map.members, added.store_id]
    return next(game for game in FEW if home_of(after, game) == added.store_id)


# proves S7
@pytest.mark.parametrize("begun", [False, True], ids=["not-begun", "begun"])
async def test_a_read_under_way_while_its_partition_moves_finds_it(begun: bool) -> None:
    """It has asked the old home when the move begins, or when that is under way already, and is
    answered when nothing is there any more."""
    stores = [Held(store) for store in memory(3, LAYOUTS)]
    engine = await together(stores[:2])
    await fill(engine, FEW)
    engine = await together(stores)
    game = leaving(engine, stores[2])
    if begun:
        map = engine.places.map
        target = tuple(store.store_id for store in stores)
        await engine.places.tell(ShardMap(map.number + 1, map.primary, map.members, target))
    home = next(store for store in stores if store.store_id == engine.places.map.homes(game)[0])
    home.holding = True
    reading = asyncio.create_task(engine.get(MOVES, ("t", game, "1")))
    await home.asked.wait()
    if begun:
        await engine.commit(put(MOVES, ("t", game, "1"), Note(rank=99), expect=1))
    else:
        await engine.mover.reshard((), silent)
    assert await rows_of(home, game) == []
    home.go.set()
    found = await reading
    assert found is not None
    assert found.version == (2 if begun else 1)


class DownAfterAScan(Wrapping):
    """A store that goes down once it has told what it has."""

    down = False

    async def scan(self, records: Any, prefix: Any, **asked: Any) -> Any:
        if self.down:
            raise Unavailable("connection refused.")
        page = await super().scan(records, prefix, **asked)
        self.down = records is MOVES
        return page

    async def get(self, records: Any, key: Any) -> Any:
        if self.down:
            raise Unavailable("connection refused.")
        return await super().get(records, key)


# proves S7
async def test_a_list_leaves_out_nothing_when_what_moved_away_cannot_be_asked_for() -> None:
    """Its old home has answered without it, and cannot say any more that it is in the new one."""
    stores = memory(3, LAYOUTS)
    engine = await together(stores[:2])
    await fill(engine, FEW)
    engine = await together(stores)
    game, map = leaving(engine, stores[2]), engine.places.map
    target = tuple(store.store_id for store in stores)
    await engine.places.tell(ShardMap(map.number + 1, map.primary, map.members, target))
    await engine.commit(put(MOVES, ("t", game, "1"), Note(), expect=1))
    home = map.homes(game)[0]
    failing = [DownAfterAScan(one) if one.store_id == home else one for one in stores]
    with pytest.raises(Unavailable, match=f"{home} at memory://: connection refused"):
        await (await together(failing)).scan(MOVES, ("t",), limit=99)
    failing = [DownAfterAScan(one) if one.store_id == home else one for one in stores]
    page = await (await together(failing)).scan(MOVES, ("t",), limit=99, partial=True)
    assert page.missing == (f"{home} at memory://",)
    new = DownAfterAScan(stores[2])
    engine = await together([*stores[:2], new])
    new.down = True
    page = await engine.scan(MOVES, ("t", game), limit=99, partial=True)
    assert page.missing == (f"{new.store_id} at memory://",)


async def verified(engine: Engine) -> list[tuple[str, str]]:
    return [(one.kind, f"{one.where}: {one.why}") async for one in engine.verify()]


# proves S7
async def test_what_lies_in_a_shard_that_is_not_its_home_is_named() -> None:
    """One partition whole in the wrong shard, one in two, and one of what only the primary keeps;
    while partitions move, what is in two is in order."""
    stores = memory(3, LAYOUTS)
    engine = await together(stores)
    await fill(engine, FEW)
    assert await verified(engine) == []
    at = {store.store_id: store for store in stores}
    first, second = FEW[:2]
    homes_of = {game: at[engine.places.map.homes(game)[0]] for game in (first, second)}
    wrong = {
        game: next(one for one in stores[1:] if one is not homes_of[game]) for game in homes_of
    }
    rows = {game: (await engine.rows(partition=game)).items for game in homes_of}
    for game in homes_of:
        rows[game] = tuple(row for row in rows[game] if not isinstance(row, FloorRow))
        await wrong[game].load(rows[game])
    await homes_of[first].unload(rows[first])
    await stores[2].commit(put(FACTS, ("t", "astray"), Note()))
    found = sorted(await verified(engine))
    assert [kind for kind, _ in found] == ["misplaced"] * 3
    for game, there in ((first, "has nothing of it"), (second, f"keeps {len(rows[second])} rows")):
        (told,) = [text for _, text in found if game in text]
        assert told.startswith(f"shard {wrong[game].store_id} at memory://: the partition {game}:")
        assert f"{len(rows[game])} rows of it lie here" in told
        assert f"its home is {homes_of[game].store_id} at memory://, which {there}" in told
    assert any("the collection facts: it is not partitioned" in text for _, text in found)
    assert await engine.get(MOVES, ("t", first, "1")) is None, "nobody reads it there"


# proves S7
@pytest.mark.parametrize("at", range(1, 60, 6))
async def test_half_of_a_move_is_nothing_astray(at: int) -> None:
    stores, _, _ = await half_moved(at, drained=False)
    engine = await together(stores)
    assert await verified(engine) == []
    await engine.mover.reshard((), silent)
    assert await verified(engine) == []


class LosesTombstones(Wrapping):
    """A store that does not load what it should."""

    async def load(self, rows: Sequence[Row], **named: Any) -> None:
        kept = [row for row in rows if not isinstance(row, RecordRow) or row.value is not None]
        await super().load(kept, **named)


# proves S7
async def test_a_partition_that_came_out_otherwise_stays_where_it_was() -> None:
    stores = memory(3, LAYOUTS)
    await fill(await together(stores[:2]), FEW)
    before = await homes(stores, FEW)
    engine = await together([*stores[:2], LosesTombstones(stores[2])])
    with pytest.raises(Damaged, match="its rows sum up to"):
        await engine.mover.reshard((), silent)
    await readable(engine)
    for store in stores[:2]:
        for game in FEW:
            assert bool(await rows_of(store, game)) == (before[game] == store.store_id)
    engine = await together(stores)
    await engine.mover.reshard((), silent)
    await readable(engine)


class Yields(Wrapping):
    """A store that lets others go first, at random, before and after each call."""

    def __init__(self, engine: Engine, random: Random) -> None:
        super().__init__(engine)
        self.random = random

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if not asyncio.iscoroutinefunction(found) or name == "close":
            return found

        async def later(*args: Any, **named: Any) -> Any:
            await self._pass()
            answer = await found(*args, **named)
            await self._pass()
            return answer

        return later if name != "_pass" else found

    async def _pass(self) -> None:
        for _ in range(self.random.choice((0, 0, 1, 3))):
            await asyncio.sleep(0)


class Players:
    """Writers and readers, each of whom knows what must be there."""

    def __init__(self, engine: Engine, random: Random) -> None:
        self.engine = engine
        self.random = random
        self.over = False
        self.versions: dict[tuple[str, str, str], int] = {}
        self.begun: dict[tuple[str, str, str], int] = {}
        self.writes = self.reads = self.lists = self.awaited = 0
        self.there = asyncio.Event()

    async def written(self, more: int) -> None:
        """Return when there are so many more writes."""
        self.awaited = self.writes + more
        self.there.clear()
        await self.there.wait()

    async def write(self, name: str) -> None:
        """A record, a log and an operation id of each, which only this writer writes."""
        while not self.over:
            key = ("t", self.random.choice(GAMES), name)
            known = self.versions.get(key, 0)
            self.begun[key] = known + 1
            batch = put(MOVES, key, Note(rank=known + 1), expect=known)
            batch += append(PLIES, (name, key[1]), [Note(rank=known + 1)], after=known)
            batch = batch.named(f"{name} {known + 1}")
            expected = Committed((known + 1, known + 1))
            assert await self.engine.commit(batch) == expected
            self.versions[key] = known + 1
            self.writes += 1
            if self.writes == self.awaited:
                self.there.set()
            assert await self.engine.commit(batch) == expected
            await asyncio.sleep(0)

    async def read(self) -> None:
        while not self.over:
            if not self.versions:
                await asyncio.sleep(0)
                continue
            key = self.random.choice(list(self.versions))
            least, stream = self.versions[key], (key[2], key[1])
            found = await self.engine.get(MOVES, key)
            assert found is not None, key
            assert least <= found.value.rank <= self.begun[key]
            least = self.versions[key]
            tip = await self.engine.wait(PLIES, stream, least - 1, timeout_s=60)
            assert tip.last >= least
            entries = await self.engine.read(PLIES, stream, after=least - 1, limit=1)
            assert [entry.value.rank for entry in entries] == [least]
            self.reads += 1
            await asyncio.sleep(0)

    async def list(self) -> None:
        while not self.over:
            least = dict(self.versions)
            limit = self.random.choice((3, 20, 1_000))
            down, cursor = self.random.choice((False, True)), None
            keys: list[tuple[str, ...]] = []
            while True:
                page = await self.engine.scan(
                    MOVES, ("t",), limit=limit, cursor=cursor, descending=down
                )
                for record in page.items:
                    key = (record.key[0], record.key[1], record.key[2])
                    keys.append(key)
                    assert record.version >= least.get(key, 1)
                if (cursor := page.cursor) is None:
                    break
            assert keys == sorted(set(keys), reverse=down)
            assert set(least) <= set(keys)
            (count,) = (await self.engine.count(MOVES, ("t",))).values() or (0,)
            assert len(least) <= count <= len(self.begun)
            some = [key for key in least if self.random.random() < 0.3]
            assert all(await self.engine.get_many(MOVES, some))
            self.lists += 1
            await asyncio.sleep(0)


# proves S7
@pytest.mark.parametrize("seed", range(3))
async def test_every_key_is_readable_and_writable_while_it_moves(seed: int) -> None:
    random = Random(seed)
    stores = [Yields(store, random) for store in memory(4, LAYOUTS)]
    await together(stores[:2])
    engine = Checked(await together(stores))
    players = Players(engine, random)
    async with asyncio.TaskGroup() as group:
        for name in ("a", "b", "c"):
            group.create_task(players.write(name))
        for work in (players.read, players.read, players.list):
            group.create_task(work())
        sharded: Any = engine.engine
        ids = [store.store_id for store in stores]
        for drain in ([ids[3]], [ids[0]], [], ids[1:3], []):
            await players.written(50)
            done = await sharded.mover.reshard(drain, silent)
            assert done.partitions > 3
        players.over = True
    assert players.writes > 200
    assert min(players.reads, players.lists) > 5
    await engine.close()
