"""Rows and bytes after a power cut: what is referred to is whole, what is not is swept."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from perdure.core.batch import Batch
from perdure.core.clock import SystemClock
from perdure.core.disk import Disk
from perdure.core.engine import Engine
from perdure.core.values import Committed, Record
from perdure.engines import open_engine
from perdure.engines.blobs_local import LocalBlobs
from perdure.engines.wrapping import Wrapping
from perdure.proving.crashstates import RecordingDisk, State, crash_states
from perdure.services.blobs import BlobKeeper
from perdure.surfaces.blobs import BlobUses, Claim


class Marking(Wrapping):
    """Marks each commit among the steps of the disk, and keeps it to be made again."""

    def __init__(self, engine: Engine, disk: RecordingDisk) -> None:
        super().__init__(engine)
        self.disk = disk
        self.batches: list[Batch] = []

    async def commit(self, batch: Batch) -> Committed:
        committed = await super().commit(batch)
        self.batches.append(batch)
        self.disk.mark("commit")
        return committed


class ClaimsTooLate(BlobKeeper):
    """Publishes first and commits the claim then, while a sweep runs in between."""

    async def put(
        self, tenant: str, chunks: AsyncIterator[bytes], *, size_bytes_max: int
    ) -> Record[Claim]:
        blob = await self.blobs.put(chunks, size_bytes_max=size_bytes_max)
        await self.sweep()
        claim = Claim(blob.digest, blob.size_bytes, self._boot_id, int(self._clock.now_s()))
        committed = await self._engine.commit(self.uses.claim(tenant, "late", claim))
        return Record((tenant, blob.digest, "late"), committed.numbers[0], claim)


async def chunks(data: bytes) -> AsyncIterator[bytes]:
    yield data[:4]
    yield data[4:]


async def memory() -> Engine:
    return await open_engine("memory://", BlobUses.promise.layouts)


async def story(kind: type[BlobKeeper], disk: RecordingDisk, root: Path) -> list[Batch]:
    """Two tenants keep the same bytes, one upload is never finished, the bytes go and come back."""
    engine = Marking(await memory(), disk)
    blobs = await LocalBlobs.open(root / "blobs", disk=disk, clock=SystemClock())
    keeper = kind(engine, blobs, SystemClock(), "boot_1")
    uses = keeper.uses

    async def keep(tenant: str, data: bytes) -> Record[Claim]:
        return await keeper.put(tenant, chunks(data), size_bytes_max=100)

    first = await keep("t", b"kept by two")
    await engine.commit(uses.refer(first, "files/1"))
    await engine.commit(uses.refer(await keep("u", b"kept by two"), "files/1"))
    await keep("t", b"never finished")
    digest = first.value.digest
    await engine.commit(uses.release("t", digest, "files/1"))
    await keeper.sweep()
    await engine.commit(uses.release("u", digest, "files/1"))
    await keeper.sweep()
    await engine.commit(uses.refer(await keep("t", b"kept by two"), "files/2"))
    await blobs.close()
    return engine.batches


async def violations(state: State, batches: list[Batch], root: Path) -> list[str]:
    """What the next boot finds wrong, after its first sweep."""
    root.mkdir()
    state.write(root)
    engine = await memory()
    for batch in batches[: len(state.marks)]:
        await engine.commit(batch)
    blobs = await LocalBlobs.open(root / "blobs", disk=Disk(), clock=SystemClock())
    keeper = BlobKeeper(engine, blobs, SystemClock(), "boot_2")
    found = [f"lost: {finding}" async for finding in keeper.verify()]
    await keeper.sweep()
    found += [f"lost by the sweep: {finding}" async for finding in keeper.verify()]
    found += [f"damaged: {finding}" async for finding in blobs.verify()]
    referred = {reference.key[1] async for reference in keeper.uses.references()}
    found += [f"nobody's: {blob}" async for blob in blobs.list() if blob.digest not in referred]
    await blobs.close()
    return found


async def judge(
    kind: type[BlobKeeper], make: Callable[[], RecordingDisk], root: Path
) -> tuple[int, list[str]]:
    """How many states there are up to the first that is wrong, and what is wrong with it."""
    disk, real, after = make(), root / "real", root / "after"
    real.mkdir()
    after.mkdir()
    batches = await story(kind, disk, real)
    count = 0
    for state in crash_states(disk.steps, real):
        count += 1
        if found := await violations(state, batches, after / f"{count}"):
            return count, found
    return count, []


# proves C3
# proves C4
async def test_after_any_power_cut_rows_and_bytes_agree(tmp_path: Path) -> None:
    count, found = await judge(BlobKeeper, RecordingDisk, tmp_path)
    assert found == []
    assert count > 100


class ForgetsToSyncNames(RecordingDisk):
    def sync_directory(self, path: Path) -> None:
        pass


@pytest.mark.parametrize(
    ("kind", "disk"), [(ClaimsTooLate, RecordingDisk), (BlobKeeper, ForgetsToSyncNames)]
)
async def test_a_planted_bug_is_caught(
    kind: type[BlobKeeper], disk: Callable[[], RecordingDisk], tmp_path: Path
) -> None:
    _, found = await judge(kind, disk, tmp_path)
    assert found
