"""An upload of bytes that a sweep is just taking: the moment at which a keeper of blobs can lose
what it has acknowledged."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator

from perdure.core.clock import SystemClock
from perdure.engines import open_engine
from perdure.engines.blobs_memory import MemoryBlobs
from perdure.engines.wrapping import Wrapping
from perdure.services.blobs import BlobKeeper
from perdure.surfaces.blobs import BlobUses

_DATA = b"some bytes"
_WINDOW_S = 0.05
"""How long an upload may take to be at the point where it must wait."""


class SlowToDrop(MemoryBlobs):
    """Holds a drop until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.begun = asyncio.Event()
        self.let_go = asyncio.Event()

    async def drop(self, digest: str) -> None:
        self.begun.set()
        await self.let_go.wait()
        await super().drop(digest)


async def lost_to_a_sweep(*, apart: bool = False) -> str | None:
    """Upload bytes while a sweep, of another process where they are `apart`, drops the same ones;
    what is lost then, None if nothing is."""
    clock, blobs = SystemClock(), SlowToDrop()
    engine = Wrapping(await open_engine("memory://", BlobUses.promise.layouts, clock=clock))
    engine.shared = apart
    keeper = BlobKeeper(engine, blobs, clock, "boot_1")
    sweeper = BlobKeeper(engine, blobs, clock, "boot_2") if apart else keeper

    async def chunks() -> AsyncIterator[bytes]:
        yield _DATA

    await engine.commit(keeper.uses.give_up(await keeper.put("t", chunks(), size_bytes_max=100)))
    sweep = asyncio.create_task(sweeper.sweep())
    await blobs.begun.wait()
    upload = asyncio.create_task(keeper.put("t", chunks(), size_bytes_max=100))
    await asyncio.wait([upload], timeout=_WINDOW_S)
    blobs.let_go.set()
    await sweep
    await engine.commit(keeper.uses.refer(await upload, "files/1"))
    there = [blob.digest async for blob in blobs.list()]
    await engine.close()
    digest = hashlib.sha256(_DATA).hexdigest()
    return None if there == [digest] else f"{digest} is referred to, and its bytes were swept"
