"""The keeper of blobs: what a sweep may take, also when it runs beside claims of the same bytes."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from perdure.core.batch import Batch
from perdure.core.blobs import Blobs
from perdure.core.clock import SystemClock
from perdure.core.engine import Engine
from perdure.core.errors import Conflict, Unavailable
from perdure.core.limits import CLOCK_OFF_S
from perdure.core.values import Record
from perdure.engines import open_blobs, open_engine
from perdure.engines.blobs_memory import MemoryBlobs
from perdure.engines.checked import Checked
from perdure.engines.failing import Edge, Failing, Fault, raising
from perdure.proving.s3 import Server
from perdure.proving.sweeping import lost_to_a_sweep
from perdure.services.blobs import BlobKeeper
from perdure.surfaces.blobs import CLAIM_KEPT_S, BlobUses, Claim

BOOT = "boot_2"
DATA = b"some bytes"
DIGEST = hashlib.sha256(DATA).hexdigest()


class Clock(SystemClock):
    late_s = 0.0

    def now_s(self) -> float:
        return super().now_s() + self.late_s


async def chunks(data: bytes) -> AsyncIterator[bytes]:
    yield data


async def keep(keeper: BlobKeeper, data: bytes = DATA) -> Record[Claim]:
    return await keeper.put("t", chunks(data), size_bytes_max=1_000)


async def digests(blobs: Blobs) -> list[str]:
    return [blob.digest async for blob in blobs.list()]


places = ["memory://"]
"""Where keepers keep blobs; the last one is in force."""


@pytest.fixture(params=["memory", "s3"], autouse=True)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A place for blobs that nobody else has used."""
    if request.param == "s3":
        server: Server = request.getfixturevalue("s3")
        places.append(server.url(tmp_path.name))
    yield places[-1]
    del places[1:]


async def open_keeper(
    around: Callable[[Engine], Engine] = lambda engine: engine, blobs: Blobs | None = None
) -> tuple[BlobKeeper, Clock, Checked]:
    clock = Clock()
    engine = Checked(around(await open_engine("memory://", BlobUses.promise.layouts, clock=clock)))
    kept = blobs or await open_blobs(places[-1])
    return BlobKeeper(engine, kept, clock, BOOT), clock, engine


async def swept(keeper: BlobKeeper, living: list[str]) -> None:
    """Sweep while these boots live."""

    async def are() -> list[str]:
        return living

    keeper.living = are
    await keeper.sweep()


# proves C4
async def test_a_sweep_leaves_what_is_claimed_or_referred_to() -> None:
    keeper, _, engine = await open_keeper()
    claim = await keep(keeper)
    await swept(keeper, [BOOT])
    assert await digests(keeper.blobs) == [DIGEST]
    await engine.commit(keeper.uses.refer(claim, "files/1"))
    await swept(keeper, [])
    assert await digests(keeper.blobs) == [DIGEST]
    await engine.commit(keeper.uses.release("t", DIGEST, "files/1"))
    await swept(keeper, [BOOT])
    assert await digests(keeper.blobs) == []
    assert (keeper.stats.blobs_dropped, keeper.stats.bytes_dropped) == (1, len(DATA))
    await engine.close()


# proves C17
async def test_what_a_backup_may_name_is_kept_until_it_is_made() -> None:
    keeper, _, engine = await open_keeper()
    claim = await keep(keeper)
    await engine.commit(keeper.uses.refer(claim, "files/1"))
    async with keeper.holding():
        await engine.commit(keeper.uses.release("t", DIGEST, "files/1"))
        await swept(keeper, [BOOT])
        assert await digests(keeper.blobs) == [DIGEST]
    await swept(keeper, [BOOT])
    assert await digests(keeper.blobs) == []


# proves C4
async def test_claims_of_dead_boots_and_old_ones_are_given_up() -> None:
    for living, late_s in (
        ([], 0.0),
        (["boot_3"], 0.0),
        ([BOOT], CLAIM_KEPT_S + CLOCK_OFF_S + 2.0),
    ):
        keeper, clock, engine = await open_keeper()
        claim = await keep(keeper)
        clock.late_s = late_s
        await swept(keeper, living)
        assert keeper.stats.claims_given_up == 1
        assert await digests(keeper.blobs) == []
        with pytest.raises(Conflict):
            await engine.commit(keeper.uses.refer(claim, "files/1"))


async def test_a_claim_is_kept_by_a_living_boot_for_its_time() -> None:
    keeper, clock, _ = await open_keeper()
    await keep(keeper)
    clock.late_s = CLAIM_KEPT_S + CLOCK_OFF_S - 60
    await swept(keeper, [BOOT, "boot_1"])
    assert await digests(keeper.blobs) == [DIGEST]


async def test_a_claim_that_becomes_a_reference_under_the_sweep_is_left() -> None:
    """The sweep has read the claim when it is used."""
    keeper, _, engine = await open_keeper()
    claim = await keep(keeper)
    (stale,) = [stale async for stale in keeper.uses.claims()]
    await engine.commit(keeper.uses.refer(claim, "files/1"))
    await keeper.give_up(stale)
    assert keeper.stats.claims_given_up == 0
    await swept(keeper, [])
    assert await digests(keeper.blobs) == [DIGEST]


# proves C4
async def test_without_a_committed_claim_no_bytes_appear() -> None:
    full = raising(Unavailable("as planned"))
    keeper, _, _ = await open_keeper(lambda engine: Failing(engine, [Fault(Edge.BEFORE, full)]))
    with pytest.raises(Unavailable):
        await keep(keeper)
    assert await digests(keeper.blobs) == []


# proves C4
async def test_puts_and_sweeps_of_the_same_bytes_never_lose_a_claimed_blob(tmp_path: Path) -> None:
    """After every successful `refer` the bytes are there for as long as the reference is."""
    blobs = await open_blobs(f"file:///{tmp_path}")
    keeper, _, engine = await open_keeper(blobs=blobs)

    async def use(user: int) -> None:
        for turn in range(15):
            claim = await keep(keeper)
            owner = f"files/{user}.{turn}"
            await engine.commit(keeper.uses.refer(claim, owner))
            assert b"".join([chunk async for chunk in blobs.read(DIGEST)]) == DATA
            await engine.commit(keeper.uses.release("t", DIGEST, owner))
            while await keeper.uses.used(DIGEST):
                await swept(keeper, [BOOT])
            await swept(keeper, [BOOT])

    await asyncio.gather(*(use(user) for user in range(3)))
    assert await digests(blobs) == []
    assert keeper.stats.blobs_dropped > 1
    await blobs.close()
    await engine.close()


# proves C4
async def test_bytes_that_a_sweep_is_taking_are_written_again() -> None:
    assert await lost_to_a_sweep() is None


# proves C4
async def test_bytes_that_a_sweep_of_another_process_is_taking_are_written_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert await lost_to_a_sweep(apart=True) is None
    monkeypatch.setattr(BlobUses, "unmarked", lambda uses, digest: Batch())
    assert await lost_to_a_sweep(apart=True) is not None


class Stuck(MemoryBlobs):
    stuck = True

    async def drop(self, digest: str) -> None:
        if self.stuck:
            raise Unavailable("as planned")
        await super().drop(digest)


# proves C4
async def test_bytes_that_could_not_be_dropped_are_found_by_the_next_boot() -> None:
    """It looks at claims alone, so the last one must outlive the bytes."""
    blobs = Stuck()
    keeper, clock, engine = await open_keeper(blobs=blobs)
    with pytest.raises(Unavailable):
        await keeper.give_up(await keep(keeper))
    blobs.stuck = False
    await BlobKeeper(engine, blobs, clock, "boot_3").recover()
    assert await digests(blobs) == []
    assert not await keeper.uses.used(DIGEST)


# proves C4
async def test_a_reference_whose_bytes_are_gone_is_reported() -> None:
    keeper, _, engine = await open_keeper()
    await engine.commit(keeper.uses.refer(await keep(keeper), "files/1"))
    await engine.commit(keeper.uses.refer(await keep(keeper, b"other"), "files/2"))
    assert [finding async for finding in keeper.verify()] == []
    await keeper.blobs.drop(DIGEST)
    (finding,) = [finding async for finding in keeper.verify()]
    assert DIGEST in finding.where
    assert "files/1" in finding.where
    assert "absent" in finding.why


async def test_locks_of_digests_nobody_touches_are_forgotten() -> None:
    keeper, _, _ = await open_keeper()
    await keep(keeper)
    await swept(keeper, [BOOT])
    assert len(keeper._locks) == 0
