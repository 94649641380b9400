"""Several upstreams behind one server, as the official SDK and a configuration file meet them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from perdure.proving.upstream import ScriptedUpstream
from tests.e2e.http_server import Server, serving


# proves R12
async def test_upstreams_of_the_file_are_merged_and_asked_by_name(tmp_path: Path) -> None:
    async with (
        ScriptedUpstream(models=("small",)) as left,
        ScriptedUpstream(models=("large",)) as right,
    ):
        (tmp_path / "perdure.toml").write_text(
            f"""
            [[upstreams]]
            name = "left"
            url = "{left.url}"
            [[upstreams]]
            name = "right"
            url = "{right.url}"
            aliases = {{best = "large"}}
            """
        )
        async with serving(tmp_path / "data") as server, server.sdk() as sdk:
            listed = [(model.id, model.owned_by) async for model in sdk.models.list()]
            assert listed == [("small", "left"), ("best", "right"), ("large", "right")]
            made = await sdk.responses.create(model="best", input="echo hi")
            assert (made.model, made.output_text) == ("best", "hi")
            assert [sent["model"] for sent in await right.received()] == ["large"]
            with pytest.raises(openai.BadRequestError, match="There are: small, best, large"):
                await sdk.responses.create(model="huge", input="echo hi")


@pytest.fixture
async def upstream() -> AsyncIterator[ScriptedUpstream]:
    async with ScriptedUpstream() as server:
        yield server


@pytest.fixture(params=["chat", "responses"])
async def server(
    request: pytest.FixtureRequest, tmp_path: Path, upstream: ScriptedUpstream
) -> AsyncIterator[Server]:
    """A server whose upstream is asked by either API."""
    settings = {"PERDURE_UPSTREAM_API": request.param}
    async with serving(tmp_path / "data", "--upstream", upstream.url, **settings) as running:
        yield running


class Place(BaseModel):
    city: str


def function(name: str) -> Any:
    parameters = {"type": "object", "properties": {"place": {"type": "integer"}}}
    return {"type": "function", "name": name, "parameters": parameters, "strict": False}


# proves R12
async def test_structured_output_travels_both_ways(
    server: Server, upstream: ScriptedUpstream
) -> None:
    async with server.sdk() as sdk:
        made = await sdk.responses.parse(
            model="m", input='echo {"city": "Oslo"}', text_format=Place
        )
        assert made.output_parsed == Place(city="Oslo")
        await sdk.responses.create(
            model="m", input="echo {}", text={"format": {"type": "json_object"}}
        )
    for sent, type in zip(await upstream.received(2), ("json_schema", "json_object"), strict=True):
        format = sent.get("response_format") or sent["text"]["format"]
        assert format["type"] == type
        if type == "json_schema":
            schema = format.get("json_schema") or format
            assert (schema["name"], schema["strict"]) == ("Place", True)
            assert schema["schema"]["required"] == ["city"]


# proves R12
async def test_parallel_calls_and_their_outputs_travel_both_ways(
    server: Server, upstream: ScriptedUpstream
) -> None:
    tools = [function("f"), function("g")]
    async with server.sdk() as sdk:
        stream = await sdk.responses.create(
            model="m", input="parallel f g", tools=tools, parallel_tool_calls=True, stream=True
        )
        events = [event async for event in stream]
        calls: Any = events[-1].response.output  # type: ignore[union-attr]
        assert [(call.name, call.arguments) for call in calls] == [
            ("f", '{"place": 0}'),
            ("g", '{"place": 1}'),
        ]
        outputs: Any = [
            {"type": "function_call_output", "call_id": call.call_id, "output": f"out {call.name}"}
            for call in calls
        ]
        last = await sdk.responses.create(
            model="m",
            input=outputs,
            tools=tools,
            previous_response_id=events[-1].response.id,  # type: ignore[union-attr]
        )
        assert last.output_text == "out g"
    first, second = await upstream.received(2)
    assert first["parallel_tool_calls"] is True
    if "messages" in second:
        assert [m["role"] for m in second["messages"]] == ["user", "assistant", "tool", "tool"]
        assert len(second["messages"][1]["tool_calls"]) == 2
    else:
        types = [item["type"] for item in second["input"]]
        assert types == ["message", *["function_call"] * 2, *["function_call_output"] * 2]


# proves R12
async def test_images_thoughts_and_the_details_of_usage_travel(
    server: Server, upstream: ScriptedUpstream
) -> None:
    pixel = "data:image/png;base64,iVBORw0KGgo="
    content: Any = [
        {"type": "input_text", "text": "reasoning so it is"},
        {"type": "input_image", "image_url": pixel, "detail": "low"},
    ]
    async with server.sdk() as sdk:
        made = await sdk.responses.create(model="m", input=[{"role": "user", "content": content}])
        assert [item.type for item in made.output] == ["reasoning", "message"]
        assert made.output_text.strip() == "so it is"
        assert made.usage is not None
        assert made.usage.input_tokens_details.cached_tokens == 2
        assert made.usage.output_tokens_details.reasoning_tokens > 0
    [sent] = await upstream.received(1)
    if "messages" in sent:
        [_, image] = sent["messages"][0]["content"]
        assert image == {"type": "image_url", "image_url": {"url": pixel, "detail": "low"}}
    else:
        [_, image] = sent["input"][0]["content"]
        assert image == content[1]


# proves R12
async def test_tools_that_nobody_runs_are_refused_or_dropped_by_name(
    tmp_path: Path, upstream: ScriptedUpstream
) -> None:
    tools: Any = [
        {"type": "web_search"},
        function("f"),
        {"type": "custom", "name": "caf\u00e9"},
        {"type": "mcp", "server_label": "x", "server_url": "http://x.example"},
    ]
    for api in ("chat", "responses"):
        settings = {"PERDURE_UPSTREAM_API": api}
        options = ("--upstream", upstream.url)
        async with serving(tmp_path / api, *options, **settings) as server, server.sdk() as sdk:
            with pytest.raises(openai.BadRequestError, match="the tool type 'web_search'"):
                await sdk.responses.create(model="m", input="echo hi", tools=tools)
        settings["PERDURE_TOOLS_UNSUPPORTED"] = "drop"
        async with serving(tmp_path / api, *options, **settings) as server, server.sdk() as sdk:
            raw = sdk.responses.with_raw_response
            made = await raw.create(model="m", input="echo hi", tools=tools)
            dropped = "web_search, custom:caf%C3%A9, mcp"
            assert made.headers["x-perdure-dropped-tools"] == dropped
            assert [tool.type for tool in made.parse().tools] == ["function"]
            stream = await raw.create(model="m", input="echo hi", tools=tools, stream=True)
            assert stream.headers["x-perdure-dropped-tools"] == dropped
            plain = await raw.create(model="m", input="echo hi", tools=tools[1:2])
            assert "x-perdure-dropped-tools" not in plain.headers
    assert {len(sent["tools"]) for sent in await upstream.received()} == {1}


# proves R12
async def test_chat_completions_pass_through_for_the_official_client(
    tmp_path: Path, upstream: ScriptedUpstream
) -> None:
    (tmp_path / "perdure.toml").write_text(
        f"""
        [[upstreams]]
        name = "up"
        url = "{upstream.url}"
        aliases = {{best = "scripted"}}
        """
    )
    said: Any = [{"role": "user", "content": "count 3"}]
    async with serving(tmp_path / "data") as server, server.sdk() as sdk:
        create = sdk.chat.completions.create
        whole = await create(model="best", messages=said)
        assert whole.choices[0].message.content == "1 2 3"
        chunks = [chunk async for chunk in await create(model="best", messages=said, stream=True)]
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "1 2 3"
        with pytest.raises(openai.BadRequestError, match="POST /v1/responses"):
            await create(model="best", messages=said, store=True)
        cut: Any = [{"role": "user", "content": "cut 3"}]
        with pytest.raises(openai.APIError, match="broke off"):
            _ = [chunk async for chunk in await create(model="best", messages=cut, stream=True)]
    assert {sent["model"] for sent in await upstream.received()} == {"scripted"}
