"""Counting input tokens: the request of `POST /v1/responses/input_tokens`, and its answer.

The request is one that would create a response, cut down to what a model reads.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from perdure.wire.errors import unsupported
from perdure.wire.responses import CreateResponse, parse_part_of_create

COUNTED = (
    "model",
    "input",
    "instructions",
    "previous_response_id",
    "conversation",
    "tools",
    "tool_choice",
    "parallel_tool_calls",
    "reasoning",
    "text",
    "truncation",
)

ANY_MODEL = "(any)"
"""Stands for the model of a request that names none, which only this operation allows."""


class InputTokens(msgspec.Struct, frozen=True, kw_only=True):
    """The answer."""

    object: Literal["response.input_tokens"] = "response.input_tokens"
    input_tokens: int


def parse_count_input(body: Any) -> CreateResponse:
    """The request of a parsed JSON body. Raises `WireError` as for creating a response, and for
    every parameter that is not counted."""
    if isinstance(body, dict):
        if body.get("personality") is not None:
            raise unsupported("A style preset", "personality", "Say it in 'instructions'.")
        if body.get("model") is None:
            body = body | {"model": ANY_MODEL}
    return parse_part_of_create(body, COUNTED)
