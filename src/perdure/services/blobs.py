"""The keeper of blobs: puts bytes under a claim, and sweeps the bytes nobody needs.

Invariant: between the commit of a claim and the moment its bytes can be seen, and between the last
look at who needs a digest and its drop, the digest's lock is held. So a sweep never takes bytes
that were claimed, and a claim never stands for bytes that a sweep is taking. The lock is this
process's, which suffices where one process owns the blobs, as with local ones.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Collection
from contextlib import asynccontextmanager
from weakref import WeakValueDictionary

import msgspec

from perdure.core.blobs import Blob, Blobs
from perdure.core.clock import Clock
from perdure.core.engine import Engine
from perdure.core.errors import Conflict
from perdure.core.values import Finding, Record
from perdure.surfaces.blobs import CLAIM_KEPT_S, BlobUses, Claim

_PAGE = 200


class BlobStats(msgspec.Struct):
    """Counters since start."""

    claims_given_up: int = 0
    blobs_dropped: int = 0
    bytes_dropped: int = 0


class BlobKeeper:
    """Keeps the blobs of one boot. `uses` writes the batches that turn claims into references."""

    def __init__(self, engine: Engine, blobs: Blobs, clock: Clock, boot_id: str) -> None:
        self.blobs = blobs
        self.uses = BlobUses(engine)
        self.stats = BlobStats()
        self._engine = engine
        self._clock = clock
        self._boot_id = boot_id
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def put(
        self, tenant: str, chunks: AsyncIterable[bytes], *, size_bytes_max: int
    ) -> Record[Claim]:
        """Store bytes and claim them; see `Blobs.put`. Commit `uses.refer` of what it returns
        with the record that names the blob, or the sweep takes both in time."""
        made: list[Record[Claim]] = []

        @asynccontextmanager
        async def claimed(blob: Blob) -> AsyncIterator[None]:
            async with self._lock(blob.digest):
                claim = Claim(blob.digest, blob.size_bytes, self._boot_id, int(self._clock.now_s()))
                claim_id = self._clock.new_id("claim")
                committed = await self._engine.commit(self.uses.claim(tenant, claim_id, claim))
                key = (tenant, blob.digest, claim_id)
                made.append(Record(key, committed.numbers[0], claim))
                yield

        await self.blobs.put(chunks, size_bytes_max=size_bytes_max, publishing=claimed)
        return made[0]

    async def sweep(self, living_boots: Collection[str]) -> None:
        """Give up claims of boots that are not living and claims past their time, then drop the
        blobs that neither a claim nor a reference needs."""
        before_s = self._clock.now_s() - CLAIM_KEPT_S
        async for claim in self._claims():
            if claim.value.boot_id not in living_boots or claim.value.claimed_at_s < before_s:
                await self._give_up(claim)
        async for blob in self.blobs.list():
            if not await self.uses.used(blob.digest):
                await self._drop(blob)

    async def verify(self) -> AsyncIterator[Finding]:
        """References whose bytes are absent or of another size. What the bytes say by themselves
        is `Blobs.verify`'s to find."""
        cursor: str | None = None
        while True:
            page = await self.uses.references(limit=_PAGE, cursor=cursor)
            for reference in page.items:
                tenant, digest, owner = reference.key
                stored = await self.blobs.size(digest)
                if stored != reference.value.size_bytes:
                    found = "absent" if stored is None else f"{stored} bytes"
                    yield Finding(
                        f"the blob {digest} of {owner} (tenant {tenant})",
                        f"{reference.value.size_bytes} bytes were stored, now it is {found}",
                    )
            if (cursor := page.cursor) is None:
                return

    async def _claims(self) -> AsyncIterator[Record[Claim]]:
        cursor: str | None = None
        while True:
            page = await self.uses.claims(limit=_PAGE, cursor=cursor)
            for claim in page.items:
                yield claim
            if (cursor := page.cursor) is None:
                return

    async def _give_up(self, claim: Record[Claim]) -> None:
        try:
            await self._engine.commit(self.uses.give_up(claim))
        except Conflict:
            return  # it became a reference since it was read
        self.stats.claims_given_up += 1

    async def _drop(self, blob: Blob) -> None:
        async with self._lock(blob.digest):
            if await self.uses.used(blob.digest):
                return
            await self.blobs.drop(blob.digest)
        self.stats.blobs_dropped += 1
        self.stats.bytes_dropped += blob.size_bytes

    def _lock(self, digest: str) -> asyncio.Lock:
        return self._locks.setdefault(digest, asyncio.Lock())
