"""LangChain's `ChatOpenAI` as a judge: it leaves the history to the server and sends only what is
new, so whatever the server forgot would be missing from what the model is asked.
"""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import pytest
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

from perdure.proving.upstream import ScriptedUpstream
from tests.e2e.http_server import Server, serving


@pytest.fixture
async def upstream(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[ScriptedUpstream]:
    for name in ("LANGSMITH_TRACING", "LANGCHAIN_TRACING_V2"):
        monkeypatch.setenv(name, "false")
    async with ScriptedUpstream() as server:
        yield server


class Place(BaseModel):
    """Where something is."""

    city: str
    floor: int


@tool
def weather(city: str) -> str:
    """The weather of a city."""
    return f"sunny in {city}"


def model(server: Server, **more: Any) -> ChatOpenAI:
    return ChatOpenAI(
        model="m",
        base_url=f"{server.url}/v1",
        api_key="none",
        max_retries=0,
        use_responses_api=True,
        use_previous_response_id=True,
        **more,
    )


async def last_asked(upstream: ScriptedUpstream) -> list[Any]:
    """What the model was given to read at last: the content of each message, or its calls."""
    messages = (await upstream.received())[-1]["messages"]
    return [message.get("content") or message.get("tool_calls") for message in messages]


# proves R2
async def test_turns_go_on_by_previous_response_id_across_a_kill(
    tmp_path: Path, upstream: ScriptedUpstream
) -> None:
    data, options = tmp_path / "data", ("--upstream", upstream.url)
    said: list[BaseMessage] = [HumanMessage("echo one")]
    async with serving(data, *options) as server:
        said += [await model(server).ainvoke(said), HumanMessage("echo two")]
        second = await model(server).ainvoke(said)
        assert second.text == "two"
        assert second.usage_metadata is not None
        assert second.usage_metadata["output_tokens"] == 1
        assert await server.end(signal.SIGKILL) == -signal.SIGKILL
    async with serving(data, *options) as server, server.sdk() as sdk:
        assert "did not end clean" in server.said
        said += [second, HumanMessage("echo three")]
        third = await model(server).ainvoke(said)
        assert await last_asked(upstream) == ["echo one", "one", "echo two", "two", "echo three"]
        kept = await sdk.responses.retrieve(third.response_metadata["id"])
        assert kept.previous_response_id == second.response_metadata["id"]
        sent = await sdk.responses.input_items.list(kept.id)
        assert len(sent.data) == 1, "the client sent more than what was new"
        branch = await model(server).ainvoke([*said[:2], HumanMessage("echo instead")])
        assert branch.text == "instead"
        assert await last_asked(upstream) == ["echo one", "one", "echo instead"]


# proves R2
async def test_a_streamed_answer_is_built_on_like_any_other(
    tmp_path: Path, upstream: ScriptedUpstream
) -> None:
    data, options = tmp_path / "data", ("--upstream", upstream.url)
    asked: list[BaseMessage] = [HumanMessage("reasoning one two three")]
    async with serving(data, *options) as server:
        chunks = [chunk async for chunk in model(server).astream(asked)]
        streamed = reduce(add, chunks)
        assert streamed.text == "one two three"
        assert streamed.response_metadata["status"] == "completed"
        assert streamed.usage_metadata is not None
        assert streamed.usage_metadata["output_token_details"]["reasoning"] == 6
        assert await server.end(signal.SIGKILL) == -signal.SIGKILL
    async with serving(data, *options) as server:
        on = await model(server).ainvoke([*asked, streamed, HumanMessage("echo and on")])
        assert on.text == "and on"
        spoken = [text for text in await last_asked(upstream) if isinstance(text, str)]
        assert spoken == ["reasoning one two three", "one two three", "echo and on"]


# proves R2
@pytest.mark.parametrize("streaming", [False, True])
async def test_a_tool_runs_while_the_server_is_killed(
    tmp_path: Path, upstream: ScriptedUpstream, streaming: bool
) -> None:
    data, options = tmp_path / "data", ("--upstream", upstream.url)
    said: list[BaseMessage] = [HumanMessage('tool weather {"city": "Oslo"}')]
    async with serving(data, *options) as server:
        called = await model(server, streaming=streaming).bind_tools([weather]).ainvoke(said)
        assert isinstance(called, AIMessage)
        [call] = called.tool_calls
        assert (call["name"], call["args"]) == ("weather", {"city": "Oslo"})
        assert await server.end(signal.SIGKILL) == -signal.SIGKILL
    result = await weather.ainvoke(call)
    assert isinstance(result, ToolMessage)
    async with serving(data, *options) as server:
        said += [called, result]
        answered = await model(server, streaming=streaming).bind_tools([weather]).ainvoke(said)
        assert answered.text == "sunny in Oslo"
        question, [asked], output = await last_asked(upstream)
        assert (question, output) == (said[0].content, "sunny in Oslo")
        assert asked["id"] == call["id"]
        after = [*said, answered, HumanMessage("echo thanks")]
        assert (await model(server).ainvoke(after)).text == "thanks"


# proves R1
@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
async def test_structured_output(tmp_path: Path, upstream: ScriptedUpstream, method: Any) -> None:
    place = '{"city": "Oslo", "floor": 3}'
    said = {"json_schema": f"echo {place}", "function_calling": f"tool Place {place}"}[method]
    async with serving(tmp_path / "data", "--upstream", upstream.url) as server:
        structured = model(server).with_structured_output(Place, method=method)
        assert await structured.ainvoke(said) == Place(city="Oslo", floor=3)
        sent = (await upstream.received())[-1]
        if method == "json_schema":
            form = sent["response_format"]["json_schema"]
            assert (form["name"], form["strict"]) == ("Place", True)
            assert set(form["schema"]["properties"]) == {"city", "floor"}
        else:
            assert sent["tool_choice"] == {"type": "function", "function": {"name": "Place"}}
