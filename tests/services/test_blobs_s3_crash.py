"""Rows and objects after a process that died with any one of its requests to the object store, and
whose last request took place all the same: what is referred to is whole, the rest is swept."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import pytest

from perdure.core.clock import SystemClock
from perdure.core.engine import Engine
from perdure.core.errors import Unavailable
from perdure.engines import blobs_s3, open_blobs
from perdure.engines.blobs_s3 import PART_BYTES
from perdure.proving.s3 import Server
from perdure.services.blobs import BlobKeeper
from tests.engines.test_blobs_s3 import Wire
from tests.services.test_blobs_crash import ClaimsTooLate, memory

LARGE = bytes(range(256)) * (PART_BYTES // 256 + 1)


class Dying(Wire):
    """Carries `left` more requests. The last of them takes place, and nobody hears of it; of what
    comes behind it nothing arrives."""

    left = 0

    async def _ask(self, client: asyncio.StreamReader, asks: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while piece := await client.read(65_536):
                self.left -= b" HTTP/1.1\r\n" in piece
                if self.left < 0:
                    return
                asks.write(piece)
                await asks.drain()

    async def _answer(self, server: asyncio.StreamReader, answers: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while piece := await server.read(65_536):
                if self.left <= 0:
                    return
                answers.write(piece)
                await answers.drain()


async def chunks(data: bytes) -> AsyncIterator[bytes]:
    yield data


async def live(keeper: BlobKeeper, engine: Engine) -> None:
    """Two tenants keep the same bytes, an upload stays a claim, bytes go and come back, and one
    blob is larger than one part."""
    uses = keeper.uses

    async def keep(tenant: str, data: bytes) -> None:
        claim = await keeper.put(tenant, chunks(data), size_bytes_max=len(data))
        await engine.commit(uses.refer(claim, "files/1"))

    await keep("t", b"kept by two")
    await keep("u", b"kept by two")
    await keeper.put("t", chunks(b"a claim"), size_bytes_max=100)
    async for reference in uses.references():
        await engine.commit(uses.release(reference.key[0], reference.key[1], "files/1"))
        await keeper.sweep()
    await keep("t", b"kept by two")
    await keep("t", LARGE)


async def judge(kind: type[BlobKeeper], wire: Dying, url: str, past: str, requests: int) -> bool:
    """Whether all of that life came to pass within so many requests. What the next boot finds
    wrong is raised."""
    wire.left = 1_000
    engine, clock = await memory(), SystemClock()
    blobs = await open_blobs(past)
    wire.left = requests
    died = False
    try:
        await live(kind(engine, blobs, clock, "boot_1"), engine)
    except Unavailable:
        died = True
    await blobs.close()
    again = await open_blobs(url)
    keeper = BlobKeeper(engine, again, clock, "boot_2")
    assert [finding async for finding in keeper.verify()] == []
    await keeper.sweep()
    assert [finding async for finding in keeper.verify()] == []
    assert [finding async for finding in again.verify()] == []
    needed = {reference.key[1] async for reference in keeper.uses.references()}
    assert {blob.digest async for blob in again.list()} == needed
    await again.close()
    return not died


@pytest.fixture
async def wire(s3: Server, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Dying]:
    monkeypatch.setattr(blobs_s3, "_RETRIES", 0)
    carrying = Dying(s3.port)
    listener = await asyncio.start_server(carrying.connect, "127.0.0.1", 0)
    carrying.port = listener.sockets[0].getsockname()[1]
    yield carrying
    listener.close()
    await carrying.close()


# proves C4
async def test_after_a_death_at_any_request_rows_and_bytes_agree(
    wire: Dying, s3: Server, tmp_path: Path
) -> None:
    requests, whole = 0, False
    while not whole:
        requests += 1
        place = f"{tmp_path.name}/{requests}"
        past = s3.url(place, port=wire.port)
        whole = await judge(BlobKeeper, wire, s3.url(place), past, requests)
    assert requests > 12


async def test_bytes_that_are_claimed_too_late_are_caught(
    wire: Dying, s3: Server, tmp_path: Path
) -> None:
    with pytest.raises(AssertionError):
        await judge(
            ClaimsTooLate, wire, s3.url(tmp_path.name), s3.url(tmp_path.name, port=wire.port), 1_000
        )
