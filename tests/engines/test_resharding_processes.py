"""Shards that several processes use: one moves partitions while another goes by what it knew, is
killed, or sleeps in the middle of it."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path
from random import Random

import msgspec
import pytest

from perdure.core.addresses import of_shards, shards_of
from perdure.core.batch import append, put
from perdure.core.engine import Engine, Resharded
from perdure.core.errors import Invalid, Unavailable
from perdure.core.paging import every
from perdure.engines import open_engine, sharding_of
from perdure.engines.checked import Checked
from perdure.engines.sharded import ShardedEngine
from perdure.engines.wrapping import Wrapping
from perdure.proving.subject import LAYOUTS, MOVES, PLIES, Note
from perdure.proving.subjects import postgres_url, shards_url
from perdure.services.shards import shard_warnings
from perdure.surfaces.state import LAYOUTS as STATE_LAYOUTS
from tests.engines.test_resharding import (
    FEW,
    GAMES,
    Players,
    Slow,
    Yields,
    fill,
    homes,
    readable,
    rows_of,
    silent,
    together,
)
from tests.engines.test_sharded import Counting, memory
from tests.tidy.tree import ROOT


class Hurried(Counting):
    """Nobody waits by it: time goes on by as much as was to be slept."""

    def __init__(self) -> None:
        super().__init__()
        self._slept_s = 0.0

    def monotonic_s(self) -> float:
        return super().monotonic_s() + self._slept_s

    async def sleep(self, duration_s: float) -> None:
        self._slept_s += duration_s
        await asyncio.sleep(0)


class Common(Wrapping):
    """A store that several processes use."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self.shared = True


# proves S7
async def test_who_has_an_older_map_reads_and_writes_where_things_are_now() -> None:
    """Two processes; one moves partitions, and the other is not told."""
    clock = Hurried()
    stores = [Common(store) for store in memory(3, LAYOUTS)]
    await fill(await together(stores[:2], clock), FEW)
    one, other = await together(stores, clock), await together(stores, clock)
    new = [f"new {number}" for number in range(12)]
    await readable(other)
    for drain in ((), (stores[2].store_id,)):
        before = other.places.map
        await one.mover.reshard(drain, silent)
        assert other.places.map is before, "nobody has told it"
        for game in new:
            version = 1 if not drain else 2
            made = await other.commit(put(MOVES, ("new", game, "1"), Note(), expect=version - 1))
            assert made.numbers == (version,)
        assert other.places.map.number > before.number
        for engine in (one, other):
            await readable(engine)
            for game in new:
                assert await engine.get(MOVES, ("new", game, "1"))
        at_home = await homes(stores, [*FEW, *new])
        assert at_home == {game: one.places.map.homes(game)[0] for game in [*FEW, *new]}
    third = await together(stores, clock)
    await one.mover.reshard((), silent)
    await readable(third)
    assert third.places.map == one.places.map


# proves S7
@pytest.mark.parametrize("what", ["load", "unload"])
async def test_who_sleeps_in_the_middle_of_a_move_harms_nothing_when_it_wakes(what: str) -> None:
    """Another process has ended the move since, and moved everything back."""
    clock = Hurried()
    stores = [Common(store) for store in memory(3, LAYOUTS)]
    await fill(await together(stores[:2], clock), FEW)
    slow = [Slow(store, what) for store in stores]
    awake, asleep = await together(stores, clock), await together(slow, clock)
    before = await rows_of(awake)
    sleeping = asyncio.create_task(asleep.mover.reshard((), silent))
    reached = [asyncio.create_task(store.asked.wait()) for store in slow]
    await asyncio.wait(reached, return_when=asyncio.FIRST_COMPLETED)
    await awake.mover.reshard((), silent)
    await awake.mover.reshard([stores[2].store_id], silent)
    assert await rows_of(awake) == before
    for store in slow:
        store.go.set()
    with pytest.raises(Unavailable, match="changed by somebody else"):
        await sleeping
    for task in reached:
        task.cancel()
    assert await rows_of(awake) == before
    assert await rows_of(stores[2]) == [
        row for row in await rows_of(stores[2]) if row.at.name.startswith("shard")
    ]
    await readable(asleep)


# proves S7
async def test_of_two_who_change_the_shards_at_once_one_is_refused() -> None:
    clock = Hurried()
    stores = [Common(Yields(store, Random(1))) for store in memory(3, LAYOUTS)]
    await fill(await together(stores, clock), FEW)
    one, other = await together(stores, clock), await together(stores, clock)
    before = await rows_of(one)
    done = await asyncio.gather(
        one.mover.reshard([stores[1].store_id], silent),
        other.mover.reshard([stores[2].store_id], silent),
        return_exceptions=True,
    )
    refused = [answer for answer in done if isinstance(answer, (Unavailable, Invalid))]
    assert (len(refused), len([answer for answer in done if isinstance(answer, Resharded)])) == (
        1,
        1,
    )
    for engine in (one, other):
        await readable(engine)
        assert await rows_of(engine) == before


# proves S7
async def test_a_process_that_lacks_a_shard_that_was_added_says_so() -> None:
    clock = Hurried()
    stores = [Common(store) for store in memory(3, LAYOUTS)]
    await fill(await together(stores[:2], clock), FEW)
    one, other = await together(stores, clock), await together(stores[:2], clock)
    await one.mover.reshard((), silent)
    moved = [game for game in FEW if one.places.map.homes(game)[0] == stores[2].store_id]
    assert 0 < len(moved) < len(FEW)
    for game in FEW:
        if game in moved:
            with pytest.raises(Unavailable, match=f"{stores[2].store_id} was added"):
                await other.get(MOVES, ("t", game, "1"))
        else:
            assert await other.get(MOVES, ("t", game, "1"))


async def command(dies_at: int, *given: str) -> tuple[int, bytes, str]:
    """Run a command: its exit code and what it said."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.engines.resharding_command", *given),
        cwd=ROOT,
        env=os.environ | {"DIES_AT": str(dies_at)},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    said, complaint = await process.communicate()
    assert process.returncode is not None
    return process.returncode, said, complaint.decode()


# proves S7
async def test_the_command_goes_on_after_it_was_killed(tmp_path: Path) -> None:
    """SIGKILL in the middle; what it left is read and written, and moved to the end."""
    layouts = (*STATE_LAYOUTS, MOVES, PLIES)
    three = shards_url(tmp_path, 2, 1, 0)
    engine = await open_engine(shards_url(tmp_path, 0, 1), layouts)
    moves = [put(MOVES, ("t", game, "1"), Note()) for game in GAMES]
    plies = [append(PLIES, ("t", game), [Note()]) for game in GAMES]
    await asyncio.gather(*(engine.commit(a + b) for a, b in zip(moves, plies, strict=True)))
    before = await rows_of(engine)
    assert isinstance(engine, ShardedEngine)
    old = engine.places.map.members
    await engine.close()
    config = tmp_path / "perdure.toml"
    config.write_text(f"shards = {msgspec.json.encode(shards_of(three)).decode()}")
    given = ("--config", str(config), "--data", str(tmp_path))
    killed, *said = await command(4, "reshard", *given)
    assert killed == -signal.SIGKILL, said
    code, answer, complaint = await command(0, "status", "--json", *given)
    assert code == 3, complaint
    shards = msgspec.json.decode(answer)["shards"]
    (added,) = [shard["id"] for shard in shards["shards"] if not shard["member"]]
    assert shards["moving"] == {
        "members": list(old),
        "to": sorted([*old, added]),
        "here": False,
        "partitions": shards["moving"]["partitions"],
    }
    engine = await open_engine(three, layouts)
    (warning,) = shard_warnings(sharding_of(engine))
    assert f"to {', '.join(sorted([*old, added]))}, {shards['moving']['partitions']} so" in warning
    assert "run `perdure reshard` again, and it goes on" in warning
    found = [record.key[1] async for record in every(engine, MOVES, ("t",))]
    assert found == sorted(GAMES)
    assert await engine.count(MOVES, ()) == {(): len(GAMES)}
    for game in GAMES:
        assert await engine.get(MOVES, ("t", game, "1"))
        assert (await engine.tip(PLIES, ("t", game))).last == 1
    await engine.close()
    code, answer, complaint = await command(0, "reshard", "--json", *given)
    assert code == 0, complaint
    done = msgspec.json.decode(answer, type=Resharded)
    engine = await open_engine(three, layouts)
    assert isinstance(engine, ShardedEngine)
    whole = engine.places.map
    assert shard_warnings(sharding_of(engine)) == []
    assert done.partitions == sum(whole.homes(game)[0] == added for game in GAMES)
    assert await rows_of(engine) == before
    assert [finding async for finding in engine.verify()] == []
    await engine.close()


# proves S7
async def test_two_processes_over_shards_on_postgresql(tmp_path: Path) -> None:
    """The same with a real clock and a real database: one moves, the other plays on."""
    url = of_shards(postgres_url(tmp_path / f"{number}") for number in range(3))
    await (await open_engine(of_shards(shards_of(url)[:2]), LAYOUTS)).close()
    one, other = await open_engine(url, LAYOUTS), await open_engine(url, LAYOUTS)
    assert isinstance(one, ShardedEngine)
    players = Players(Checked(other), Random(0))
    try:
        async with asyncio.TaskGroup() as group:
            for work in (players.write("a"), players.write("b"), players.read(), players.list()):
                group.create_task(work)
            await players.written(40)
            done = await one.mover.reshard((), silent)
            await players.written(20)
            players.over = True
        assert done.partitions > 0
        for engine in (one, other):
            found = [record.key async for record in every(engine, MOVES, ("t",))]
            assert found == sorted(players.versions)
            for key, version in players.versions.items():
                record = await engine.get(MOVES, key)
                assert record is not None
                assert record.version == version
    finally:
        await one.close()
        await other.close()
