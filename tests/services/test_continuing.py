"""Going on with a message that was cut short: with every way to ask for it, and with upstreams that
do not do it. The death is a node that is dropped; it is real in tests/e2e and tests/crash."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from openai import omit
from openai._models import validate_type
from openai.lib.streaming.responses._responses import ResponseStreamState
from openai.types.responses import ResponseStreamEvent

from perdure.core.errors import Invalid
from perdure.proving.upstream import ScriptedUpstream
from perdure.services.bridge import NEW_PARTS, ChatReader
from perdure.services.config import load
from perdure.services.continuing import (
    WAYS,
    Continuation,
    Continues,
    NotContinued,
    Partial,
    Way,
    asked_to_go_on,
)
from perdure.services.gateway import Started
from perdure.wire import events as ev
from perdure.wire.fold import View, take
from tests.services.conftest import Driver, Open
from tests.services.reading import CLOCK
from tests.services.test_background import body, cancel, heard, types
from tests.services.test_recovery import Deaf, die, said

PROMPT = "slow 0.02 12"
TEXT = "1 2 3 4 5 6 7 8 9 10 11 12"
GOES_ON: dict[str, Any] = {"upstream.continues": "continue_final_message"}


@pytest.fixture
def engine_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'perdure.db'}"


@pytest.fixture
async def upstream(request: pytest.FixtureRequest) -> AsyncIterator[ScriptedUpstream]:
    """One that knows the way a test names."""
    way: Continues = getattr(request, "param", "continue_final_message")
    async with ScriptedUpstream(continues=way) as server:
        yield server


async def cut_short(
    opened: Open, flags: dict[str, Any], prompt: str, until: str, **fields: Any
) -> tuple[Started, list[dict[str, Any]]]:
    first = await opened(flags, wrap=Deaf)
    started = await first.ask(prompt, background=True, **fields)
    seen = await heard(first, started, until)
    await die(first.node)
    return started, seen


async def ended(driver: Driver, started: Started) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """All events to the end, which the official client's own accumulation agrees with."""
    events = await driver.events(started)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    official = ResponseStreamState(input_tools=omit, text_format=omit)
    for event in events:
        official.handle_event(validate_type(type_=ResponseStreamEvent, value=event))
        if event["type"] == "response.output_item.done" and event["item"]["type"] == "message":
            item = official._get_output_item(event["output_index"]).to_dict()
            assert item["content"][0]["text"] == event["item"]["content"][0]["text"]
    response = await body(driver, started.id)
    assert events[-1]["response"] == response
    return events, response


def attempts(response: dict[str, Any]) -> list[tuple[bool, str | None]]:
    told = response["perdure"]["attempts"]
    return [(one.get("continued", False), one.get("reason")) for one in told]


# proves R5
@pytest.mark.parametrize(
    ("way", "text", "pieces", "new"),
    [
        (Way(), "1 2", [" 3", " 4"], " 3"),
        (Way(), "1 2", ["", " ", "3"], " "),
        (Way(), "1 2 \n", [" ", "\n", "3"], "3"),
        (Way(), "1 2 ", [" 3"], "3"),
        (Way(), "1 2 ", ["3"], None),
        (Way(), "1 2 ", [" "], ""),
        (Way(), "1 2", ["1 ", "2 3"], None),
        (Way(), "1 2", ["1", " "], ""),
        (Way(), "1 2", ["1", " 3"], "1 3"),
        (Way(), "a long text that", ["a long text that is"], None),
        (Way(), "a text that is long and said", ["a text that is lo", "st"], None),
        (Way(repeats=True), "1 2", ["1", " 2 3"], " 3"),
        (Way(repeats=True), "1 2", ["1 2", " 3"], " 3"),
        (Way(repeats=True), "1 2 ", ["1 2 1 2"], "1 2"),
        (Way(repeats=True), "1 2", ["1 3"], None),
        (Way(repeats=True), "1 2", ["1 2"], ""),
    ],
)
def test_only_what_is_new_for_certain_is_taken(
    way: Way, text: str, pieces: list[str], new: str | None
) -> None:
    continuation = Continuation(Partial(0, text), way)
    if new is None:
        with pytest.raises(NotContinued):
            [continuation.new(piece) for piece in pieces]
        return
    told = [continuation.new(piece) for piece in pieces]
    assert next(filter(None, told), "") == new


# proves R5
@pytest.mark.parametrize("way", WAYS)
def test_white_space_at_its_end_is_not_sent(way: Continues) -> None:
    asked = {"model": "m", "messages": [{"role": "user", "content": "count"}], "stream": True}
    sent = asked_to_go_on(asked, Partial(0, " 1 2 \n"), WAYS[way])
    marked = {"role": "assistant", "content": " 1 2", **WAYS[way].marks}
    assert sent == {**asked, **WAYS[way].fields, "messages": [*asked["messages"], marked]}
    with pytest.raises(NotContinued):
        asked_to_go_on(sent, Partial(0, "3"), WAYS[way])


def reading(text: str) -> ChatReader:
    """A reader of what goes on with a message that says `text`."""
    view = View()
    item = {"id": "msg_1", "type": "message", "role": "assistant", "content": []}
    at: dict[str, Any] = {"output_index": 0, "item_id": "msg_1", "content_index": 0}
    take(
        view,
        ev.OutputItemAdded(output_index=0, item=item),
        ev.ContentPartAdded(**at, part=NEW_PARTS["output_text"]),
        ev.OutputTextDelta(**at, delta=text),
    )
    return ChatReader(view, CLOCK, Continuation(Partial(0, text), Way()))


def chunk(delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}


CALL = {"tool_calls": [{"index": 0, "id": "c", "function": {"name": "f", "arguments": "{}"}}]}


# proves R5
@pytest.mark.parametrize(
    "delta",
    [{"reasoning_content": "hm"}, {"reasoning": "hm"}, {"refusal": "no"}, CALL, {"content": "1 2"}],
)
def test_whatever_is_no_text_that_is_new_is_no_continuation(delta: dict[str, Any]) -> None:
    reader = reading("1 2")
    assert reader.read(chunk({"role": "assistant", "content": ""})) == []
    with pytest.raises(NotContinued):
        reader.read(chunk(delta))


# proves R5
@pytest.mark.parametrize("content", ["", "1"])
def test_an_end_without_anything_new_is_no_continuation(content: str) -> None:
    reader = reading("1 2")
    assert reader.read(chunk({"content": content}, "stop")) == []
    with pytest.raises(NotContinued):
        reader.end()


# proves R5
def test_behind_what_is_new_anything_may_come() -> None:
    reader = reading("1 2")
    made = reader.read(chunk({"content": " 3"})) + reader.read(chunk(CALL, "tool_calls"))
    _, outcome = reader.end()
    assert outcome.status == "completed"
    assert [type(event).__name__ for event in made[:4]] == [
        "OutputTextDelta",
        "OutputTextDone",
        "ContentPartDone",
        "OutputItemDone",
    ]
    message, call = reader.view.output()
    assert (message["status"], message["content"][0]["text"]) == ("completed", "1 2 3")
    assert (call["name"], call["status"]) == ("f", "completed")


# proves R5
@pytest.mark.parametrize(
    ("upstream", "way"), [(way, way) for way in WAYS], indirect=["upstream"], ids=WAYS
)
async def test_text_goes_on_in_the_same_item(
    opened: Open, upstream: ScriptedUpstream, way: Continues
) -> None:
    flags = {"upstream.continues": way}
    started, seen = await cut_short(opened, flags, PROMPT, "1 2 3")
    driver = await opened(flags)
    events, response = await ended(driver, started)
    assert events[: len(seen)] == seen
    again = [at for at, type in enumerate(types(events)) if type == "in_progress"][1]
    [open] = events[again]["response"]["output"]
    assert (open["status"], open["content"][0]["text"]) == ("in_progress", said(events[:again]))
    assert types(events).count("in_progress") == 2
    assert types(events).count("output_item.added") == 1
    assert types(events).count("content_part.added") == 1
    assert types(events)[-4:] == [
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    (item,) = response["output"]
    assert {event["item_id"] for event in events if "item_id" in event} == {item["id"]}
    assert said(events) == TEXT
    assert events[-4]["text"] == events[-3]["part"]["text"] == TEXT
    assert events[-2]["item"] == item
    assert (item["status"], item["content"][0]["text"]) == ("completed", TEXT)
    assert "abandoned" not in response["perdure"]
    assert attempts(response) == [(False, "process_restart"), (True, None)]
    unbroken = await driver.answer(PROMPT)
    assert response["usage"]["total_tokens"] == unbroken["usage"]["total_tokens"]
    first, second, _ = await upstream.received()
    *before, last = second["messages"]
    given = said(seen)
    assert before == first["messages"]
    assert last["content"].startswith(given)
    assert TEXT.startswith(last["content"])


# proves R5
async def test_what_goes_on_may_be_cut_short_again(
    opened: Open, upstream: ScriptedUpstream
) -> None:
    started, _ = await cut_short(opened, GOES_ON, "gate later 7 12 0.02", "1 2")
    again = await opened(GOES_ON, wrap=Deaf)
    seen: list[dict[str, Any]] = []
    async for group in again.node.gateway.events(started, after=-1):
        seen += [msgspec.json.decode(event) for event in group]
        if said(seen).startswith("1 2 3 4 5 6 7"):
            break
    await die(again.node)
    await upstream.open("later")
    events, response = await ended(await opened(GOES_ON), started)
    assert types(events).count("output_item.added") == 1
    assert said(events) == TEXT == response["output"][0]["content"][0]["text"]
    lost = (True, "process_restart")
    assert attempts(response) == [(False, "process_restart"), lost, (True, None)]


# proves R5, R12
async def test_a_model_that_is_still_loading_is_waited_for(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("perdure.services.background._LOADING_PAUSE_S", 0.05)
    async with ScriptedUpstream() as first:
        port = int(first.url.removesuffix("/v1").rpartition(":")[2])
        other = {"name": "other", "url": "http://127.0.0.1:9/v1", "models": ["no-model"]}
        knows = {"name": "knows", "url": first.url, "continues": "continue_final_message"}
        flags = {"upstream.url": None, "upstreams": [other, knows]}
        started, _ = await cut_short(opened, flags, PROMPT, "1 2 3")
    driver = await opened(flags)
    await heard(driver, started, "", attempt=2)
    async with ScriptedUpstream(port):
        events, response = await ended(driver, started)
    assert said(events) == TEXT == response["output"][0]["content"][0]["text"]
    assert attempts(response) == [(False, "process_restart"), (True, None)]


# proves R5
async def test_one_whose_upstream_proves_to_be_another_is_begun_anew(
    opened: Open, upstream: ScriptedUpstream
) -> None:
    silent = {"name": "silent", "url": "http://127.0.0.1:9/v1", "continues": "prefill"}
    flags = {"upstream.url": None, "upstreams": [silent, {"name": "one", "url": upstream.url}]}
    started, _ = await cut_short(opened, flags, PROMPT, "1 2 3")
    events, response = await ended(await opened(flags), started)
    begun_anew(events, response)


# proves O2, R5
async def test_a_stop_in_good_order_is_gone_on_from(opened: Open) -> None:
    first = await opened(GOES_ON)
    started = await first.ask(PROMPT, background=True)
    await heard(first, started, "1 2 3")
    await first.node.drain(0)
    await first.node.close()
    events, response = await ended(await opened(GOES_ON), started)
    assert said(events) == TEXT == response["output"][0]["content"][0]["text"]
    assert attempts(response) == [(False, "server_stopped"), (True, None)]


# proves R5
async def test_thoughts_before_it_stay_and_go_with_it(
    opened: Open, upstream: ScriptedUpstream
) -> None:
    started, _ = await cut_short(opened, GOES_ON, f"ponder 0.02 {TEXT}", f"The user wants: {TEXT}1")
    events, response = await ended(await opened(GOES_ON), started)
    thought, item = response["output"]
    assert thought["content"][0]["text"] == f"The user wants: {TEXT}"
    assert item["content"][0]["text"] == TEXT
    assert said(events) == f"The user wants: {TEXT}{TEXT}"
    assert attempts(response) == [(False, "process_restart"), (True, None)]
    last = (await upstream.received())[1]["messages"][-1]
    assert last["reasoning_content"] == thought["content"][0]["text"]


# proves R5
async def test_a_thought_that_was_cut_short_is_begun_anew(opened: Open) -> None:
    started, _ = await cut_short(opened, GOES_ON, f"ponder 0.02 {TEXT}", "The user")
    _, response = await ended(await opened(GOES_ON), started)
    assert [item["type"] for item in response["output"]] == ["reasoning", "message"]
    assert [item["type"] for item in response["perdure"]["abandoned"]] == ["reasoning"]
    assert attempts(response) == [(False, "process_restart"), (False, None)]


def begun_anew(events: list[dict[str, Any]], response: dict[str, Any]) -> None:
    """What was said is abandoned, and all of it is said once more, in an item of its own."""
    (left,) = response["perdure"]["abandoned"]
    (item,) = response["output"]
    assert left["status"] == "incomplete"
    assert TEXT.startswith(left["content"][0]["text"])
    assert item["content"][0]["text"] == TEXT
    over = [at for at, type in enumerate(types(events)) if type == "in_progress"][-1]
    assert events[over - 1]["item"] == left
    assert {event["output_index"] for event in events[over + 1 : -1]} == {1}


# proves R5
@pytest.mark.parametrize(
    ("upstream", "way"),
    [
        ("no", "prefill"),
        ("no", "prefix_repeated"),
        ("prefix", "continue_final_message"),
        ("prefix_repeated", "prefix"),
        ("prefix", "prefix_repeated"),
    ],
    indirect=["upstream"],
)
async def test_an_upstream_that_does_not_go_on_is_asked_anew(
    opened: Open, upstream: ScriptedUpstream, way: Continues
) -> None:
    flags = {"upstream.continues": way}
    started, _ = await cut_short(opened, flags, PROMPT, "1 2 3")
    events, response = await ended(await opened(flags), started)
    begun_anew(events, response)
    refused = (True, "not_continued")
    assert attempts(response) == [(False, "process_restart"), refused, (False, None)]
    assert len(await upstream.received()) <= 3


# proves R5
@pytest.mark.parametrize(
    "fields",
    [
        {"max_output_tokens": 100},
        {"include": ["message.output_text.logprobs"]},
        {"text": {"format": {"type": "json_object"}}},
        {"guided_regex": ".*"},
    ],
    ids=lambda fields: next(iter(fields)),
)
async def test_what_was_asked_of_the_whole_is_begun_anew(
    opened: Open, upstream: ScriptedUpstream, fields: dict[str, Any]
) -> None:
    started, _ = await cut_short(opened, GOES_ON, PROMPT, "1 2 3", **fields)
    events, response = await ended(await opened(GOES_ON), started)
    begun_anew(events, response)
    assert attempts(response) == [(False, "process_restart"), (False, None)]
    assert len(await upstream.received()) == 2


# proves R5
async def test_cancelling_wins_over_going_on(opened: Open, upstream: ScriptedUpstream) -> None:
    started, _ = await cut_short(opened, GOES_ON, "hang 3", "1 2 3")
    driver = await opened(GOES_ON)
    await upstream.received(2)
    response = await cancel(driver, started.id)
    assert response["status"] == "cancelled"
    (item,) = response["output"]
    assert (item["status"], item["content"][0]["text"]) == ("incomplete", "1 2 3")
    events, _ = await ended(driver, started)
    assert types(events).count("in_progress") == 2


def test_the_responses_api_knows_no_way() -> None:
    flags = {"upstream.url": "http://a/v1", "upstream.api": "responses"}
    with pytest.raises(Invalid, match="continues is for chat completions"):
        load(environment={}, flags=flags | GOES_ON)
