"""A start while a shard is down: only what lives there fails, and it is joined when it is back."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path

import pytest

from perdure.core.batch import put
from perdure.core.clock import SystemClock
from perdure.core.disk import Disk
from perdure.core.engine import Engine, Survives
from perdure.core.errors import Invalid, PerdureError, PromiseBroken, Unavailable, WrongShards
from perdure.engines import open_engine, postgres_driver, sharding_of
from perdure.engines.sharded import ShardedEngine
from perdure.engines.sharded_map import Absent
from perdure.engines.wrapping import Wrapping
from perdure.proving.postgres import make_server
from perdure.proving.subject import FACTS, LAYOUTS, MOVES, Note
from perdure.proving.subjects import shards_url
from perdure.proving.waiting import wait_until
from perdure.services.shards import shard_warnings
from tests.engines.postgres_stores import at
from tests.engines.test_resharding import FEW, fill, readable, silent, together
from tests.engines.test_sharded import memory

SOON_S = 30.0


class Away:
    """A store that cannot be opened before it is `back`."""

    def __init__(self, store: Engine) -> None:
        self.store = store
        self.back = False
        self.absent = Absent(
            f"postgresql://user@db/{store.store_id}", self.open, Unavailable("refused.")
        )

    async def open(self) -> Engine:
        if not self.back:
            raise Unavailable("still refused.")
        return self.store


async def without(stores: Sequence[Engine], *away: Away) -> ShardedEngine:
    return await ShardedEngine.open(
        stores,
        LAYOUTS,
        clock=SystemClock(),
        disk=Disk(),
        read_only=False,
        absent=[one.absent for one in away],
    )


async def kept_by(engine: ShardedEngine, store: Engine) -> set[str]:
    return {game for game in FEW if engine.places.map.homes(game)[0] == store.store_id}


# proves S7
async def test_a_start_without_a_shard_lacks_what_lives_there_until_it_is_back() -> None:
    stores = memory(3, LAYOUTS)
    await fill(await together(stores), FEW)
    gone = Away(stores[2])
    engine = await without(stores[:2], gone)
    lost = await kept_by(engine, gone.store)
    assert 0 < len(lost) < len(FEW)
    named = f"{gone.store.store_id} at postgresql://db/{gone.store.store_id}"
    for game in FEW:
        key = ("t", game, "1")
        if game in lost:
            with pytest.raises(Unavailable, match=f"{named} is down since before the start"):
                await engine.get(MOVES, key)
            with pytest.raises(Unavailable, match=named):
                await engine.commit(put(MOVES, key, Note()))
        else:
            assert await engine.get(MOVES, key)
            await engine.commit(put(MOVES, ("v", game, "1"), Note(), expect=0))
    assert await engine.get(FACTS, ("t", "common"))
    page = await engine.scan(MOVES, ("s",), limit=99, partial=True)
    assert {record.key[1] for record in page.items} == set(FEW) - lost
    assert page.missing == (named,)
    for refused in (
        engine.scan(MOVES, ("s",), limit=99),
        engine.count(MOVES, ()),
        engine.rows(),
        engine.usage(),
        engine.mover.reshard((), silent),
    ):
        with pytest.raises(Unavailable, match=f"db/{gone.store.store_id}"):
            await refused
    (finding,) = [finding async for finding in engine.verify()]
    assert (finding.kind, gone.store.store_id in finding.where) == ("unreadable", True)
    with pytest.raises(Unavailable, match=r"still refused"):
        await engine.watch.join(gone.absent)
    gone.back = True
    await engine.watch.join(gone.absent)
    await readable(engine)
    assert engine.sharding.missing == ()
    assert [shard.id for shard in engine.sharding.shards if shard.down] == []
    assert [finding async for finding in engine.verify()] == []


# proves S7
async def test_of_two_that_are_down_each_is_known_by_its_id_when_it_comes() -> None:
    stores = memory(3, LAYOUTS)
    await fill(await together(stores), FEW)
    one, other = Away(stores[1]), Away(stores[2])
    engine = await without(stores[:1], one, other)
    first, second = shard_warnings(engine.sharding)
    either = f"{stores[1].store_id} or {stores[2].store_id}"
    assert f"shard {either} at {one.absent.url} is down: the partitions that live in it" in first
    assert other.absent.url in second
    other.back = True
    await engine.watch.join(other.absent)
    for game in FEW:
        if game in await kept_by(engine, stores[1]):
            with pytest.raises(Unavailable, match=stores[1].store_id):
                await engine.get(MOVES, ("t", game, "1"))
        else:
            assert await engine.get(MOVES, ("t", game, "1"))


# proves S7
async def test_nothing_starts_without_the_primary_nor_for_the_first_time() -> None:
    stores = memory(3, LAYOUTS)
    with pytest.raises(Unavailable, match="this is the first start or the primary is not there"):
        await without(stores[:2], Away(stores[2]))
    await together(stores[:2])
    with pytest.raises(Unavailable, match=f"The primary, {stores[0].store_id}, is not among"):
        await without(stores[1:2], Away(stores[0]))
    with pytest.raises(Unavailable, match="the primary is not there"):
        await without(stores[2:], Away(stores[0]), Away(stores[1]))
    await together(stores)
    with pytest.raises(WrongShards, match="not among those given"):
        await together(stores[:1])


# proves S7
async def test_a_new_shard_that_is_down_is_needed_for_nothing_but_to_be_added() -> None:
    stores = memory(3, LAYOUTS)
    await fill(await together(stores[:2]), FEW)
    new = Away(stores[2])
    engine = await without(stores[:2], new)
    await readable(engine)
    assert "nothing lives in it yet" in shard_warnings(engine.sharding)[0]
    with pytest.raises(Unavailable, match="nothing is moved while a shard is down"):
        await engine.mover.reshard((), silent)
    assert not engine.places.map.next, "nothing was begun"
    new.back = True
    await engine.watch.join(new.absent)
    assert (await engine.mover.reshard((), silent)).partitions > 0
    await readable(engine)


# proves S7
async def test_what_comes_back_as_something_else_is_not_taken() -> None:

    class Lasting(Wrapping):
        """A store that more is promised of, and that stays open."""

        def __init__(self, engine: Engine, survives: Survives) -> None:
            super().__init__(engine)
            self.survives = survives

        async def close(self) -> None:
            pass

    strong, weak = Survives(process_crash=True), Survives()
    stores = [Lasting(store, strong) for store in memory(7, LAYOUTS)]
    stores, theirs, full, empty = stores[:3], stores[3:5], stores[5], stores[6]
    await fill(await together(stores), FEW)
    await together(theirs)
    await full.commit(put(FACTS, ("t", "a"), Note()))
    refused: list[tuple[Engine, type[PerdureError], str]] = [
        (theirs[1], WrongShards, "is a shard of another store"),
        (full, WrongShards, "holds facts already"),
        (empty, WrongShards, f"the shard {stores[2].store_id} of this store is not among those"),
        (stores[1], WrongShards, "is given a second time"),
        (Lasting(stores[2], weak), PromiseBroken, "does not survive process_crash"),
    ]
    for store, kind, why in refused:
        gone = Away(store)
        gone.back = True
        engine = await without(stores[:2], gone)
        with pytest.raises(kind, match=why):
            await engine.watch.join(gone.absent)
        assert engine.places.missing == (stores[2].store_id,)
        for game in await kept_by(engine, stores[2]):
            with pytest.raises(Unavailable):
                await engine.get(MOVES, ("t", game, "1"))


# proves S7
@pytest.mark.parametrize("killed", [False, True])
async def test_a_map_that_changed_meanwhile_is_learned_and_told(killed: bool) -> None:
    """The shard was down while others moved partitions to it, or since somebody was killed in the
    middle of that."""
    stores = memory(3, LAYOUTS)
    await fill(await together(stores[:2]), FEW)
    whole = await together(stores)
    wanted = None
    if killed:
        map = whole.places.map
        wanted = type(map)(map.number + 1, map.primary, map.members, tuple(whole.places.shards))
        await whole.places.tell_one(whole.places.primary, wanted)
    else:
        await whole.mover.reshard((), silent)
    gone = Away(stores[2])
    engine = await without(stores[:2], gone)
    assert engine.places.missing == (stores[2].store_id,)
    gone.back = True
    await engine.watch.join(gone.absent)
    await readable(engine)
    if wanted:
        assert engine.places.shards[stores[2].store_id].knows(wanted)
        await engine.mover.reshard((), silent)
    await readable(await together(stores))


# proves S7
async def test_a_process_joins_a_shard_by_itself_when_it_is_back(tmp_path: Path) -> None:
    """Stores on a disk that is not there at the start; they are opened as any start opens them."""
    for number in range(3):
        (tmp_path / f"{number}").mkdir()
    url = "shards:" + ",".join(
        f"sqlite:///{tmp_path / f'{number}' / 'state.db'}" for number in range(3)
    )
    engine = await open_engine(url, LAYOUTS)
    await fill(engine, FEW)
    await engine.close()
    (tmp_path / "2").rename(tmp_path / "away")
    (tmp_path / "2").touch()
    engine = await open_engine(url, LAYOUTS)
    (warning,) = shard_warnings(sharding_of(engine))
    assert f"sqlite:///{tmp_path / '2' / 'state.db'} is down" in warning
    (tmp_path / "2").unlink()
    (tmp_path / "away").rename(tmp_path / "2")

    async def joined() -> bool:
        return not shard_warnings(sharding_of(engine))

    await wait_until(joined, SOON_S, "the shard to be joined")
    await readable(engine)
    sharding = sharding_of(engine)
    assert sharding is not None
    assert [shard.recovered is not None for shard in sharding.shards] == [True] * 3
    await engine.close()
    (tmp_path / "0").rename(tmp_path / "away")
    (tmp_path / "0").touch()
    with pytest.raises(Unavailable, match="is not among those that answer"):
        await open_engine(url, LAYOUTS)
    assert sharding_of(await open_engine("memory://", LAYOUTS)) is None
    with pytest.raises(Invalid):
        await open_engine(shards_url(tmp_path, 7) + ",file:///x", LAYOUTS)


# proves S7
async def test_a_database_that_goes_and_comes_is_told_and_joined(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres_driver, "PATIENCE_S", 0.5)
    server = make_server()
    url = f"shards:sqlite:///{tmp_path / 'state.db'},{at(server.dsn, 'shard')}"
    try:
        engine = await open_engine(url, LAYOUTS)
        await fill(engine, FEW)
        await engine.close()
        server.stop()
        engine = await open_engine(url, LAYOUTS)

        async def warned() -> bool:
            return bool(shard_warnings(sharding_of(engine)))

        async def healthy() -> bool:
            return not await warned()

        for how in (None, signal.SIGQUIT):
            if how is not None:
                server.stop(how)
            await wait_until(warned, SOON_S, "the shard to be missed")
            assert await engine.get(FACTS, ("t", "common"))
            with pytest.raises(Unavailable, match="postgresql://"):
                await engine.count(MOVES, ())
            server.start()
            await wait_until(healthy, SOON_S, "the shard to be back")
            await readable(engine)
        assert isinstance(engine, ShardedEngine)
        as_configured = at(server.dsn, "shard")
        await engine.mover.reshard([as_configured], lambda done, total: None)
        assert engine.places.map.members == (engine.places.map.primary,)
        await engine.close()
    finally:
        server.remove()
