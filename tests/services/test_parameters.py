"""Every parameter of the official client's `responses.create`: it works, or is refused by name.

The table is checked against the signature of the installed client, and its values against the
literals in the client's types, so a parameter or a value that OpenAI adds turns these tests red.
"""

from __future__ import annotations

import inspect
from typing import Any, Literal, get_args, get_origin, get_type_hints

import msgspec
import openai.resources.responses
import pytest
from openai.types.responses import (
    FunctionToolParam,
    ResponseIncludable,
    ResponseTextConfigParam,
    ToolParam,
    response_create_params,
)
from openai.types.shared_params import Reasoning as OfficialReasoning

from perdure.proving.upstream import ScriptedUpstream
from perdure.wire.errors import NotFound, WireError
from perdure.wire.responses import INCLUDES, Reasoning, TextConfig, parse_create_response
from tests.services.conftest import Driver, someone

ANYWHERE = {"self", "extra_headers", "extra_query", "extra_body", "timeout"}
"""Arguments of the client itself."""

TOOL = {"type": "function", "name": "f", "parameters": {"type": "object"}}
SCHEMA = {"type": "json_schema", "name": "n", "schema": {"type": "object"}}


class Works(msgspec.Struct):
    """A value that is taken: given back in the body, and asked of the upstream as `asked`."""

    value: Any
    asked: dict[str, Any] = {}
    also: dict[str, Any] = {}
    given_back: bool = True


class Refused(msgspec.Struct):
    """A value that is not, and what the refusal says."""

    value: Any
    param: str
    code: str
    also: dict[str, Any] = {}


UNSUPPORTED, VALUE, INVALID = "unsupported_parameter", "unsupported_value", "invalid_value"
EXCLUSIVE = "mutually_exclusive_parameters"

OPEN_RESPONSES: dict[str, list[Works | Refused]] = {
    "presence_penalty": [
        Works(0.5, {"presence_penalty": 0.5}),
        Refused(3, "presence_penalty", INVALID),
    ],
    "frequency_penalty": [
        Works(0.5, {"frequency_penalty": 0.5}),
        Refused(-3, "frequency_penalty", INVALID),
    ],
}
"""What the Open Responses specification has beyond the official client."""

TABLE: dict[str, list[Works | Refused]] = {
    **OPEN_RESPONSES,
    "access_programs": [Refused({"cyber": "standard"}, "access_programs", UNSUPPORTED)],
    "background_options": [Refused({"completion_window": "8h"}, "background_options", UNSUPPORTED)],
    "background": [
        Works(False),
        Refused("yes", "background", "invalid_type"),
    ],
    "context_management": [
        Refused([{"type": "compaction"}], "context_management", UNSUPPORTED),
        Works(None, given_back=False),
    ],
    "conversation": [
        Refused("conv_1", "store", EXCLUSIVE, also={"store": False}),
        Refused(
            "conv_1", "previous_response_id", EXCLUSIVE, also={"previous_response_id": "resp_1"}
        ),
        Refused({"id": "conv_1", "more": 1}, "conversation.more", "unknown_parameter"),
    ],
    "image": [Refused({"context_compression": "auto"}, "image", UNSUPPORTED)],
    "include": [
        *(Works([value], given_back=False) for value in INCLUDES),
        Works(["message.output_text.logprobs"], {"logprobs": True}, given_back=False),
        Refused(["message.made_up"], "include[0]", INVALID),
    ],
    "input": [
        Works("hello", given_back=False),
        Refused([], "input", "missing_required_parameter"),
        Refused([{"type": "made_up"}], "input[0].type", INVALID),
        Refused(3, "input", "invalid_type"),
    ],
    "instructions": [Works("be brief")],
    "max_output_tokens": [
        Works(100, {"max_tokens": 100}),
        Refused(0, "max_output_tokens", INVALID),
    ],
    "max_tool_calls": [Works(3), Refused(0, "max_tool_calls", INVALID)],
    "metadata": [
        Works({"a": "b"}),
        Refused({"a": 1}, "metadata", "invalid_type"),
    ],
    "model": [Works("m", {"model": "m"}), Refused("", "model", INVALID)],
    "moderation": [Refused({"model": "omni-moderation-latest"}, "moderation", UNSUPPORTED)],
    "parallel_tool_calls": [
        Works(False, {"parallel_tool_calls": False}, also={"tools": [TOOL]}),
    ],
    "previous_response_id": [
        Refused("resp_nobody", "previous_response_id", "previous_response_not_found"),
    ],
    "prompt": [Refused({"id": "pmpt_1"}, "prompt", UNSUPPORTED)],
    "prompt_cache_key": [Works("k", {"prompt_cache_key": "k"})],
    "prompt_cache_options": [Refused({"mode": "implicit"}, "prompt_cache_options", UNSUPPORTED)],
    "prompt_cache_retention": [
        Works("24h", {"prompt_cache_retention": "24h"}),
        Refused("1h", "prompt_cache_retention", INVALID),
    ],
    "reasoning": [
        Works({"effort": "high", "summary": None}, {"reasoning_effort": "high"}),
        Works({"effort": None, "summary": "auto", "context": "auto", "mode": "standard"}),
        Refused({"effort": "boundless"}, "reasoning.effort", INVALID),
        Refused({"mode": "pro"}, "reasoning.mode", VALUE),
        Refused({"context": "all_turns"}, "reasoning.context", VALUE),
    ],
    "safety_identifier": [Works("s", {"safety_identifier": "s"})],
    "service_tier": [
        Works("flex", {"service_tier": "flex"}),
        Refused("slow", "service_tier", INVALID),
    ],
    "store": [Works(True), Works(False), Refused("no", "store", "invalid_type")],
    "stream": [Works(True, given_back=False), Refused("yes", "stream", "invalid_type")],
    "stream_options": [
        Works({"include_obfuscation": False}, also={"stream": True}, given_back=False),
        Refused({"include_obfuscation": False}, "stream_options", INVALID),
        Refused(
            {"include_obfuscation": True},
            "stream_options.include_obfuscation",
            UNSUPPORTED,
            also={"stream": True},
        ),
        Refused({"other": 1}, "stream_options.other", "unknown_parameter", also={"stream": True}),
    ],
    "temperature": [Works(0.5, {"temperature": 0.5}), Refused(3, "temperature", INVALID)],
    "text": [
        Works({"format": {"type": "text"}, "verbosity": "low"}, {"verbosity": "low"}),
        Works(
            {"format": SCHEMA},
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "schema": {"type": "object"}},
                }
            },
        ),
        Works({"format": {"type": "json_object"}}, {"response_format": {"type": "json_object"}}),
        Refused({"format": {"type": "grammar"}}, "text.format.type", INVALID),
        Refused(
            {"format": {"type": "json_schema"}}, "text.format.name", "missing_required_parameter"
        ),
    ],
    "tool_choice": [
        Works("required", {"tool_choice": "required"}, also={"tools": [TOOL]}),
        Works(
            {"type": "function", "name": "f"},
            {"tool_choice": {"type": "function", "function": {"name": "f"}}},
            also={"tools": [TOOL]},
        ),
        Refused("required", "tool_choice", INVALID),
        *(
            Refused({"type": type}, "tool_choice", INVALID, also={"tools": [TOOL]})
            for type in ("file_search", "mcp", "custom", "shell", "apply_patch", "web_search")
        ),
    ],
    "tools": [
        Works(
            [
                {
                    "type": "function",
                    "name": "f",
                    "description": "d",
                    "parameters": {},
                    "strict": True,
                }
            ],
            {
                "tools": [
                    {
                        "type": "function",
                        "function": {
                            "name": "f",
                            "description": "d",
                            "parameters": {},
                            "strict": True,
                        },
                    }
                ]
            },
        ),
        Refused([{"type": "made_up"}], "tools[0].type", VALUE),
        Refused([{**TOOL, "defer_loading": True}], "tools[0].defer_loading", VALUE),
        Refused([{**TOOL, "async": True}], "tools[0].async", VALUE),
        Refused([{**TOOL, "output_schema": {}}], "tools[0].output_schema", VALUE),
        Refused([{**TOOL, "allowed_callers": ["direct"]}], "tools[0].allowed_callers", VALUE),
        Refused([{"type": "function"}], "tools[0].name", "missing_required_parameter"),
    ],
    "top_logprobs": [
        Works(2, {"logprobs": True, "top_logprobs": 2}),
        Refused(21, "top_logprobs", INVALID),
    ],
    "top_p": [Works(0.5, {"top_p": 0.5}), Refused(2, "top_p", INVALID)],
    "truncation": [Works("disabled"), Refused("auto", "truncation", VALUE)],
    "user": [Works("u", {"user": "u"})],
}


def sent_with(name: str, case: Works | Refused) -> dict[str, Any]:
    return {"model": "m", "input": "echo hi"} | case.also | {name: case.value}


# proves R1
def test_the_table_names_every_parameter_of_the_official_client() -> None:
    create = inspect.signature(openai.resources.responses.Responses.create)
    assert set(TABLE) - set(OPEN_RESPONSES) == set(create.parameters) - ANYWHERE


# proves R1
async def test_every_parameter_works_or_is_refused_by_name(
    driver: Driver, upstream: ScriptedUpstream
) -> None:
    asked = 0
    for name, cases in TABLE.items():
        for case in cases:
            sent = sent_with(name, case)
            if isinstance(case, Refused):
                with pytest.raises(WireError) as refused:
                    await driver.node.gateway.create(someone(), sent)
                got = (refused.value.param, refused.value.code, refused.value.status)
                assert got == (case.param, case.code, 400), sent
                continue
            started = await driver.node.gateway.create(someone(), sent)
            body = msgspec.json.decode(await driver.node.gateway.finished(started))
            if case.given_back:
                shown = body[name]
                if name == "tools":
                    assert shown == case.value
                elif isinstance(case.value, dict):
                    assert case.value.items() <= shown.items(), sent
                else:
                    assert shown == case.value, sent
            asked += 1
            [*_, last] = await upstream.received(asked)
            assert case.asked.items() <= last.items(), sent


# proves R1
async def test_a_conversation_and_an_earlier_response_are_built_on(driver: Driver) -> None:
    conversation = await driver.conversation("hello")
    first = await driver.answer("echo one", conversation=conversation)
    assert first["conversation"] == {"id": conversation}
    second = await driver.answer("echo two", previous_response_id=first["id"])
    assert second["previous_response_id"] == first["id"]
    with pytest.raises(NotFound):
        await driver.ask("x", conversation="conv_nobody")


def hosted_tools() -> list[str]:
    """The types of every tool in the client's union, but for functions."""
    found = [get_type_hints(tool)["type"] for tool in get_args(ToolParam)]
    return sorted({name for kind in found for name in get_args(kind)} - {"function"})


# proves R1
@pytest.mark.parametrize("type", hosted_tools())
def test_a_tool_that_nobody_here_can_run_is_refused_by_its_place(type: str) -> None:
    with pytest.raises(WireError, match=type) as refused:
        parse_create_response({"model": "m", "input": "x", "tools": [TOOL, {"type": type}]})
    assert (refused.value.param, refused.value.code) == ("tools[1].type", VALUE)


def literals() -> list[tuple[str, Any]]:
    """Every value that the client's types name for a parameter, itself or in a list."""
    hints = get_type_hints(response_create_params.ResponseCreateParamsBase)
    found = [(name, value) for name, hint in hints.items() for value in _literals(hint)]
    return [pair for pair in found if pair[0] not in ("model", "tool_choice")]


def _literals(hint: Any) -> list[Any]:
    if get_origin(hint) is Literal:
        return list(get_args(hint))
    return [value for part in get_args(hint) for value in _literals(part)]


# proves R1
@pytest.mark.parametrize(("name", "value"), literals())
def test_a_value_that_the_client_names_is_taken_or_refused_by_name(name: str, value: Any) -> None:
    refused = refusal({"model": "m", "input": "x", name: [value] if name == "include" else value})
    if refused is not None:
        assert refused.param == name
        assert refused.code == VALUE, "a value that the client knows is not called invalid"


def refusal(sent: dict[str, Any]) -> WireError | None:
    try:
        parse_create_response(sent)
    except WireError as error:
        return error
    return None


# proves R1
def test_what_nests_in_a_parameter_is_known_too() -> None:
    assert set(get_args(ResponseIncludable)) == set(INCLUDES)
    assert set(get_type_hints(OfficialReasoning)) == {*Reasoning.__struct_fields__, "mode"}
    assert set(get_type_hints(ResponseTextConfigParam)) == set(TextConfig.__struct_fields__)
    refused = {case.param for case in TABLE["tools"] if isinstance(case, Refused)}
    works = {"type", "name", "description", "parameters", "strict"}
    assert set(get_type_hints(FunctionToolParam)) - works == {
        param.removeprefix("tools[0].") for param in refused
    } - {"type", "name"}
