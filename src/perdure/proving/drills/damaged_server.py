"""A server whose store was damaged while it was down: a bit of a record, an entry, a tip or a blob
is another, and everything around it, page checksums too, is in order.

What is damaged must be answered as such, by its name, or not be needed; no answer is another than
was acknowledged, and all else goes on. The actors of all surfaces judge that, thing by thing.
"""

from __future__ import annotations

import copy
import random
import shutil
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, closing, contextmanager
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec

from perdure.core.clock import SystemClock
from perdure.core.keys import Key, join, show
from perdure.core.layouts import Layout, Records
from perdure.core.promises import Promise
from perdure.engines import open_engine
from perdure.engines.blobs_local import LocalBlobs
from perdure.engines.sqlite_driver import connect
from perdure.engines.sqlite_schema import STREAM_SHIFT
from perdure.proving.campaign import Campaign, Life, Stage
from perdure.proving.client import Client, Gone, Harmed
from perdure.proving.drills.drill import Subject, Trial
from perdure.proving.faults import DAMAGE
from perdure.proving.judging import RUNNER
from perdure.proving.launcher import Death, Plan
from perdure.proving.oracle import Check, History, Op, Verdict
from perdure.proving.snapshot import BLOBS, STORE, Snapshot
from perdure.proving.watched import HastyDisk
from perdure.proving.workload import Actor, Scene, Start
from perdure.surfaces.blobs import BlobUses
from perdure.surfaces.boots import Boots
from perdure.surfaces.state import LAYOUTS, PROMISES

T = TypeVar("T")

_WORKERS, _STEPS = 2, 18
_KILLED = Death("after", 45)
_NEWCOMER = -3
"""A worker that has touched nothing which could be damaged."""


class Wound(msgspec.Struct, frozen=True):
    """One part of one thing that a surface keeps; an entry is number `seq` of its stream."""

    surface: str
    kept: str
    key: Key
    part: Literal["value", "attachment", "entry", "tip", "bytes"]
    seq: int = 0

    def __str__(self) -> str:
        return f"{self.part} of {self.name}"

    @property
    def name(self) -> str:
        """What an answer calls it."""
        if self.part == "bytes":
            return f"the blob {self.key[0]}"
        entry = f" entry {self.seq}" if self.part == "entry" else ""
        return f"{self.kept} {show(self.key)}{entry}"

    def strike(self, data: Path, rng: random.Random) -> object:
        """Change it in a store that nobody has open; what is there then."""
        if self.part == "bytes":
            blob = self._blob(data)
            blob.write_bytes(_flipped(blob.read_bytes(), rng))
            return self.found(data)
        with closing(connect(str(data / STORE))) as connection:
            table, column, id = self._place(connection)
            query = f"SELECT {column} FROM {table} WHERE id = ?"
            was: Any = connection.execute(query, (id,)).get
            changed = was ^ 1 if self.part == "tip" else _flipped(was, rng)
            connection.execute(f"UPDATE {table} SET {column} = ? WHERE id = ?", (changed, id))
        return changed

    def found(self, data: Path) -> object:
        """What is there now."""
        if self.part == "bytes":
            return self._blob(data).read_bytes()
        with closing(connect(str(data / STORE))) as connection:
            table, column, id = self._place(connection)
            return connection.execute(f"SELECT {column} FROM {table} WHERE id = ?", (id,)).get

    def _blob(self, data: Path) -> Path:
        return data / BLOBS / self.key[0][:2] / self.key[0]

    def _place(self, connection: Any) -> tuple[str, str, int]:
        """Table, column and row."""
        place = join(self.key)
        if self.part in ("value", "attachment"):
            table = f"records_{self.kept}"
            found = connection.execute(f"SELECT id FROM {table} WHERE key = ?", (place,)).get
            return table, self.part, found
        query = "SELECT id FROM streams WHERE log = ? AND key = ?"
        stream = connection.execute(query, (self.kept, place)).get
        if self.part == "tip":
            return "streams", "last", stream
        return "entries", "value", (stream << STREAM_SHIFT) | self.seq


def wounds_of(store: Snapshot, promise: Promise) -> list[list[Wound]]:
    """Everything of a surface that a store holds, each kind of thing by itself."""
    kinds: dict[tuple[str, str], list[Wound]] = defaultdict(list)
    for layout in promise.layouts:
        for wound in _in_layout(store, promise.surface, layout):
            kinds[(wound.kept, wound.part)].append(wound)
    if promise.surface == BlobUses.promise.surface:
        for digest in sorted(digest for digest, data in store.blobs.items() if data):
            kinds["", "bytes"].append(Wound(promise.surface, "", (digest,), "bytes"))
    return list(kinds.values())


def _in_layout(store: Snapshot, surface: str, layout: Layout) -> Iterator[Wound]:
    if isinstance(layout, Records):
        for key, kept in sorted(store.records[layout.name].items()):
            yield Wound(surface, layout.name, key, "value")
            if kept.attachment:
                yield Wound(surface, layout.name, key, "attachment")
        return
    for key, stream in sorted(store.streams[layout.name].items()):
        yield Wound(surface, layout.name, key, "tip")
        for seq in range(stream.tip.first, stream.tip.last + 1):
            yield Wound(surface, layout.name, key, "entry", seq)


def _flipped(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]


class Left(msgspec.Struct, frozen=True):
    """A store that a server left, and what its clients were told; `settled` if all work was done.
    `kinds` is everything in it by surface, each kind of thing by itself."""

    data: Path
    store: Snapshot
    actors: list[Actor]
    history: History
    settled: bool

    @property
    def kinds(self) -> dict[str, list[list[Wound]]]:
        return {promise.surface: wounds_of(self.store, promise) for promise in PROMISES}


class Patients:
    """Two stores with something of every surface in them, one at rest and one of a server that was
    killed at work. `troubles` is what was wrong before anything was damaged."""

    def __init__(self, stage: Stage, rest: Left, killed: Left, troubles: list[str]) -> None:
        self.rest = rest
        self.killed = killed
        self.troubles = troubles
        self._stage = stage

    async def judge(
        self, left: Left, wounds: Sequence[Wound], place: Path, seed: str, plant: str | None = None
    ) -> list[str]:
        """What does not hold of a server that finds these wounds in a copy of a store."""
        data = place / "data"
        shutil.copytree(left.data, data, ignore=shutil.ignore_patterns("*.sock"))
        struck = {wound: wound.strike(data, random.Random(f"{seed}/{wound}")) for wound in wounds}
        stage = self._stage
        plan = Plan(data=str(data), port=stage.port, upstream=stage.upstream.url, plant=plant)
        victim = await stage.nursery.start(plan)
        if await victim.ready() is None:
            return ["the server does not start"]
        actors, ops = copy.deepcopy((left.actors, left.history.ops))
        history = History(place / "history.jsonl")
        history.ops, history.cycle = ops, left.history.cycle + 1
        history.harmed = tuple(wound.name for wound in wounds)
        client = Client(victim.url, history, _NEWCOMER, random.Random(seed))
        verdict = Verdict()
        scene = OneThing(client, left.store, Start(victim.pid, frozenset()), history, verdict)
        wounded = {wound.surface for wound in wounds}
        try:
            if left.settled:
                await _judge_all(scene, actors, wounded)
            await _work_on(scene, actors, wounded)
        except Gone as gone:
            verdict.holds(Check.LIVE, RUNNER, False, f"it left: {gone}")
        finally:
            await client.close()
            history.close()
            victim.signal()
            await victim.death()
        listed = await _verified(data)
        return [
            *map(str, verdict.violations),
            *history.complaints,
            *(
                f"{wound} is damaged, and verify does not list it"
                for wound, what in struck.items()
                if not any(wound.name in where for where in listed) and wound.found(data) == what
            ),
        ]


class OneThing(Scene):
    """A scene in which an actor sees one thing, number `at` of `count`."""

    at = 0
    count = 1

    def chosen(self, things: Sequence[tuple[Op, T]]) -> Iterator[T]:
        self.count = len(things)
        yield from (thing for _, thing in things[self.at : self.at + 1])


async def _judge_all(scene: OneThing, actors: Sequence[Actor], wounded: set[str]) -> None:
    """Every thing by itself is as it should be or said to be damaged, and few are."""
    seen, harmed = 0, 0
    for actor in actors:
        scene.at, scene.count = 0, 1
        if actor.surface == Boots.promise.surface and actor.surface in wounded:
            continue  # it asks for all boots at once
        while scene.at < scene.count:
            try:
                with _understood(scene, actor):
                    await actor.judge(scene)
            except Harmed:
                harmed += 1
            scene.at += 1
        seen += scene.count
    few = 2 * harmed < seen
    scene.verdict.holds(Check.GOES_ON, RUNNER, few, f"of {seen} things {harmed} are damaged")


async def _work_on(scene: Scene, actors: Sequence[Actor], wounded: set[str]) -> None:
    """Who has nothing to do with what is damaged works as ever."""
    for actor in actors:
        try:
            with _understood(scene, actor):
                await actor.act(scene.client)
        except Harmed as harm:
            own = actor.surface in wounded
            scene.verdict.holds(Check.GOES_ON, actor.surface, own, f"new work is harmed: {harm}")


@contextmanager
def _understood(scene: Scene, actor: Actor) -> Iterator[None]:
    """An actor that cannot make sense of an answer was given a wrong one."""
    try:
        yield
    except (msgspec.MsgspecError, UnicodeDecodeError, LookupError) as error:
        what = f"an answer makes no sense: {error!r}"
        scene.verdict.holds(Check.KEPT, actor.surface, False, what)


async def _verified(data: Path) -> list[str]:
    """Where damage is found in a store and its blobs."""
    engine = await open_engine(f"sqlite:///{data / STORE}", LAYOUTS)
    blobs = await LocalBlobs.open(data / BLOBS, disk=HastyDisk(), clock=SystemClock())
    found = [finding.where async for finding in engine.verify()]
    found += [finding.where async for finding in blobs.verify()]
    await blobs.close()
    await engine.close()
    return found


@asynccontextmanager
async def patients(stage: Stage, home: Path, seed: str) -> AsyncIterator[Patients]:
    """Stores made by lives in which every surface was used."""
    with (
        Campaign(stage, home / "rest", seed=seed) as rest,
        Campaign(stage, home / "killed", seed=seed) as killed,
    ):
        await rest.live(Life(workers=_WORKERS, steps=_STEPS, choices=seed, stop=True))
        await killed.work(Life(workers=_WORKERS, steps=_STEPS, choices=seed, death=_KILLED))
        yield Patients(
            stage,
            await _left(rest, settled=True),
            await _left(killed, settled=False),
            [str(it) for campaign in (rest, killed) for it in campaign.verdict.violations],
        )


async def _left(campaign: Campaign, *, settled: bool) -> Left:
    store = await Snapshot.of(campaign.data, campaign.home / "copy", verify=False)
    return Left(campaign.data, store, campaign.actors, campaign.history, settled)


class DamagedServer:
    """See `says`. Of which of several like things a case changes a bit, the ids decide, which are
    new in every run."""

    fault = DAMAGE
    subject: Subject = "server"
    says = (
        "one bit of each record, entry, tip and blob that a server of every surface left, at rest "
        "or killed at work, changes, and the checksum of its page with it: the server starts, "
        "whatever needs the thing answers `damaged` and names it, no answer is another, `verify` "
        "lists it, and all else goes on"
    )

    def __init__(self, plant: str | None = None) -> None:
        self.plant = plant

    def lacks(self) -> str | None:
        return None

    async def run(self, trial: Trial) -> None:
        async with (
            Stage(trial.home) as stage,
            patients(stage, trial.home / "life", trial.seed) as hurt,
        ):
            if hurt.troubles:
                trial.judged(1, hurt.troubles, trial.home / "life")
                return
            order = [
                it
                for turn in zip_longest(_shuffled(trial, hurt.rest), _shuffled(trial, hurt.killed))
                for it in turn
                if it is not None
            ]
            trial.planned = len(order)
            for case, (left, wound) in enumerate(order, 1):
                if trial.over:
                    return
                if trial.wants(case):
                    with trial.place(case) as place:
                        wrong = await hurt.judge(left, [wound], place, trial.seed, self.plant)
                        trial.judged(case, (f"{wound}: {it}" for it in wrong), place)
                        trial.count("at rest" if left.settled else "killed at work")


def _shuffled(trial: Trial, left: Left) -> list[tuple[Left, Wound]]:
    """Everything in a store, one of each kind in turn."""
    kinds = list(chain.from_iterable(left.kinds.values()))
    for kind in kinds:
        trial.rng("order", kind[0].kept, kind[0].part).shuffle(kind)
    return [(left, it) for turn in zip_longest(*kinds) for it in turn if it is not None]
