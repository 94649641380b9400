"""The part of a Responses stream that is read back from an upstream: any event, loosely.

Servers that speak this API differ in which events they send and in what places them, so one struct
holds what any event may carry and nearly everything may be absent.
"""

from __future__ import annotations

from typing import Any

import msgspec

RESPONSE_ENDS = frozenset(
    f"response.{status}" for status in ("completed", "incomplete", "failed", "cancelled")
)
"""The events behind which a stream holds nothing more."""


class InputDetails(msgspec.Struct, frozen=True):
    """Of the input's tokens."""

    cached_tokens: int | None = None
    cache_write_tokens: int | None = None


class OutputDetails(msgspec.Struct, frozen=True):
    """Of the output's tokens."""

    reasoning_tokens: int | None = None


class RelayedUsage(msgspec.Struct, frozen=True):
    """Tokens read and written."""

    input_tokens: int | None = None
    output_tokens: int | None = None
    total_tokens: int | None = None
    input_tokens_details: InputDetails | None = None
    output_tokens_details: OutputDetails | None = None


class RelayedBody(msgspec.Struct, frozen=True):
    """A response at its end; an upstream that does not stream sends nothing else."""

    status: str | None = None
    output: list[dict[str, Any]] = []
    usage: RelayedUsage | None = None
    error: Any = None
    incomplete_details: dict[str, Any] | None = None


class RelayedEvent(msgspec.Struct, frozen=True):
    """One event, or the error object that took its place. `output_index`, else `item_id`, tells
    the item it is about; `content_index` or `summary_index` the part."""

    type: str = ""
    output_index: int | None = None
    item_id: str | None = None
    content_index: int | None = None
    summary_index: int | None = None
    item: dict[str, Any] | None = None
    part: dict[str, Any] | None = None
    delta: Any = None
    text: str | None = None
    refusal: str | None = None
    arguments: str | None = None
    logprobs: list[Any] | None = None
    response: RelayedBody | None = None
    error: Any = None
    message: str | None = None
    code: str | int | None = None
