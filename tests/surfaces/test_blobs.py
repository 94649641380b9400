"""Claims and references of blobs: which commits go through, and who keeps a digest."""

from __future__ import annotations

from typing import Any

import pytest

from perdure.core.batch import Batch, put
from perdure.core.errors import Conflict
from perdure.core.layouts import Records
from perdure.core.promises import check_promises
from perdure.core.values import Page, Record
from perdure.engines import open_engine
from perdure.engines.checked import Checked
from perdure.engines.wrapping import Wrapping
from perdure.surfaces.blobs import CLAIMS, DROPS, REFERENCES, BlobUses, Claim, Reference

DIGEST = "ab" * 32
FILES = Records("files", str, key=("tenant", "id"))
FILE = ("t", "file_1")


async def engine() -> Checked:
    return Checked(await open_engine("memory://", (*BlobUses.promise.layouts, FILES)))


async def claimed(store: Checked, claim_id: str = "claim_1", tenant: str = "t") -> Record[Claim]:
    claim = Claim(DIGEST, 5, "boot_1", 1_000)
    committed = await store.commit(BlobUses(store).claim(tenant, claim_id, claim))
    return Record((tenant, DIGEST, claim_id), committed.numbers[0], claim)


def naming(uses: BlobUses, claim: Record[Claim]) -> Batch:
    """The record that names the blob, and its reference, as one commit."""
    return put(FILES, FILE, DIGEST, expect=0) + uses.refer(claim, "files/file_1")


async def test_its_promise_fits_the_embedded_engine() -> None:
    (warning,) = check_promises([BlobUses.promise], await engine(), "local")
    assert warning.startswith("blobs ")
    assert BlobUses.promise.layouts == (CLAIMS, REFERENCES, DROPS)


async def test_a_claim_that_becomes_a_reference_between_two_looks_is_seen() -> None:
    """Whoever looks for references first sees neither."""

    class Between(Wrapping):
        batch: Batch | None = None

        async def scan(self, *args: Any, **named: Any) -> Page[Any]:
            page = await super().scan(*args, **named)
            if self.batch is not None:
                batch, self.batch = self.batch, None
                await self.commit(batch)
            return page

    between = Between(await open_engine("memory://", BlobUses.promise.layouts))
    uses = BlobUses(between)
    claim = await claimed(Checked(between))
    between.batch = uses.refer(claim, "files/file_1")
    assert await uses.used(DIGEST)
    assert await uses.used(DIGEST)


# proves C4
async def test_a_claim_becomes_a_reference_with_the_record_that_names_the_blob() -> None:
    store = await engine()
    uses = BlobUses(store)
    assert not await uses.used(DIGEST)
    claim = await claimed(store)
    assert await uses.used(DIGEST)
    await store.commit(naming(uses, claim))
    assert await uses.used(DIGEST)
    assert [claim async for claim in uses.claims()] == []
    (reference,) = [reference async for reference in uses.references()]
    assert reference.key == ("t", DIGEST, "files/file_1")
    assert reference.value == Reference(DIGEST, 5)
    await store.commit(uses.release("t", DIGEST, "files/file_1"))
    assert not await uses.used(DIGEST)
    await store.close()


# proves C4
async def test_a_swept_claim_refuses_the_record_that_names_the_blob() -> None:
    store = await engine()
    uses = BlobUses(store)
    claim = await claimed(store)
    await store.commit(uses.give_up(claim))
    with pytest.raises(Conflict):
        await store.commit(naming(uses, claim))
    assert await store.get(FILES, FILE) is None
    assert not await uses.used(DIGEST)


# proves C23
async def test_a_claim_made_again_does_not_revive_the_swept_one() -> None:
    store = await engine()
    uses = BlobUses(store)
    claim = await claimed(store)
    await store.commit(uses.give_up(claim))
    await claimed(store)
    with pytest.raises(Conflict):
        await store.commit(naming(uses, claim))


async def test_a_claim_can_be_used_once() -> None:
    store = await engine()
    uses = BlobUses(store)
    claim = await claimed(store)
    await store.commit(uses.refer(claim, "files/file_1"))
    for late in (uses.refer(claim, "files/file_2"), uses.give_up(claim)):
        with pytest.raises(Conflict):
            await store.commit(late)


async def test_a_shared_reference_must_still_be_there() -> None:
    store = await engine()
    uses = BlobUses(store)
    await store.commit(uses.refer(await claimed(store), "files/file_1"))
    (reference,) = [reference async for reference in uses.references()]
    await store.commit(uses.share(reference, "files/file_2"))
    await store.commit(uses.release("t", DIGEST, "files/file_1"))
    assert await uses.used(DIGEST)
    with pytest.raises(Conflict):
        await store.commit(uses.share(reference, "files/file_3"))


async def test_any_tenant_that_needs_a_blob_keeps_it() -> None:
    store = await engine()
    uses = BlobUses(store)
    await store.commit(uses.refer(await claimed(store), "files/file_1"))
    await store.commit(uses.refer(await claimed(store, tenant="u"), "files/file_1"))
    await store.commit(uses.release("t", DIGEST, "files/file_1"))
    assert await uses.used(DIGEST)
    await store.commit(uses.release("u", DIGEST, "files/file_1"))
    assert not await uses.used(DIGEST)


async def test_claims_are_listed_the_oldest_first() -> None:
    store = await engine()
    uses = BlobUses(store)
    for at_s in (30, 10, 20):
        await store.commit(uses.claim("t", f"claim_{at_s}", Claim(DIGEST, 1, "boot", at_s)))
    assert [claim.value.claimed_at_s async for claim in uses.claims()] == [10, 20, 30]
