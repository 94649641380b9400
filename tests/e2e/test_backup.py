"""Backing up a server that is in use, and what is left when it is killed meanwhile."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from typing import Any

import openai

from perdure import library
from perdure.core.batch import join, put
from perdure.core.disk import TEMPORARY
from perdure.proving.waiting import wait_until
from perdure.surfaces.conversations import CONVERSATIONS, Conversation
from tests.e2e.http_server import perdure, serving


async def fill(data: Path, records: int) -> None:
    """So much that a backup takes a moment."""
    data.mkdir()
    async with library.open(f"sqlite:///{data / 'perdure.db'}") as state:
        for start in range(0, records, 2_000):
            await state.commit(
                join(
                    put(
                        CONVERSATIONS,
                        ("default", f"conv_{number}"),
                        Conversation(number, {"padding": "x" * 400}),
                    )
                    for number in range(start, start + 2_000)
                )
            )


# proves C17
async def test_what_was_answered_before_a_backup_is_in_it(tmp_path: Path) -> None:
    data, target, other = tmp_path / "data", tmp_path / "backup", tmp_path / "other"
    await fill(data, 10_000)
    answered: dict[str, Any] = {}
    stop = asyncio.Event()

    async def write(sdk: openai.AsyncOpenAI, writer: int) -> None:
        previous: str | None = None
        while not stop.is_set():
            answer = await sdk.responses.create(
                model="perdure-extract",
                input=f"The number of writer {writer} is {len(answered)}.",
                previous_response_id=previous,
            )
            answered[answer.id] = answer
            previous = answer.id if len(answered) % 5 else None

    async with serving(data) as server, server.sdk() as sdk:
        writing = [asyncio.create_task(write(sdk, writer)) for writer in range(4)]

        async def some() -> bool:
            return len(answered) >= 20

        await wait_until(some, 20, "answers")
        before = dict(answered)
        backed_up = await perdure("backup", str(target), "--data", str(data), "--json")
        assert backed_up.code == 0, backed_up.err
        during = len(answered) - len(before)
        stop.set()
        await asyncio.gather(*writing)
        assert during > 0, "writers stood still during the backup"
    restored = await perdure("restore", str(target), "--data", str(other), "--json")
    assert restored.code == 0, restored.err
    assert restored.json() == backed_up.json()
    verified = await perdure("verify", "--data", str(other))
    assert (verified.code, verified.out) == (0, "nothing is damaged\n")
    async with serving(other) as server, server.sdk() as sdk:
        for response_id, answer in before.items():
            assert await sdk.responses.retrieve(response_id) == answer
        last = await sdk.responses.create(
            model="perdure-extract", input="The number?", previous_response_id=next(iter(before))
        )
        assert last.status == "completed"


# proves C17
async def test_a_kill_during_a_backup_leaves_the_source_and_no_half_backup(tmp_path: Path) -> None:
    data, target = tmp_path / "data", tmp_path / "backup"
    await fill(data, 20_000)
    growing = target.with_name(target.name + TEMPORARY)
    async with serving(data) as server, server.sdk() as sdk:
        answer = await sdk.responses.create(model="perdure-extract", input="Keep this.")
        backing_up = asyncio.create_task(perdure("backup", str(target), "--data", str(data)))

        async def copying() -> bool:
            return (growing / "perdure.db").exists()

        await wait_until(copying, 20, "a backup under way")
        assert await server.end(signal.SIGKILL) == -signal.SIGKILL
        told = await backing_up
        assert (told.code, told.out) == (5, ""), told
        assert "stopped" in told.err
    assert growing.is_dir()
    assert not target.exists()
    refused = await perdure("restore", str(growing), "--data", str(tmp_path / "other"))
    assert refused.code == 3
    assert "cut short" in refused.err
    assert not (tmp_path / "other").exists()
    assert (await perdure("verify", "--data", str(data))).code == 0
    async with serving(data) as server, server.sdk() as sdk:
        assert await sdk.responses.retrieve(answer.id) == answer
        assert (await perdure("backup", str(target), "--data", str(data))).code == 0
    assert not growing.exists()
    again = await perdure("restore", str(target), "--data", str(tmp_path / "other"))
    assert again.code == 0, again.err


# proves C17
async def test_a_backup_that_nobody_waits_for_is_given_up(tmp_path: Path) -> None:
    data, target = tmp_path / "data", tmp_path / "backup"
    await fill(data, 20_000)
    growing = target.with_name(target.name + TEMPORARY)
    async with serving(data) as server:
        backing_up = asyncio.create_task(perdure("backup", str(target), "--data", str(data)))

        async def copying() -> bool:
            return (growing / "perdure.db").exists()

        async def gone() -> bool:
            return not growing.exists()

        await wait_until(copying, 20, "a backup under way")
        backing_up.cancel()
        await asyncio.wait((backing_up,))
        await wait_until(gone, 20, "the end of a backup nobody waits for")
        assert not target.exists()
        assert (await perdure("backup", str(target), "--data", str(data))).code == 0
        assert await server.end() == 0


async def test_what_cannot_be_done_is_said(tmp_path: Path) -> None:
    data = tmp_path / "data"
    absent = await perdure("backup", str(tmp_path / "b"), "--data", str(data))
    assert (absent.code, "there is no store" in absent.err) == (3, True)
    async with serving(data):
        data_taken = await perdure("backup", str(data), "--data", str(data))
        assert (data_taken.code, "never overwrites" in data_taken.err) == (2, True)
        over = await perdure("restore", str(tmp_path), "--data", str(data))
        assert (over.code, "is not empty" in over.err) == (2, True)
    nothing = await perdure("restore", str(tmp_path), "--data", str(tmp_path / "new"))
    assert (nothing.code, "is not a backup" in nothing.err) == (3, True)
    memory = await perdure("backup", str(tmp_path / "b"), "--engine", "memory://")
    assert memory.code == 3


# proves C17
async def test_files_are_backed_up_wherever_their_bytes_are(tmp_path: Path) -> None:
    """While a server runs and when none does, also with the blobs in a place of their own."""
    data, apart = tmp_path / "data", {"PERDURE_BLOBS": f"file:///{tmp_path / 'blobs'}"}
    async with serving(data, **apart) as server, server.sdk() as sdk:
        made = await sdk.files.create(file=("a.txt", b"kept" * 10_000), purpose="user_data")
        running = await perdure("backup", str(tmp_path / "one"), "--data", str(data), **apart)
        assert (running.code, "1 blobs" in running.out) == (0, True), running
        assert await server.end() == 0
    stopped = await perdure("backup", str(tmp_path / "two"), "--data", str(data), **apart)
    assert (stopped.code, "1 blobs" in stopped.out) == (0, True), stopped
    for name in ("one", "two"):
        other = tmp_path / f"from-{name}"
        back = await perdure("restore", str(tmp_path / name), "--data", str(other))
        assert back.code == 0, back.err
        async with serving(other) as server, server.sdk() as sdk:
            content = await sdk.files.content(made.id)
            assert content.content == b"kept" * 10_000
            assert (await perdure("verify", "--data", str(other))).code == 0
    (blob,) = (path for path in (tmp_path / "blobs").glob("??/*"))
    blob.rename(tmp_path / "away")
    lost = await perdure("verify", "--data", str(data), **apart)
    assert (lost.code, f"of files/{made.id}" in lost.out) == (6, True), lost
    refused = await perdure("backup", str(tmp_path / "three"), "--data", str(data), **apart)
    assert (refused.code, f"of files/{made.id}" in refused.err) == (6, True), refused
    async with serving(data, **apart):
        held = await perdure("verify", "--data", str(data), **apart)
        assert (held.code, held.out) == (lost.code, lost.out)
