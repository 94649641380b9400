"""A store moved from one engine to another, by the command and under real servers; and what is
there when that is killed."""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path
from typing import Any

import openai
import pytest

from perdure import library
from perdure.core.batch import append, delete, join, put
from perdure.core.errors import Unavailable
from perdure.engines import open_blobs
from perdure.proving.subjects import postgres_url
from perdure.surfaces.conversations import CONVERSATIONS, Conversation
from perdure.surfaces.jobs import JOB_EVENTS, JobEvent
from tests.e2e.http_server import clean_environment, perdure, serving
from tests.services.test_backups import chunks

KILLED_AT = """
import asyncio, sys
from perdure import library
from perdure.engines import open_engine
from perdure.engines.failing import Edge, Failing, Fault, killing

async def killed_in_a_load(url, layouts, **options):
    engine = await open_engine(url, layouts, **options)
    faults = [Fault(Edge.AFTER, killing(), int(at))] if "copy_of" in options else []
    return Failing(engine, faults)

source, target, blobs, blobs_to, at = sys.argv[1:]
library.open_engine = killed_in_a_load
asyncio.run(library.copy(source, target, blobs, blobs_to, lambda *told: None))
"""
"""A copy that is killed when one of its loads is done."""


EVENT = JobEvent(type="began", attempt=1, at_s=1, runner="boot_1")


def sqlite_in(data: Path) -> str:
    return f"sqlite:///{data / 'perdure.db'}"


def local(engine: str, data: Path) -> str:
    return sqlite_in(data) if engine == "sqlite" else f"file:///{data / 'state'}"


async def talk(sdk: openai.AsyncOpenAI) -> tuple[list[Any], Any]:
    """A chain of three answers, one of them in the background, and a file."""
    file = await sdk.files.create(file=("a.txt", b"The number is 7." * 9_999), purpose="user_data")
    answers: list[Any] = []
    for turn in range(3):
        answers.append(
            await sdk.responses.create(
                model="perdure-extract",
                input=f"The number of turn {turn} is {turn * 7}.",
                previous_response_id=answers[-1].id if answers else None,
            )
        )
    gone = await sdk.responses.create(model="perdure-extract", input="Forget this.")
    await sdk.responses.delete(gone.id)
    return answers, file


async def check(sdk: openai.AsyncOpenAI, answers: list[Any], file: Any) -> None:
    """Everything is as it was answered, and goes on."""
    for answer in answers:
        assert await sdk.responses.retrieve(answer.id) == answer
    stream = await sdk.responses.retrieve(answers[0].id, stream=True, starting_after=2)
    numbers = [event.sequence_number async for event in stream]
    assert numbers == list(range(3, 3 + len(numbers)))
    assert (await sdk.files.content(file.id)).content == b"The number is 7." * 9_999
    assert [one.id for one in (await sdk.files.list()).data] == [file.id]
    more = await sdk.responses.create(
        model="perdure-extract",
        input="What is the number of turn 2?",
        previous_response_id=answers[-1].id,
    )
    assert more.status == "completed"
    assert "14" in more.output_text


# proves C17, R2
async def test_a_store_moves_to_postgres_and_back_with_its_files(tmp_path: Path) -> None:
    data, back, shared = tmp_path / "data", tmp_path / "back", postgres_url(tmp_path)
    async with serving(data) as server, server.sdk() as sdk:
        answers, file = await talk(sdk)
        refused = await perdure("copy", sqlite_in(data), shared)
        assert (refused.code, "in use" in refused.err) == (5, True), refused
        assert await server.end(signal.SIGKILL) == -signal.SIGKILL
    copied = await perdure("copy", sqlite_in(data), shared, "--json")
    assert copied.code == 0, copied.err
    told = copied.json()
    assert (told["counts"]["responses"], told["counts"]["files"], told["blobs"]) == (3, 1, 1)
    assert told["counts"]["tombstones"] > 0
    async with serving(data, "--engine", shared) as server, server.sdk() as sdk:
        await check(sdk, answers, file)
        assert await server.end() == 0
    verified = await perdure("verify", "--data", str(data), "--engine", shared)
    assert (verified.code, verified.out) == (0, "nothing is damaged\n")
    again = await perdure("copy", sqlite_in(data), shared)
    assert (again.code, "holds that store already" in again.err) == (2, True), again
    copied = await perdure(
        "copy", shared, sqlite_in(back), "--blobs", f"file:///{data / 'blobs'}", "--json"
    )
    assert copied.code == 0, copied.err
    assert copied.json()["blobs_at"] == f"file:///{back / 'blobs'}"
    async with serving(back) as server, server.sdk() as sdk:
        await check(sdk, answers, file)
    assert (await perdure("verify", "--data", str(back))).code == 0


async def fill(data: Path) -> None:
    """A store of several pages of rows, of every kind, and blobs."""
    data.mkdir()
    async with library.open(sqlite_in(data)) as state:
        keys = [("default", f"conv_{number}") for number in range(1_500)]
        rows = [put(CONVERSATIONS, key, Conversation(1, {"a": "b"})) for key in keys]
        await state.commit(join(rows).named("an operation"))
        await state.commit(join(delete(CONVERSATIONS, key) for key in keys[:100]))
        for _ in range(3):
            await state.commit(append(JOB_EVENTS, ("default", "job"), [EVENT] * 900))
    kept = await open_blobs(f"file:///{data / 'blobs'}", owner=state.engine.store_id)
    for body in (b"one" * 9_999, b"two"):
        await kept.put(chunks(body), size_bytes_max=len(body))
    await kept.close()


async def killed_copy(source: str, target: str, data: Path, into: Path, at: int) -> int | None:
    blobs = (f"file:///{data / 'blobs'}", f"file:///{into / 'blobs'}")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", KILLED_AT, source, target, *blobs, f"{at}"),
        env=clean_environment(),
    )
    await asyncio.wait_for(process.wait(), 60)
    return process.returncode


async def is_whole(target: str) -> bool:
    try:
        async with library.open(target, read_only=True):
            return True
    except Unavailable:
        return False


# proves C17, C4
@pytest.mark.parametrize("engine", ["sqlite", "files", "postgres"])
async def test_a_copy_that_is_killed_at_every_load_is_completed_and_used_only_then(
    engine: str, tmp_path: Path
) -> None:
    data, into = tmp_path / "data", tmp_path / "into"
    source = sqlite_in(data)
    target = postgres_url(into) if engine == "postgres" else local(engine, into)
    await fill(data)
    loads = 0
    while loads == 0 or not await is_whole(target):
        loads += 1
        code = await killed_copy(source, target, data, into, loads)
        assert code == -signal.SIGKILL
        if loads == 2:
            named = ("--data", str(into), "--engine", target)
            for command in (("serve", "--port", "0"), ("verify",)):
                refused = await perdure(*command, *named, cwd=tmp_path)
                assert (refused.code, "is not complete" in refused.err) == (5, True), refused
    assert loads >= 5
    verified = await library.verify(target, f"file:///{into / 'blobs'}")
    assert verified.ok, verified
    async with library.open(source) as before, library.open(target) as after:
        page = None
        while page is None or page.after is not None:
            at = page.after if page else None
            page = await before.engine.rows(after=at)
            assert await after.engine.rows(after=at) == page
    one, other = ({path.name for path in (at / "blobs").rglob("*")} for at in (data, into))
    assert one == other


# proves C17
async def test_a_source_that_was_written_to_meanwhile_is_not_copied(tmp_path: Path) -> None:
    data, into = tmp_path / "data", tmp_path / "into"
    await fill(data)
    source, target = sqlite_in(data), sqlite_in(into)
    assert await killed_copy(source, target, data, into, 2) == -signal.SIGKILL
    async with library.open(source) as state:
        await state.commit(put(CONVERSATIONS, ("default", "conv_500"), Conversation(2, {})))
    refused = await perdure("copy", source, target)
    assert (refused.code, "was written to since" in refused.err) == (5, True), refused
    async with library.open(source) as state:
        await state.commit(delete(CONVERSATIONS, ("default", "conv_500")))
    refused = await perdure("copy", source, target)
    assert (refused.code, "was written to since" in refused.err) == (5, True), refused
    assert not await is_whole(target)
    other = await perdure("copy", sqlite_in(tmp_path / "absent"), target)
    assert other.code == 3, other
    await fill(tmp_path / "third")
    third = await perdure("copy", sqlite_in(tmp_path / "third"), target)
    assert (third.code, "unfinished copy of another store" in third.err) == (2, True), third
    full = await perdure("copy", source, sqlite_in(tmp_path / "third"))
    assert (full.code, "holds another store" in full.err) == (2, True), full


def at_work(url: str, input: str) -> list[Any]:
    """One more turn of a worker, where it is now; and all that it has said."""
    with library.blocking(url) as state:
        workers = state.workers
        workers.create_runtime({"id": "lab", "config": {"model": "m"}})
        workers.create("lab", {"id": "scout"})
        workers.input("lab", "scout", {"content": input, "submission_id": input})
        step = {"generation": workers.start("lab", "scout").generation, "taken": 1}
        said = [{"role": "assistant", "content": f"{input}, done"}]
        workers.progress("lab", "scout", {**step, "transcript": said, "state": input})
        workers.release("lab", "scout", {"generation": step["generation"]})
        told = [one.content for one in workers.transcript("lab", "scout").data]
        assert workers.overview("lab", "scout").taken * 2 == len(told)
        return told


# proves C17, W1, W2
def test_a_worker_moves_from_engine_to_engine_and_goes_on_in_each(tmp_path: Path) -> None:
    places = [
        *(local("files", tmp_path / "a"), local("sqlite", tmp_path / "b")),
        *(postgres_url(tmp_path), local("files", tmp_path / "c")),
    ]
    blobs = f"file:///{tmp_path / 'blobs'}"
    said: list[Any] = []
    for number, place in enumerate(places):
        said += [f"input-{number}", f"input-{number}, done"]
        assert at_work(place, f"input-{number}") == said
        if number + 1 == len(places):
            break
        killed = (place, places[number + 1], tmp_path, tmp_path, 1)
        assert asyncio.run(killed_copy(*killed)) == -signal.SIGKILL
        with pytest.raises(Unavailable, match="not complete"):
            at_work(places[number + 1], "too-early")
        asyncio.run(library.copy(place, places[number + 1], blobs, blobs, lambda *told: None))
