"""Who needs a blob: claims and references, as ordinary records, so that no engine knows blobs.

A claim is committed before the bytes it is for can be seen; a reference takes its place in the
same commit as the record that names the blob. Since `refer` deletes the claim at the version it
was made with, that commit fails if the claim was swept: no record ever names bytes that a sweep
may have taken. A digest without claims and references is nobody's, and its bytes may go.

Who ends a reference leaves a claim of nobody's behind (`let_go`). So bytes that are there always
have one or the other, and what a crash leaves over is found by its claims alone.

Where several processes share the blobs, whoever is about to drop a digest marks it first and looks
again who needs it; while a mark stands, nobody claims the digest.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable
from typing import Any

import msgspec

from perdure.core.batch import Batch, check, delete, join, put
from perdure.core.blobs import Blob
from perdure.core.engine import Engine, Survives
from perdure.core.keys import SYSTEM_TENANT
from perdure.core.layouts import Index, Records
from perdure.core.paging import every
from perdure.core.promises import Durability, Promise
from perdure.core.values import Finding, Record

CLAIM_KEPT_S = 24 * 3600
"""A claim that has not become a reference after this long is given up, even by a living boot."""

NOBODY = ""
"""The boot of a claim that will never become a reference: its bytes are to go."""


class Claim(msgspec.Struct, frozen=True):
    """Somebody in boot `boot_id` is about to name this blob in a record."""

    digest: str
    size_bytes: int
    boot_id: str
    claimed_at_s: int


class Reference(msgspec.Struct, frozen=True):
    """A record names this blob; the last segment of the key says which one."""

    digest: str
    size_bytes: int


CLAIMS = Records(
    "blob_claims",
    Claim,
    key=("tenant", "digest", "claim_id"),
    indexes=(
        Index("by_digest", ("digest",), every_tenant=True),
        Index("by_age", ("claimed_at_s",), every_tenant=True),
    ),
)
REFERENCES = Records(
    "blob_references",
    Reference,
    key=("tenant", "digest", "owner"),
    indexes=(Index("by_digest", ("digest",), every_tenant=True),),
)


class Drop(msgspec.Struct, frozen=True):
    """Boot `boot_id` is about to drop this digest, if nobody needs it."""

    boot_id: str


DROPS = Records("blob_drops", Drop, key=("tenant", "digest"))
_ALL = "all-"
"""What a mark of this prefix is of, is not to be dropped but kept, and it is everything."""


class BlobUses:
    """Reads of claims and references, and the batches that write them.

    `owner` names the record that refers to a blob, for instance `files/file_123`.
    """

    promise = Promise(
        surface="blobs",
        durability=Durability.SHARED,
        acknowledgement="the bytes and their name are on disk before a record can refer to them",
        survives=Survives(process_crash=True, power_cut=True, failed_sync=True, damage=True),
        owner="the process that holds the directory of blobs, or all that share it",
        recovery="bytes that were never published are removed, claims of dead boots are swept",
        retention="as long as a record refers to them; a claim lives a day",
        layouts=(CLAIMS, REFERENCES, DROPS),
        statements=("C3", "C4"),
    )

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def used(self, digest: str) -> bool:
        """Whether anybody needs this digest, in whatever tenant.

        Claims are looked at first: one that becomes a reference between the two looks is then
        seen as one or the other.
        """
        for records in (CLAIMS, REFERENCES):
            if await self._any(records, digest):
                return True
        return False

    async def needed(self, digest: str, living: Callable[[], Awaitable[Collection[str]]]) -> bool:
        """Whether a record names this digest, or a boot that is living, now that the claims were
        read, is about to name it in one. Claims are looked at first, as in `used`."""
        async for claim in every(self._engine, CLAIMS, (), index="by_digest", where=(digest,)):
            if claim.value.boot_id in await living():
                return True
        return await self._any(REFERENCES, digest)

    def claims(self, damaged: list[Finding] | None = None) -> AsyncIterator[Record[Claim]]:
        """Claims of all tenants, the oldest first. Raises `Damaged` unless `damaged` notes it."""
        return every(self._engine, CLAIMS, (), index="by_age", damaged=damaged)

    def references(self, damaged: list[Finding] | None = None) -> AsyncIterator[Record[Reference]]:
        """References of all tenants, by digest. Raises `Damaged` unless `damaged` notes it."""
        return every(self._engine, REFERENCES, (), index="by_digest", damaged=damaged)

    def claim(self, tenant: str, claim_id: str, claim: Claim) -> Batch:
        """Claim a blob, before its bytes can be seen."""
        return put(CLAIMS, (tenant, claim.digest, claim_id), claim, expect=0)

    def drops(self) -> AsyncIterator[Record[Drop]]:
        """Every mark that stands."""
        return every(self._engine, DROPS, (SYSTEM_TENANT,))

    def mark(self, digest: str, boot_id: str) -> Batch:
        """Let nobody claim a digest. Raises `Conflict` where it is marked already."""
        return put(DROPS, (SYSTEM_TENANT, digest), Drop(boot_id), expect=0)

    def unmark(self, digest: str, version: int) -> Batch:
        """Let it be claimed again. Raises `Conflict` where somebody else marked it since."""
        return delete(DROPS, (SYSTEM_TENANT, digest), expect=version)

    def keep_all(self, boot_id: str) -> str:
        """What to mark so that nobody drops anything."""
        return f"{_ALL}{boot_id}"

    async def all_kept(self) -> bool:
        """Whether anybody wants nothing to be dropped."""
        async for mark in self.drops():
            if mark.key[-1].startswith(_ALL):
                return True
        return False

    def unmarked(self, digest: str) -> Batch:
        """What goes with a claim: a `Conflict` while the digest is marked."""
        return check(DROPS, (SYSTEM_TENANT, digest), 0)

    def refer(self, claim: Record[Claim], owner: str) -> Batch:
        """Turn a claim into the reference of `owner`; commit it with the record that is `owner`.
        The commit raises `Conflict` if the claim was swept: put the bytes again."""
        tenant, digest, _ = claim.key
        reference = Reference(digest, claim.value.size_bytes)
        return delete(CLAIMS, claim.key, expect=claim.version) + put(
            REFERENCES, (tenant, digest, owner), reference
        )

    def pass_on(self, tenant: str, references: Iterable[tuple[str, Reference]], to: str) -> Batch:
        """Let `to` refer to the blobs that owners, named here with what they refer to, let go.
        Commit it with the end of their records, expected as they were read."""
        owners = list(references)
        taken = {reference.digest: reference for _, reference in owners}
        return join(self.release(tenant, it.digest, owner) for owner, it in owners) + join(
            put(REFERENCES, (tenant, digest, to), it) for digest, it in taken.items()
        )

    def share(self, reference: Record[Reference], owner: str) -> Batch:
        """Let another record of the tenant refer to a blob that is referred to already."""
        tenant, digest, _ = reference.key
        return check(REFERENCES, reference.key, reference.version) + put(
            REFERENCES, (tenant, digest, owner), reference.value
        )

    def hold(self, tenant: str, blobs: Iterable[Blob], owner: str) -> Batch:
        """Let another record of the tenant refer to blobs; commit it with a check that the record
        which refers to them already is as it was read."""
        return join(
            put(REFERENCES, (tenant, blob.digest, owner), Reference(blob.digest, blob.size_bytes))
            for blob in blobs
        )

    def release(self, tenant: str, digest: str, owner: str) -> Batch:
        """End a reference; commit it with the end of the record that is `owner`."""
        return delete(REFERENCES, (tenant, digest, owner))

    def let_go(self, claim: Record[Claim], owner: str) -> Batch:
        """End a reference like `release`, leaving a claim of nobody's, not yet written, in its
        place."""
        tenant, digest, claim_id = claim.key
        return self.release(tenant, digest, owner) + self.claim(tenant, claim_id, claim.value)

    def disown(self, claim: Record[Claim]) -> Batch:
        """Make a claim nobody's: it can no more become a reference. Raises `Conflict` if it has."""
        nobodys = msgspec.structs.replace(claim.value, boot_id=NOBODY)
        return put(CLAIMS, claim.key, nobodys, expect=claim.version)

    def give_up(self, claim: Record[Claim]) -> Batch:
        """End a claim that has not become a reference. Raises `Conflict` if it has."""
        return delete(CLAIMS, claim.key, expect=claim.version)

    async def _any(self, records: Records[Any], digest: str) -> bool:
        page = await self._engine.scan(records, (), index="by_digest", where=(digest,), limit=1)
        return bool(page.items)
