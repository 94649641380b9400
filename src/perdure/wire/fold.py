"""The fold over one response's events: the output so far, live and after a crash alike.

While a response is made, and again when its log is read back after its process died, the same
`apply` rebuilds the same items. Texts are kept as lists of pieces and joined when they are asked
for, so folding n deltas costs n.
"""

from __future__ import annotations

from typing import Any

import msgspec

from perdure.wire import events as ev
from perdure.wire.events import Event
from perdure.wire.items import Item
from perdure.wire.responses import Body

_TEXT_FIELD = {"refusal": "refusal"}


class _Part(msgspec.Struct):
    """A content or summary part; `pieces` grow until it is done."""

    part: Item
    pieces: list[str]
    logprobs: list[Any]
    done: bool = False

    def built(self) -> Item:
        field = _TEXT_FIELD.get(self.part["type"], "text")
        built = self.part | {field: self.text()}
        if self.logprobs:
            built["logprobs"] = list(self.logprobs)
        return built

    def text(self) -> str:
        if len(self.pieces) > 1:
            self.pieces = ["".join(self.pieces)]
        return self.pieces[0] if self.pieces else ""


class _Open(msgspec.Struct):
    """An output item as far as it is known; `item` is final once `done`."""

    item: Item
    content: dict[int, _Part]
    summary: dict[int, _Part]
    arguments: list[str]
    done: bool = False

    def built(self, status: str) -> Item:
        if self.done:
            return self.item
        built = self.item | {"status": status}
        if self.content:
            built["content"] = [part.built() for _, part in sorted(self.content.items())]
        if self.summary:
            built["summary"] = [part.built() for _, part in sorted(self.summary.items())]
        if built["type"] == "function_call":
            self.arguments = ["".join(self.arguments)]
            built["arguments"] = self.arguments[0]
        return built


class View:
    """What the events so far amount to.

    `response` is the last body an event carried, and `ended` whether that event was terminal.
    Every `response.in_progress` begins an attempt. One that finds an item open goes on with it; any
    other begins anew, and what stands before the last of those, from item `first` back, was
    abandoned with the process that made it.
    """

    def __init__(self) -> None:
        self.response: Body | None = None
        self.ended = False
        self.first = 0
        self.items: dict[int, _Open] = {}

    @property
    def next_index(self) -> int:
        """The `output_index` of the next item."""
        return max(self.items, default=-1) + 1

    def open_indexes(self) -> list[int]:
        """The `output_index` of every item not done yet, in order."""
        return [index for index, item in sorted(self.items.items()) if not item.done]

    def output(self, open_status: str = "incomplete") -> list[Item]:
        """Every item of the last attempt in order; those not done yet are shown with
        `open_status`."""
        items = sorted(self.items.items())
        return [item.built(open_status) for index, item in items if index >= self.first]

    def abandoned(self) -> list[Item]:
        """Every item of the attempts before."""
        items = sorted(self.items.items())
        return [item.built("incomplete") for index, item in items if index < self.first]


def take(view: View, *events: Event) -> list[Event]:
    """Apply new events, and return them."""
    for event in events:
        apply(view, event)
    return list(events)


def apply(view: View, event: Event) -> None:
    """Take one event into the view, which is changed in place.

    Events of one response come in the order of their log. An event of an item that was never added
    is a broken log, and fails as a `KeyError`.
    """
    match event:
        case ev.OutputTextDelta():
            part = _part(view, event)
            part.pieces.append(event.delta)
            part.logprobs.extend(event.logprobs)
        case ev.RefusalDelta() | ev.ReasoningTextDelta():
            _part(view, event).pieces.append(event.delta)
        case ev.FunctionCallArgumentsDelta():
            view.items[event.output_index].arguments.append(event.delta)
        case ev.ReasoningSummaryTextDelta():
            _summary(view, event).pieces.append(event.delta)
        case ev.OutputTextDone() | ev.ReasoningTextDone():
            _part(view, event).pieces = [event.text]
        case ev.RefusalDone():
            _part(view, event).pieces = [event.refusal]
        case ev.FunctionCallArgumentsDone():
            view.items[event.output_index].arguments = [event.arguments]
        case ev.ReasoningSummaryTextDone():
            _summary(view, event).pieces = [event.text]
        case ev.OutputItemAdded():
            arguments = [event.item.get("arguments") or ""]
            view.items[event.output_index] = _Open(event.item, {}, {}, arguments)
        case ev.OutputItemDone():
            view.items[event.output_index] = _Open(event.item, {}, {}, [], done=True)
        case ev.ContentPartAdded():
            view.items[event.output_index].content[event.content_index] = _new_part(event.part)
        case ev.ContentPartDone():
            _finish(_part(view, event), event.part)
        case ev.ReasoningSummaryPartAdded():
            view.items[event.output_index].summary[event.summary_index] = _new_part(event.part)
        case ev.ReasoningSummaryPartDone():
            _finish(_summary(view, event), event.part)
        case ev.ResponseCreated() | ev.ResponseQueued():
            view.response = event.response
        case ev.ResponseInProgress():
            view.response = event.response
            if not view.open_indexes():
                view.first = view.next_index
        case ev.ResponseCompleted() | ev.ResponseIncomplete() | ev.ResponseFailed():
            view.response = event.response
            view.ended = True
        case ev.ErrorEvent():
            pass


def closing(view: View, output_index: int, status: str) -> list[Event]:
    """The events that end one open item with `status`, not applied yet.

    The arguments of a call that was cut short get no `done`: a client may run what it is told is
    done.
    """
    open = view.items[output_index]
    made: list[Event] = []
    at = {"output_index": output_index, "item_id": open.item["id"]}
    for index, part in sorted(open.summary.items()):
        if not part.done:
            made.append(ev.ReasoningSummaryTextDone(**at, summary_index=index, text=part.text()))
            made.append(ev.ReasoningSummaryPartDone(**at, summary_index=index, part=part.built()))
    for index, part in sorted(open.content.items()):
        if not part.done:
            made.extend(closing_part(view, output_index, index))
    item = open.built(status)
    if item["type"] == "function_call" and status == "completed":
        made.append(
            ev.FunctionCallArgumentsDone(**at, name=item["name"], arguments=item["arguments"])
        )
    made.append(ev.OutputItemDone(output_index=output_index, item=item))
    return made


def closing_part(view: View, output_index: int, content_index: int) -> list[Event]:
    """The events that end one open content part, not applied yet."""
    open = view.items[output_index]
    part = open.content[content_index]
    at = {
        "output_index": output_index,
        "item_id": open.item["id"],
        "content_index": content_index,
    }
    text = part.text()
    done: Event
    match part.part["type"]:
        case "refusal":
            done = ev.RefusalDone(**at, refusal=text)
        case "reasoning_text":
            done = ev.ReasoningTextDone(**at, text=text)
        case _:
            done = ev.OutputTextDone(**at, text=text, logprobs=list(part.logprobs))
    return [done, ev.ContentPartDone(**at, part=part.built())]


def interrupting(view: View) -> list[Event]:
    """The events that end every open item as `incomplete`, not applied yet."""
    return [event for index in view.open_indexes() for event in closing(view, index, "incomplete")]


def _part(view: View, event: Any) -> _Part:
    return view.items[event.output_index].content[event.content_index]


def _summary(view: View, event: Any) -> _Part:
    return view.items[event.output_index].summary[event.summary_index]


def _new_part(part: Item) -> _Part:
    field = _TEXT_FIELD.get(part["type"], "text")
    return _Part(part, [part.get(field) or ""], [])


def _finish(part: _Part, final: Item) -> None:
    part.part = final
    part.pieces = [final.get(_TEXT_FIELD.get(final["type"], "text")) or ""]
    part.logprobs = final.get("logprobs") or []
    part.done = True
