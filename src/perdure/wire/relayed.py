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


class RelayedPart(msgspec.Struct, frozen=True):
    """What is read of a part of an item. The rest of it is kept as it came."""

    type: str | None = None
    text: str | None = None
    refusal: str | None = None
    annotations: list[dict[str, Any]] | None = None
    logprobs: list[Any] | None = None


class RelayedItem(msgspec.Struct, frozen=True):
    """What is read of an item. The rest of it is kept as it came."""

    type: str
    id: str | None = None
    status: str | None = None
    role: str | None = None
    name: str | None = None
    call_id: str | None = None
    arguments: str | None = None
    content: list[RelayedPart] | None = None
    summary: list[RelayedPart] | None = None


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


def check_event(said: RelayedEvent) -> None:
    """Refuse an event whose item or part is not of a form that can be read. Raises
    `msgspec.ValidationError`."""
    if said.item is not None:
        msgspec.convert(said.item, RelayedItem)
    if said.part is not None:
        msgspec.convert(said.part, RelayedPart)
    if said.response is not None:
        check_body(said.response)


def check_body(said: RelayedBody) -> None:
    """The same for a response."""
    for item in said.output:
        msgspec.convert(item, RelayedItem)
