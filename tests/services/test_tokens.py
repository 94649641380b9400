"""Counting tokens: with each kind of tokenizer, and without one."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from perdure.core.clock import SystemClock
from perdure.proving.upstream import ScriptedUpstream
from perdure.services.attachments import Attachments
from perdure.services.context import Context
from perdure.services.sealing import Sealing
from perdure.services.tokens import Counted, TokenCounter
from perdure.services.upstream import Upstream
from perdure.services.upstreams import Member, Upstreams
from perdure.wire.errors import NotFound, WireError
from tests.services.conftest import Driver

WEATHER = {"type": "function", "name": "weather", "parameters": {"type": "object"}}


@asynccontextmanager
async def counting(driver: Driver, url: str) -> AsyncIterator[TokenCounter]:
    """Counts over the driver's store with an upstream of its own."""
    clock = SystemClock()
    upstream = Upstream(
        url,
        key=None,
        api="chat",
        connect_timeout_s=1,
        read_timeout_s=5,
        attempts_max=1,
        clock=clock,
    )
    state = driver.node.state
    context = Context(state, Sealing(state, clock), Attachments(driver.node.files), "repair")
    upstreams = Upstreams([Member("one", upstream)])
    yield TokenCounter(state, context, upstreams, clock)
    await upstreams.close()


# proves R1
@pytest.mark.parametrize("beside", ["", "/llama"])
async def test_the_upstreams_tokenizer_counts(
    driver: Driver, upstream: ScriptedUpstream, beside: str
) -> None:
    first = await driver.answer("echo one two")
    conversation = await driver.conversation("four words in all", "and three more")
    sent: list[tuple[dict[str, Any], int]] = [
        ({"input": "five words of plain text"}, 5),
        ({"model": "m", "input": "one", "instructions": "be brief"}, 3),
        ({"input": "one", "tools": [WEATHER]}, 2),
        ({"input": "two more", "previous_response_id": first["id"]}, 7),
        ({"input": "x", "conversation": conversation}, 8),
    ]
    url = upstream.url.removesuffix("/v1") + beside + "/v1"
    async with counting(driver, url) as tokens:
        for fields, count in sent:
            assert await tokens.count("default", fields) == Counted(count, True)


# proves R1
@pytest.mark.parametrize("reached", [True, False])
async def test_without_a_tokenizer_it_is_an_estimate(
    driver: Driver, upstream: ScriptedUpstream, reached: bool
) -> None:
    root = upstream.url.removesuffix("/v1") if reached else "http://127.0.0.1:9"
    part = {"type": "input_image", "image_url": "data:image/png;base64," + "A" * 100_000}
    async with counting(driver, f"{root}/plain/v1") as tokens:
        few = await tokens.count("default", {"input": "word " * 100})
        many = await tokens.count("default", {"input": "word " * 1_000, "tools": [WEATHER]})
        image = await tokens.count("default", {"input": [{"role": "user", "content": [part]}]})
    assert [few.exact, many.exact, image.exact] == [False] * 3
    assert 100 <= few.tokens <= 200
    assert many.tokens > 5 * few.tokens
    assert 500 < image.tokens < 2_000


# proves R1
@pytest.mark.parametrize(
    ("sent", "param"),
    [
        ({"input": "x", "personality": "friendly"}, "personality"),
        ({"input": "x", "store": False}, "store"),
        ({"input": "x", "truncation": "auto"}, "truncation"),
        ({"instructions": "x"}, "input"),
        ({"input": "x", "previous_response_id": "resp_nobody"}, "previous_response_id"),
        ({"input": "x", "model": 3}, "model"),
        ([], None),
    ],
)
async def test_what_cannot_be_counted_is_refused_by_name(
    driver: Driver, sent: Any, param: str | None
) -> None:
    with pytest.raises(WireError) as refused:
        await driver.node.tokens.count("default", sent)
    assert refused.value.param == param


async def test_an_unknown_conversation_is_not_found(driver: Driver) -> None:
    with pytest.raises(NotFound):
        await driver.node.tokens.count("default", {"input": "x", "conversation": "conv_nobody"})
