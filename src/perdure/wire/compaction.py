"""Compacting: the request of `POST /v1/responses/compact`, and its answer."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from perdure.wire.items import Item
from perdure.wire.responses import CreateResponse, parse_part_of_create

COMPACTED = (
    "model",
    "input",
    "instructions",
    "previous_response_id",
    "service_tier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "prompt_cache_options",
    "image",
)


class Compaction(msgspec.Struct, frozen=True, kw_only=True):
    """The answer. `output` is to be the next request's input, with what is said next behind it."""

    id: str
    object: Literal["response.compaction"] = "response.compaction"
    created_at: int
    output: list[Item]
    usage: dict[str, Any]


def parse_compact(body: Any) -> CreateResponse:
    """The request of a parsed JSON body. Raises `WireError` as for creating a response, and for
    every parameter that compacting does not take."""
    return parse_part_of_create(body, COMPACTED)
