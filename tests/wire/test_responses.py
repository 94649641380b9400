"""What a response request may say, what is refused by name, and the body that comes back."""

from __future__ import annotations

from typing import Any

import pytest
from openai._models import validate_type
from openai.types.responses import Response, response_create_params
from pydantic import ValidationError

from perdure.wire.errors import WireError, body_of
from perdure.wire.responses import (
    INCLUDES,
    CreateResponse,
    Outcome,
    failed,
    finished,
    parse_create_response,
    response_body,
)

LEAST: dict[str, Any] = {"model": "m", "input": "hi"}

EVERYTHING: dict[str, Any] = {
    "model": "m",
    "input": "hi",
    "instructions": "be brief",
    "previous_response_id": "resp_before",
    "store": True,
    "stream": True,
    "stream_options": {"include_obfuscation": False},
    "background": False,
    "include": list(INCLUDES),
    "tools": [
        {"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": True},
        {"type": "function", "name": "g", "x-vendor": {"kept": 1}},
    ],
    "tool_choice": {"type": "function", "name": "f"},
    "parallel_tool_calls": False,
    "max_tool_calls": 3,
    "max_output_tokens": 100,
    "temperature": 1,
    "top_p": 0.5,
    "top_logprobs": 2,
    "reasoning": {"effort": "low", "summary": "auto"},
    "text": {
        "format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}},
        "verbosity": "low",
    },
    "truncation": "disabled",
    "metadata": {"a": "b"},
    "user": "u",
    "safety_identifier": "s",
    "service_tier": "flex",
    "prompt_cache_key": "k",
    "prompt_cache_retention": "24h",
    "top_k": 40,
}


def strictly(body: dict[str, Any]) -> Response:
    """As `OpenAI(_strict_response_validation=True)` reads it."""
    return validate_type(type_=Response, value=body)


def started(sent: dict[str, Any]) -> dict[str, Any]:
    return response_body(parse_create_response(sent), id="resp_1", created_at=7)


# proves R1
def test_the_struct_knows_every_field_of_the_official_client() -> None:
    official = set(response_create_params.ResponseCreateParamsBase.__annotations__) | {"stream"}
    assert official <= set(CreateResponse.__struct_fields__)


# proves R1
@pytest.mark.parametrize("sent", [LEAST, EVERYTHING], ids=["least", "everything"])
def test_a_body_has_every_field_and_passes_strict_validation(sent: dict[str, Any]) -> None:
    body = started(sent)
    strictly(body)
    optional = {"access_programs", "image", "input_transformations", "prompt_cache_diagnostics"}
    optional |= {"prompt_cache_options", "tool_usage"}
    assert set(Response.model_fields) - optional <= set(body)
    assert body["store"] is True
    assert body["created_at"] == 7


# proves R1
def test_a_body_gives_back_what_was_sent() -> None:
    body = started(EVERYTHING)
    unechoed = {"input", "stream", "stream_options", "include", "tools", "background"}
    assert {name: body[name] for name in EVERYTHING if name not in unechoed} == {
        name: value for name, value in EVERYTHING.items() if name not in unechoed
    }
    for shown, sent in zip(body["tools"], EVERYTHING["tools"], strict=True):
        assert sent.items() <= shown.items()


# proves R1
def test_a_background_response_begins_queued() -> None:
    body = started(LEAST | {"background": True})
    strictly(body)
    assert (body["status"], body["background"]) == ("queued", True)


def test_strict_validation_is_a_judge_that_can_say_no() -> None:
    body = started(LEAST)
    del body["output"]
    with pytest.raises(ValidationError):
        strictly(body)


def test_a_conversation_is_named_by_string_or_object() -> None:
    for held in ("conv_1", {"id": "conv_1"}):
        request = parse_create_response({"model": "m", "conversation": held})
        assert request.conversation_id == "conv_1"
        assert started({"model": "m", "conversation": held})["conversation"] == {"id": "conv_1"}


@pytest.mark.parametrize(
    ("outcome", "completed_at"),
    [
        (Outcome(status="completed"), 9),
        (failed("it broke", perdure={"reason": "process_restart"}), None),
        (Outcome(status="incomplete", incomplete_details={"reason": "max_output_tokens"}), None),
        (Outcome(status="cancelled"), None),
    ],
)
def test_terminal_bodies_pass_strict_validation(outcome: Outcome, completed_at: int | None) -> None:
    body = finished(started(LEAST), outcome, [], completed_at=9)
    strictly(body)
    assert body["status"] == outcome.status
    assert body["completed_at"] == completed_at
    assert body.get("perdure") == outcome.perdure


# proves R1, R7
@pytest.mark.parametrize(
    ("change", "param", "code"),
    [
        ({"prompt": {"id": "p"}}, "prompt", "unsupported_parameter"),
        ({"context_management": []}, "context_management", "unsupported_parameter"),
        ({"moderation": {"model": "m"}}, "moderation", "unsupported_parameter"),
        ({"prompt_cache_options": {}}, "prompt_cache_options", "unsupported_parameter"),
        ({"truncation": "auto"}, "truncation", "unsupported_value"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "unsupported_value"),
        ({"tools": [{"type": "custom", "name": "c"}]}, "tools[0].type", "unsupported_value"),
        ({"tools": [{"type": ["function"]}]}, "tools[0].type", "unsupported_value"),
        ({"tools": [{"type": "function"}]}, "tools[0].name", "missing_required_parameter"),
        ({"include": ["nonsense"]}, "include[0]", "invalid_value"),
        ({"reasoning": {"mode": "pro"}}, "reasoning.mode", "unsupported_value"),
        ({"reasoning": {"effort": "huge"}}, "reasoning.effort", "invalid_value"),
        ({"stream_options": {}}, "stream_options", "invalid_value"),
        (
            {"stream": True, "stream_options": {"include_obfuscation": True}},
            "stream_options.include_obfuscation",
            "unsupported_parameter",
        ),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.name", None),
        ({"temperature": 3}, "temperature", "invalid_value"),
        ({"max_output_tokens": "9"}, "max_output_tokens", "invalid_type"),
        ({"model": None}, "model", "invalid_type"),
        ({"service_tier": "gold"}, "service_tier", "invalid_value"),
        ({"metadata": {"a": 1}}, "metadata", "invalid_type"),
        ({"metadata": {"a": "x" * 513}}, "metadata.a", "string_above_max_length"),
        ({"metadata": {"k" * 65: "x"}}, "metadata", "string_above_max_length"),
        ({"model": ""}, "model", None),
        ({"previous_response_id": ""}, "previous_response_id", None),
        ({"metadata": {str(n): "" for n in range(17)}}, "metadata", None),
        ({"conversation": {"id": 1}}, "conversation.id", "invalid_type"),
        (
            {"conversation": "c", "previous_response_id": "r"},
            "previous_response_id",
            "mutually_exclusive_parameters",
        ),
        ({"input": None}, "input", "missing_required_parameter"),
        ({"input": []}, "input", "missing_required_parameter"),
        ({"max_tokens": 5}, "max_tokens", "unsupported_parameter"),
        ({"messages": []}, "messages", "unsupported_parameter"),
        ({"output": []}, "output", "unknown_parameter"),
        ({"perdure": {}}, "perdure", "unknown_parameter"),
        ({"n": 2}, "n", "unknown_parameter"),
    ],
)
def test_refusals_name_the_parameter(change: dict[str, Any], param: str, code: str | None) -> None:
    with pytest.raises(WireError) as caught:
        parse_create_response(LEAST | change)
    assert caught.value.param == param
    assert code is None or caught.value.code == code
    said = body_of(caught.value).error
    assert said.type == "invalid_request_error"
    assert said.param == param
    assert param.split("[")[0].split(".")[0] in said.message


def test_a_body_that_is_no_object_is_refused() -> None:
    for body in (None, [], "x", 3):
        with pytest.raises(WireError):
            parse_create_response(body)


def test_a_wrong_value_is_answered_with_the_right_ones() -> None:
    with pytest.raises(WireError, match="'auto', 'default', 'flex'"):
        parse_create_response(LEAST | {"service_tier": "gold"})


def test_a_field_named_extra_is_the_clients_own() -> None:
    assert parse_create_response(LEAST | {"extra": 1}).extra == {"extra": 1}
