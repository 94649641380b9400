"""Uploads of a node: their hour, their order, and that nothing of them stays behind."""

from __future__ import annotations

import asyncio
import base64
import hashlib
from collections.abc import AsyncGenerator
from typing import Any

import msgspec
import pytest

from perdure.core.errors import LimitExceeded
from perdure.services.lifecycle import Node
from perdure.services.uploads import ENDED_KEPT_S
from perdure.surfaces.files import BLOCK_BYTES, FILES, PARTS, UPLOADS
from perdure.wire.errors import NotFound, WireError
from tests.services.conftest import Open, someone
from tests.services.test_files import Clock, bytes_of, claims, stored

PIECES = (b"first part, ", bytes(BLOCK_BYTES + 5), b"last part")
WHOLE = b"".join(PIECES)


async def announce(node: Node, size_bytes: int = len(WHOLE), **more: Any) -> str:
    sent = {"bytes": size_bytes, "filename": "a", "mime_type": "text/plain", "purpose": "batch"}
    return msgspec.json.decode(await node.uploads.create(nobody(), sent | more))["id"]


def nobody() -> Any:
    return someone(digest="")


async def add(node: Node, upload_id: str, data: bytes) -> str:
    async def chunks() -> AsyncGenerator[bytes, None]:
        yield data

    body = await node.uploads.add("default", upload_id, chunks(), lambda sent: nobody())
    return msgspec.json.decode(body)["id"]


async def complete(node: Node, upload_id: str, part_ids: list[str], **more: Any) -> dict[str, Any]:
    sent = {"part_ids": part_ids} | more
    return msgspec.json.decode(await node.uploads.complete(nobody(), upload_id, sent))


async def refused(work: Any) -> str:
    with pytest.raises(WireError) as error:
        await work
    return error.value.code


async def count(node: Node, records: Any) -> int:
    return (await node.state.engine.count(records, ())).get((), 0)


# proves R10
async def test_parts_sent_side_by_side_become_a_file_in_the_order_named(opened: Open) -> None:
    node = (await opened()).node
    upload = await announce(node, expires_after={"anchor": "created_at", "seconds": 3_600})
    sent = await asyncio.gather(*(add(node, upload, piece) for piece in (*PIECES, PIECES[0])))
    made = await complete(node, upload, sent[:3], md5=hashlib.md5(WHOLE).hexdigest())
    assert (made["status"], made["file"]["bytes"]) == ("completed", len(WHOLE))
    assert made["file"]["expires_at"] == made["file"]["created_at"] + 3_600
    file_id = made["file"]["id"]
    assert await bytes_of(node, file_id) == WHOLE
    held = await node.files.get("default", file_id)
    for start, size in ((0, 1), (11, 3), (13, BLOCK_BYTES), (len(WHOLE) - 10, 10)):
        parts = node.files.content(held, start=start, size_bytes=size)
        assert b"".join([part async for part in parts]) == WHOLE[start : start + size]
    assert await count(node, PARTS) == 0
    assert await claims(node) == 0
    await node.files.delete("default", file_id)
    assert await stored(node) == []


# proves R10
async def test_a_completion_that_does_not_fit_is_refused_and_can_be_corrected(
    opened: Open,
) -> None:
    node = (await opened()).node
    upload = await announce(node)
    first, second, third = [await add(node, upload, piece) for piece in PIECES]
    order = [first, second, third]
    assert await refused(complete(node, upload, order[:2])) == "upload_size_mismatch"
    assert await refused(complete(node, upload, [*order, "part_x"])) == "upload_part_not_found"
    assert await refused(complete(node, upload, [first, first])) == "invalid_value"
    wrong = hashlib.md5(b"other").hexdigest()
    assert await refused(complete(node, upload, order, md5=wrong)) == "upload_md5_mismatch"
    assert await refused(complete(node, upload, order, md5="none")) == "invalid_value"
    md5 = base64.b64encode(hashlib.md5(WHOLE).digest()).decode()
    made = await complete(node, upload, order, md5=md5)
    assert await bytes_of(node, made["file"]["id"]) == WHOLE
    assert await refused(complete(node, upload, order[::-1])) == "upload_completed"
    assert await refused(complete(node, upload, order)) == "upload_completed"  # with the MD5 it was
    assert await complete(node, upload, order, md5=md5) == made
    await node.files.delete("default", made["file"]["id"])
    assert await refused(complete(node, upload, order, md5=md5)) == "upload_completed"
    assert await refused(add(node, upload, b"late")) == "upload_completed"
    assert await refused(node.uploads.cancel(nobody(), upload)) == "upload_completed"


# proves C22
async def test_a_completion_sent_again_gets_the_same_file(opened: Open) -> None:
    node = (await opened()).node
    upload = await announce(node, 5)
    sent = {"part_ids": [await add(node, upload, b"12345")]}
    lost = await node.uploads.complete(someone(digest="same"), upload, sent)
    again = await node.uploads.complete(someone(digest="same", retried=True), upload, sent)
    assert again == lost


# proves R10, C22
async def test_equal_completions_at_once_make_one_file_and_get_one_answer(opened: Open) -> None:
    node = (await opened()).node
    for _ in range(5):
        upload = await announce(node)
        order = [await add(node, upload, piece) for piece in PIECES]
        sent = {"part_ids": order}
        many = [node.uploads.complete(someone(), upload, sent) for _ in range(4)]
        other = node.uploads.complete(someone(), upload, {"part_ids": order[::-1]})
        *answers, odd = await asyncio.gather(*many, other, return_exceptions=True)
        told = {answer for answer in answers if isinstance(answer, bytes)}
        if isinstance(odd, bytes):  # it was the first: the others name another order
            assert told == set()
        else:
            assert len(told) == 1
            assert told == set(answers)
            assert isinstance(odd, WireError)
        assert await count(node, FILES) == 1
        held = await node.state.uploads.get("default", upload)
        await node.files.delete("default", str(held.value.file_id))
        assert (await stored(node), await claims(node)) == ([], 0)


# proves R10
async def test_a_cancelled_upload_leaves_nothing(opened: Open) -> None:
    node = (await opened()).node
    upload = await announce(node)
    await add(node, upload, PIECES[0])
    body = await node.uploads.cancel(nobody(), upload)
    assert msgspec.json.decode(body)["status"] == "cancelled"
    assert (await count(node, PARTS), await stored(node), await claims(node)) == (0, [], 0)
    assert await refused(add(node, upload, b"late")) == "upload_cancelled"
    assert await stored(node) == []


# proves R10
async def test_an_upload_lives_an_hour(opened: Open) -> None:
    clock = Clock()
    node = (await opened(clock=clock)).node
    upload = await announce(node)
    part = await add(node, upload, PIECES[0])
    clock.late_s = 3_601
    assert await refused(add(node, upload, b"late")) == "upload_expired"
    assert await refused(complete(node, upload, [part])) == "upload_expired"
    await node.uploads.sweep()
    assert (await count(node, PARTS), await stored(node), await claims(node)) == (0, [], 0)
    assert await refused(add(node, upload, b"late")) == "upload_expired"
    clock.late_s += ENDED_KEPT_S + 1
    await node.uploads.sweep()
    assert await count(node, UPLOADS) == 0
    with pytest.raises(NotFound):
        await add(node, upload, b"late")


# proves R10
async def test_a_part_that_arrives_while_its_upload_ends_is_refused_and_gone(
    opened: Open,
) -> None:
    node = (await opened()).node
    upload = await announce(node)

    async def chunks() -> AsyncGenerator[bytes, None]:
        yield b"half"
        await node.uploads.cancel(nobody(), upload)
        yield b"other half"

    late = node.uploads.add("default", upload, chunks(), lambda sent: nobody())
    assert await refused(late) == "upload_cancelled"
    assert (await count(node, PARTS), await stored(node), await claims(node)) == (0, [], 0)


# proves R10
async def test_an_upload_that_is_cancelled_while_its_parts_are_read_says_so(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = (await opened()).node
    upload = await announce(node)
    parts = [await add(node, upload, piece) for piece in PIECES]
    content = node.files.content

    async def late(held: Any, **more: Any) -> AsyncGenerator[bytes, None]:
        await node.uploads.cancel(nobody(), upload)
        async for part in content(held, **more):
            yield part

    monkeypatch.setattr(node.files, "content", late)
    ending = complete(node, upload, parts, md5=hashlib.md5(WHOLE).hexdigest())
    assert await refused(ending) == "upload_cancelled"
    assert node.blobs.warnings == []


async def test_parts_may_be_sent_twice_and_not_for_ever(opened: Open) -> None:
    node = (await opened()).node
    upload = await announce(node, 4)
    await add(node, upload, b"1234")
    await add(node, upload, b"1234")
    with pytest.raises(LimitExceeded):
        await add(node, upload, b"1")


# proves R10
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("bytes", 0),
        ("bytes", 8 * 2**30 + 1),
        ("filename", "a\0"),
        ("purpose", "fun"),
        ("expires_after", {"anchor": "created_at", "seconds": 1}),
        ("colour", "red"),
    ],
)
async def test_an_announcement_that_does_not_fit_is_refused_by_name(
    opened: Open, field: str, value: Any
) -> None:
    node = (await opened()).node
    with pytest.raises(WireError) as error:
        await announce(node, **{field: value})
    assert (error.value.param or "").startswith(field)
