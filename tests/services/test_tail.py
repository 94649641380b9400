"""Following a log live: every entry once, in order, whoever joins when and wherever."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from perdure.core.batch import append, drop
from perdure.core.clock import SystemClock
from perdure.core.disk import Disk
from perdure.core.engine import Engine
from perdure.core.errors import CursorRefused, Latched, Missing, Unavailable
from perdure.core.keys import Key
from perdure.core.layouts import Log
from perdure.core.values import Entry
from perdure.engines import open_engine
from perdure.engines.memory import MemoryEngine
from perdure.engines.sharded import ShardedEngine
from perdure.engines.sharded_map import SHARD_LAYOUTS
from perdure.engines.wrapping import Wrapping
from perdure.services import tail as tails
from perdure.services.tail import Tail

LOG = Log("numbers", int, key=("tenant", "id"))
KEY = ("default", "one")
LAST = -1


def is_last(entry: Entry[Any]) -> bool:
    return bool(entry.value == LAST)


@pytest.fixture
async def engine() -> AsyncIterator[Engine]:
    engine = await open_engine("memory://", [LOG], clock=SystemClock())
    yield engine
    await engine.close()


async def followed(tail: Tail, after: int = 0) -> list[int]:
    return [
        entry.value
        async for entries in tail.follow(LOG, KEY, after=after, ended=is_last)
        for entry in entries
    ]


# proves C6
@pytest.mark.parametrize("recent", [4, 512])
async def test_readers_who_join_at_any_time_miss_nothing(
    engine: Engine, recent: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tails, "_RECENT_MAX", recent)
    tail = Tail(engine)
    numbers = [*range(1, 300), LAST]
    readers = []
    for at, number in enumerate(numbers):
        if at % 30 == 0:
            readers.append((at, asyncio.create_task(followed(tail, after=at // 2))))
        await engine.commit(append(LOG, KEY, [number]))
        await asyncio.sleep(0)
    for at, reader in readers:
        assert await reader == numbers[at // 2 :]
    assert tail.stats.streams == tail.stats.followers == 0


# proves C6
async def test_a_reader_may_join_at_the_edge_of_what_is_in_memory(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tails, "_RECENT_MAX", 3)
    tail = Tail(engine)
    numbers = [*range(1, 9), LAST]
    await engine.commit(append(LOG, KEY, numbers[:1]))
    seen: list[int] = []
    async for entries in tail.follow(LOG, KEY, after=0, ended=is_last):
        seen += [entry.value for entry in entries]
        if len(seen) < len(numbers):
            await engine.commit(append(LOG, KEY, numbers[len(seen) : len(seen) + 1]))
            continue
        # While this one follows, the last three are in memory and the rest is not.
        places = range(len(numbers) + 1)
        assert [await followed(tail, place) for place in places] == [numbers[at:] for at in places]
    assert seen == numbers


async def test_a_reader_beyond_the_end_stops_when_the_stream_ends(engine: Engine) -> None:
    tail = Tail(engine)
    await engine.commit(append(LOG, KEY, [1]))
    beyond = asyncio.create_task(followed(tail, after=50))
    behind = asyncio.create_task(followed(tail))
    await asyncio.sleep(0)
    await engine.commit(append(LOG, KEY, [LAST]))
    assert await beyond == []
    assert await behind == [1, LAST]


async def test_an_ended_stream_can_be_followed_from_anywhere(engine: Engine) -> None:
    await engine.commit(append(LOG, KEY, [1, 2, LAST]))
    tail = Tail(engine)
    assert [await followed(tail, after) for after in (0, 1, 3, 9)] == [
        [1, 2, LAST],
        [2, LAST],
        [],
        [],
    ]


async def test_followers_are_told_why_nothing_more_comes(engine: Engine) -> None:
    tail = Tail(engine)
    await engine.commit(append(LOG, KEY, [1]))
    following = tail.follow(LOG, KEY, after=0, ended=is_last)
    assert [entry.value for entry in await anext(following)] == [1]
    tail.fail(LOG, KEY, Unavailable("the store is full"))
    with pytest.raises(Unavailable, match="full"):
        await anext(following)


async def test_a_dropped_stream_is_missing_not_silent(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tails, "_WAIT_S", 0.01)
    tail = Tail(engine)
    await engine.commit(append(LOG, KEY, [1, 2]))
    following = tail.follow(LOG, KEY, after=0, ended=is_last)
    assert [entry.value for entry in await anext(following)] == [1, 2]
    await engine.commit(drop(LOG, KEY))
    with pytest.raises(Missing):
        await anext(following)


# proves C9
async def test_what_a_latched_store_cannot_go_on_with_is_not_waited_for(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Latching(Wrapping):
        why: str | None = None

        def latched_for(self, log: Log[Any], stream: Key) -> str | None:
            return self.why

    monkeypatch.setattr(tails, "_WAIT_S", 0.01)
    latching = Latching(engine)
    await engine.commit(append(LOG, KEY, [1, 2]))
    following = Tail(latching).follow(LOG, KEY, after=0, ended=is_last)
    assert [entry.value for entry in await anext(following)] == [1, 2]
    latching.why = "a sync failed"
    with pytest.raises(Latched, match="a sync failed"):
        await anext(following)


# proves S7
async def test_a_shard_that_is_latched_ends_the_streams_that_live_in_it_and_no_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tails, "_WAIT_S", 0.01)
    clock = SystemClock()
    log = Log("games", int, key=("tenant", "game"), partition="game")
    stores = [MemoryEngine((log, *SHARD_LAYOUTS), clock) for _ in range(2)]
    engine = await ShardedEngine.open(stores, [log], clock=clock, disk=Disk(), read_only=False)
    by_home = {engine.places.map.homes(f"{game}")[0]: ("t", f"{game}") for game in range(40)}
    failed, sound = by_home[stores[0].store_id], by_home[stores[1].store_id]
    tail = Tail(engine)
    following = {key: tail.follow(log, key, after=0, ended=is_last) for key in (failed, sound)}
    for key in following:
        await engine.commit(append(log, key, [1]))
        assert [entry.value for entry in await anext(following[key])] == [1]
    stores[0].latched = "a sync failed"
    with pytest.raises(Latched, match=f"{stores[0].store_id} at memory://: a sync failed"):
        await anext(following[failed])
    await engine.commit(append(log, sound, [LAST]))
    assert [entry.value for entry in await anext(following[sound])] == [LAST]
    await engine.close()


# proves C23, W10
@pytest.mark.parametrize("recent", [2, 512])
async def test_who_follows_an_incarnation_is_told_nothing_of_the_next(
    engine: Engine, recent: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tails, "_RECENT_MAX", recent)
    tail = Tail(engine)
    await engine.commit(append(LOG, KEY, [1, 2, 3]))
    seen: list[int] = []

    async def follow() -> None:
        async for entries in tail.follow(LOG, KEY, after=0, ended=is_last, incarnation=1):
            seen.extend(entry.value for entry in entries)
            await engine.commit(drop(LOG, KEY))
            await engine.commit(append(LOG, KEY, [11, 12, 13, 14, LAST]))

    with pytest.raises((Missing, CursorRefused)):
        await follow()
    assert seen == [1, 2, 3]
    assert tail.stats.streams == tail.stats.followers == 0
