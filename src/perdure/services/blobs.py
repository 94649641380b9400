"""The keeper of blobs: puts bytes under a claim, and sweeps the bytes nobody needs.

Invariant: between the commit of a claim and the moment its bytes can be seen, and between the last
look at who needs a digest and its drop, the digest's lock is held. So a sweep never takes bytes
that were claimed, and a claim never stands for bytes that a sweep is taking. The lock is this
process's. Where several share the blobs, a drop is marked in the store too: no claim can be
committed while the mark stands, and who needs the digest is looked at once more under it.

Bytes go before the last claim that leads to them, so a kill in between leaves what can be found.
"""

from __future__ import annotations

import asyncio
from collections.abc import (
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
)
from contextlib import asynccontextmanager, suppress
from weakref import WeakValueDictionary

import msgspec
import structlog

from perdure.core.batch import Batch
from perdure.core.blobs import Blob, Blobs
from perdure.core.clock import Clock
from perdure.core.engine import Engine
from perdure.core.errors import Conflict, Damaged, Missing, StoreLocked
from perdure.core.limits import CLOCK_OFF_S
from perdure.core.values import Committed, Finding, Record
from perdure.surfaces.blobs import CLAIM_KEPT_S, NOBODY, BlobUses, Claim
from perdure.surfaces.boots import SurfaceRecovery

DROP_S = 3.0
"""No drop takes longer, and no claim waits longer for one. Less than a lease, so that nobody takes
away the mark of a drop that is still to come."""

_PAUSE_S = 0.02

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
        self.lease: Callable[[], Batch] = Batch
        """What shows with a commit that this boot may write."""
        self._marked: set[str] = set()
        self._stale: set[tuple[str, int]] = set()
        self.living: Callable[[], Awaitable[Collection[str]]] = self._alone
        """The boots whose claims stand. It is asked after the claims were read, so that one who has
        only just begun is among them."""
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
                committed = await self._claim(self.uses.claim(tenant, claim_id, claim), blob.digest)
                key = (tenant, blob.digest, claim_id)
                made.append(Record(key, committed.numbers[0], claim))
                yield

        blob = await self.blobs.put(chunks, size_bytes_max=size_bytes_max, publishing=claimed)
        self.troubles.pop(blob.digest, None)
        return made[0]

    async def _claim(self, claim: Batch, digest: str) -> Committed:
        """Commit a claim, once no other process is dropping what it is for."""
        if not self._engine.shared:
            return await self._engine.commit(claim)
        deadline_s = self._clock.monotonic_s() + DROP_S
        while True:
            try:
                return await self._engine.commit(claim + self.uses.unmarked(digest) + self.lease())
            except Conflict:
                if self._clock.monotonic_s() > deadline_s:
                    raise
            await self._clock.sleep(_PAUSE_S)

    async def recover(self) -> SurfaceRecovery:
        """What opening removed, and what dead boots had claimed: its cost is what they left over,
        not what is stored."""
        began_s = self._clock.monotonic_s()
        before = self.stats.claims_given_up
        damaged = await self.collect()
        return SurfaceRecovery(
            surface="blobs",
            cut=len(self.blobs.recovered),
            orphaned=self.stats.claims_given_up - before,
            damaged=len(damaged),
            duration_s=round(self._clock.monotonic_s() - began_s, 6),
            findings=(*damaged, *self.blobs.recovered),
        )

    def refer(self, claim: Record[Claim], owner: str) -> Batch:
        """See `BlobUses.refer`; also a `Conflict` once this boot was taken for dead: its claims
        keep nothing then."""
        return self.uses.refer(claim, owner) + self.lease()

    async def clear_marks(self) -> None:
        """Take away the marks that the dead have left, or this boot by a commit that failed. Only
        those that stood at the last look too: a drop ends within `DROP_S` of its mark."""
        stale = set()
        async for mark in self.uses.drops():
            digest, boot_id = mark.key[-1], mark.value.boot_id
            mine = boot_id == self._boot_id
            if digest not in self._marked if mine else boot_id not in await self.living():
                stale.add((digest, mark.version))
        for digest, version in stale & self._stale:
            with suppress(Conflict):
                await self._engine.commit(self.uses.unmark(digest, version))
        self._stale = stale

    async def tend(self) -> None:
        """The round that is made now and then: sweep, and look for references without bytes."""
        await self.sweep()
        self.troubles = {}
        async for finding in self.verify():
            _log.error("damaged", where=finding.where, why=finding.why)

    async def collect(self) -> list[Finding]:
        """Give up claims of boots that are not living and claims past their time, and drop the
        bytes that nobody else needs. Where damage hides what is needed all stays; it is returned.
        """
        before_s = self._clock.now_s() - CLAIM_KEPT_S - CLOCK_OFF_S
        damaged: list[Finding] = []
        async for claim in self.uses.claims(damaged):
            old = claim.value.claimed_at_s < before_s
            if old or claim.value.boot_id not in await self.living():
                try:
                    await self.give_up(claim)
                except Damaged as damage:
                    damaged.append(Finding(damage.where, damage.why))
        for finding in damaged:
            _log.error("damaged", where=finding.where, why=finding.why)
        return damaged

    async def sweep(self) -> None:
        """`collect`, then drop whatever else has neither a claim nor a reference."""
        await self.collect()
        async for blob in self.blobs.list():
            async with self._lock(blob.digest):
                if not await self.uses.used(blob.digest):
                    await self._drop(blob.digest)

    async def give_up(self, claim: Record[Claim]) -> None:
        """End a claim that has not become a reference, and drop its bytes if nobody needs them."""
        digest = claim.value.digest
        try:
            if claim.value.boot_id != NOBODY:
                committed = await self._engine.commit(self.uses.disown(claim))
                claim = msgspec.structs.replace(claim, version=committed.numbers[0])
            async with self._lock(digest):
                if not await self._needed(digest):
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
        if not await self._needed(digest):
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
            if not await self._needed(blob.digest):
                yield blob

    @asynccontextmanager
    async def holding(self) -> AsyncIterator[None]:
        """Keep all bytes while a backup is made: what it has of the records may name them. What is
        not dropped meanwhile, the next sweep finds. Raises `Conflict` where this boot does so
        already and the blobs are shared."""
        self._holders += 1
        try:
            if self.lease():
                async with self._mark(self.uses.keep_all(self._boot_id)):
                    yield
            else:
                yield
        finally:
            self._holders -= 1

    @asynccontextmanager
    async def _mark(self, what: str) -> AsyncIterator[None]:
        """Show the other processes what is done here."""
        self._marked.add(what)
        try:
            marked = await self._engine.commit(self.uses.mark(what, self._boot_id) + self.lease())
            try:
                yield
            finally:
                with suppress(Conflict):
                    await self._engine.commit(self.uses.unmark(what, marked.numbers[0]))
        finally:
            self._marked.discard(what)

    async def _drop(self, digest: str) -> None:
        """Under the digest's lock. Bytes that are not there (any more) are no trouble."""
        if self._holders:
            return
        size_bytes = await self.blobs.size(digest)
        if size_bytes is not None:
            if self._engine.shared:
                if not await self._dropped_alone(digest):
                    return
            else:
                await self.blobs.drop(digest)
            self.stats.blobs_dropped += 1
            self.stats.bytes_dropped += size_bytes
        self.troubles.pop(digest, None)

    async def _dropped_alone(self, digest: str) -> bool:
        """Drop bytes that other processes may want at the same moment; whether nobody did. What was
        begun is carried through: one that is cancelled would go on in its thread without its mark.
        """
        return await asyncio.shield(asyncio.ensure_future(self._dropped_under_mark(digest)))

    async def _dropped_under_mark(self, digest: str) -> bool:
        began_s = self._clock.monotonic_s()
        try:
            async with self._mark(digest), self.blobs.dropping(digest):
                if await self.uses.all_kept() or await self._needed(digest):
                    return False
                # One that stood still may have been taken for dead, and its mark away.
                if self._clock.monotonic_s() - began_s >= DROP_S:
                    return False
                await self.blobs.drop(digest)
                return True
        except (Conflict, Missing, StoreLocked):
            return False

    async def _needed(self, digest: str) -> bool:
        return await self.uses.needed(digest, self.living)

    async def _alone(self) -> Collection[str]:
        return (self._boot_id,)

    def _lock(self, digest: str) -> asyncio.Lock:
        return self._locks.setdefault(digest, asyncio.Lock())
