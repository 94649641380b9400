"""Blobs in an object store that is killed, slow, cut off, silent, full of somebody else's, or gone:
nobody is given a wrong byte, and what cannot be known is not taken for absence."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from perdure.core.blobs import Blob
from perdure.core.errors import Damaged, Invalid, Unavailable
from perdure.core.values import Finding
from perdure.engines import open_blobs
from perdure.engines.blobs_s3 import PART_BYTES, RANGE_BYTES
from perdure.proving.s3 import KEYS, Server, serving_s3
from tests.engines.test_blobs import MANY, chunks, found, listed, put, read

LARGE = random.Random(1).randbytes(2 * PART_BYTES + 12_345)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server that may be killed."""
    for name, key in KEYS.items():
        monkeypatch.setenv(name, key)
    with serving_s3(tmp_path / "objects") as started:
        yield started


class Wire:
    """Carries bytes to a server, and does to its answers what it is told: after `cut_after` bytes
    the connection ends, after `silent_after` nothing arrives any more; while it `flips`, a byte of
    every body that is sent is another one."""

    def __init__(self, port: int) -> None:
        self.port = 0
        self.cut_after: int | None = None
        self.silent_after: int | None = None
        self.flips = False
        self._server = port
        self._carrying: set[asyncio.Task[None]] = set()

    def connect(self, client: asyncio.StreamReader, answers: asyncio.StreamWriter) -> None:
        carrying = asyncio.create_task(self._carry(client, answers))
        self._carrying.add(carrying)
        carrying.add_done_callback(self._carrying.discard)

    async def close(self) -> None:
        for carrying in self._carrying:
            carrying.cancel()
        await asyncio.gather(*self._carrying, return_exceptions=True)

    async def _carry(self, client: asyncio.StreamReader, answers: asyncio.StreamWriter) -> None:
        server, asks = await asyncio.open_connection("127.0.0.1", self._server)
        ways = [
            asyncio.create_task(self._ask(client, asks)),
            asyncio.create_task(self._answer(server, answers)),
        ]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.wait(ways)
            for writer in (asks, answers):
                writer.transport.abort()

    async def _ask(self, client: asyncio.StreamReader, asks: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while piece := await client.read(65_536):
                if self.flips and b"HTTP/1.1" not in piece:
                    piece = piece[:-1] + bytes([piece[-1] ^ 1])
                asks.write(piece)
                await asks.drain()

    async def _answer(self, server: asyncio.StreamReader, answers: asyncio.StreamWriter) -> None:
        carried = 0
        with suppress(OSError):
            while piece := await server.read(65_536):
                carried += len(piece)
                if self.cut_after is not None and carried > self.cut_after:
                    return
                if self.silent_after is None or carried <= self.silent_after:
                    answers.write(piece)
                    await answers.drain()


@pytest.fixture
async def wire(server: Server) -> AsyncIterator[Wire]:
    carrying = Wire(server.port)
    listener = await asyncio.start_server(carrying.connect, "127.0.0.1", 0)
    carrying.port = listener.sockets[0].getsockname()[1]
    yield carrying
    listener.close()
    await carrying.close()


# proves C4, R10
async def test_a_server_that_is_killed_in_mid_upload_has_nothing_of_it(server: Server) -> None:
    blobs = await open_blobs(server.url("p", timeout_s="5"))
    small = await put(blobs, b"kept")

    async def struck() -> AsyncIterator[bytes]:
        yield LARGE[: PART_BYTES + 1]
        server.kill()
        yield LARGE[PART_BYTES + 1 :]

    with pytest.raises(Unavailable, match="Try again"):
        await blobs.put(struck(), size_bytes_max=MANY)
    with pytest.raises(Unavailable):
        await blobs.size(small.digest)
    with pytest.raises(Unavailable):
        await listed(blobs)
    server.start()
    assert (await listed(blobs), await found(blobs)) == ([small], [])
    blob = await put(blobs, LARGE)
    assert await read(blobs, blob.digest) == LARGE
    assert await found(blobs) == []


# proves C4, R10
async def test_a_server_that_is_killed_before_bytes_have_their_name(server: Server) -> None:
    url = server.url("p", timeout_s="5")
    blobs = await open_blobs(url, owner="store_1")

    @asynccontextmanager
    async def struck(blob: Blob) -> AsyncIterator[None]:
        server.kill()
        yield

    for data in (b"small", LARGE):
        with pytest.raises(Unavailable):
            await blobs.put(chunks(data), size_bytes_max=MANY, publishing=struck)
        server.start()
        assert await listed(blobs) == []
    (left,) = await found(blobs)
    assert left.kind == "leftover"
    shared = await open_blobs(url, owner="store_1", shared=True)
    assert shared.recovered == ()  # another process may be sending it
    again = await open_blobs(url, owner="store_1")
    assert again.recovered == (left,)
    assert (await put(again, LARGE)).size_bytes == len(LARGE)
    assert await found(again) == []


# proves C7, R10
@pytest.mark.parametrize("fault", ["cut_after", "silent_after"])
async def test_a_connection_that_ends_in_mid_read_gives_no_wrong_byte(
    fault: str, server: Server, wire: Wire
) -> None:
    blob = await put(await open_blobs(server.url("p")), LARGE)
    blobs = await open_blobs(server.url("p", port=wire.port, timeout_s="1"))
    setattr(wire, fault, RANGE_BYTES + 100_000)  # of one connection, which is used for all ranges
    got = bytearray()

    async def get() -> None:
        async for chunk in blobs.read(blob.digest):
            got.extend(chunk)
            setattr(wire, fault, 100_000)

    with pytest.raises(Unavailable, match="Try again"):
        await asyncio.wait_for(get(), 60)
    assert 0 < len(got) < len(LARGE)
    assert LARGE.startswith(got)
    setattr(wire, fault, None)
    assert await read(blobs, blob.digest) == LARGE


# proves C4
async def test_a_drop_is_given_up_sooner_than_others_are_held_off(
    server: Server, wire: Wire
) -> None:
    blobs = await open_blobs(server.url("p", port=wire.port, timeout_s="600"))
    blob = await put(blobs, b"stays")
    wire.silent_after = 0
    with pytest.raises(Unavailable):
        await asyncio.wait_for(blobs.drop(blob.digest), 60)
    wire.silent_after = None
    assert await listed(await open_blobs(server.url("p"))) in ([blob], [])


# proves C7, C8
async def test_bytes_that_change_on_their_way_or_there_are_not_believed(
    server: Server, wire: Wire
) -> None:
    blobs = await open_blobs(server.url("p", port=wire.port, timeout_s="5"))
    wire.flips = True  # this server does not hold a body to its signature
    changed = await put(blobs, LARGE)
    wire.flips = False
    with pytest.raises(Damaged):
        await read(blobs, changed.digest)
    await blobs.drop(changed.digest)
    blob, other = await put(blobs, LARGE), await put(blobs, b"sound")
    file = server.path(f"p/{blob.digest[:2]}/{blob.digest}")
    body = bytearray(file.read_bytes())
    body[-5] ^= 1
    file.write_bytes(body)
    with pytest.raises(Damaged):
        await read(blobs, blob.digest)
    where = f"the blob {blob.digest}"
    assert await found(blobs) == [Finding(where, "its bytes have another digest")]
    assert await read(blobs, other.digest) == b"sound"
    assert await put(blobs, LARGE) == blob  # written anew, whatever is there
    assert await found(blobs) == []


# proves C4
async def test_a_place_belongs_to_the_store_that_was_there_first(server: Server) -> None:
    url = server.url("p")
    first = await open_blobs(url, owner="store_1")
    await put(first, b"mine")
    await open_blobs(url, owner="store_1", shared=True)
    with pytest.raises(Invalid, match="of another store, store_1"):
        await open_blobs(url, owner="store_2")
    looking = await open_blobs(url, read_only=True)
    assert [blob.size_bytes for blob in await listed(looking)] == [4]
    for change in (put(looking, b"x"), looking.drop("0" * 64)):
        with pytest.raises(Invalid, match="reading only"):
            await change
    assert await listed(await open_blobs(server.url("p2"), owner="store_2")) == []


# proves C2, R10
async def test_what_cannot_be_asked_is_not_absent(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    blobs = await open_blobs(server.url())
    blob = await put(blobs, b"here")
    bucket = server.path(".")
    bucket.rename(bucket.with_name("away"))
    for ask in (blobs.size(blob.digest), read(blobs, blob.digest), listed(blobs), put(blobs, b"")):
        with pytest.raises(Unavailable, match="no such bucket"):
            await ask
    with pytest.raises(Unavailable, match="no such bucket"):
        await open_blobs(server.url())
    bucket.with_name("away").rename(bucket)
    assert await read(blobs, blob.digest) == b"here"
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
    with pytest.raises(Unavailable, match="SignatureDoesNotMatch"):
        await open_blobs(server.url())


@pytest.mark.parametrize(
    "url", ["s3://", "s3://key:secret@bucket/p", "s3://bucket/?key=x", "s3://bucket/?timeout_s=0"]
)
async def test_a_url_that_names_no_bucket_or_holds_a_key_is_refused(url: str) -> None:
    with pytest.raises(Invalid, match="Keys are not part of it"):
        await open_blobs(url)
