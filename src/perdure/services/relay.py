"""The relay: asks a server that speaks the Responses API itself, and retells its events as ours.

The upstream keeps nothing (`store: false`): it is given the whole conversation, and its events
become events of our response, with our ids and numbers. What it leaves out on the way is made
whole from what it says at the end of a part, an item or the response.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from perdure.core.clock import Clock
from perdure.services.bridge import (
    NEW_PARTS,
    OUTPUT_ITEMS_MAX,
    sayable,
    unmappable,
    upstream_error,
)
from perdure.wire import events as ev
from perdure.wire.events import Event
from perdure.wire.fold import View, closing, closing_part, take
from perdure.wire.items import KINDS, Item
from perdure.wire.relayed import (
    RESPONSE_ENDS,
    RelayedBody,
    RelayedEvent,
    RelayedUsage,
    check_body,
    check_event,
)
from perdure.wire.responses import CreateResponse, Outcome, failed

_FORWARDED = (
    "instructions",
    "include",
    "tools",
    "tool_choice",
    "parallel_tool_calls",
    "max_tool_calls",
    "max_output_tokens",
    "temperature",
    "top_p",
    "presence_penalty",
    "frequency_penalty",
    "top_logprobs",
    "reasoning",
    "text",
    "user",
    "safety_identifier",
    "service_tier",
    "prompt_cache_key",
    "prompt_cache_retention",
)
"""What the upstream is told of a request; the rest (store, chain, metadata) is kept here."""


def responses_request(
    request: CreateResponse,
    history: Sequence[Item],
    items: Sequence[Item],
    *,
    model: str | None = None,
) -> dict[str, Any]:
    """What to ask the upstream: `history` (earlier turns) and `items` (this request's, in full
    form), always streamed and never stored there. `model` replaces an alias.

    Raises `WireError` naming what it cannot be given.
    """
    asked: dict[str, Any] = {
        "model": model or request.model,
        "input": [
            sent
            for item, param in sayable(history, items)
            if (sent := _sent(item, param)) is not None
        ],
        "stream": True,
        "store": False,
    }
    for name in _FORWARDED:
        if (value := getattr(request, name)) is not None:
            asked[name] = value
    return asked | request.extra


def _sent(item: Item, param: str | None) -> Item | None:
    """An item as a server takes it that has never seen it: with an id only where the format asks
    for one, because a server that looks our ids up would not find them. None for what means
    nothing there."""
    match item:
        case {"type": "message", "role": "assistant"}:
            content = [
                {name: value for name, value in part.items() if name != "logprobs"}
                for part in item["content"]
            ]
            return _only(item, "id", "type", "role", "status", "phase") | {"content": content}
        case {"type": "message", "content": parts}:
            _check_parts(parts, item, param)
            return _only(item, "type", "role", "content")
        case {"type": "function_call"}:
            return _only(item, "type", "call_id", "name", "arguments")
        case {"type": "function_call_output", "output": output}:
            if not isinstance(output, str):
                _check_parts(output, item, param)
            return _only(item, "type", "call_id", "output")
        case {"type": "reasoning", "encrypted_content": str()}:
            return _only(item, "type", "summary", "encrypted_content")
        case {"type": "reasoning", "content": [_, *_]}:
            return _only(item, "id", "type", "summary", "content")
        case {"type": "reasoning"}:
            return None
        case _:
            return item


def _only(item: Item, *names: str) -> Item:
    return {name: item[name] for name in names if item.get(name) is not None}


def _check_parts(parts: list[Item], item: Item, param: str | None) -> None:
    for part in parts:
        if part.get("file_id"):
            raise unmappable(f"content of type '{part['type']}' by 'file_id'", item, param)


_TEXTS = {"output_text": "text", "refusal": "refusal", "reasoning_text": "text"}
"""Content parts that are streamed, and the field that holds their text."""

_DELTAS: dict[str, tuple[str, str]] = {
    "response.output_text.delta": ("message", "output_text"),
    "response.refusal.delta": ("message", "refusal"),
    "response.reasoning_text.delta": ("reasoning", "reasoning_text"),
}

_BUILT = frozenset({"id", "type", "status", "content", "summary", "arguments", "call_id", "name"})
"""Fields of a finished item that its events amount to; all others are taken as they are said."""


class ResponsesReader:
    """Reads the events of one streamed response and tells them as events of ours.

    Every event it returns is already in `view`. Events of no meaning here (progress of tools that
    the upstream runs, types yet unknown) are passed over: the finished item says it all.
    """

    def __init__(self, view: View, clock: Clock) -> None:
        self.view = view
        self._clock = clock
        self._made: list[Event] = []
        self._places: dict[int, int] = {}
        self._ids: dict[str, int] = {}
        self._last: int | None = None
        self._ended: Outcome | None = None
        self._failure: Outcome | None = None

    @property
    def failed(self) -> bool:
        """Whether the upstream said that it failed, so that nothing more counts."""
        return self._failure is not None

    @property
    def finished(self) -> bool:
        """Whether the upstream said how its answer ended."""
        return self._ended is not None

    def read(self, chunk: dict[str, Any]) -> list[Event]:
        """The events one event amounts to. What comes after the end or an error is not read."""
        if self._failure is not None or self._ended is not None:
            return []
        try:
            if chunk.get("object") == "response":
                body = msgspec.convert(chunk, RelayedBody)
                check_body(body)
                self._end(body, "")
            else:
                event = msgspec.convert(chunk, RelayedEvent)
                check_event(event)
                self._take_in(event)
        except msgspec.ValidationError as error:
            self._failure = failed(f"The upstream sent an event that cannot be read: {error}.")
        return self._flush()

    def end(self, failure: Outcome | None = None) -> tuple[list[Event], Outcome]:
        """The last events, which close every open item, and how it ended. `failure` is what the
        connection to the upstream died of; a stream that just stops is a failure too."""
        outcome = failure or self._failure or self._ended
        if outcome is None:
            outcome = failed("The upstream closed the stream before it had finished its answer.")
        status = "completed" if outcome.status == "completed" else "incomplete"
        for index in self.view.open_indexes():
            self._take(*closing(self.view, index, status))
        return self._flush(), outcome

    def _take_in(self, said: RelayedEvent) -> None:
        match said.type:
            case "response.output_item.added" if said.item is not None:
                self._open(said.item, said)
            case "response.output_item.done" if said.item is not None:
                self._finish(said.item, self._place(said, str(said.item.get("type"))))
            case "response.output_text.delta" | "response.refusal.delta":
                self._write(said)
            case "response.reasoning_text.delta":
                self._write(said)
            case "response.content_part.done" if said.part is not None:
                self._finish_part(said.part, said)
            case "response.reasoning_summary_text.delta":
                self._summarize(said, str(said.delta or ""))
            case "response.reasoning_summary_text.done":
                self._summarize(said, said.text or "", whole=True)
            case "response.function_call_arguments.delta":
                self._argue(self._place(said, "function_call"), str(said.delta or ""))
            case "error":
                self._failure = upstream_error(
                    said.error or {"message": said.message, "code": said.code}
                )
            case type if type in RESPONSE_ENDS:
                self._end(said.response or RelayedBody(), type.removeprefix("response."))
            case _ if said.error:
                self._failure = upstream_error(said.error)

    def _place(self, said: RelayedEvent, type: str) -> int:
        """Our index of the item an event is about; one that was not announced is opened now."""
        if said.output_index is not None:
            place = self._places.get(said.output_index)
        else:
            place = self._ids.get(said.item_id or "", self._last)
        if place is None or self.view.items[place].item["type"] != type:
            place = self._open(said.item or {"type": type}, said)
        return place

    def _open(self, item: Item, said: RelayedEvent) -> int:
        type = str(item.get("type"))
        kind = KINDS.get(type)
        ours = item | {
            "type": type,
            "id": self._clock.new_id(kind.prefix if kind else "item"),
            "status": "in_progress",
        }
        match type:
            case "message":
                ours |= {"role": "assistant", "content": []}
            case "reasoning":
                ours |= {"summary": [], "content": [], "encrypted_content": None}
            case "function_call":
                ours |= {
                    "arguments": "",
                    "name": str(item.get("name") or ""),
                    "call_id": self._call_id(item.get("call_id")),
                }
        place = self.view.next_index
        self._take(ev.OutputItemAdded(output_index=place, item=ours))
        index = said.output_index
        self._places[max(self._places, default=-1) + 1 if index is None else index] = place
        for id in (item.get("id"), said.item_id):
            if isinstance(id, str):
                self._ids[id] = place
        self._last = place
        return place

    def _call_id(self, said: Any) -> str:
        taken = any(open.item.get("call_id") == said for open in self.view.items.values())
        return said if isinstance(said, str) and said and not taken else self._clock.new_id("call")

    def _write(self, said: RelayedEvent) -> None:
        item, type = _DELTAS[said.type]
        place = self._place(said, item)
        index = self._part(place, said.content_index, type)
        if index is not None and said.delta:
            self._say(place, index, str(said.delta), said.logprobs)

    def _part(self, place: int, at: int | None, type: str) -> int | None:
        """The open part `at` a place, or the last, opened now where there is none of its type;
        None for one that has ended or an item that has."""
        item = self.view.items[place]
        if item.done:
            return None
        index = at if at in item.content else len(item.content) - 1 if at in (None, -1) else -1
        if index is not None and index in item.content:
            part = item.content[index]
            if part.part["type"] == type:
                return None if part.done else index
        index = len(item.content)
        self._take(
            ev.ContentPartAdded(
                output_index=place,
                item_id=item.item["id"],
                content_index=index,
                part=NEW_PARTS[type],
            )
        )
        return index

    def _say(self, place: int, index: int, text: str, logprobs: Sequence[Any] | None) -> None:
        item = self.view.items[place]
        at = {"output_index": place, "item_id": item.item["id"], "content_index": index}
        match item.content[index].part["type"]:
            case "output_text":
                self._take(ev.OutputTextDelta(**at, delta=text, logprobs=list(logprobs or ())))
            case "refusal":
                self._take(ev.RefusalDelta(**at, delta=text))
            case _:
                self._take(ev.ReasoningTextDelta(**at, delta=text))

    def _finish_part(self, part: Item, said: RelayedEvent) -> None:
        type = str(part.get("type"))
        if type in _TEXTS:
            place = self._place(said, "reasoning" if type == "reasoning_text" else "message")
            self._complete(place, said.content_index, part)

    def _complete(self, place: int, at: int | None, final: Item) -> None:
        """Say what of a part has not been said yet, and end it."""
        index = self._part(place, at, final["type"])
        if index is None:
            return
        part = self.view.items[place].content[index]
        rest = _rest(part.text(), final.get(_TEXTS[final["type"]]))
        if rest:
            self._say(place, index, rest, None if part.text() else final.get("logprobs"))
        *most, done = closing_part(self.view, place, index)
        if isinstance(done, ev.ContentPartDone) and final.get("annotations"):
            done.part = done.part | {"annotations": final["annotations"]}
        self._take(*most, done)

    def _summarize(self, said: RelayedEvent, text: str, *, whole: bool = False) -> None:
        place = self._place(said, "reasoning")
        if not self.view.items[place].done:
            self._add_summary(place, said.summary_index or 0, text, whole=whole)

    def _add_summary(self, place: int, index: int, text: str, *, whole: bool) -> None:
        """Add to a summary, or say what of the whole of it is left and end it."""
        item = self.view.items[place]
        at = {"output_index": place, "item_id": item.item["id"], "summary_index": index}
        if index not in item.summary:
            new = {"type": "summary_text", "text": ""}
            self._take(ev.ReasoningSummaryPartAdded(**at, part=new))
        part = item.summary[index]
        if part.done:
            return
        rest = _rest(part.text(), text) if whole else text
        if rest:
            self._take(ev.ReasoningSummaryTextDelta(**at, delta=rest))
        if whole:
            self._take(ev.ReasoningSummaryTextDone(**at, text=part.text()))
            self._take(ev.ReasoningSummaryPartDone(**at, part=part.built()))

    def _argue(self, place: int, arguments: str) -> None:
        item = self.view.items[place]
        if arguments and not item.done:
            self._take(
                ev.FunctionCallArgumentsDelta(
                    output_index=place, item_id=item.item["id"], delta=arguments
                )
            )

    def _finish(self, said: Item, place: int) -> None:
        """Bring an item to what the upstream says it is at its end, and end it."""
        item = self.view.items[place]
        if item.done:
            return
        for index, part in enumerate(said.get("summary") or ()):
            self._add_summary(place, index, str(part.get("text") or ""), whole=True)
        for index, part in enumerate(said.get("content") or ()):
            if part.get("type") in _TEXTS:
                self._complete(place, index, part)
        if said.get("type") == "function_call":
            if not item.item["name"]:
                self._failure = failed("The upstream made a tool call without a name.")
                return
            self._argue(place, _rest("".join(item.arguments), said.get("arguments")))
        status = "incomplete" if said.get("status") == "incomplete" else "completed"
        *most, done = closing(self.view, place, status)
        assert isinstance(done, ev.OutputItemDone)
        kept = {name: value for name, value in said.items() if name not in _BUILT}
        done.item = done.item | kept
        self._take(*most, done)

    def _end(self, body: RelayedBody, status: str) -> None:
        """Take the end of a response, whose output makes whole what was not streamed."""
        unseen = not self.view.items
        for index, item in enumerate(body.output):
            if self.view.next_index > OUTPUT_ITEMS_MAX:
                break  # whoever reads on sees in the view that there is no room for more
            if unseen:
                self._open(item, RelayedEvent(output_index=index))
            place = self._places.get(index)
            if place is not None and self.view.items[place].item["type"] == item.get("type"):
                self._finish(item, place)
        usage = _usage(body.usage)
        match body.status or status:
            case "completed":
                self._ended = Outcome(status="completed", usage=usage)
            case "incomplete":
                details = body.incomplete_details or {"reason": "max_output_tokens"}
                self._ended = Outcome(status="incomplete", incomplete_details=details, usage=usage)
            case other:
                ended = upstream_error(body.error or f"its response is {other}")
                self._ended = msgspec.structs.replace(ended, usage=usage)

    def _take(self, *events: Event) -> None:
        self._made += take(self.view, *events)

    def _flush(self) -> list[Event]:
        made, self._made = self._made, []
        return made


def _rest(said: str, whole: Any) -> str:
    """What of a whole text has not been said; nothing where it is another text: what was streamed
    counts."""
    return whole[len(said) :] if isinstance(whole, str) and whole.startswith(said) else ""


def _usage(usage: RelayedUsage | None) -> dict[str, Any] | None:
    """Usage with every detail; None where the upstream counted nothing."""
    if usage is None:
        return None
    read, written = usage.input_tokens or 0, usage.output_tokens or 0
    of_read, of_written = usage.input_tokens_details, usage.output_tokens_details
    return {
        "input_tokens": read,
        "input_tokens_details": {
            "cached_tokens": (of_read and of_read.cached_tokens) or 0,
            "cache_write_tokens": (of_read and of_read.cache_write_tokens) or 0,
        },
        "output_tokens": written,
        "output_tokens_details": {
            "reasoning_tokens": (of_written and of_written.reasoning_tokens) or 0
        },
        "total_tokens": read + written if usage.total_tokens is None else usage.total_tokens,
    }
