"""The relay: what a Responses upstream is asked, and what is made of what it says."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perdure.core import codec
from perdure.proving.scripts import Script
from perdure.proving.upstream import ScriptedUpstream, responses_events
from perdure.services.relay import ResponsesReader, responses_request
from perdure.services.upstream import UpstreamFailed
from perdure.wire import events as ev
from perdure.wire.errors import WireError
from perdure.wire.items import sound_items
from perdure.wire.responses import Outcome, parse_create_response
from tests.services.conftest import Over, at, someone
from tests.services.reading import CLOCK, told, words


def asked(*items: dict[str, Any], **fields: Any) -> dict[str, Any]:
    request = parse_create_response({"model": "m", "input": list(items)} | fields)
    return responses_request(request, (), sound_items(request.input or [], CLOCK))


def read(*events: dict[str, Any]) -> tuple[list[dict[str, Any]], Outcome]:
    items, outcome, _ = told(*events, by=ResponsesReader)
    return items, outcome


def event(type: str, **fields: Any) -> dict[str, Any]:
    return {"type": f"response.{type}", **fields}


def ended(status: str = "completed", **body: Any) -> dict[str, Any]:
    return event(status, response={"status": status, "output": [], **body})


CALL = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
CITATION = {
    "type": "url_citation",
    "url": "http://a.example",
    "title": "t",
    "start_index": 0,
    "end_index": 4,
}
OUTPUT = {"type": "function_call_output", "call_id": "c", "output": "4"}


# proves R12
def test_items_are_sent_whole_and_without_ids_that_could_be_looked_up() -> None:
    thought = {"type": "reasoning_text", "text": "hm"}
    sent = asked(
        {"role": "developer", "content": "be brief"},
        {"id": "msg_u", "role": "user", "content": [{"type": "input_text", "text": "hi"}]},
        {"id": "rs_1", "type": "reasoning", "summary": [], "encrypted_content": "gAAA"},
        {"id": "rs_2", "type": "reasoning", "summary": [], "content": [thought]},
        {"id": "rs_3", "type": "reasoning", "summary": [{"type": "summary_text", "text": "s"}]},
        CALL | {"id": "fc_1"},
        OUTPUT,
        {"id": "msg_a", "role": "assistant", "content": "four"},
    )
    assert sent["store"] is False
    assert sent["stream"] is True
    text = {"type": "output_text", "text": "four", "annotations": []}
    assert sent["input"] == [
        {
            "type": "message",
            "role": "developer",
            "content": [{"type": "input_text", "text": "be brief"}],
        },
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]},
        {"type": "reasoning", "summary": [], "encrypted_content": "gAAA"},
        {"type": "reasoning", "id": "rs_2", "summary": [], "content": [thought]},
        CALL,
        OUTPUT,
        {
            "type": "message",
            "id": "msg_a",
            "role": "assistant",
            "status": "completed",
            "content": [text],
        },
    ]


# proves R12
def test_what_the_request_asks_for_is_forwarded_and_what_is_kept_here_is_not() -> None:
    schema = {"type": "object", "properties": {}}
    forwarded = {
        "instructions": "short",
        "temperature": 0.5,
        "max_output_tokens": 9,
        "parallel_tool_calls": False,
        "reasoning": {"effort": "low"},
        "text": {"format": {"type": "json_schema", "name": "n", "schema": schema, "strict": True}},
        "tools": [{"type": "function", "name": "f", "parameters": schema}],
        "tool_choice": "auto",
        "min_p": 0.1,
    }
    kept = {"metadata": {"a": "b"}, "previous_response_id": "resp_1", "store": True}
    sent = asked({"role": "user", "content": "hi"}, **forwarded, **kept)
    assert {name: sent[name] for name in forwarded} == forwarded
    assert sent["store"] is False
    assert not {"metadata", "previous_response_id", "conversation"} & set(sent)


# proves R12
def test_images_go_along_and_files_kept_here_are_refused() -> None:
    image = {"type": "input_image", "image_url": "data:image/png;base64,AA==", "detail": "auto"}
    assert asked({"role": "user", "content": [image]})["input"][0]["content"] == [image]
    for part in ({"type": "input_image", "file_id": "f"}, {"type": "input_file", "file_id": "f"}):
        with pytest.raises(WireError, match="file_id") as refused:
            asked({"role": "user", "content": [part]})
        assert refused.value.param == "input[0]"
    with pytest.raises(WireError, match="No tool output found"):
        asked(CALL)


SCRIPTS = st.builds(
    Script,
    chunks=st.lists(st.text("ab ", min_size=1, max_size=3), max_size=3).map(tuple),
    thoughts=st.lists(st.text("ab ", min_size=1, max_size=3), max_size=3).map(tuple),
    refusal=st.sampled_from(["", "I will not"]),
    calls=st.lists(st.tuples(st.sampled_from("fg"), st.just('{"a": 1}')), max_size=2).map(tuple),
    ending=st.sampled_from(["stop", "length", "content_filter", "error", "cut"]),
)


# proves R12
@given(script=SCRIPTS)
def test_a_response_retold_says_the_same_under_ids_of_ours(script: Script) -> None:
    events = [*responses_events(script, {"model": "m", "input": "x"})]
    sent = [codec.parse(encoded) for encoded in ev.encode_events(events, after=0)]
    items, outcome, made = told(*sent, by=ResponsesReader)
    done = [one["item"] for one in sent if one["type"] == "response.output_item.done"]
    if script.ending == "cut":
        assert outcome.status == "failed"
        done = items
    assert [one | {"id": ""} for one in items] == [one | {"id": ""} for one in done]
    assert not {one["id"] for one in items} & {
        one["item"]["id"] for one in sent if one["type"] == "response.output_item.added"
    }
    if script.ending != "cut":
        types = [ev.type_of(event) for event in made]
        assert types == [one["type"] for one in sent]


# proves R12
def test_what_was_not_streamed_is_made_whole_at_the_end() -> None:
    message = {
        "id": "x",
        "type": "message",
        "role": "assistant",
        "status": "completed",
        "content": [
            {
                "type": "output_text",
                "text": "four",
                "annotations": [CITATION],
            }
        ],
    }
    thought = {
        "id": "y",
        "type": "reasoning",
        "summary": [{"type": "summary_text", "text": "adding"}],
        "encrypted_content": "gAAA",
    }
    call = CALL | {"id": "z", "status": "completed"}
    output = [thought, message, call]
    for events in (
        [ended(output=output)],
        [{"object": "response", "status": "completed", "output": output}],
        [
            *(
                event("output_item.done", output_index=n, item=item)
                for n, item in enumerate(output)
            ),
            ended(output=output),
        ],
        [
            event("output_item.added", output_index=1, item=message | {"content": []}),
            event("output_text.delta", output_index=1, content_index=0, delta="fo"),
            event("output_item.added", output_index=0, item={"type": "reasoning"}),
            ended(output=output),
            event("output_text.delta", output_index=1, content_index=0, delta="ignored"),
        ],
    ):
        items, outcome = read(*events)
        kinds = {item["type"]: item for item in items}
        assert outcome.status == "completed"
        assert kinds["reasoning"]["summary"] == thought["summary"]
        assert kinds["reasoning"]["encrypted_content"] == "gAAA"
        [part] = kinds["message"]["content"]
        assert (part["text"], part["annotations"]) == ("four", [CITATION])
        if len(items) == 3:
            assert kinds["function_call"]["arguments"] == "{}"
            assert kinds["function_call"]["call_id"] == "c"


# proves R12
@pytest.mark.parametrize(
    "events",
    [
        [event("output_text.delta", output_index=0, content_index=0, delta="hi")],
        [event("output_text.delta", item_id="a", delta="h"), event("output_text.delta", delta="i")],
        [
            event("output_item.added", output_index=0, item={"type": "message", "id": "a"}),
            event("output_text.delta", output_index=0, content_index=-1, item_id="b", delta="hi"),
            event("output_text.done", output_index=0, content_index=-1, text="hi"),
        ],
        [
            event("output_item.added", item={"type": "message", "id": "a"}),
            event("content_part.added", item_id="a", part={"type": "output_text", "text": ""}),
            event("output_text.delta", item_id="a", delta="hi"),
            event("content_part.done", item_id="a", part={"type": "output_text", "text": "hi"}),
        ],
        [event("web_search_call.searching"), event("output_text.delta", delta="hi")],
    ],
    ids=["unannounced", "no indexes", "odd indexes", "by item id", "unknown event"],
)
def test_events_of_odd_servers(events: list[dict[str, Any]]) -> None:
    items, outcome = read(*events, ended())
    assert [(item["type"], words(item), item["status"]) for item in items] == [
        ("message", "hi", "completed")
    ]
    assert outcome.status == "completed"


# proves R12
def test_usage_is_kept_with_its_details() -> None:
    usage = {
        "input_tokens": 5,
        "input_tokens_details": {"cached_tokens": 3},
        "output_tokens": 7,
        "output_tokens_details": {"reasoning_tokens": 2},
    }
    assert read(ended(usage=usage))[1].usage == {
        "input_tokens": 5,
        "input_tokens_details": {"cached_tokens": 3, "cache_write_tokens": 0},
        "output_tokens": 7,
        "output_tokens_details": {"reasoning_tokens": 2},
        "total_tokens": 12,
    }
    assert read(ended())[1].usage is None


# proves R12
@pytest.mark.parametrize(
    ("last", "code", "says"),
    [
        ([], "server_error", "closed the stream before"),
        ([{"type": "error", "message": "boom", "code": "server_error"}], "server_error", "boom"),
        ([{"error": {"message": "slow", "code": 429}}], "rate_limit_exceeded", "slow"),
        ([ended("failed", error={"code": "x", "message": "boom"})], "server_error", "boom"),
        ([ended("cancelled")], "server_error", "its response is cancelled"),
        ([event("output_text.delta", output_index="x")], "server_error", "cannot be read"),
        (
            [event("output_item.done", item={"type": "message", "content": 7})],
            "server_error",
            "cannot be read",
        ),
        (
            [event("content_part.done", output_index=0, part={"type": ["output_text"]})],
            "server_error",
            "cannot be read",
        ),
        ([ended(output=[{"type": "message", "content": [3]}])], "server_error", "cannot be read"),
        ([event("output_item.done", item={"type": "function_call"})], "server_error", "a name"),
    ],
)
def test_failures_keep_what_was_said(last: list[Any], code: str, says: str) -> None:
    items, outcome = read(event("output_text.delta", output_index=0, delta="so far"), *last)
    assert (items[0]["status"], words(items[0])) == ("incomplete", "so far")
    assert outcome.status == "failed"
    assert outcome.error is not None
    assert outcome.error["code"] == code
    assert says in outcome.error["message"]


# proves R12
async def test_a_responses_upstream_is_given_every_turn_and_told_to_store_nothing(
    over: Over, upstream: ScriptedUpstream
) -> None:
    driver = await over(at("up", upstream, api="responses"))
    first = await driver.answer("reasoning one", model="scripted")
    tool = await driver.answer("tool f {}", model="scripted", previous_response_id=first["id"])
    [call] = tool["output"]
    output = {"type": "function_call_output", "call_id": call["call_id"], "output": "two"}
    last = await driver.answer([output], model="scripted", previous_response_id=tool["id"])
    assert [item["type"] for item in first["output"]] == ["reasoning", "message"]
    assert first["usage"]["total_tokens"] > 0
    assert words(last["output"][0]) == "two"
    sent = await upstream.received()
    assert {request["store"] for request in sent} == {False}
    assert [item["type"] for item in sent[-1]["input"]] == [
        "message",
        "reasoning",
        "message",
        "message",
        "function_call",
        "function_call_output",
    ]


# proves R12
async def test_a_responses_upstream_may_break_refuse_and_be_left(
    over: Over, upstream: ScriptedUpstream
) -> None:
    driver = await over(at("up", upstream, api="responses"))
    flaky = await driver.answer("flaky 2")
    cut = await driver.answer("cut 3")
    whole = await driver.answer("whole one two")
    assert [flaky["status"], cut["status"], whole["status"]] == ["completed", "failed", "completed"]
    assert (words(cut["output"][0]), words(whole["output"][0])) == ("1 2 3", "one two")
    assert len(await upstream.received()) == 5
    refused = await driver.ask("fail 400")
    with pytest.raises(UpstreamFailed) as said:
        await driver.node.gateway.finished(refused)
    assert said.value.status == 400
    hanging = await driver.ask("hang 2", store=False)
    async for group in driver.node.gateway.events(hanging, after=-1):
        if b"delta" in b"".join(group):
            break
    await driver.node.gateway.abandon(hanging, someone())
    assert await upstream.left_early(1) == 1
    stopped = msgspec.json.decode(await driver.node.gateway.finished(hanging))
    assert stopped["perdure"] == {"reason": "client_disconnected"}


# proves R12
@pytest.mark.parametrize(
    ("apis", "field"), [(("chat", "responses"), "input"), (("chat",), "messages")]
)
async def test_auto_finds_out_once_which_api_there_is(
    over: Over, apis: tuple[str, ...], field: str
) -> None:
    async with ScriptedUpstream(apis=apis) as upstream:
        driver = await over(at("up", upstream, api="auto"))
        for said in ("echo one", "echo two"):
            assert (await driver.answer(said))["status"] == "completed"
        sent = await upstream.received()
        assert [field in request for request in sent] == [True, True]
        [member] = driver.node.upstreams.members
        assert member.upstream.stats.requests == 3


# proves R12
async def test_auto_asks_again_where_nobody_answered(over: Over) -> None:
    async with ScriptedUpstream() as upstream:
        driver = await over(at("up", upstream, api="auto", attempts_max=1))
    with pytest.raises(UpstreamFailed, match="cannot be reached"):
        await driver.ask("echo one")
    port = int(upstream.url.rpartition(":")[2].removesuffix("/v1"))
    async with ScriptedUpstream(port=port) as upstream:
        assert (await driver.answer("echo two"))["status"] == "completed"
        assert "input" in (await upstream.received())[0]
