"""Files of a node: how long they are there, and what failures and kills leave of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from perdure.core.batch import Batch, layout_of
from perdure.core.clock import SystemClock
from perdure.core.errors import Missing, Unavailable
from perdure.core.values import Committed
from perdure.engines.failing import Edge, Failing, Fault, raising
from perdure.engines.wrapping import Wrapping
from perdure.proving.waiting import wait_until
from perdure.services.files import Summing, ahead
from perdure.services.lifecycle import Node
from perdure.surfaces.blobs import CLAIMS
from perdure.surfaces.files import BLOCK_BYTES, FILES
from perdure.wire.errors import NotFound
from perdure.wire.files import CreateFile
from tests.services.conftest import Open, someone
from tests.services.test_blobs import swept

DATA = b"some bytes of a file"


class Clock(SystemClock):
    late_s = 0.0

    def now_s(self) -> float:
        return super().now_s() + self.late_s


class OnlyFiles(Failing):
    """Counts and fails what is committed for files, whatever the node does beside."""

    async def commit(self, batch: Batch) -> Committed:
        ours = any(layout_of(op) in (CLAIMS, FILES) for op in batch.ops)
        return await (super().commit(batch) if ours else Wrapping.commit(self, batch))


async def chunks(data: bytes) -> AsyncGenerator[bytes, None]:
    yield data[:5]
    yield data[5:]


async def keep(node: Node, data: bytes = DATA, after_s: int | None = None) -> dict[str, Any]:
    request = CreateFile("a.txt", "user_data", after_s)
    body = await node.files.create(
        "default", chunks(data), lambda: request, lambda sent: someone(digest="")
    )
    return msgspec.json.decode(body)


async def bytes_of(node: Node, file_id: str) -> bytes:
    held = await node.files.get("default", file_id)
    return b"".join([part async for part in node.files.content(held)])


async def stored(node: Node) -> list[str]:
    return [blob.digest async for blob in node.blobs.blobs.list()]


async def claims(node: Node) -> int:
    return (await node.state.engine.count(CLAIMS, ())).get((), 0)


# proves R10
async def test_a_file_is_there_until_its_time_is_over_swept_or_not(opened: Open) -> None:
    clock = Clock()
    node = (await opened(clock=clock)).node
    brief = await keep(node, after_s=3_600)
    lasting = await keep(node, b"others")
    assert brief["expires_at"] == brief["created_at"] + 3_600
    clock.late_s = 3_590
    await node.files.sweep()
    assert await bytes_of(node, brief["id"]) == DATA
    clock.late_s = 3_601
    for read in (node.files.get, node.files.describe, node.files.delete):
        with pytest.raises(NotFound):
            await read("default", brief["id"])
    listed = await node.files.list("default", purpose=None, order="asc", limit=9, after=None)
    assert [file.id for file in listed.data] == [lasting["id"]]
    await node.files.sweep()
    assert await node.state.engine.get(FILES, ("default", brief["id"])) is None
    assert len(await stored(node)) == 1
    assert await claims(node) == 0


# proves R10
async def test_time_passes_while_no_server_runs(opened: Open, tmp_path: Path) -> None:
    if (driver := await opened()).node.config.engine == "memory://":
        pytest.skip("memory ends with its server")
    brief = await keep(driver.node, after_s=3_600)
    await driver.node.close()
    clock = Clock()
    clock.late_s = 7_200
    node = (await opened(clock=clock)).node
    with pytest.raises(NotFound):
        await node.files.get("default", brief["id"])

    async def swept() -> bool:
        return await stored(node) == [] and await claims(node) == 0

    await wait_until(swept, 10, "the first sweep of the new boot")


# proves R10
async def test_a_file_that_is_deleted_while_it_is_read_is_no_damage(opened: Open) -> None:
    node = (await opened()).node
    file_id = (await keep(node, bytes(2 * BLOCK_BYTES)))["id"]
    held = await node.files.get("default", file_id)
    await node.files.delete("default", file_id)
    with pytest.raises(Missing, match="deleted while it was read"):
        await node.files.check(held)
    with pytest.raises(Missing, match="deleted while it was read"):
        await anext(node.files.content(held))
    assert node.blobs.warnings == []


# proves R10
async def test_what_is_deleted_while_everything_is_verified_is_no_damage(opened: Open) -> None:
    node = (await opened()).node
    for number in range(3):
        await keep(node, b"file %d" % number)
    look = node.blobs.blobs.size

    async def delete_all(digest: str) -> int | None:
        node.blobs.blobs.size = look  # type: ignore[method-assign]
        listed = await node.files.list("default", purpose=None, order="asc", limit=9, after=None)
        for file in listed.data:
            await node.files.delete("default", file.id)
        return await look(digest)

    node.blobs.blobs.size = delete_all  # type: ignore[method-assign]
    assert [finding async for finding in node.blobs.verify()] == []


# proves R10, C4
@pytest.mark.parametrize("edge", [Edge.BEFORE, Edge.AFTER])
@pytest.mark.parametrize("commit", [1, 2])
async def test_a_commit_that_fails_leaves_no_bytes_that_nobody_knows(
    opened: Open, edge: Edge, commit: int
) -> None:
    """The claim, then the file: before or after either, the bytes are found by what is stored."""
    node = (await opened(wrap=OnlyFiles)).node
    engine = node.state.engine
    assert isinstance(engine, OnlyFiles)
    planned = raising(Unavailable("as planned"))
    engine.faults.append(Fault(edge, planned, engine.commits + commit))
    with pytest.raises(Unavailable):
        await keep(node)
    there = edge is Edge.AFTER and commit == 2
    listed = await node.files.list("default", purpose=None, order="asc", limit=9, after=None)
    assert len(listed.data) == there
    await swept(node.blobs, [])
    assert len(await stored(node)) == there
    assert await claims(node) == 0
    for file in listed.data:
        assert await bytes_of(node, file.id) == DATA


# proves C4
async def test_what_a_dead_boot_had_claimed_is_given_up_by_the_next(opened: Open) -> None:
    driver = await opened()
    if driver.node.config.engine == "memory://":
        pytest.skip("memory ends with its server")
    await driver.node.blobs.put("default", chunks(DATA), size_bytes_max=99)
    kept = await keep(driver.node, b"others")
    await driver.node.close()
    node = (await opened()).node
    (report,) = [found for found in node.startup.recovery if found.surface == "blobs"]
    assert report.orphaned == 1
    assert len(await stored(node)) == 1
    assert await bytes_of(node, kept["id"]) == b"others"


def test_sums_do_not_depend_on_how_bytes_arrive() -> None:
    data = bytes(BLOCK_BYTES + 10)

    async def sums(*cuts: int) -> bytes:
        async def pieces() -> AsyncIterator[bytes]:
            for start, end in zip((0, *cuts), (*cuts, len(data)), strict=True):
                yield data[start:end]

        summing = Summing(pieces())
        assert b"".join([part async for part in aiter(summing)]) == data
        return summing.sums()

    whole = asyncio.run(sums())
    assert len(whole) == 16
    assert asyncio.run(sums(1, BLOCK_BYTES, BLOCK_BYTES + 3)) == whole
    assert asyncio.run(sums(BLOCK_BYTES - 1)) == whole


async def test_a_source_that_is_read_ahead_is_closed_and_its_error_is_told() -> None:
    closed: list[bool] = []

    async def failing() -> AsyncGenerator[bytes, None]:
        try:
            yield b"one"
            raise Unavailable("as planned")
        finally:
            closed.append(True)

    told = ahead(failing())
    assert await anext(told) == b"one"
    with pytest.raises(Unavailable):
        await anext(told)
    assert closed == [True]
    left = ahead(failing())
    assert await anext(left) == b"one"
    await left.aclose()
    assert closed == [True, True]
