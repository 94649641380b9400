"""What chat servers are asked: every part of a request and of its history, or a refusal by name."""

from __future__ import annotations

from typing import Any

import pytest

from perdure.core.clock import SystemClock
from perdure.services.bridge import chat_request
from perdure.wire.errors import WireError
from perdure.wire.items import sound_items
from perdure.wire.responses import parse_create_response

CLOCK = SystemClock()
LEAST: dict[str, Any] = {"model": "m", "input": "x"}


def asked(sent: dict[str, Any], *history: Any, **options: Any) -> dict[str, Any]:
    request = parse_create_response(LEAST | sent)
    assert request.input is not None
    earlier = sound_items(history, CLOCK)
    return chat_request(request, earlier, sound_items(request.input, CLOCK), **options)


def call(id: str, arguments: str = "{}", **more: Any) -> dict[str, Any]:
    return {"type": "function_call", "call_id": id, "name": "f", "arguments": arguments} | more


def output(id: str, text: Any = "done") -> dict[str, Any]:
    return {"type": "function_call_output", "call_id": id, "output": text}


def chat_call(id: str) -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": "f", "arguments": "{}"}}


# proves R12
def test_the_least_request_is_streamed_and_counts_tokens() -> None:
    assert asked({}) == {
        "model": "m",
        "messages": [{"role": "user", "content": "x"}],
        "stream": True,
        "stream_options": {"include_usage": True},
    }


# proves R1, R12
def test_parameters_are_asked_for_under_their_chat_names() -> None:
    sent = {
        "temperature": 0.5,
        "top_p": 0.9,
        "max_output_tokens": 7,
        "reasoning": {"effort": "high"},
        "top_logprobs": 3,
        "user": "u",
        "safety_identifier": "s",
        "service_tier": "flex",
        "prompt_cache_key": "k",
        "store": True,
        "metadata": {"a": "b"},
        "text": {
            "verbosity": "low",
            "format": {"type": "json_schema", "name": "n", "schema": {}, "strict": True},
        },
        "top_k": 40,
    }
    made = asked(sent, model="real")
    made.pop("messages")
    assert made == {
        "model": "real",
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0.5,
        "top_p": 0.9,
        "max_tokens": 7,
        "reasoning_effort": "high",
        "logprobs": True,
        "top_logprobs": 3,
        "user": "u",
        "safety_identifier": "s",
        "service_tier": "flex",
        "prompt_cache_key": "k",
        "verbosity": "low",
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "n", "schema": {}, "strict": True},
        },
        "top_k": 40,
    }
    newer = asked({"max_output_tokens": 7}, max_tokens="max_completion_tokens")
    assert (newer["max_completion_tokens"], "max_tokens" in newer) == (7, False)
    plain = asked({"text": {"format": {"type": "json_object"}}})
    assert plain["response_format"] == {"type": "json_object"}
    assert "response_format" not in asked({"text": {"format": None}})


# proves R12
def test_instructions_and_earlier_turns_come_first_and_developers_are_the_system() -> None:
    made = asked(
        {"instructions": "be brief", "input": "and now?"},
        {"role": "developer", "content": "be kind"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
    )
    assert made["messages"] == [
        {"role": "system", "content": "be brief"},
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "and now?"},
    ]


# proves R12
def test_texts_and_images_become_parts() -> None:
    content = [
        {"type": "input_text", "text": "what is"},
        {"type": "input_image", "image_url": "data:image/png;base64,AA"},
    ]
    (message,) = asked({"input": [{"role": "user", "content": content}]})["messages"]
    assert message["content"] == [
        {"type": "text", "text": "what is"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA", "detail": "auto"}},
    ]


# proves R12
def test_calls_of_one_turn_are_one_message_with_their_outputs_behind_it() -> None:
    made = asked(
        {"input": [output("c1"), output("c2", [{"type": "input_text", "text": "two"}])]},
        {"role": "user", "content": "do both"},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"role": "assistant", "content": "doing"},
        call("c1"),
        call("c2"),
    )
    assert made["messages"] == [
        {"role": "user", "content": "do both"},
        {
            "role": "assistant",
            "content": "doing",
            "reasoning_content": "hm",
            "tool_calls": [chat_call("c1"), chat_call("c2")],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "done"},
        {"role": "tool", "tool_call_id": "c2", "content": "two"},
    ]


def test_text_after_a_call_joins_its_message_and_thoughts_without_calls_are_left_out() -> None:
    thought = {
        "type": "reasoning",
        "summary": [],
        "content": [{"type": "reasoning_text", "text": "t"}],
    }
    made = asked(
        {"input": [output("c1"), {"role": "user", "content": "go on"}]},
        call("c1"),
        {"role": "assistant", "content": "called"},
    )
    assert made["messages"][0] == {
        "role": "assistant",
        "content": "called",
        "tool_calls": [chat_call("c1")],
    }
    quiet = asked({}, thought, {"role": "assistant", "content": "a"})["messages"]
    assert quiet[0] == {"role": "assistant", "content": "a"}


def test_two_answers_in_a_row_stay_two() -> None:
    answer = {"role": "assistant", "content": "a"}
    assert [m["role"] for m in asked({}, answer, answer)["messages"]] == [
        "assistant",
        "assistant",
        "user",
    ]


# proves R7
def test_calls_and_outputs_must_match() -> None:
    with pytest.raises(WireError, match=r"No tool call found .* call_id c9"):
        asked({"input": [output("c9")]})
    with pytest.raises(WireError, match="No tool output found for function call c1"):
        asked({}, call("c1"))


# proves R5
def test_a_call_that_was_cut_short_is_left_out() -> None:
    cut = call("c1", '{"a', status="incomplete")
    assert asked({}, {"role": "user", "content": "go"}, cut)["messages"] == [
        {"role": "user", "content": "go"},
        {"role": "user", "content": "x"},
    ]


FUNCTIONS = [
    {"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": None},
    {"type": "function", "name": "g", "description": "d", "strict": True},
]


# proves R12
@pytest.mark.parametrize(
    ("choice", "chat_choice", "names"),
    [
        (None, None, ["f", "g"]),
        ("none", "none", ["f", "g"]),
        ("required", "required", ["f", "g"]),
        (
            {"type": "function", "name": "g"},
            {"type": "function", "function": {"name": "g"}},
            ["f", "g"],
        ),
        (
            {
                "type": "allowed_tools",
                "mode": "required",
                "tools": [{"type": "function", "name": "g"}],
            },
            "required",
            ["g"],
        ),
    ],
)
def test_tools_and_choices(choice: Any, chat_choice: Any, names: list[str]) -> None:
    made = asked({"tools": FUNCTIONS, "tool_choice": choice, "parallel_tool_calls": False})
    assert [tool["function"]["name"] for tool in made["tools"]] == names
    assert made.get("tool_choice") == chat_choice
    assert made["parallel_tool_calls"] is False
    assert made["tools"][-1]["function"] == {"name": "g", "description": "d", "strict": True}


# proves R1, R12
@pytest.mark.parametrize(
    ("sent", "history", "param"),
    [
        ({"tool_choice": "required"}, [], "tool_choice"),
        ({"tool_choice": "always"}, [], "tool_choice"),
        ({"tools": FUNCTIONS, "tool_choice": {"type": "function", "name": "z"}}, [], "tool_choice"),
        ({"tools": FUNCTIONS, "tool_choice": {"type": "web_search"}}, [], "tool_choice"),
        (
            {"tools": FUNCTIONS, "tool_choice": {"type": "allowed_tools", "mode": "auto"}},
            [],
            "tool_choice",
        ),
        (
            {"tools": [{"type": "function", "name": "f", "defer_loading": True}]},
            [],
            "tools[0].defer_loading",
        ),
        (
            {
                "input": [
                    {"role": "user", "content": [{"type": "input_image", "file_id": "file_1"}]}
                ]
            },
            [],
            "input[0]",
        ),
        (
            {"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "f"}]}]},
            [],
            "input[0]",
        ),
        (
            {"input": [{"role": "system", "content": [{"type": "input_image", "image_url": "u"}]}]},
            [],
            "input[0]",
        ),
        ({"input": [{"type": "file_search_call", "queries": []}]}, [], "input[0]"),
        ({}, [{"type": "compaction", "encrypted_content": "x"}], "input"),
    ],
)
def test_what_chat_cannot_express_is_refused_by_place(
    sent: dict[str, Any], history: list[Any], param: str
) -> None:
    with pytest.raises(WireError) as caught:
        asked(sent, *history)
    assert caught.value.param == param
