"""What the usual model servers stream, each shape read as it would come over the wire.

A shape stands in `shapes/` as the bytes of its stream; comments, which event streams have, say
which documentation and version it was written down from.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from perdure.core import codec
from perdure.services.upstream import Upstream
from tests.services.reading import CLOCK, told, words

SHAPES = sorted((Path(__file__).parent / "shapes").glob("*.sse"))


def answers() -> dict[str, Any]:
    """What a kind of shape says, by the second part of its name: items, status, usage."""
    thought, four, so_far = ("reasoning", "Two and two."), ("message", "4"), ("message", "so far")
    calls = [("weather", {"city": "Oslo"}), ("weather", {"city": "Rome"})]
    return {
        "reasoning": ([thought, four], "completed", 49),
        "tools": (calls, "completed", 49),
        "error": ([so_far], "failed", None),
        "abort": ([so_far], "failed", None),
        "length": ([so_far], "incomplete", None),
        "usage": ([so_far], "incomplete", 49),
    }


async def chunks_of(shape: Path) -> list[dict[str, Any]]:
    """The shape as the client of upstreams reads it."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
        writer.write(head + shape.read_bytes())
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    upstream = Upstream(
        f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1",
        key=None,
        api="chat",
        connect_timeout_s=5,
        read_timeout_s=5,
        attempts_max=1,
        clock=CLOCK,
    )
    try:
        return [chunk async for chunk in upstream.stream_chat({})]
    finally:
        await upstream.close()
        server.close()


def said(item: dict[str, Any]) -> tuple[str, Any]:
    if item["type"] == "function_call":
        return item["name"], codec.parse(item["arguments"])
    return item["type"], words(item)


# proves R12
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.stem)
async def test_a_shape_is_read(shape: Path) -> None:
    items, outcome, _ = told(*await chunks_of(shape))
    expected, status, total = answers()[shape.stem.split("_")[1]]
    assert [said(item) for item in items] == expected
    assert outcome.status == status
    assert (outcome.usage or {}).get("total_tokens") == total
    assert len({item.get("call_id", item["id"]) for item in items}) == len(items)
    if "error" in shape.stem:
        assert outcome.error is not None
        reported = outcome.error["message"]
        assert "EngineCore" in reported or "context shift" in reported
    if shape.stem == "sglang_reasoning":
        assert outcome.usage is not None
        assert outcome.usage["input_tokens_details"]["cached_tokens"] == 16
        assert outcome.usage["output_tokens_details"]["reasoning_tokens"] == 6


def test_every_server_is_there_and_says_what_it_was_written_from() -> None:
    servers = {shape.stem.split("_")[0] for shape in SHAPES}
    assert {"vllm", "ollama", "sglang", "llamacpp"} <= servers
    for shape in SHAPES:
        assert shape.read_text().startswith(": ")
