"""Opening a store that an older Perdure wrote: first a snapshot of it as it is, then the upgrade.

    perdure-data/perdure.db.before-upgrade-1234    a backup, as of commit 1234

Invariants
- An engine upgrades nothing without a snapshot of the store after its very last commit; where other
  processes may commit at any time, without one that was taken just now.
- A snapshot is a backup like any other, by the engine's own hand, blobs and all. It has its name
  only when it is durable and verified; then every file of it is read once more and held to its
  digest. The release before makes a store of it with `perdure restore`. Nobody removes it.
- There is room for all of it, and for what the upgrade writes, before anything is written.
"""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal

import msgspec

from perdure.core.blobs import Blobs
from perdure.core.clock import Clock
from perdure.core.disk import Disk
from perdure.core.engine import Engine, Snapshot
from perdure.core.errors import NeedsUpgrade, StorageFull, StoreLocked
from perdure.core.offload import off_loop
from perdure.services.backups import Progress, back_up, check_backup
from perdure.services.blobs import BlobKeeper

_ANOTHER_S = 0.5
"""How often it is looked whether the process that takes the snapshot has done the upgrade."""


class Cost(msgspec.Struct, frozen=True):
    """One step of an upgrade: what it does, the rows it goes through, the most that it writes."""

    says: str
    rows: int
    size_bytes: int


class Migration(msgspec.Struct, frozen=True, kw_only=True):
    """An upgrade: what it would come to, and once it is `done`, what it came to."""

    object: Literal["perdure.migration"] = "perdure.migration"
    engine: str
    format: int
    newest: int
    steps: tuple[Cost, ...] = ()
    snapshot: str = ""
    """Where it is kept; empty where nothing is to be done."""

    kept: bool = False
    """Whether it is there already, as an upgrade that was cut off has left it."""

    snapshot_size_bytes: int = 0
    needed_size_bytes: int = 0
    """Of the snapshot, unless it is kept, and of what the steps write, if on the same disk."""

    free_size_bytes: int = 0
    done: bool = False


class Upgrading(msgspec.Struct, frozen=True):
    """How a store is opened, where its blobs are, and beside which path snapshots are kept.
    `opening` takes `read_only` and `snapshots`, and raises `NeedsUpgrade` for an older store."""

    opening: Callable[..., Awaitable[Engine]]
    blobs: Callable[[], Awaitable[Blobs]]
    beside: Path
    clock: Clock
    disk: Disk

    async def open(self, progress: Progress) -> Engine:
        """The store, opened for writing and so upgraded. Raises `StorageFull` before anything is
        written, and what opening and `back_up` raise."""
        taken: list[Snapshot] = []
        while True:
            try:
                return await self.opening(snapshots=taken)
            except NeedsUpgrade:
                try:
                    snapshot = await self._snapshot(progress)
                except StoreLocked as locked:
                    if locked.holder:
                        raise
                    await self.clock.sleep(_ANOTHER_S)
                    continue
                if snapshot in taken:
                    raise
                taken.append(snapshot)

    async def plan(self) -> Migration:
        """What opening the store for writing would do. It is only looked at."""
        async with self._looking() as (engine, blobs):
            return await self._plan(engine, blobs)

    async def _snapshot(self, progress: Progress) -> Snapshot:
        async with self._looking() as (engine, blobs):
            plan = await self._plan(engine, blobs)
            target = Path(plan.snapshot)
            if plan.needed_size_bytes > plan.free_size_bytes:
                raise StorageFull(
                    f"{engine.url} needs an upgrade, and that needs {plan.needed_size_bytes} bytes "
                    f"in {self.beside.parent}, where {plan.free_size_bytes} are free: "
                    f"{plan.snapshot_size_bytes} for a snapshot of the store as it is, the rest "
                    "for the upgrade. Nothing was changed; make room and try again."
                )
            if not plan.kept:
                keeper = BlobKeeper(engine, blobs, self.clock, self.clock.new_id("boot"))
                await back_up(engine, keeper, target, progress, clock=self.clock, disk=self.disk)
            return (await check_backup(target, progress)).snapshot

    async def _plan(self, engine: Engine, blobs: Blobs) -> Migration:
        written = engine.written
        if not written.steps:
            return Migration(engine=engine.url, format=written.format, newest=written.newest)
        usage = await engine.usage()
        steps = tuple(
            Cost(
                step.says,
                step.rows,
                usage.collections.get(step.collection, 0) if step.collection else usage.total_bytes,
            )
            for step in written.steps
        )
        snapshot_bytes = usage.total_bytes + sum([blob.size_bytes async for blob in blobs.list()])
        growth = 0 if engine.shared else sum(step.size_bytes for step in steps)
        target, kept = await off_loop(self._target, written.number)
        return Migration(
            engine=engine.url,
            format=written.format,
            newest=written.newest,
            steps=steps,
            snapshot=str(target),
            kept=kept,
            snapshot_size_bytes=snapshot_bytes,
            needed_size_bytes=growth + (0 if kept else snapshot_bytes),
            free_size_bytes=await off_loop(self.disk.free_bytes, self.beside.parent),
        )

    def _target(self, number: int | None) -> tuple[Path, bool]:
        """Where the snapshot of a commit is, and whether it is there; a new place where no number
        tells which one that would be."""
        for at in itertools.count(1) if number is None else (number,):
            path = self.beside.with_name(f"{self.beside.name}.before-upgrade-{at}")
            if number is not None or not path.exists():
                break
        return path, path.exists()

    @asynccontextmanager
    async def _looking(self) -> AsyncIterator[tuple[Engine, Blobs]]:
        engine = await self.opening(read_only=True)
        try:
            blobs = await self.blobs()
            try:
                yield engine, blobs
            finally:
                await blobs.close()
        finally:
            await engine.close()
