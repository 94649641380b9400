"""What reads the past: counting, compacting and repairing, asked for by the official SDK, which
checks every answer strictly.
"""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator
from pathlib import Path

import httpx2
import openai
import pytest
from openai.types.responses import FunctionToolParam

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
        assert "x-perdure-tokens" not in counted.headers
        assert counted.parse().input_tokens == 3 + 2 + 3
        assert (await sdk.responses.input_tokens.count(input="echo x")).input_tokens == 2
    async with serving(tmp_path / "estimated") as server, server.sdk() as sdk:
        counted = await sdk.responses.input_tokens.with_raw_response.count(input="word " * 100)
        assert counted.headers["x-perdure-tokens"] == "estimate"
        assert 100 <= counted.parse().input_tokens <= 200


# proves R1
async def test_a_compaction_stands_for_its_conversation_also_after_a_kill(
    tmp_path: Path, upstream: ScriptedUpstream
) -> None:
    data, options = tmp_path / "data", ("--upstream", upstream.url)
    async with serving(data, *options) as server, server.sdk() as sdk:
        first = await sdk.responses.create(model="m", input="echo one", instructions="be brief")
        made = await sdk.responses.compact(
            model="echo-all-of-it", previous_response_id=first.id, instructions="be brief"
        )
        assert made.object == "response.compaction"
        assert [item.type for item in made.output] == ["compaction"]
        assert made.usage.output_tokens == 3
        asked = (await upstream.received())[-1]
        assert [message["content"] for message in asked["messages"]][:3] == [
            "be brief",
            "echo one",
            "one",
        ]
        assert asked["messages"][-1]["content"].startswith("Summarize")
        await server.end(signal.SIGKILL)
    item = made.output[0].model_dump(exclude_unset=True)
    said = [item, {"role": "user", "content": "echo two"}]
    async with serving(data, *options) as server, server.sdk() as sdk:
        next_ = await sdk.responses.create(model="m", input=said)
        last = await sdk.responses.create(
            model="m", input="echo three", previous_response_id=next_.id
        )
        assert last.output_text == "three"
        asked = (await upstream.received())[-1]
        contents = [message["content"] for message in asked["messages"]]
        assert contents[0].endswith("summary of it:\n\nall of it")
        assert contents[1:] == ["echo two", "two", "echo three"]
        listed = await sdk.responses.input_items.list(next_.id, order="asc")
        assert listed.data[0].model_dump(exclude_unset=True) == item
        counted = await sdk.responses.input_tokens.count(model="m", input=[item])
        assert counted.input_tokens > 3
        sealed = item["encrypted_content"]
        other = "A=" if sealed[-2:] != "A=" else "E="
        changed = item | {"encrypted_content": sealed[:-2] + other}
        with pytest.raises(openai.BadRequestError) as refused:
            await sdk.responses.create(model="m", input=[changed, said[1]])
        assert refused.value.code == "invalid_encrypted_content"
        assert refused.value.param == "input[0].encrypted_content"


# proves R1
async def test_without_a_model_that_writes_compacting_says_what_to_do(tmp_path: Path) -> None:
    async with serving(tmp_path / "data") as server, server.sdk() as sdk:
        with pytest.raises(openai.BadRequestError, match="--upstream") as refused:
            await sdk.responses.compact(model="perdure-extract", input="hello")
        assert refused.value.param == "model"


# proves R9
async def test_a_tool_call_that_nobody_answered_is_named_and_the_chain_goes_on(
    tmp_path: Path, upstream: ScriptedUpstream
) -> None:
    """The program that ran the tools was killed between the call and its output."""
    weather: FunctionToolParam = {
        "type": "function",
        "name": "weather",
        "parameters": {"type": "object"},
        "strict": False,
    }
    options = ("--upstream", upstream.url)
    async with serving(tmp_path / "data", *options) as server, server.sdk() as sdk:
        called = await sdk.responses.create(model="m", input="tool weather", tools=[weather])
        [call] = called.output
        went_on = await sdk.responses.with_raw_response.create(
            model="m", input="echo on", previous_response_id=called.id
        )
        assert went_on.headers["x-perdure-unanswered-calls"] == call.id
        assert went_on.parse().output_text == "on"
        async with sdk.responses.stream(
            model="m", input="echo still on", previous_response_id=went_on.parse().id
        ) as stream:
            assert (await stream.get_final_response()).output_text == "still on"


# proves R7
async def test_the_sdk_waits_for_what_it_builds_on(
    tmp_path: Path, upstream: ScriptedUpstream
) -> None:
    """A response that goes on after its client has left, and a client that will not wait."""
    options = ("--upstream", upstream.url)
    async with serving(tmp_path / "data", *options) as server, server.sdk() as sdk:
        stream = await sdk.responses.create(model="m", input="gate on 1 6", stream=True)
        created = await anext(aiter(stream))
        assert created.type == "response.created"
        with pytest.raises(openai.BadRequestError) as refused:
            await sdk.responses.create(
                model="m", input="echo on", previous_response_id=created.response.id
            )
        assert refused.value.code == "response_in_progress"
        assert refused.value.param == "previous_response_id"
        statuses: list[int] = []

        async def answered(answer: httpx2.Response) -> None:
            statuses.append(answer.status_code)
            await upstream.open("on")

        hooked = openai.DefaultAsyncHttpxClient(event_hooks={"response": [answered]})
        async with server.sdk(max_retries=2, http_client=hooked) as patient:
            made = await patient.responses.create(
                model="m", input="echo on", previous_response_id=created.response.id
            )
        assert made.output_text == "on"
        assert (statuses[0], statuses[-1]) == (400, 200)
        await stream.close()
