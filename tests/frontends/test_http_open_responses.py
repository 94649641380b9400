"""The Open Responses specification as a judge: its published schemas read every answer, and its
rules for streams and items are checked event by event. docs/open-responses.md lists them all.
"""

from __future__ import annotations

from typing import Any

import httpx
import msgspec
import openresponses_types as spec
import pydantic
import pytest

from perdure.proving.upstream import ScriptedUpstream
from tests.frontends.conftest import Serve, Served

RESOURCE = pydantic.TypeAdapter(spec.ResponseResource)
EVENTS = {
    str(member.value): pydantic.TypeAdapter(model)
    for name, model in vars(spec).items()
    if name.endswith("StreamingEvent")
    for member in model.model_fields["type"].annotation
}
NOT_ITS_NAME = {
    "response.reasoning_text.delta": "response.reasoning.delta",
    "response.reasoning_text.done": "response.reasoning.done",
}
"""Events that go by the name the official SDKs know, which would not take the specification's."""

TEXTS = {"output_text": "text", "refusal": "refusal", "reasoning_text": "text"}
PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA"
    "60e6kgAAAABJRU5ErkJggg=="
)


def tool(name: str) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {"location": {"type": "string"}}}
    return {"type": "function", "name": name, "parameters": parameters}


def user(content: Any) -> dict[str, Any]:
    return {"type": "message", "role": "user", "content": content}


@pytest.fixture(params=["chat", "responses"])
async def server(
    request: pytest.FixtureRequest, serve: Serve, upstream: ScriptedUpstream
) -> Served:
    """A server whose upstream is asked by either API."""
    return await serve(upstream__url=upstream.url, upstream__api=request.param)


async def ask(server: Served, **request: Any) -> dict[str, Any]:
    """A response, after its schema was checked."""
    answer = await server.client.post("/v1/responses", json={"model": "m", **request})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/json"
    body: dict[str, Any] = answer.json()
    sound_response(body)
    return body


async def stream(server: Served, **request: Any) -> list[dict[str, Any]]:
    """The events of a response, after everything about them was checked."""
    sent = {"model": "m", "stream": True, **request}
    return sound_stream(await server.client.post("/v1/responses", json=sent))


def sound_response(body: dict[str, Any]) -> None:
    RESOURCE.validate_python(body)
    for item in body["output"]:
        assert {"id", "type", "status"} <= item.keys()
    ids = [item["id"] for item in body["output"]]
    assert len(set(ids)) == len(ids)


def sound_stream(answer: httpx.Response) -> list[dict[str, Any]]:
    """Server-sent events in form, in number, in the grammar of items, and up to `[DONE]`."""
    assert answer.headers["content-type"].startswith("text/event-stream")
    *blocks, done, nothing = answer.text.split("\n\n")
    assert (done, nothing) == ("data: [DONE]", "")
    events = []
    for block in blocks:
        name, data = block.split("\n")
        event = msgspec.json.decode(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        known = NOT_ITS_NAME.get(event["type"], event["type"])
        EVENTS[known].validate_python(event | {"type": known})
        events.append(event)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    last = events[-1]["response"]
    assert events[-1]["type"] == f"response.{last['status']}"
    sound_response(last)
    assert sound_items(events[2:-1]) == last["output"]
    return events


def sound_items(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Follow every item through its states; returns the items as they were closed."""
    items: dict[int, dict[str, Any]] = {}
    closed: dict[int, dict[str, Any]] = {}
    parts: dict[tuple[int, int], list[str]] = {}
    texts: dict[tuple[int, int], str] = {}
    arguments: dict[int, list[str]] = {}
    for event in events:
        at, kind = event["output_index"], event["type"].removeprefix("response.")
        assert at not in closed, "nothing may happen to an item that is done"
        part = (at, event.get("content_index", 0))
        if kind == "output_item.added":
            assert at == len(items)
            assert event["item"]["status"] == "in_progress"
            assert not event["item"].get("content")
            items[at] = event["item"]
            continue
        if kind == "output_item.done":
            item = closed[at] = event["item"]
            assert not [open for open in parts if open[0] == at]
            assert {name: item[name] for name in ("id", "type")} == {
                name: items[at][name] for name in ("id", "type")
            }
            for place, content in enumerate(item.get("content") or ()):
                assert content[TEXTS[content["type"]]] == texts.pop((at, place))
            if at in arguments:
                assert item["arguments"] == "".join(arguments[at])
            continue
        assert event["item_id"] == items[at]["id"]
        if kind == "content_part.added":
            assert event["part"][TEXTS[event["part"]["type"]]] == ""
            parts[part] = []
        elif kind == "content_part.done":
            assert event["part"][TEXTS[event["part"]["type"]]] == texts[part]
            assert parts.pop(part) == [], "the text is closed before its part"
        elif kind == "function_call_arguments.delta":
            arguments.setdefault(at, []).append(event["delta"])
        elif kind == "function_call_arguments.done":
            assert event["arguments"] == "".join(arguments[at])
        elif kind.endswith(".delta"):
            parts[part].append(event["delta"])
        else:
            texts[part] = event[TEXTS[kind.removesuffix(".done")]]
            assert texts[part] == "".join(parts[part])
            parts[part] = []
    assert not texts
    return [closed[at] for at in sorted(items)]


# proves R1
async def test_basic_text(server: Served) -> None:
    for said in ("echo well done", [user("echo well done")]):
        made = await ask(server, input=said)
        [message] = made["output"]
        assert (made["status"], message["status"]) == ("completed", "completed")
        assert message["content"][0]["text"] == "well done"


# proves R1, R4
async def test_streaming(server: Served) -> None:
    for said, ends, item in (
        ("count 5", "completed", "completed"),
        ("reasoning one two", "completed", "completed"),
        ("refuse never", "completed", "completed"),
        ("length 3", "incomplete", "incomplete"),
        ("filter 3", "incomplete", "incomplete"),
        ("cut 3", "failed", "incomplete"),
    ):
        *_, last = await stream(server, input=[user(said)])
        assert last["response"]["status"] == ends
        assert last["response"]["output"][-1]["status"] == item


# proves R1
async def test_a_system_prompt_and_instructions(server: Served, upstream: ScriptedUpstream) -> None:
    pirate = {"type": "message", "role": "system", "content": "You are a pirate."}
    made = await ask(server, instructions="Be brief.", input=[pirate, user("echo ahoy")])
    assert made["instructions"] == "Be brief."
    assert made["output"][0]["content"][0]["text"] == "ahoy"
    [sent] = await upstream.received()
    assert {"Be brief.", "You are a pirate."} <= set(texts_in(sent))


def texts_in(sent: Any) -> list[str]:
    """Every text in a request to the upstream, in order."""
    if isinstance(sent, str):
        return [sent]
    if isinstance(sent, dict):
        sent = sent.values()
    return [text for part in sent for text in texts_in(part)] if hasattr(sent, "__iter__") else []


# proves R1
async def test_tool_calling(server: Served) -> None:
    said, tools = [user('tool get_weather {"location": "Oslo"}')], [tool("get_weather")]
    made = await ask(server, input=said, tools=tools)
    [call] = made["output"]
    assert (call["type"], call["name"], call["status"]) == (
        *("function_call", "get_weather"),
        "completed",
    )
    assert call["arguments"] == '{"location": "Oslo"}'
    kinds = [event["type"] for event in await stream(server, input=said, tools=tools)]
    for kind in ("output_item.added", "function_call_arguments.done", "output_item.done"):
        assert kinds.count(f"response.{kind}") == 1
    output = {"type": "function_call_output", "call_id": call["call_id"], "output": "64 degrees"}
    for before in ({"previous_response_id": made["id"]}, {}):
        items = [output] if before else [*said, call, output]
        told = await ask(server, input=items, tools=tools, **before)
        assert told["output"][0]["content"][0]["text"] == "64 degrees"


# proves R1
async def test_parallel_calls_are_items_of_their_own(server: Served) -> None:
    tools = [tool("one"), tool("two")]
    *_, last = await stream(server, input="parallel one two", tools=tools)
    calls = [(item["name"], item["status"]) for item in last["response"]["output"]]
    assert calls == [("one", "completed"), ("two", "completed")]


# proves R1
async def test_a_call_beyond_the_allowed_tools_is_refused(server: Served) -> None:
    """By the server, whatever its upstream makes of `tool_choice`."""
    tools = [tool("read"), tool("send")]
    choice: dict[str, Any] = {
        "type": "allowed_tools",
        "tools": [{"type": "function", "name": "read"}],
    }
    for chosen in (choice, choice | {"mode": "auto"}):
        made = await ask(server, input="tool read", tools=tools, tool_choice=chosen)
        assert (made["status"], made["output"][0]["name"]) == ("completed", "read")
        assert made["tool_choice"] == choice | {"mode": "auto"}
    *_, last = await stream(server, input="tool send", tools=tools, tool_choice=choice)
    assert last["response"]["status"] == "failed"
    assert "'send'" in last["response"]["error"]["message"]
    none = await ask(server, input="tool read", tools=tools, tool_choice="none")
    assert (none["status"], none["output"][0]["status"]) == ("failed", "incomplete")


# proves R1
async def test_image_input(server: Served, upstream: ScriptedUpstream) -> None:
    image = {"type": "input_image", "image_url": PIXEL}
    made = await ask(server, input=[user([{"type": "input_text", "text": "echo red"}, image])])
    assert made["status"] == "completed"
    [sent] = await upstream.received()
    assert PIXEL in texts_in(sent)


# proves R1, R2
async def test_multi_turn_keeps_the_order(server: Served, upstream: ScriptedUpstream) -> None:
    """Prior input, prior output, new input: sent along, or left to the server."""
    greeted = {"type": "message", "role": "assistant", "content": "Hello Alice!"}
    past = [user("My name is Alice."), greeted]
    first = await ask(server, input=[*past, user("echo one")])
    await ask(server, input="echo two", previous_response_id=first["id"])
    sent = (await upstream.received())[-1]
    wanted = ["My name is Alice.", "Hello Alice!", "echo one", "one", "echo two"]
    assert [text for text in texts_in(sent) if text in wanted] == wanted
    conversation = (await server.json("POST", "/v1/conversations", {}))["id"]
    for given in (conversation, {"id": conversation}):
        made = await ask(server, input="echo three", conversation=given)
        assert made["conversation"] == {"id": conversation}


# proves R1
async def test_what_was_sent_is_shown_and_what_was_not_has_its_default(
    server: Served, upstream: ScriptedUpstream
) -> None:
    plain = await ask(server, input="echo hi")
    defaults = {"temperature": 1.0, "top_p": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
    defaults |= {"service_tier": "default", "truncation": "disabled"}
    assert {name: plain[name] for name in defaults} == defaults
    assert not defaults.keys() & (await upstream.received())[-1].keys(), "the upstream has its own"
    sent = {"temperature": 0.5, "top_p": 0.5, "presence_penalty": 0.5, "frequency_penalty": -0.5}
    made = await ask(server, input="echo hi", **sent)
    assert {name: made[name] for name in sent} == sent
    asked = (await upstream.received())[-1]
    assert {name: asked[name] for name in sent} == sent


# proves R1, R7
async def test_compaction_and_errors(server: Served) -> None:
    first = await ask(server, input="echo one")
    sent = {"model": "echo-all-of-it", "previous_response_id": first["id"]}
    compacted = await server.client.post("/v1/responses/compact", json=sent)
    spec.CompactResource.model_validate(compacted.json())
    for path, status, param in (
        ("/v1/responses", 400, "model"),
        ("/v1/responses/compact", 400, "model"),
    ):
        refused = await server.client.post(path, json={"input": "hi"})
        assert (refused.status_code, refused.json()["error"]["param"]) == (status, param)
    absent = await server.client.get("/v1/responses/resp_none")
    assert absent.status_code == 404
    for answer in (refused, absent):
        assert answer.json()["error"].keys() == {"message", "type", "param", "code"}
