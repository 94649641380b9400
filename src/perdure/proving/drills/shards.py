"""Partitions that move between shards under load, and what comes down in the middle of it: the
process at any edge of a commit in any store, or one of the stores.

Clients act at each of these edges while whoever moves stands there, so the same seed gives the same
order over stores in memory; every few cases the stores are real ones of SQLite.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Sequence
from pathlib import Path
from random import Random
from typing import Any

from perdure.core.batch import append, put
from perdure.core.clock import SystemClock
from perdure.core.disk import Disk
from perdure.core.engine import Engine
from perdure.core.errors import PerdureError, Unavailable
from perdure.core.rows import FloorRow
from perdure.core.values import Record
from perdure.engines.failing import Edge, Failing, Fault
from perdure.engines.memory import MemoryEngine
from perdure.engines.sharded import ShardedEngine
from perdure.engines.sharded_map import SHARD_LAYOUTS, Absent, home_of
from perdure.engines.sqlite import SqliteEngine
from perdure.engines.wrapping import Wrapping
from perdure.proving.drills.drill import Subject, Trial
from perdure.proving.faults import PROCESS_CRASH
from perdure.proving.subject import LAYOUTS, MOVES, PLIES, Note
from perdure.proving.watched import HastyDisk

_GAMES = tuple(f"game {number}" for number in range(9))
_TENANT = "t"
_EDGES = 50
"""Edges that a move passes, about: they are gone through one after the other, then again under
another load. A life that ends before its edge is one that nothing happened to."""

_WRITES = 12
"""Writes that clients begin while partitions move, at most."""

_REAL_EACH = 8
_CALLS = {
    *("commit", "get", "get_many", "scan", "count", "read", "tip", "wait", "streams"),
    *("rows", "load", "unload"),
}


class Clients:
    """Writers of one record and one stream a partition, who know what must be there, and readers.
    What does not hold they add to `wrong`."""

    def __init__(self, random: Random, wrong: list[str]) -> None:
        self.wrong = wrong
        self.lost: str | None = None
        """The shard that is down: what lives in it may be unavailable."""
        self.told = dict.fromkeys(_GAMES, 0)
        self.begun = dict(self.told)
        self.reads = self.unavailable = 0
        self.left = 0
        self._random = random
        self._writing: dict[str, asyncio.Task[None]] = {}

    async def act(self, engine: ShardedEngine) -> None:
        """Begin a write, which may have to wait for what moves, and read a few."""
        if self.left and self._random.random() < 0.5:
            self.left -= 1
            game = self._random.choice(_GAMES)
            if game not in self._writing:
                self._writing[game] = asyncio.create_task(self.write(engine, game))
        for game in self._random.sample(_GAMES, 2):
            await self.read(engine, game)
        if self._random.random() < 0.2:
            await self.list(engine)

    async def rest(self) -> None:
        """Until every write has ended."""
        while self._writing:
            await asyncio.wait(self._writing.values())
            await asyncio.sleep(0)

    async def write(self, engine: ShardedEngine, game: str) -> None:
        """One step more. One whose answer was lost may be there."""
        try:
            if self.begun[game] > self.told[game]:
                self.told[game] = self.begun[game] = await self._version(engine, game)
            number = self.begun[game] = self.told[game] + 1
            batch = put(MOVES, (_TENANT, game, "1"), Note(rank=number), expect=number - 1)
            await engine.commit(
                batch + append(PLIES, (_TENANT, game), [Note(rank=number)], after=number - 1)
            )
            self.told[game] = number
        except Unavailable:
            self.unavailable += 1
        except PerdureError as error:
            self.wrong.append(f"a write to {game} got {error!r}")
        finally:
            self._writing.pop(game, None)

    async def write_all(self, engine: ShardedEngine) -> None:
        """One step more of each, while nothing is in its way."""
        for game in _GAMES:
            await self.write(engine, game)
            if self.told[game] != self.begun[game]:
                self.wrong.append(f"{game} could not be written, and nothing is down")

    async def read(self, engine: ShardedEngine, game: str) -> None:
        """The newest acknowledged step, or a later one that was begun, by every way to ask."""
        least, stream = self.told[game], (_TENANT, game)
        self.reads += 1
        try:
            self._judge(game, least, await self._version(engine, game))
            tip = await engine.tip(PLIES, stream)
            self._judge(game, least, tip.last)
            for entry in await engine.read(PLIES, stream, after=max(0, tip.last - 1), limit=1):
                self._judge(game, least, entry.value.rank)
        except Unavailable as error:
            if self.lost not in engine.places.map.homes(game):
                self.wrong.append(f"{game} is unavailable, and its shard is not down: {error}")
            self.unavailable += 1
        except PerdureError as error:
            self.wrong.append(f"a read of {game} got {error!r}")

    def _judge(self, game: str, least: int, found: int) -> None:
        if not least <= found <= self.begun[game]:
            self.wrong.append(
                f"{game}: {least} acknowledged, {self.begun[game]} begun, {found} there"
            )

    async def list(self, engine: ShardedEngine) -> None:
        """Every partition that is not lost, once and in order."""
        least = [game for game in sorted(_GAMES) if self.told[game]]
        partial = self.lost is not None
        try:
            page = await engine.scan(MOVES, (_TENANT,), limit=100, partial=partial)
        except PerdureError as error:
            if partial or self.lost is None:
                self.wrong.append(f"a list got {error!r}")
            return
        found = [record.key[1] for record in page.items]
        map = engine.places.map
        missing = {game for game in least if game not in found}
        if found != sorted(set(found)) or any(self.lost not in map.homes(one) for one in missing):
            self.wrong.append(f"a list without {self.lost} has {found}, and should have {least}")
        if missing and not page.missing:
            self.wrong.append(f"a list lacks {missing}, and does not say that a shard is missing")

    async def all(self, engine: ShardedEngine) -> None:
        """Read and list everything."""
        for game in _GAMES:
            await self.read(engine, game)
        await self.list(engine)

    async def _version(self, engine: ShardedEngine, game: str) -> int:
        record: Record[Note] | None = await engine.get(MOVES, (_TENANT, game, "1"))
        if record is not None and record.value.rank != record.version:
            self.wrong.append(f"{game}: version {record.version} says {record.value.rank}")
        return 0 if record is None else record.version


class Life:
    """A process, up to the edge at which it dies, or at which a store is lost."""

    def __init__(self, clients: Clients, at: int, lost: str | None) -> None:
        self.engine: ShardedEngine
        self.edges = 0
        self.struck = False
        self.clients = clients
        self._at = at
        self._lost = lost
        self._acting = False

    def around(self, stores: Sequence[Engine]) -> list[Engine]:
        """The stores as this process sees them."""
        faults = [Fault(edge, self._pass) for edge in Edge]
        return [Failing(Losable(store, self.clients), faults) for store in stores]

    async def _pass(self) -> None:
        self.edges += 1
        if self.edges == self._at:
            self.struck = True
            self.clients.lost = self._lost
        if self.struck and self._lost is None:
            raise Unavailable("this process is dead.")
        if not self._acting and hasattr(self, "engine"):
            self._acting = True
            await self.clients.act(self.engine)
            self._acting = False


class Losable(Wrapping):
    """A store that does not answer while it is lost."""

    def __init__(self, engine: Engine, clients: Clients) -> None:
        super().__init__(engine)
        self.clients = clients

    def __getattribute__(self, name: str) -> Any:
        if name in _CALLS and self.clients.lost == self.store_id:
            raise Unavailable("connection refused.")
        return super().__getattribute__(name)


class KilledMoves:
    """See `says`."""

    fault = PROCESS_CRASH
    subject: Subject = "shards"
    says = (
        "a shard is added or drained while clients write, read and list; the process dies at each "
        "edge of each commit in turn, or a shard is lost there: at every moment each key has what "
        "was acknowledged last, or is in a lost shard and says so; the next process starts, at "
        "times without that shard, and ends it: nothing lies in two shards, and what moved is what "
        "has another home"
    )

    def lacks(self) -> str | None:
        return None

    async def run(self, trial: Trial) -> None:
        await trial.each(lambda case, place: self._judge(trial, case, place))

    async def _judge(self, trial: Trial, case: int, place: Path) -> list[str]:
        rng, wrong = trial.rng("moved", case), list[str]()
        stores = await _stores(rng, place if case % _REAL_EACH == 0 else None)
        try:
            await self._move(trial, case, rng, stores, wrong)
        finally:
            for store in stores:
                await store.close()
        return wrong

    async def _move(
        self, trial: Trial, case: int, rng: Random, stores: list[Engine], wrong: list[str]
    ) -> None:
        drained, clients = case % 2 == 0, Clients(rng, wrong)
        ids = [store.store_id for store in stores]
        first = await _together(stores if drained else stores[:2])
        await clients.write_all(first)
        drain = ids[2:] if drained else ()
        before = set(ids if drained else ids[:2])
        after = set(ids) - set(drain)
        lost = rng.choice(ids[1:]) if rng.random() < 0.4 else None
        life = Life(clients, 1 + (case - 1) // 2 % _EDGES, lost)
        clients.left = _WRITES
        await self._live(life, stores, drain)
        await clients.all(life.engine)
        if not life.struck:
            trial.count("lives that nothing happened to")
        trial.count("losses" if lost else "deaths", life.struck)
        away = lost or (rng.choice(ids[1:]) if rng.random() < 0.3 else None)
        engine = await self._start(stores, away, clients)
        clients.left = _WRITES
        await engine.mover.reshard(drain, _untold)
        await clients.all(engine)
        wrong += [f"{one.where}: {one.why}" async for one in engine.verify()]
        wrong += await _astray(stores, after)
        last = await _together([one for one in stores if one.store_id in after])
        await clients.write_all(last)
        await clients.all(last)
        moved = sum(home_of(before, game) != home_of(after, game) for game in _GAMES)
        trial.count("partitions", len(_GAMES))
        trial.count("partitions moved", moved)
        trial.count("reads", clients.reads)
        trial.count("answers that a shard was down or a process dead", clients.unavailable)

    async def _live(self, life: Life, stores: Sequence[Engine], drain: Collection[str]) -> None:
        """Move partitions, as far as that goes."""
        life.engine = await _together(life.around(stores))
        try:
            await life.engine.mover.reshard(drain, _untold)
        except Unavailable:
            if not life.struck:
                raise
        await life.engine.mover.close()
        await life.clients.rest()

    async def _start(
        self, stores: Sequence[Engine], away: str | None, clients: Clients
    ) -> ShardedEngine:
        """The next process: one of the stores is back a while after it has started."""
        clients.lost = away
        present = [store for store in stores if store.store_id != away]
        absent = [Absent(one.url, _opening(one), _DOWN) for one in stores if one.store_id == away]
        engine = await _together(present, absent)
        await clients.all(engine)
        for game in _GAMES[:3]:
            await clients.write(engine, game)
        clients.lost = None
        for one in absent:
            await engine.watch.join(one)
        await clients.all(engine)
        return engine


_DOWN = Unavailable("connection refused.")


class SeededClock(SystemClock):
    """Gives ids by a seed, so that the same partitions move in the same case."""

    def __init__(self, random: Random) -> None:
        super().__init__()
        self._random = random

    def new_id(self, prefix: str) -> str:
        return f"{prefix}_{self._random.getrandbits(64):016x}"


async def _stores(random: Random, place: Path | None) -> list[Engine]:
    """Three stores, the first of which will be the primary: in memory, or in files at `place`."""
    clock, layouts = SeededClock(random), (*LAYOUTS, *SHARD_LAYOUTS)
    if place is None:
        return [MemoryEngine(layouts, clock) for _ in range(3)]
    disk = HastyDisk()
    return [
        await SqliteEngine.open(str(place / f"{number}.db"), layouts, clock=clock, disk=disk)
        for number in range(3)
    ]


async def _together(stores: Sequence[Engine], absent: Sequence[Absent] = ()) -> ShardedEngine:
    clock, disk = SystemClock(), Disk()
    return await ShardedEngine.open(
        stores, LAYOUTS, clock=clock, disk=disk, read_only=False, absent=absent
    )


def _opening(store: Engine) -> Callable[[], Awaitable[Engine]]:
    async def open_it() -> Engine:
        return store

    return open_it


async def _astray(stores: Sequence[Engine], members: Collection[str]) -> list[str]:
    """Partitions that are not in their home alone."""
    wrong: list[str] = []
    for game in _GAMES:
        pages = [(store.store_id, await store.rows(partition=game)) for store in stores]
        keeps = [
            id for id, page in pages if any(not isinstance(row, FloorRow) for row in page.items)
        ]
        if keeps != [home_of(members, game)]:
            wrong.append(f"{game} is in {keeps}, and its home is {home_of(members, game)}")
    return wrong


def _untold(partitions: int, rows: int) -> None:
    pass
