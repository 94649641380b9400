"""Servers that keep the bytes of files in an object store: two over one database, from different
directories as on different hosts; the store away and back; a backup; a copy to a directory."""

from __future__ import annotations

import random
from pathlib import Path

import openai
import pytest

from perdure.engines.blobs_s3 import PART_BYTES
from perdure.proving.s3 import KEYS, Server, serving_s3
from perdure.proving.subjects import postgres_url
from tests.e2e.http_server import perdure, serving

LARGE = random.Random(2).randbytes(PART_BYTES + 1_000)
SHARED = {"PERDURE_PROFILE": "shared"}


# proves R10, C17
async def test_files_in_an_object_store_are_those_of_every_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, key in KEYS.items():
        monkeypatch.setenv(name, key)
    engine = postgres_url(tmp_path)
    with serving_s3(tmp_path / "objects") as s3:
        blobs = s3.url("perdure", timeout_s="2")
        ours = SHARED | {"PERDURE_BLOBS": blobs}
        one, other = tmp_path / "one", tmp_path / "other"
        async with (
            serving(one, "--engine", engine, **ours) as first,
            serving(other, "--engine", engine, **ours) as second,
            first.sdk() as here,
            second.sdk() as there,
        ):
            file = await here.files.create(file=("a.bin", LARGE), purpose="user_data")
            assert (await there.files.content(file.id)).content == LARGE
            await judge_away(s3, there, file.id)
            assert (await second.end(), await first.end()) == (0, 0)
        await judge_moved(tmp_path, engine, blobs, file.id)


async def judge_away(s3: Server, sdk: openai.AsyncOpenAI, id: str) -> None:
    """What a server says while the object store is killed, and afterwards."""
    s3.kill()
    with pytest.raises(openai.InternalServerError) as refused:
        await sdk.files.create(file=("b.bin", b"lost"), purpose="user_data")
    assert refused.value.status_code == 503
    with pytest.raises(openai.InternalServerError) as refused:
        await sdk.files.content(id)
    assert refused.value.status_code == 503
    answer = await sdk.responses.create(model="perdure-extract", input="Are you there?")
    assert answer.status == "completed"
    s3.start()
    assert (await sdk.files.content(id)).content == LARGE
    assert [one.id for one in (await sdk.files.list()).data] == [id]


async def judge_moved(tmp_path: Path, engine: str, blobs: str, id: str) -> None:
    """A backup that is restored, and a copy, both to files."""
    named = ("--data", str(tmp_path / "one"), "--engine", engine)
    made = await perdure("backup", str(tmp_path / "backup"), *named, PERDURE_BLOBS=blobs)
    assert made.code == 0, made.err
    again = postgres_url(tmp_path / "again")
    restored = await perdure(
        *("restore", str(tmp_path / "backup"), "--engine", again),
        *("--data", str(tmp_path / "fourth")),
        PERDURE_BLOBS=blobs.replace("/perdure?", "/restored?"),
    )
    assert restored.code == 0, restored.err
    moved = tmp_path / "moved"
    copied = await perdure("copy", engine, f"sqlite:///{moved / 'perdure.db'}", "--blobs", blobs)
    assert copied.code == 0, copied.err
    async with serving(moved) as server, server.sdk() as sdk:
        assert (await sdk.files.content(id)).content == LARGE
