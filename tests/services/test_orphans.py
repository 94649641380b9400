"""Tool calls that were never answered: told, named, refused where that is wanted, never stored."""

from __future__ import annotations

from typing import Any

import pytest

from perdure.proving.upstream import ScriptedUpstream
from perdure.services.orphans import LATE, UNANSWERED, repaired
from perdure.wire.errors import WireError
from tests.services.conftest import Driver, Open, someone

WEATHER = {"type": "function", "name": "weather", "parameters": {"type": "object"}}


def call(name: str, status: str = "completed") -> dict[str, Any]:
    return {
        "id": f"fc_{name}",
        "type": "function_call",
        "call_id": f"call_{name}",
        "name": "weather",
        "arguments": "{}",
        "status": status,
    }


def output(name: str, text: str = "sunny") -> dict[str, Any]:
    return {
        "id": f"fco_{name}",
        "type": "function_call_output",
        "call_id": f"call_{name}",
        "output": text,
        "status": "completed",
    }


def said(text: str, role: str = "user") -> dict[str, Any]:
    kind = "output_text" if role == "assistant" else "input_text"
    content = [{"type": kind, "text": text}]
    return {"id": f"msg_{text}", "type": "message", "role": role, "content": content}


def shape(items: list[dict[str, Any]]) -> list[str]:
    """Each item in a word; an output that was made up ends in `?`."""
    words = {"function_call": "call ", "function_call_output": "out "}
    return [
        words[item["type"]] + item["call_id"][5:] + "?" * (item.get("output") == UNANSWERED)
        if item["type"] in words
        else item["content"][0]["text"].partition(":")[0][-9:]
        for item in items
    ]


# proves R9
@pytest.mark.parametrize(
    ("history", "items", "past", "now"),
    [
        ([call("a")], [output("a")], ["call a"], ["out a"]),
        ([call("a")], [said("hi")], ["call a", "out a?"], ["hi"]),
        ([call("a")], [said("hi"), output("a")], ["call a"], ["hi", "out a"]),
        ([call("a"), call("b")], [output("b")], ["call a", "call b", "out a?"], ["out b"]),
        (
            [said("go"), call("a"), said("so", "assistant"), said("hi"), said("ok", "assistant")],
            [said("on")],
            ["go", "call a", "so", "out a?", "hi", "ok"],
            ["on"],
        ),
        (
            [call("a"), said("hi"), said("ok", "assistant")],
            [output("a")],
            ["call a", "out a?", "hi", "ok"],
            [(LATE.format(call_id="call_a")).partition(":")[0][-9:]],
        ),
        (
            [call("a"), output("a"), call("a"), said("hi")],
            [said("on")],
            ["call a", "out a", "call a", "out a?", "hi"],
            ["on"],
        ),
        ([call("a", "incomplete")], [said("hi")], ["call a"], ["hi"]),
        ([said("hi")], [call("a")], ["hi"], ["call a"]),
        ([], [output("a")], [], ["out a"]),
    ],
)
def test_the_past_is_told_as_it_was(
    history: list[Any], items: list[Any], past: list[str], now: list[str]
) -> None:
    told = repaired(history, items)
    assert shape(told.history) == past
    assert shape(told.items) == now
    assert len(told.orphans) == sum(word.endswith("?") for word in past)


# proves R9
async def test_a_chain_goes_on_after_a_call_that_nobody_answered(
    driver: Driver, upstream: ScriptedUpstream
) -> None:
    first = await driver.answer("parallel weather weather", tools=[WEATHER])
    calls = [item for item in first["output"] if item["type"] == "function_call"]
    given = {"type": "function_call_output", "call_id": calls[1]["call_id"], "output": "rain"}
    started = await driver.node.gateway.create(
        someone(),
        {"model": "m", "previous_response_id": first["id"], "input": [given], "tools": [WEATHER]},
    )
    [second] = [(await driver.events(started))[-1]["response"]]
    orphan = {name: calls[0][name] for name in ("id", "call_id", "name")}
    assert second["status"] == "completed"
    assert second["perdure"] == {"unanswered_calls": [orphan]} == started.notes
    third = await driver.answer("echo on", previous_response_id=second["id"])
    assert third["perdure"] == second["perdure"]
    assert driver.node.gateway.stats.calls_repaired == 2
    for asked in (await upstream.received())[1:]:
        tools = [message for message in asked["messages"] if message["role"] == "tool"]
        assert [message["content"] for message in tools] == [UNANSWERED, "rain"]
        assert asked["messages"][1]["role"] == "assistant"
        assert asked["messages"][2:4] == tools
    owner = ("default", second["id"])
    kept = [item.value.type async for item in driver.node.state.items.all(owner, "input")]
    assert kept == ["function_call_output"], "nothing that was made up is stored"


# proves R9
async def test_a_conversation_goes_on_too_and_takes_the_output_late(
    driver: Driver, upstream: ScriptedUpstream
) -> None:
    conversation = await driver.conversation()
    first = await driver.answer("tool weather", conversation=conversation, tools=[WEATHER])
    await driver.answer("echo on", conversation=conversation)
    late = {"type": "function_call_output", "output": "rain at last"}
    late["call_id"] = first["output"][0]["call_id"]
    last = await driver.ask("", conversation=conversation, input=[late])
    body = (await driver.events(last))[-1]["response"]
    assert body["status"] == "completed"
    asked = (await upstream.received())[-1]
    assert asked["messages"][-1]["role"] == "user"
    assert asked["messages"][-1]["content"].endswith("rain at last")


# proves R9
async def test_a_repeat_is_told_again_what_was_repaired(driver: Driver) -> None:
    first = await driver.answer("tool weather", tools=[WEATHER])
    caller = someone(key="again")
    began = await driver.ask("echo on", caller=caller, previous_response_id=first["id"])
    await driver.node.gateway.finished(began)
    again = await driver.ask("echo on", caller=caller, previous_response_id=first["id"])
    assert again.notes == began.notes != {}


# proves R9
async def test_a_failure_keeps_the_report(driver: Driver) -> None:
    first = await driver.answer("tool weather", tools=[WEATHER])
    ended = await driver.answer("cut 2", previous_response_id=first["id"])
    assert set(ended["perdure"]) == {"unanswered_calls", "reason", "status"}


# proves R9
async def test_an_operator_may_have_it_refused(opened: Open) -> None:
    driver = await opened(flags={"tools.orphans": "refuse"})
    first = await driver.answer("tool weather", tools=[WEATHER])
    with pytest.raises(WireError, match=first["output"][0]["call_id"]):
        await driver.ask("echo on", previous_response_id=first["id"])


# proves R9
async def test_calls_of_the_request_itself_are_their_senders_to_answer(driver: Driver) -> None:
    sent = {"model": "m", "input": [call("a"), {"role": "user", "content": "hi"}]}
    with pytest.raises(WireError, match="No tool output found for function call call_a"):
        await driver.node.gateway.create(someone(), sent)
