"""Several stores as one: who belongs to it, where a partition lives, lists merged, a shard down."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perdure.core import cursors
from perdure.core.batch import append, put
from perdure.core.clock import SystemClock
from perdure.core.disk import Disk
from perdure.core.engine import Engine
from perdure.core.errors import Closed, Damaged, Invalid, PerdureError, Unavailable, WrongShards
from perdure.core.keys import Key
from perdure.core.layouts import Column, Layout, Records
from perdure.core.values import Page, Record
from perdure.engines import open_engine
from perdure.engines.memory import MemoryEngine
from perdure.engines.sharded import ShardedEngine
from perdure.engines.sharded_map import SHARD_LAYOUTS, home_of
from perdure.engines.wrapping import Wrapping
from perdure.proving.subject import FACTS, LAYOUTS, MOVES, NOTES, PLIES, Note
from perdure.proving.subjects import shards_url

SESSIONS = Records(
    "sessions",
    Note,
    key=("tenant", "session", "id"),
    indexes=NOTES.indexes,
    partition="session",
)
MINE: tuple[Layout, ...] = (*LAYOUTS, SESSIONS)

ids = st.lists(st.text(min_size=1), min_size=1, max_size=8, unique=True)


class Counting(SystemClock):
    """Gives ids that are the same in every run, so that partitions have the same homes."""

    def __init__(self) -> None:
        super().__init__()
        self._given = 0

    def new_id(self, prefix: str) -> str:
        self._given += 1
        return f"{prefix}_{self._given}"


def memory(count: int, layouts: Sequence[Layout]) -> list[Engine]:
    clock = Counting()
    return [MemoryEngine((*layouts, *SHARD_LAYOUTS), clock) for _ in range(count)]


class Down(Wrapping):
    """A store that cannot be reached while it is `down`."""

    down = False

    def __getattribute__(self, name: str) -> Any:
        asked = {"commit", "get", "get_many", "scan", "count", "read", "tip", "wait", "streams"}
        if name in asked and super().__getattribute__("down"):
            raise Unavailable("connection refused.")
        return super().__getattribute__(name)


async def together(stores: Sequence[Engine]) -> ShardedEngine:
    clock, disk = SystemClock(), Disk()
    return await ShardedEngine.open(stores, MINE, clock=clock, disk=disk, read_only=False)


async def shards(count: int = 3) -> tuple[ShardedEngine, list[Down]]:
    stores = [Down(store) for store in memory(count, MINE)]
    return await together(stores), stores


# proves S7
@given(ids, st.text(), st.randoms(use_true_random=False))
def test_the_home_of_a_partition_does_not_depend_on_the_order_of_shards(
    shards: list[str], partition: str, random: Any
) -> None:
    home = home_of(shards, partition)
    random.shuffle(shards)
    assert home_of(shards, partition) == home


# proves S7
@given(ids, st.text(min_size=1), st.lists(st.text(), max_size=50, unique=True))
def test_one_shard_more_takes_and_nothing_moves_between_the_others(
    shards: list[str], added: str, partitions: list[str]
) -> None:
    for partition in partitions:
        before, after = home_of(shards, partition), home_of([*shards, added], partition)
        assert after in (before, added)


# proves S7
@pytest.mark.parametrize("count", [1, 2, 4, 9])
def test_one_shard_more_takes_its_part(count: int) -> None:
    shards = [f"store_{number}" for number in range(count + 1)]
    keys = [f"session {number}" for number in range(20_000)]
    moved = sum(home_of(shards[:-1], key) != home_of(shards, key) for key in keys)
    assert moved == pytest.approx(len(keys) / (count + 1), rel=0.06)
    homes = [home_of(shards, key) for key in keys]
    for shard in shards:
        assert homes.count(shard) == pytest.approx(len(keys) / (count + 1), rel=0.1)


small = st.integers(-1, 2)
written = st.tuples(
    st.sampled_from(["t", "u"]),
    st.sampled_from("abcdef"),
    st.sampled_from("123"),
    st.builds(
        Note,
        status=st.sampled_from([None, "", "open"]),
        rank=small,
        due_s=st.one_of(st.none(), small),
    ),
)
questions: st.SearchStrategy[tuple[tuple[str, ...], str | None, tuple[Column, ...]]] = (
    st.sampled_from(
        [
            ((), None, ()),
            (("t",), None, ()),
            (("t", "a"), None, ()),
            (("t",), "by_status", ()),
            (("t",), "by_status", ("open",)),
            (("u",), "by_rank", ()),
            (("t",), "by_rank", (1,)),
            ((), "due", ()),
        ]
    )
)


async def pages(
    engine: Engine,
    asked: tuple[tuple[str, ...], str | None, Sequence[Column]],
    limit: int,
    down: bool,
) -> list[list[Record[Note]]]:
    """Every page from the first to the last."""
    prefix, index, where = asked
    found, cursor = [], None
    while True:
        page = await engine.scan(
            SESSIONS,
            prefix,
            index=index,
            where=where,
            limit=limit,
            cursor=cursor,
            descending=down,
        )
        found.append(page.items)
        if (cursor := page.cursor) is None:
            return found


# proves S7, C18
@settings(max_examples=150)
@given(st.lists(written, max_size=25), questions, st.integers(1, 5), st.booleans())
async def test_a_merged_list_is_that_of_one_store_page_by_page(
    records: list[tuple[str, str, str, Note]],
    asked: tuple[tuple[str, ...], str | None, tuple[Column, ...]],
    limit: int,
    down: bool,
) -> None:
    one: Engine = MemoryEngine(MINE, SystemClock())
    many, _ = await shards()
    for tenant, session, name, note in records:
        for engine in (one, many):
            await engine.commit(put(SESSIONS, (tenant, session, name), note))
    assert await pages(many, asked, limit, down) == await pages(one, asked, limit, down)
    prefix, index, where = asked
    if not where:
        expected = await one.count(SESSIONS, prefix, index=index)
        assert await many.count(SESSIONS, prefix, index=index) == expected


class DamagedAt(Wrapping):
    """A store in which one record cannot be read, as every engine tells it."""

    at = ""

    async def scan(self, records: Records[Any], prefix: Any, **asked: Any) -> Page[Any]:
        page = await super().scan(records, prefix, **asked)
        names = [record.key[-1] for record in page.items]
        if self.at not in names:
            return page
        place = names.index(self.at)

        def behind(record: Record[Any]) -> str:
            return cursors.at_record(self.store_id, records, prefix, record)

        if place == 0:
            raise Damaged(f"sessions {self.at}", "as planned", behind(page.items[0]))
        return Page(page.items[:place], behind(page.items[place - 1]))


async def test_damage_in_one_shard_ends_a_page_where_it_stands_in_the_whole() -> None:
    stores = [DamagedAt(store) for store in memory(3, MINE)]
    engine = await together(stores)
    for number in range(12):
        await engine.commit(put(SESSIONS, ("t", f"s{number:02}", f"{number:02}"), Note()))
    for store in stores:
        store.at = "05"
    first = await engine.scan(SESSIONS, ("t",), limit=100)
    assert [record.key[-1] for record in first.items] == ["00", "01", "02", "03", "04"]
    with pytest.raises(Damaged) as damage:
        await engine.scan(SESSIONS, ("t",), limit=100, cursor=first.cursor)
    rest = await engine.scan(SESSIONS, ("t",), limit=100, cursor=damage.value.resume)
    assert [record.key[-1] for record in rest.items] == [f"{number:02}" for number in range(6, 12)]


# proves S7
async def test_a_shard_that_is_down_fails_what_lives_in_it_and_is_named() -> None:
    engine, stores = await shards()
    games = [f"g{number}" for number in range(30)]
    for game in games:
        move = put(MOVES, ("t", game, "1"), Note()) + append(PLIES, ("t", game), [Note()])
        await engine.commit(move)
    await engine.commit(put(FACTS, ("t", "common"), Note()))
    gone = next(store for store in stores if store.store_id != engine.store_id)
    inside = {record.key[1] for record in (await gone.scan(MOVES, (), limit=99)).items}
    assert 0 < len(inside) < 20
    gone.down = True
    for game in games:
        key = ("t", game, "1")
        asked = [
            lambda key=key: engine.get(MOVES, key),
            lambda key=key: engine.get_many(MOVES, [key]),
            lambda key=key: engine.commit(put(MOVES, key, Note())),
            lambda key=key: engine.read(PLIES, key[:2], limit=9),
            lambda key=key: engine.tip(PLIES, key[:2]),
            lambda key=key: engine.wait(PLIES, key[:2], 0, timeout_s=0),
            lambda key=key: engine.scan(MOVES, key[:2], limit=9),
        ]
        for ask in asked:
            if game in inside:
                with pytest.raises(Unavailable, match=gone.store_id):
                    await ask()
            else:
                await ask()
    assert await engine.get(FACTS, ("t", "common"))
    with pytest.raises(Unavailable, match=gone.store_id):
        await engine.scan(MOVES, ("t",), limit=99)
    with pytest.raises(Unavailable, match=gone.store_id):
        await engine.count(MOVES, ("t",))
    found: set[str] = set()
    cursor: str | None = None
    while True:
        page = await engine.scan(MOVES, ("t",), limit=4, cursor=cursor, partial=True)
        found |= {record.key[1] for record in page.items}
        assert [name.split()[0] for name in page.missing] == [gone.store_id]
        if (cursor := page.cursor) is None:
            break
    assert found == set(games) - inside
    listed = await engine.streams(PLIES, ("t",), limit=99, partial=True)
    assert {key[1] for key in listed.items} == found
    assert len(listed.missing) == 1
    gone.down = False
    whole = await engine.scan(MOVES, ("t",), limit=99, partial=True)
    assert (len(whole.items), whole.missing) == (30, ())


async def test_a_shard_is_named_once_to_all_who_are_told_the_same_error() -> None:
    """An engine that answers many by one statement tells all of them one error."""
    engine, stores = await shards()
    shared = Unavailable("away")

    class Together(Wrapping):
        async def get(self, records: Records[Any], key: Key) -> Record[Any] | None:
            raise shared

    shard = engine.places.shards[stores[0].store_id]
    shard.engine = Together(shard.engine)
    asked = (engine.get(FACTS, ("t", str(number))) for number in range(3))
    told = await asyncio.gather(*asked, return_exceptions=True)
    assert {str(error) for error in told} == {f"shard {shard.name}: away"}


async def test_a_latched_shard_is_named() -> None:
    engine, stores = await shards()
    assert engine.latched is None
    memory = stores[1].engine
    assert isinstance(memory, MemoryEngine)
    memory.latched = "a sync failed"
    assert engine.latched is not None
    assert f"{memory.store_id} at memory://: a sync failed" in engine.latched


async def opened(url: str) -> Engine:
    return await open_engine(url, LAYOUTS)


async def refused(url: str) -> str:
    with pytest.raises(WrongShards) as error:
        await opened(url)
    return str(error.value)


# proves S7
async def test_shards_are_known_in_any_order_and_by_any_name(tmp_path: Path) -> None:
    engine = await opened(shards_url(tmp_path, 0, 1, 2))
    for number in range(20):
        await engine.commit(put(MOVES, ("t", f"g{number}", "1"), Note(rank=number)))
    first = await engine.scan(MOVES, (), limit=7)
    await engine.close()
    (tmp_path / "2.db").rename(tmp_path / "7.db")
    engine = await opened(shards_url(tmp_path, 7, 1, 0))
    for number in range(20):
        found = await engine.get(MOVES, ("t", f"g{number}", "1"))
        assert found is not None
        assert found.value.rank == number
    rest = await engine.scan(MOVES, (), limit=99, cursor=first.cursor)
    assert len(rest.items) == 13
    await engine.close()
    with pytest.raises(Closed):
        await engine.get(MOVES, ("t", "g0", "1"))


# proves S7
async def test_stores_that_are_not_the_shards_of_one_whole_are_refused(tmp_path: Path) -> None:
    for part, numbers in (("mine", (0, 1, 2)), ("other", (0, 1))):
        engine = await opened(shards_url(tmp_path / part, *numbers))
        await engine.commit(put(FACTS, ("t", "a"), Note()))
        await engine.close()
    mine, other = tmp_path / "mine", tmp_path / "other"
    full = await opened(f"sqlite:///{tmp_path / 'full.db'}")
    await full.commit(put(FACTS, ("t", "a"), Note()))
    await full.close()
    assert "is not among those given" in await refused(shards_url(mine, 0, 1))
    assert "is not among those given" in await refused(shards_url(mine, 1, 2))
    assert "is not among those given" in await refused(shards_url(mine, 0, 1, 3))
    foreign = f"{shards_url(mine, 0, 1, 2)},sqlite:///{other / '1.db'}"
    assert "is a shard of another store" in await refused(foreign)
    assert "holds facts already" in await refused(
        f"{shards_url(mine, 0, 1, 2)},sqlite:///{tmp_path / 'full.db'}"
    )
    assert "holds facts already" in await refused(
        f"{shards_url(tmp_path / 'new', 0)},sqlite:///{tmp_path / 'full.db'}"
    )
    for number in (0, 1):
        assert "is a shard of a store" in await refused(f"sqlite:///{mine / f'{number}.db'}")
        alone = await open_engine(f"sqlite:///{mine / f'{number}.db'}", LAYOUTS, read_only=True)
        assert [finding async for finding in alone.verify()] == [], "looking at one is no harm"
        await alone.close()
    engine = await opened(shards_url(mine, 0, 1, 2))
    assert await engine.get(FACTS, ("t", "a"))
    await engine.close()


async def test_plain_files_are_no_shard(tmp_path: Path) -> None:
    with pytest.raises(Invalid, match="never a shard"):
        await opened(f"{shards_url(tmp_path, 0)},file:///{tmp_path / 'files'}")


async def test_the_same_shard_twice_is_refused() -> None:
    (store,) = memory(1, MINE)
    with pytest.raises(WrongShards, match="given 2 times"):
        await together([store, store])


async def test_a_first_start_that_was_cut_short_is_completed() -> None:
    """The primary knows its shards before they do; whoever comes next tells them."""
    stores = [Down(store) for store in memory(3, MINE)]

    class Dies(Wrapping):
        async def commit(self, batch: Any) -> Any:
            raise Unavailable("as planned.")

    with pytest.raises(PerdureError):
        await ShardedEngine.open(
            [stores[0], Dies(stores[1]), stores[2]],
            MINE,
            clock=SystemClock(),
            disk=Disk(),
            read_only=False,
        )
    with pytest.raises(WrongShards, match="not among those given"):
        await together(stores[:2])
    engine = await together(stores[::-1])
    assert engine.store_id == stores[0].store_id
    await engine.commit(put(MOVES, ("t", "g", "1"), Note()))


async def test_a_store_that_was_used_alone_becomes_the_primary_and_keeps_what_it_has(
    tmp_path: Path,
) -> None:
    alone = await opened(f"sqlite:///{tmp_path / '0.db'}")
    for number in range(9):
        await alone.commit(put(MOVES, ("t", f"g{number}", "1"), Note()))
    await alone.close()
    engine = await opened(shards_url(tmp_path, 0, 1))
    for number in range(9):
        assert await engine.get(MOVES, ("t", f"g{number}", "1"))
    await engine.close()
