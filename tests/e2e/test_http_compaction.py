"""Counting and compacting, asked for by the official SDK, which checks every answer strictly."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from perdure.proving.upstream import ScriptedUpstream
from tests.e2e.http_server import serving


@pytest.fixture
async def upstream() -> AsyncIterator[ScriptedUpstream]:
    async with ScriptedUpstream() as server:
        yield server


# proves R1
async def test_tokens_are_counted_and_an_estimate_says_so(
    tmp_path: Path, upstream: ScriptedUpstream
) -> None:
    options = ("--upstream", upstream.url)
    async with serving(tmp_path / "counted", *options) as server, server.sdk() as sdk:
        made = await sdk.responses.create(model="m", input="echo one two")
        counted = await sdk.responses.input_tokens.with_raw_response.count(
            model="m", input="and three more", previous_response_id=made.id
        )
        assert "x-perdure-input-tokens" not in counted.headers
        assert counted.parse().input_tokens == 3 + 2 + 3
        assert (await sdk.responses.input_tokens.count(input="echo x")).input_tokens == 2
    async with serving(tmp_path / "estimated") as server, server.sdk() as sdk:
        counted = await sdk.responses.input_tokens.with_raw_response.count(input="word " * 100)
        assert counted.headers["x-perdure-input-tokens"] == "estimate"
        assert 100 <= counted.parse().input_tokens <= 200
