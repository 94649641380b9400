"""Files over HTTP: what is kept, what is refused before anything is, and what is read of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from perdure.proving.waiting import wait_until
from perdure.surfaces.files import BLOCK_BYTES
from tests.frontends.conftest import Serve, Served

BOUNDARY = "xxBOUNDARYxx"
FORM = {"content-type": f"multipart/form-data; boundary={BOUNDARY}"}
DATA = bytes(range(256)) * 10


async def keep(
    server: Served, data: bytes = DATA, filename: str = "a.bin", **fields: str
) -> httpx.Response:
    fields = {"purpose": "user_data"} | fields
    return await server.client.post("/v1/files", data=fields, files={"file": (filename, data)})


async def kept(server: Served, data: bytes = DATA, **more: Any) -> dict[str, Any]:
    answer = await keep(server, data, **more)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def nothing_is_kept(server: Served) -> None:
    assert (await server.json("GET", "/v1/files"))["data"] == []
    assert [blob async for blob in server.node.blobs.blobs.list()] == []


def part(name: str, content: bytes, filename: str | None = None) -> bytes:
    named = f'name="{name}"' + (f'; filename="{filename}"' if filename is not None else "")
    head = f"--{BOUNDARY}\r\ncontent-disposition: form-data; {named}\r\n\r\n"
    return head.encode() + content + b"\r\n"


PURPOSE = part("purpose", b"user_data")
FILE = part("file", DATA, "a.bin")
END = f"--{BOUNDARY}--\r\n".encode()


# proves R10
@pytest.mark.parametrize("size_bytes", [0, 1, BLOCK_BYTES, 2 * BLOCK_BYTES + 5])
async def test_a_file_comes_back_as_it_was_sent(serve: Serve, size_bytes: int) -> None:
    server = await serve()
    data = (DATA * (size_bytes // len(DATA) + 1))[:size_bytes]
    file = await kept(server, data, filename="notes.txt")
    assert file["id"].startswith("file-")
    assert (file["bytes"], file["filename"], file["purpose"]) == (
        size_bytes,
        "notes.txt",
        "user_data",
    )
    assert file["status"] == "processed"
    assert await server.json("GET", f"/v1/files/{file['id']}") == file
    content = await server.client.get(f"/v1/files/{file['id']}/content")
    assert content.content == data
    assert content.headers["content-type"] == "application/octet-stream"
    head = await server.client.head(f"/v1/files/{file['id']}/content")
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == str(size_bytes)


# proves R10
@pytest.mark.parametrize(
    ("asked", "start", "end"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=5-", 5, None),
        ("bytes=-7", -7, None),
        (f"bytes=10-{BLOCK_BYTES + 10}", 10, BLOCK_BYTES + 11),
        (f"bytes={BLOCK_BYTES}-{9 * BLOCK_BYTES}", BLOCK_BYTES, None),
        (f"bytes=-{9 * BLOCK_BYTES}", 0, None),
    ],
)
async def test_a_part_of_a_file_is_read(
    serve: Serve, asked: str, start: int, end: int | None
) -> None:
    server = await serve()
    data = DATA * 900
    url = f"/v1/files/{(await kept(server, data))['id']}/content"
    answer = await server.client.get(url, headers={"range": asked})
    assert (answer.status_code, answer.content) == (206, data[start:end])
    first = start % len(data)
    span = f"bytes {first}-{first + len(answer.content) - 1}/{len(data)}"
    assert answer.headers["content-range"] == span
    tag = answer.headers["etag"]
    same = await server.client.get(url, headers={"range": asked, "if-range": tag})
    assert same.status_code == 206
    other = await server.client.get(url, headers={"range": asked, "if-range": '"other"'})
    assert (other.status_code, other.content) == (200, data)


# proves R10
async def test_what_a_client_has_already_is_not_sent_again(serve: Serve) -> None:
    server = await serve()
    url = f"/v1/files/{(await kept(server))['id']}/content"
    tag = (await server.client.get(url)).headers["etag"]
    for has in (tag, "*", f"W/{tag}", f'"other", {tag}'):
        answer = await server.client.get(url, headers={"if-none-match": has, "range": "bytes=0-1"})
        assert (answer.status_code, answer.content) == (304, b""), has
        assert answer.headers["etag"] == tag
        assert "content-length" not in answer.headers
    for has in ('"other"', tag.strip('"'), ""):
        answer = await server.client.get(url, headers={"if-none-match": has})
        assert (answer.status_code, answer.content) == (200, DATA), has
    twin = f"/v1/files/{(await kept(server))['id']}/content"
    assert (await server.client.get(twin, headers={"if-none-match": tag})).status_code == 304
    assert (
        await server.client.get("/v1/files/file-x/content", headers={"if-none-match": "*"})
    ).status_code == 404


# proves R10
async def test_a_part_behind_the_end_is_refused_and_an_odd_one_gets_all(serve: Serve) -> None:
    server = await serve()
    url = f"/v1/files/{(await kept(server))['id']}/content"
    for asked in (f"bytes={len(DATA)}-", "bytes=-0"):
        answer = await server.client.get(url, headers={"range": asked})
        assert answer.status_code == 416
        assert answer.headers["content-range"] == f"bytes */{len(DATA)}"
        assert answer.json()["error"]["code"] == "range_not_satisfiable"
    for asked in ("bytes=0-1,4-5", "bytes=9-3", "bytes=-", "lines=1-2"):
        answer = await server.client.get(url, headers={"range": asked})
        assert (answer.status_code, answer.content) == (200, DATA)


# proves R10
@pytest.mark.parametrize(
    ("form", "code", "param"),
    [
        (FILE + END, "missing_required_parameter", "purpose"),
        (PURPOSE + END, "missing_required_parameter", "file"),
        (part("purpose", b"mischief") + FILE + END, "invalid_value", "purpose"),
        (FILE + part("purpose", b"mischief") + END, "invalid_value", "purpose"),
        (PURPOSE + part("file", DATA) + END, "invalid_value", "file"),
        (PURPOSE + FILE + FILE + END, "invalid_value", "file"),
        (PURPOSE + PURPOSE + FILE + END, "invalid_value", "purpose"),
        (PURPOSE + FILE + part("colour", b"red") + END, "unknown_parameter", "colour"),
        (PURPOSE + part("file", DATA, "") + END, "invalid_value", "file"),
        (PURPOSE + part("file", DATA, "a\tb") + END, "invalid_value", "file"),
        (PURPOSE + part("file", DATA, "x" * 1_025) + END, "string_above_max_length", "file"),
        (part("purpose", b"p" * 5_000) + FILE + END, "string_above_max_length", "purpose"),
        (PURPOSE + FILE, "invalid_form", None),
        (PURPOSE + FILE[:-90], "invalid_form", None),
        (b"no form at all", "invalid_form", None),
        (b"", "invalid_form", None),
        (
            part("expires_after[seconds]", b"3600") + PURPOSE + FILE + END,
            "missing_required_parameter",
            "expires_after[anchor]",
        ),
    ],
)
async def test_a_form_that_is_wrong_leaves_nothing(
    serve: Serve, form: bytes, code: str, param: str | None
) -> None:
    server = await serve()
    answer = await server.client.post("/v1/files", content=form, headers=FORM)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, code, param)
    await nothing_is_kept(server)


async def test_what_is_no_form_is_refused(serve: Serve) -> None:
    server = await serve()
    for media in ("application/json", "multipart/form-data", "text/plain; boundary=x"):
        answer = await server.client.post(
            "/v1/files", content=PURPOSE + FILE + END, headers={"content-type": media}
        )
        assert answer.json()["error"]["code"] == "invalid_content_type"


# proves R10
@pytest.mark.parametrize(
    ("seconds", "code"),
    [
        ("3599", "integer_below_min_value"),
        ("2592001", "integer_above_max_value"),
        ("soon", "invalid_type"),
    ],
)
async def test_a_time_out_of_bounds_is_refused(serve: Serve, seconds: str, code: str) -> None:
    server = await serve()
    fields = {"expires_after[anchor]": "created_at", "expires_after[seconds]": seconds}
    answer = await keep(server, **fields)
    assert answer.json()["error"]["code"] == code
    await nothing_is_kept(server)


# proves R10
@pytest.mark.parametrize(
    "filename", ["../../etc/passwd", "/abs", "a b.txt", "ümläut 文.pdf", "..", "con", "a;b=c.txt"]
)
async def test_a_hostile_filename_is_only_a_name(
    serve: Serve, tmp_path: Path, filename: str
) -> None:
    server = await serve(engine=f"sqlite:///{tmp_path / 'perdure.db'}")
    file = await kept(server, filename=filename)
    assert file["filename"] == filename
    content = await server.client.get(f"/v1/files/{file['id']}/content")
    assert content.content == DATA
    assert content.headers["content-disposition"].isascii()
    inside = {path.name for path in (tmp_path / "blobs").iterdir()}
    assert len(inside - {"incoming", "lock", "owner"}) == 1


# proves R10
async def test_a_file_over_the_limit_is_refused_and_leaves_nothing(serve: Serve) -> None:
    server = await serve(limits__file_bytes_max=1_000)
    assert (await keep(server, b"x" * 1_000)).status_code == 200
    await server.client.delete(f"/v1/files/{(await kept(server, b'y'))['id']}")
    before = [blob async for blob in server.node.blobs.blobs.list()]
    for size_bytes in (1_001, 90_000):
        answer = await keep(server, b"x" * size_bytes)
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "request_too_large"
    assert [blob async for blob in server.node.blobs.blobs.list()] == before


# proves R10
async def test_a_client_that_leaves_in_the_middle_leaves_nothing(
    serve: Serve, tmp_path: Path
) -> None:
    server = await serve(engine=f"sqlite:///{tmp_path / 'perdure.db'}")
    incoming = tmp_path / "blobs" / "incoming"
    arrived, left = asyncio.Event(), asyncio.Event()

    async def halves() -> AsyncIterator[bytes]:
        yield PURPOSE + part("file", b"x" * 3_000_000, "a.bin")
        arrived.set()
        await left.wait()

    sending = asyncio.create_task(server.client.post("/v1/files", content=halves(), headers=FORM))
    await arrived.wait()
    sending.cancel()
    await asyncio.wait([sending])
    await server.client.aclose()

    async def gone() -> bool:
        return not list(incoming.iterdir())

    await wait_until(gone, 10, "an empty incoming directory")
    assert [blob async for blob in server.node.blobs.blobs.list()] == []


# proves R10
async def test_files_are_listed_by_purpose_in_order_page_by_page(serve: Serve) -> None:
    server = await serve()
    made = [
        (await kept(server, b"%d" % at, purpose=("batch", "vision")[at % 2]))["id"]
        for at in range(7)
    ]
    whole = await server.json("GET", "/v1/files?order=asc")
    assert {file["id"] for file in whole["data"]} == set(made)
    forwards = [file["id"] for file in whole["data"]]
    backwards = (await server.json("GET", "/v1/files"))["data"]
    assert [file["id"] for file in backwards] == forwards[::-1]
    found, after = [], ""
    while True:
        page = await server.json("GET", f"/v1/files?order=asc&limit=2{after}")
        found += [file["id"] for file in page["data"]]
        assert (page["first_id"], page["last_id"]) == (found[-len(page["data"])], found[-1])
        after = f"&after={found[-1]}"
        if not page["has_more"]:
            break
    assert found == forwards
    batch = await server.json("GET", "/v1/files?purpose=batch&limit=3")
    assert {file["purpose"] for file in batch["data"]} == {"batch"}
    assert (len(batch["data"]), batch["has_more"]) == (3, True)
    for query in ("purpose=none", "limit=0", "limit=10001", "order=up", "after=file-x", "x=1"):
        assert (await server.client.get(f"/v1/files?{query}")).status_code == 400


# proves R10
async def test_a_deleted_file_is_gone_with_its_bytes(serve: Serve) -> None:
    server = await serve()
    first, second = await kept(server), await kept(server)
    answer = await server.json("DELETE", f"/v1/files/{first['id']}")
    assert answer == {"id": first["id"], "object": "file", "deleted": True}
    for path in (f"/v1/files/{first['id']}", f"/v1/files/{first['id']}/content"):
        assert (await server.client.get(path)).status_code == 404
    assert (await server.client.delete(f"/v1/files/{first['id']}")).status_code == 404
    content = await server.client.get(f"/v1/files/{second['id']}/content")
    assert content.content == DATA
    await server.json("DELETE", f"/v1/files/{second['id']}")
    await nothing_is_kept(server)


# proves C22
async def test_a_file_sent_again_is_one_file(serve: Serve) -> None:
    server = await serve()

    async def send(**headers: str) -> httpx.Response:
        return await server.client.post(
            "/v1/files",
            data={"purpose": "user_data"},
            files={"file": ("a.bin", DATA)},
            headers=headers,
        )

    lost = await send(**{"x-stainless-retry-count": "0"})
    again = await send(**{"x-stainless-retry-count": "1"})
    assert again.content == lost.content
    assert (await send(**{"x-stainless-retry-count": "9" * 5_000})).content == lost.content
    named = await send(**{"idempotency-key": "one"})
    assert (await send(**{"idempotency-key": "one"})).content == named.content
    other = await server.client.post(
        "/v1/files",
        data={"purpose": "batch"},
        files={"file": ("a.bin", DATA)},
        headers={"idempotency-key": "one"},
    )
    assert other.json()["error"]["code"] == "idempotency_key_reused"
    assert len((await server.json("GET", "/v1/files"))["data"]) == 2
    assert [claim async for claim in server.node.blobs.uses.claims()] == []


# proves R10
@pytest.mark.parametrize("harm", ["changed", "shorter", "gone"])
async def test_harmed_bytes_are_a_typed_error_never_other_bytes(
    serve: Serve, tmp_path: Path, harm: str
) -> None:
    server = await serve(engine=f"sqlite:///{tmp_path / 'perdure.db'}")
    data = DATA * 900
    file = await kept(server, data)
    (path,) = (tmp_path / "blobs").glob("[0-9a-f][0-9a-f]/*")
    at = BLOCK_BYTES + 17
    if harm == "gone":
        path.unlink()
    else:
        path.write_bytes(data[:at] + (b"" if harm == "shorter" else b"!" + data[at + 1 :]))
    url = f"/v1/files/{file['id']}/content"
    got = b""
    try:
        async with server.client.stream("GET", url) as answer:
            status = answer.status_code
            async for chunk in answer.aiter_raw():
                got += chunk
    except httpx.RemoteProtocolError:
        assert harm == "changed"
        assert data.startswith(got)
        assert len(got) == BLOCK_BYTES
    else:
        assert harm != "changed"
        assert (status, b'"damaged"' in got) == (500, True)
    part = await server.client.get(url, headers={"range": f"bytes={at}-{at}"})
    assert part.status_code == 500
    assert part.json()["error"]["code"] == "damaged"
    shown = await server.json("GET", f"/v1/files/{file['id']}")
    assert shown["status"] == "error"
    assert "damaged" in shown["status_details"]
    ready = await server.json("GET", "/readyz")
    assert "blobs: 1 damaged" in ready["warnings"][0]
    await kept(server, data)
    assert (await server.client.get(url)).content == data
    assert await server.json("GET", f"/v1/files/{file['id']}") == file
