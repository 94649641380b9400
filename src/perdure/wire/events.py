"""Stream events: what a client of a response sees while it is made, one struct a type.

An event is numbered when it is encoded for its place in the log: `sequence_number` is the number of
its entry less one, so that `response.created` is 0. Until then the next one may still extend it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import msgspec

from perdure.core import codec
from perdure.wire.items import Item
from perdure.wire.responses import Body


class _Event(msgspec.Struct, tag_field="type", kw_only=True):
    sequence_number: int = 0


class ResponseCreated(_Event, tag="response.created"):
    response: Body


class ResponseQueued(_Event, tag="response.queued"):
    response: Body


class ResponseInProgress(_Event, tag="response.in_progress"):
    response: Body


class ResponseCompleted(_Event, tag="response.completed"):
    response: Body


class ResponseIncomplete(_Event, tag="response.incomplete"):
    response: Body


class ResponseFailed(_Event, tag="response.failed"):
    response: Body


class ErrorEvent(_Event, tag="error"):
    message: str
    code: str | None = None
    param: str | None = None


class _OfItem(_Event):
    output_index: int


class OutputItemAdded(_OfItem, tag="response.output_item.added"):
    item: Item


class OutputItemDone(_OfItem, tag="response.output_item.done"):
    item: Item


class FunctionCallArgumentsDelta(_OfItem, tag="response.function_call_arguments.delta"):
    item_id: str
    delta: str


class FunctionCallArgumentsDone(_OfItem, tag="response.function_call_arguments.done"):
    item_id: str
    name: str
    arguments: str


class _OfPart(_OfItem):
    item_id: str
    content_index: int


class ContentPartAdded(_OfPart, tag="response.content_part.added"):
    part: Item


class ContentPartDone(_OfPart, tag="response.content_part.done"):
    part: Item


class OutputTextDelta(_OfPart, tag="response.output_text.delta"):
    delta: str
    logprobs: list[Any] = []


class OutputTextDone(_OfPart, tag="response.output_text.done"):
    text: str
    logprobs: list[Any] = []


class RefusalDelta(_OfPart, tag="response.refusal.delta"):
    delta: str


class RefusalDone(_OfPart, tag="response.refusal.done"):
    refusal: str


class ReasoningTextDelta(_OfPart, tag="response.reasoning_text.delta"):
    delta: str


class ReasoningTextDone(_OfPart, tag="response.reasoning_text.done"):
    text: str


class _OfSummary(_OfItem):
    item_id: str
    summary_index: int


class ReasoningSummaryPartAdded(_OfSummary, tag="response.reasoning_summary_part.added"):
    part: Item


class ReasoningSummaryPartDone(_OfSummary, tag="response.reasoning_summary_part.done"):
    part: Item


class ReasoningSummaryTextDelta(_OfSummary, tag="response.reasoning_summary_text.delta"):
    delta: str


class ReasoningSummaryTextDone(_OfSummary, tag="response.reasoning_summary_text.done"):
    text: str


Delta = (
    OutputTextDelta
    | RefusalDelta
    | FunctionCallArgumentsDelta
    | ReasoningTextDelta
    | ReasoningSummaryTextDelta
)

EXTENDED_CHARS_MAX = 4096
"""A delta this long is not extended: a stream should look like one, and copying stay cheap."""

Terminal = ResponseCompleted | ResponseIncomplete | ResponseFailed

Event = (
    ResponseCreated
    | ResponseQueued
    | ResponseInProgress
    | ResponseCompleted
    | ResponseIncomplete
    | ResponseFailed
    | ErrorEvent
    | OutputItemAdded
    | OutputItemDone
    | ContentPartAdded
    | ContentPartDone
    | OutputTextDelta
    | OutputTextDone
    | RefusalDelta
    | RefusalDone
    | FunctionCallArgumentsDelta
    | FunctionCallArgumentsDone
    | ReasoningTextDelta
    | ReasoningTextDone
    | ReasoningSummaryPartAdded
    | ReasoningSummaryPartDone
    | ReasoningSummaryTextDelta
    | ReasoningSummaryTextDone
)

_TERMINAL: dict[str, type[Terminal]] = {
    "completed": ResponseCompleted,
    "incomplete": ResponseIncomplete,
    "failed": ResponseFailed,
    "cancelled": ResponseIncomplete,
}
"""By status. No event type is named after being cancelled; the status in its body says it."""


def terminal(body: Body) -> Terminal:
    """The last event of a response, carrying its terminal body."""
    return _TERMINAL[body["status"]](response=body)


def type_of(event: Event) -> str:
    """The event's `type` on the wire."""
    return str(type(event).__struct_config__.tag)


def extend(event: Event, by: Event) -> bool:
    """Let `event` say what `by`, which came right behind it, adds to the same text; whether it
    could. A text has no other neighbour of its type in its item: a new part is announced first."""
    if not isinstance(event, Delta) or type(event) is not type(by):
        return False
    assert isinstance(by, Delta)
    if event.item_id != by.item_id or len(event.delta) > EXTENDED_CHARS_MAX:
        return False
    event.delta += by.delta
    if isinstance(event, OutputTextDelta) and isinstance(by, OutputTextDelta):
        event.logprobs = event.logprobs + by.logprobs
    return True


def encode_event(event: Event) -> bytes:
    """The event as JSON; kept in the log and sent in the stream as these very bytes."""
    return codec.encode(event)


def encode_events(events: Iterable[Event], *, after: int) -> list[bytes]:
    """The events as JSON, numbered for the places behind entry `after` of their log."""
    encoded = []
    for number, event in enumerate(events, after):
        event.sequence_number = number
        encoded.append(encode_event(event))
    return encoded


def sse(type: str, data: bytes) -> bytes:
    """One server-sent event. JSON text holds no line break, so one `data` line is enough."""
    return b"event: %b\ndata: %b\n\n" % (type.encode(), data)


def sse_pieces(type: str, data: bytes, size_bytes: int) -> Iterator[bytes]:
    """The same in pieces: nobody has to hold a large event a second time."""
    yield b"event: %b\ndata: " % type.encode()
    view = memoryview(data)
    for start in range(0, view.nbytes, size_bytes):
        yield bytes(view[start : start + size_bytes])
    yield b"\n\n"
