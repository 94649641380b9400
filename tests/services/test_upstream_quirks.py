"""What upstreams do that no specification says: each must end in an answer or a typed error."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest

from perdure.core import codec
from perdure.core.batch import Append, Batch
from perdure.core.errors import StorageFull
from perdure.core.values import Committed
from perdure.engines.wrapping import Wrapping
from perdure.proving.waiting import wait_until
from perdure.services.config import load
from perdure.services.lifecycle import Node
from perdure.services.recovery import RESTARTED, interrupt
from tests.services.conftest import Driver

STREAM = "text/event-stream"


def chunk(delta: dict[str, Any], finish: str | None = None) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return b"data: %b\n\n" % codec.encode({"choices": [choice]})


DONE = b"data: [DONE]\n\n"


class Full(Wrapping):
    """An engine over a disk that can be full; after `refusals` of them there is space again. There
    is some left for batches that do not write `word`."""

    full = False
    refusals = 0
    word = b""

    async def commit(self, batch: Batch) -> Committed:
        if self.full and self.word in b"".join(_events(batch)):
            self.refusals -= 1
            self.full = self.refusals != 0
            raise StorageFull("the disk is full.")
        return await super().commit(batch)


def _events(batch: Batch) -> Iterator[bytes]:
    return (entry for op in batch.ops if isinstance(op, Append) for entry in op.entries)


class Quirky:
    """A server that gives these bytes to every question, and may then stay silent."""

    def __init__(self) -> None:
        self.body = b""
        self.media = STREAM
        self.closes = True
        self._left = asyncio.Event()

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError):  # a client that asks nothing
            await reader.readuntil(b"\r\n\r\n")
        head = f"HTTP/1.1 200 OK\r\nContent-Type: {self.media}\r\nConnection: close\r\n\r\n"
        writer.write(head.encode() + self.body)
        if not self.closes:
            await self._left.wait()
        writer.close()

    def leave(self) -> None:
        self._left.set()


@pytest.fixture
async def quirky() -> AsyncIterator[tuple[Quirky, str]]:
    quirk = Quirky()
    server = await asyncio.start_server(quirk.answer, "127.0.0.1", 0)
    yield quirk, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    quirk.leave()
    server.close()


@pytest.fixture
async def driver(quirky: tuple[Quirky, str], tmp_path: Path) -> AsyncIterator[Driver]:
    flags = {"engine": f"sqlite:///{tmp_path / 'p.db'}", "data": str(tmp_path)}
    node = Node(load(environment={}, flags=flags | {"upstream.url": quirky[1]}), wrap=Full)
    await node.open()
    yield Driver(node)
    engine = node.state.engine
    assert isinstance(engine, Full)
    engine.full = False
    await node.drain(0)
    await node.close()


# proves R12
async def test_an_event_stream_is_read_whatever_it_says_it_is(
    driver: Driver, quirky: tuple[Quirky, str]
) -> None:
    quirky[0].media = "application/json"
    quirky[0].body = b"\n" + chunk({"content": "hi"}) + chunk({}, "stop") + DONE
    assert (await driver.answer("go"))["output"][0]["content"][0]["text"] == "hi"


# proves R12
async def test_an_upstream_that_reports_an_error_and_stays_is_not_waited_for(
    driver: Driver, quirky: tuple[Quirky, str]
) -> None:
    quirky[0].closes = False
    quirky[0].body = chunk({"content": "hi"}) + b'data: {"error": {"message": "out of memory"}}\n\n'
    ended = await driver.answer("go")
    assert (ended["status"], ended["output"][0]["status"]) == ("failed", "incomplete")
    assert "out of memory" in ended["error"]["message"]


# proves R12
async def test_an_upstream_that_ends_its_answer_and_says_nothing_more_is_not_waited_for(
    driver: Driver, quirky: tuple[Quirky, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("perdure.services.upstream._REST_WITHIN_S", 0.1)
    quirky[0].closes = False
    quirky[0].body = chunk({"content": "hi"}, "stop") + b": still there\n\n"
    async with asyncio.timeout(10):
        ended = await driver.answer("go")
    assert (ended["status"], ended["usage"]) == ("completed", None)
    assert ended["output"][0]["content"][0]["text"] == "hi"


# proves R12
async def test_an_answer_that_was_finished_before_the_connection_broke_is_whole(
    driver: Driver, quirky: tuple[Quirky, str]
) -> None:
    quirky[0].body = chunk({"content": "hi"}) + chunk({}, "stop") + b"data: {broken\n\n"
    assert (await driver.answer("go"))["status"] == "completed"


# proves R5
async def test_one_line_with_more_calls_than_a_commit_holds_ends_the_response(
    driver: Driver, quirky: tuple[Quirky, str]
) -> None:
    calls = [{"function": {"name": "a"}}] * 30_000
    quirky[0].body = chunk({"tool_calls": calls}, "tool_calls") + DONE
    ended = await driver.answer("go")
    assert ended["status"] == "incomplete"
    assert ended["perdure"]["reason"] == "output_too_large"


# proves R5
@pytest.mark.parametrize("restarted", [False, True])
async def test_an_end_that_is_too_large_to_be_stored_is_stored_without_the_output(
    driver: Driver, quirky: tuple[Quirky, str], restarted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    quirky[0].closes = not restarted
    quirky[0].body = chunk({"content": "x" * 5_000}) + (b"" if restarted else chunk({}, "stop"))
    started = await driver.ask("go", stream=True)
    monkeypatch.setattr("perdure.core.batch.ATTACHMENT_BYTES_MAX", 4_000)
    if restarted:
        async for group in driver.node.gateway.events(started, after=-1):
            if b"output_text.delta" in b"".join(group):
                break
        held = await driver.node.state.responses.get(*started.key)
        await interrupt(driver.node.state, held, RESTARTED, driver.node.clock)
    else:
        await driver.node.gateway.finished(started)
    held = await driver.node.state.responses.get(*started.key)
    ended = msgspec.json.decode(held.attachment or b"")
    assert (ended["status"], ended["output"]) == ("failed", [])
    assert ended["perdure"]["reason"] == "output_too_large"
    assert (await driver.events(started))[-1]["type"] == "response.failed"


# proves O2, C10
async def test_a_full_disk_does_not_keep_a_server_from_stopping(
    driver: Driver, quirky: tuple[Quirky, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("perdure.services.gateway._STOP_WAIT_S", 0.2)
    quirky[0].closes = False
    quirky[0].body = chunk({"content": "hi"})
    started = await driver.ask("go")
    async for group in driver.node.gateway.events(started, after=-1):
        if b"output_text.delta" in b"".join(group):
            break
    engine = driver.node.state.engine
    assert isinstance(engine, Full)
    engine.full = True
    await driver.node.drain(0)
    assert driver.node.gateway.stats.running == 0
    assert not (await driver.node.state.responses.get(*started.key)).value.status.terminal


# proves C10
@pytest.mark.parametrize("word", [b"output_text.delta", b"output_item.done", b"response.completed"])
async def test_a_disk_that_is_full_for_a_moment_costs_a_response_nothing(
    driver: Driver, quirky: tuple[Quirky, str], word: bytes
) -> None:
    quirky[0].body = chunk({"content": "hi"}) + chunk({}, "stop") + DONE
    engine = driver.node.state.engine
    assert isinstance(engine, Full)
    started = await driver.ask("go")
    engine.full, engine.refusals, engine.word = True, 1, word
    events = await driver.events(started)
    assert [event["type"].removeprefix("response.") for event in events] == [
        *("created", "in_progress", "output_item.added", "content_part.added"),
        *("output_text.delta", "output_text.done", "content_part.done", "output_item.done"),
        "completed",
    ]
    assert events[-1]["response"]["output"][0]["content"][0]["text"] == "hi"
    assert (engine.full, engine.refusals) == (False, 0)


# proves R3
async def test_an_end_waits_for_the_events_that_stand_before_it(
    driver: Driver, quirky: tuple[Quirky, str]
) -> None:
    quirky[0].closes = False
    quirky[0].body = chunk({"content": "hi"})
    engine = driver.node.state.engine
    assert isinstance(engine, Full)
    started = await driver.ask("go")
    engine.full, engine.refusals, engine.word = True, 1, b"output_text.delta"

    async def refused() -> bool:
        return not engine.full

    await wait_until(refused, 10, "events that have to wait for space")
    await driver.node.drain(0)
    types = [event["type"].removeprefix("response.") for event in await driver.events(started)]
    assert types[-5:] == [
        *("output_text.delta", "output_text.done", "content_part.done", "output_item.done"),
        "failed",
    ]


# proves C10
async def test_what_cannot_be_stored_ends_generation_however_quiet_the_upstream_is(
    driver: Driver, quirky: tuple[Quirky, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("perdure.services.runs._PATIENCE_S", 0.2)
    quirky[0].closes = False
    quirky[0].body = chunk({"content": "hi"})
    engine = driver.node.state.engine
    assert isinstance(engine, Full)
    started = await driver.ask("go")
    engine.full = True
    async with asyncio.timeout(10):
        with pytest.raises(StorageFull):
            await driver.events(started)
    refused = engine.refusals

    async def tried_to_end_it() -> bool:
        return engine.refusals < refused - 2

    await wait_until(tried_to_end_it, 10, "a second try at the end")
    engine.full = False
    ended = msgspec.json.decode(await driver.node.gateway.finished(started))
    assert ended["perdure"]["reason"] == "storage_full"
    assert ended["output"][0]["content"][0]["text"] == "hi"
