"""The keeper of blobs: puts bytes under a claim, and sweeps the bytes nobody needs.

Invariant: between the commit of a claim and the moment its bytes can be seen, and between the last
look at who needs a digest and its drop, the digest's lock is held. So a sweep never takes bytes
that were claimed, and a claim never stands for bytes that a sweep is taking. The lock is this
process's, which suffices where one process owns the blobs, as with local ones.

Bytes go before the last claim that leads to them, so a kill in between leaves what can be found.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Collection, Iterator
from contextlib import asynccontextmanager, contextmanager
from weakref import WeakValueDictionary

import msgspec
import structlog

from perdure.core.blobs import Blob, Blobs
from perdure.core.clock import Clock
from perdure.core.engine import Engine
from perdure.core.errors import Conflict, Damaged, Missing
from perdure.core.limits import CLOCK_OFF_S
from perdure.core.values import Finding, Record
from perdure.surfaces.blobs import CLAIM_KEPT_S, NOBODY, BlobUses, Claim
from perdure.surfaces.boots import SurfaceRecovery

_log = structlog.get_logger("perdure.blobs")


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
        self.troubles: dict[str, str] = {}
        """Digests whose bytes were found to be gone or changed, and what was found."""
        self._engine = engine
        self._clock = clock
        self._boot_id = boot_id
        self._holders = 0
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

        blob = await self.blobs.put(chunks, size_bytes_max=size_bytes_max, publishing=claimed)
        self.troubles.pop(blob.digest, None)
        return made[0]

    async def recover(self) -> SurfaceRecovery:
        """What opening removed, and what dead boots had claimed: its cost is what they left over,
        not what is stored."""
        began_s = self._clock.monotonic_s()
        before = self.stats.claims_given_up
        damaged = await self.collect([self._boot_id])
        return SurfaceRecovery(
            surface="blobs",
            cut=len(self.blobs.recovered),
            orphaned=self.stats.claims_given_up - before,
            damaged=len(damaged),
            duration_s=round(self._clock.monotonic_s() - began_s, 6),
            findings=(*damaged, *self.blobs.recovered),
        )

    async def tend(self) -> None:
        """The round that is made now and then: sweep, and look for references without bytes."""
        await self.sweep([self._boot_id])
        self.troubles = {}
        async for finding in self.verify():
            _log.error("damaged", where=finding.where, why=finding.why)

    async def collect(self, living_boots: Collection[str]) -> list[Finding]:
        """Give up claims of boots that are not living and claims past their time, and drop the
        bytes that nobody else needs. Where damage hides what is needed all stays; it is returned.
        """
        before_s = self._clock.now_s() - CLAIM_KEPT_S - CLOCK_OFF_S
        damaged: list[Finding] = []
        async for claim in self.uses.claims(damaged):
            if claim.value.boot_id not in living_boots or claim.value.claimed_at_s < before_s:
                try:
                    await self.give_up(claim, living_boots)
                except Damaged as damage:
                    damaged.append(Finding(damage.where, damage.why))
        for finding in damaged:
            _log.error("damaged", where=finding.where, why=finding.why)
        return damaged

    async def sweep(self, living_boots: Collection[str]) -> None:
        """`collect`, then drop whatever else has neither a claim nor a reference."""
        await self.collect(living_boots)
        async for blob in self.blobs.list():
            async with self._lock(blob.digest):
                if not await self.uses.used(blob.digest):
                    await self._drop(blob.digest)

    async def give_up(
        self, claim: Record[Claim], living_boots: Collection[str] | None = None
    ) -> None:
        """End a claim that has not become a reference, and drop its bytes if nobody needs them."""
        digest = claim.value.digest
        living = [self._boot_id] if living_boots is None else living_boots
        try:
            if claim.value.boot_id != NOBODY:
                committed = await self._engine.commit(self.uses.disown(claim))
                claim = msgspec.structs.replace(claim, version=committed.numbers[0])
            async with self._lock(digest):
                if not await self.uses.needed(digest, living):
                    await self._drop(digest)
                await self._engine.commit(self.uses.give_up(claim))
        except Conflict:
            return  # it became a reference since it was read, or another sweep was here
        self.stats.claims_given_up += 1

    def leaving(self, tenant: str, digest: str, size_bytes: int) -> Record[Claim]:
        """A claim of nobody's, to be written by `uses.let_go` and then given up."""
        claim = Claim(digest, size_bytes, NOBODY, int(self._clock.now_s()))
        return Record((tenant, digest, self._clock.new_id("claim")), 1, claim)

    async def check(self, digest: str, size_bytes: int) -> None:
        """Raises what `lost` says where the bytes of a reference are absent or of another size."""
        stored = await self.blobs.size(digest)
        if stored != size_bytes:
            found = "absent" if stored is None else f"{stored} bytes"
            raise await self.lost(digest, f"{size_bytes} bytes were stored, now it is {found}")

    async def lost(self, digest: str, why: str) -> Damaged | Missing:
        """The error for bytes that are not what was written: damage, noted as a trouble of the
        digest, unless nobody needs them, because what they were of was deleted since it was read.
        """
        if not await self.uses.needed(digest, [self._boot_id]):
            return Missing(f"what the blob {digest} was of was deleted while it was read.")
        self.troubles[digest] = why
        return Damaged(f"the blob {digest}", why)

    @property
    def warnings(self) -> list[str]:
        """What people should know of, one line at most."""
        if not self.troubles:
            return []
        digest, why = next(iter(self.troubles.items()))
        return [
            f"blobs: {len(self.troubles)} damaged, first {digest} ({why}); "
            "run `perdure verify` for all of it"
        ]

    async def verify(self) -> AsyncIterator[Finding]:
        """References whose bytes are absent or of another size. What the bytes say by themselves
        is `Blobs.verify`'s to find, and rows that cannot be read are `Engine.verify`'s."""
        async for reference in self.uses.references(damaged=[]):
            tenant, digest, owner = reference.key
            try:
                await self.check(digest, reference.value.size_bytes)
            except Missing:
                continue
            except Damaged as damage:
                yield Finding(f"{damage.where} of {owner} (tenant {tenant})", damage.why)

    async def require_bytes(self) -> None:
        """Raises `Damaged` for the first reference whose bytes are not there."""
        async for finding in self.verify():
            raise Damaged(finding.where, finding.why)

    async def reclaimable(self) -> AsyncIterator[Blob]:
        """Blobs that no record names and nobody is about to: a sweep would take them."""
        async for blob in self.blobs.list():
            if not await self.uses.needed(blob.digest, [self._boot_id]):
                yield blob

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Keep all bytes while a backup is made: what it has of the records may name them. What is
        not dropped meanwhile, the next sweep finds."""
        self._holders += 1
        try:
            yield
        finally:
            self._holders -= 1

    async def _drop(self, digest: str) -> None:
        """Under the digest's lock. Bytes that are not there (any more) are no trouble."""
        if self._holders:
            return
        size_bytes = await self.blobs.size(digest)
        if size_bytes is not None:
            await self.blobs.drop(digest)
            self.stats.blobs_dropped += 1
            self.stats.bytes_dropped += size_bytes
        self.troubles.pop(digest, None)

    def _lock(self, digest: str) -> asyncio.Lock:
        return self._locks.setdefault(digest, asyncio.Lock())
