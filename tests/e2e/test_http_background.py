"""The official SDK and background responses, against the server as people run it, across kills."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI
from openai.types.responses import Response

from perdure.proving.upstream import ScriptedUpstream
from perdure.proving.waiting import wait_until
from tests.e2e.http_server import Server, serving

TAKEN_OVER_S = 10.0
TEXT = " ".join(map(str, range(1, 31)))


async def polled(sdk: AsyncOpenAI, response_id: str) -> Response:
    """As the documentation of background responses tells clients to wait."""

    async def over() -> bool:
        return (await sdk.responses.retrieve(response_id)).status not in ("queued", "in_progress")

    await wait_until(over, TAKEN_OVER_S, f"the end of {response_id}")
    return await sdk.responses.retrieve(response_id)


async def listen(stream: Any, seen: list[Any], server: Server, *, kill_at: int = 0) -> None:
    """Until the end, or the death of a server that is killed when it has counted to `kill_at`."""
    async for event in stream:
        seen.append(event)
        if kill_at and event.type.endswith("text.delta") and int(event.delta[-2:]) >= kill_at:
            server.process.kill()


# proves R1, R5
async def test_create_poll_and_cancel(tmp_path: Path) -> None:
    async with (
        ScriptedUpstream() as upstream,
        serving(tmp_path / "data", "--upstream", upstream.url) as server,
        server.sdk() as sdk,
    ):
        made = await sdk.responses.create(model="m", input="count 3", background=True)
        assert (made.status, made.background) == ("queued", True)
        ended = await polled(sdk, made.id)
        assert (ended.status, ended.output_text) == ("completed", "1 2 3")
        then = await sdk.responses.create(
            model="m", input="hang 3", background=True, previous_response_id=made.id
        )
        assert (await sdk.responses.cancel(then.id)).status == "cancelled"
        again = await sdk.responses.cancel(then.id)
        assert again == await sdk.responses.retrieve(then.id)
        foreground = await sdk.responses.create(model="m", input="echo hello")
        with pytest.raises(openai.BadRequestError, match="Cannot cancel a synchronous response"):
            await sdk.responses.cancel(foreground.id)
        with pytest.raises(openai.NotFoundError):
            await sdk.responses.cancel("resp_nobody")
        await sdk.responses.delete(then.id)
        with pytest.raises(openai.NotFoundError):
            await sdk.responses.retrieve(then.id)


# proves R4, R5
async def test_a_stream_is_resumed_across_a_kill_and_ends_whole(tmp_path: Path) -> None:
    seen: list[Any] = []
    async with ScriptedUpstream() as upstream:
        options = tmp_path / "data", "--upstream", upstream.url
        async with serving(*options) as server, server.sdk() as sdk:
            stream = await sdk.responses.create(
                model="m", input="gate on 7 30 0.02", background=True, stream=True
            )
            with pytest.raises(openai.APIConnectionError):
                await listen(stream, seen, server, kill_at=7)
        response_id = seen[0].response.id
        await upstream.open("on")
        async with serving(*options) as server, server.sdk() as sdk:
            assert "1 requeued" in server.said
            rest = await sdk.responses.retrieve(
                response_id, stream=True, starting_after=seen[-1].sequence_number
            )
            await listen(rest, seen, server)
            assert [event.sequence_number for event in seen] == list(range(len(seen)))
            assert seen[-1].type == "response.completed"
            ended = await sdk.responses.retrieve(response_id)
            assert ended.output_text == TEXT
            (left,) = ended.model_extra["perdure"]["abandoned"]
            shown = [e for e in seen if e.type == "response.output_text.delta"]
            assert left["content"][0]["text"] == "".join(
                event.delta for event in shown if event.output_index == 0
            )
            async with sdk.responses.stream(response_id=response_id) as helper:
                final = await helper.get_final_response()
            assert (final.status, final.output_text) == ("completed", TEXT)


# proves R4, R5
async def test_a_sentence_goes_on_in_its_item_across_two_kills(tmp_path: Path) -> None:
    seen: list[Any] = []
    async with ScriptedUpstream() as upstream:
        knows = "--upstream-continues", "continue_final_message"
        options = tmp_path / "data", "--upstream", upstream.url, *knows
        async with serving(*options) as server, server.sdk() as sdk:
            stream = await sdk.responses.create(
                model="m", input="gate on 7 30 0.06", background=True, stream=True
            )
            with pytest.raises(openai.APIConnectionError):
                await listen(stream, seen, server, kill_at=7)
        response_id = seen[0].response.id
        await upstream.open("on")
        for kill_at in (8, 0):
            async with serving(*options) as server, server.sdk() as sdk:
                rest = await sdk.responses.retrieve(
                    response_id, stream=True, starting_after=seen[-1].sequence_number
                )
                if kill_at:
                    with pytest.raises(openai.APIConnectionError):
                        await listen(rest, seen, server, kill_at=kill_at)
                    continue
                await listen(rest, seen, server)
                ended = await sdk.responses.retrieve(response_id)
                async with sdk.responses.stream(response_id=response_id) as helper:
                    final = await helper.get_final_response()
                unbroken = await sdk.responses.create(model="m", input="gate on 7 30 0")
                (job,) = (await sdk.get("/jobs", cast_to=object))["data"]
                shown = await sdk.get(f"/jobs/{job['id']}", cast_to=object)
    assert [event.sequence_number for event in seen] == list(range(len(seen)))
    assert [event.type for event in seen].count("response.output_item.added") == 1
    deltas = [event.delta for event in seen if event.type == "response.output_text.delta"]
    assert "".join(deltas) == TEXT == unbroken.output_text
    assert seen[-1].response == ended
    assert (final.output_text, final.output[0].id) == (TEXT, ended.output[0].id)
    (item,) = ended.output
    assert (ended.status, item.status, ended.output_text) == ("completed", "completed", TEXT)
    told = ended.model_extra["perdure"]
    assert "abandoned" not in told
    assert [attempt.get("continued", False) for attempt in told["attempts"]] == [False, True, True]
    assert [attempt["continued"] for attempt in shown["attempts"]] == [False, True, True]
    assert ended.usage is not None
    assert unbroken.usage is not None
    assert ended.usage.total_tokens == unbroken.usage.total_tokens


# proves R5
async def test_sixty_four_are_taken_over_within_ten_seconds(tmp_path: Path) -> None:
    async with ScriptedUpstream() as upstream:
        options = tmp_path / "data", "--upstream", upstream.url
        async with serving(*options) as server, server.sdk() as sdk:
            made = await asyncio.gather(
                *(
                    sdk.responses.create(model="m", input=f"pace 0.5 number {n}", background=True)
                    for n in range(64)
                )
            )
            cancelled = await sdk.responses.cancel(made[0].id)
            await server.end(signal.SIGKILL)
        async with serving(*options) as server, server.sdk() as sdk:
            async with asyncio.timeout(TAKEN_OVER_S):
                ended = [await polled(sdk, one.id) for one in made[1:]]
            assert [one.output_text for one in ended] == [f"number {n}" for n in range(1, 64)]
            assert await sdk.responses.retrieve(made[0].id) == cancelled


# proves O2, R5
async def test_a_stop_in_good_order_leaves_it_to_the_next_start(tmp_path: Path) -> None:
    async with ScriptedUpstream() as upstream:
        options = tmp_path / "data", "--upstream", upstream.url
        hurried = {"PERDURE_LIMITS_DRAIN_S": "0.1"}
        async with serving(*options, **hurried) as server, server.sdk() as sdk:
            made = await sdk.responses.create(model="m", input="slow 0.05 30", background=True)
            assert await server.end(signal.SIGTERM) == 0
        async with serving(*options) as server, server.sdk() as sdk:
            assert "the last one ended clean" in server.said
            assert (await polled(sdk, made.id)).output_text == TEXT
