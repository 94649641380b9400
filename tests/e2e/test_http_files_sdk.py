"""The Files API through the official client, against a server of its own."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path

import openai
import pytest

from tests.e2e.http_server import serving

DATA = b"%PDF-1.7 not really\n" * 2_000


# proves R10
async def test_files_through_the_official_client(tmp_path: Path) -> None:
    async with serving(tmp_path / "data") as server, server.sdk() as client:
        made = await client.files.create(
            file=("report.pdf", DATA),
            purpose="user_data",
            expires_after={"anchor": "created_at", "seconds": 3_600},
        )
        assert (made.bytes, made.filename, made.status) == (len(DATA), "report.pdf", "processed")
        assert made.expires_at == made.created_at + 3_600
        assert await client.files.retrieve(made.id) == made
        other = await client.files.create(file=tmp_path / "data.log", purpose="batch")
        assert [file.id async for file in client.files.list(limit=1, order="asc")] in (
            [made.id, other.id],
            [other.id, made.id],
        )
        assert [file.id async for file in client.files.list(purpose="batch")] == [other.id]
        assert (await client.files.content(made.id)).content == DATA
        waited = await client.files.wait_for_processing(made.id)
        assert waited.id == made.id
        deleted = await client.files.delete(made.id)
        assert (deleted.id, deleted.deleted) == (made.id, True)
        with pytest.raises(openai.NotFoundError):
            await client.files.content(made.id)
        with pytest.raises(openai.BadRequestError, match="purpose"):
            await client.files.create(file=("a.txt", b"a"), purpose="mischief")  # type: ignore[arg-type]


# proves R10
async def test_files_are_there_after_a_kill(tmp_path: Path) -> None:
    async with serving(tmp_path / "data") as server, server.sdk() as client:
        made = await client.files.create(file=("report.pdf", DATA), purpose="user_data")
        await server.end(9)
    async with serving(tmp_path / "data") as server, server.sdk() as client:
        assert await client.files.retrieve(made.id) == made
        assert (await client.files.content(made.id)).content == DATA


# proves R10
async def test_uploads_through_the_official_client(tmp_path: Path) -> None:
    whole = DATA * 20
    async with serving(tmp_path / "data") as server, server.sdk() as client:
        upload = await client.uploads.create(
            bytes=len(whole), filename="big.bin", mime_type="text/plain", purpose="user_data"
        )
        assert (upload.status, upload.expires_at) == ("pending", upload.created_at + 3_600)
        halves = (whole[:300_000], whole[300_000:])
        second, first = await asyncio.gather(
            *(client.uploads.parts.create(upload.id, data=half) for half in halves[::-1])
        )
        assert first.upload_id == upload.id
        done = await client.uploads.complete(
            upload.id,
            part_ids=[first.id, second.id],
            md5=hashlib.md5(whole).hexdigest(),
        )
        assert done.file is not None
        assert (await client.files.content(done.file.id)).content == whole
        chunked = await client.uploads.upload_file_chunked(
            file=whole,
            filename="again.bin",
            bytes=len(whole),
            mime_type="text/plain",
            purpose="user_data",
            part_size=100_000,
        )
        assert chunked.file is not None
        assert (await client.files.content(chunked.file.id)).content == whole
        other = await client.uploads.create(
            bytes=5, filename="a", mime_type="text/plain", purpose="batch"
        )
        assert (await client.uploads.cancel(other.id)).status == "cancelled"
        with pytest.raises(openai.BadRequestError, match="cancelled"):
            await client.uploads.parts.create(other.id, data=b"12345")


# proves R10
async def test_the_built_in_model_quotes_an_attached_file(tmp_path: Path) -> None:
    async with serving(tmp_path / "data") as server, server.sdk() as client:
        notes = b"Backups run at night.\n\nThe folder is synced after a rename.\n"
        file = await client.files.create(file=("notes.markdown", notes), purpose="user_data")
        answer = await client.responses.create(
            model="perdure-extract",
            input=[
                {
                    "role": "user",
                    "content": [
                        {"type": "input_file", "file_id": file.id},
                        {"type": "input_text", "text": "What is synced after a rename?"},
                    ],
                }
            ],
        )
        assert "notes.markdown, line 3: The folder is synced after a rename." in answer.output_text
        assert "night" not in answer.output_text
        with pytest.raises(openai.BadRequestError, match=r"a\.docx"):
            await client.responses.create(
                model="perdure-extract",
                input=[
                    {
                        "role": "user",
                        "content": [
                            {"type": "input_file", "filename": "a.docx", "file_data": "UEs="}
                        ],
                    }
                ],
            )
