"""The bridge: asks a `chat/completions` server, and tells what it says as response events.

Pure translation in both directions. What chat completions cannot express is refused by name when
asking; what model servers leave out or send oddly is made whole when reading.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import msgspec

from perdure.core import codec
from perdure.core.clock import Clock
from perdure.services.continuing import Continuation, NotContinued
from perdure.wire import events as ev
from perdure.wire.chat import ChatChunk, Delta, Logprobs, TokenLogprob, ToolCallDelta, Usage
from perdure.wire.errors import WireError, unsupported_value
from perdure.wire.events import Event
from perdure.wire.fold import View, closing, closing_part, take
from perdure.wire.items import KINDS, Item, text_of
from perdure.wire.responses import CreateResponse, Outcome, failed

MaxTokens = Literal["max_tokens", "max_completion_tokens"]

_FORWARDED = (
    "temperature",
    "top_p",
    "presence_penalty",
    "frequency_penalty",
    "user",
    "safety_identifier",
    "service_tier",
    "prompt_cache_key",
    "prompt_cache_retention",
)
"""Fields of the same name and meaning on both sides, sent only where the client gave them."""


def chat_request(
    request: CreateResponse,
    history: Sequence[Item],
    items: Sequence[Item],
    *,
    model: str | None = None,
    max_tokens: MaxTokens = "max_tokens",
) -> dict[str, Any]:
    """What to ask the upstream: `history` (earlier turns) and `items` (this request's, in full
    form), always streamed. `model` replaces an alias; `max_tokens` is the name this upstream
    knows the limit by.

    Raises `WireError` naming what a chat upstream cannot be asked.
    """
    asked: dict[str, Any] = {
        "model": model or request.model,
        "messages": _messages(request.instructions, history, items),
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    for name in _FORWARDED:
        if (value := getattr(request, name)) is not None:
            asked[name] = value
    if request.max_output_tokens is not None:
        asked[max_tokens] = request.max_output_tokens
    if effort := (request.reasoning or {}).get("effort"):
        asked["reasoning_effort"] = effort
    if request.logprobs:
        asked["logprobs"] = True
        if request.top_logprobs:
            asked["top_logprobs"] = request.top_logprobs
    return asked | _text(request) | _tools(request) | request.extra


def _text(request: CreateResponse) -> dict[str, Any]:
    text = request.text or {}
    asked = {"verbosity": text["verbosity"]} if text.get("verbosity") else {}
    format = text.get("format") or {"type": "text"}
    if format["type"] == "json_schema":
        schema = {name: value for name, value in format.items() if name != "type"}
        return asked | {"response_format": {"type": "json_schema", "json_schema": schema}}
    if format["type"] == "json_object":
        return asked | {"response_format": {"type": "json_object"}}
    return asked


_TOOL_FIELDS = ("name", "description", "parameters", "strict")


def _tools(request: CreateResponse) -> dict[str, Any]:
    """Functions and how to choose among them; only the allowed ones where the choice is narrowed,
    because most servers do not know `allowed_tools`."""
    tools = request.tools or []
    names = [tool["name"] for tool in tools]
    choice, allowed = _tool_choice(request.tool_choice, names)
    if not tools:
        return {}
    functions = []
    for place, tool in enumerate(tools):
        for field, value in tool.items():
            if field not in (*_TOOL_FIELDS, "type") and value not in (None, False):
                raise unsupported_value("this option", f"tools[{place}].{field}", "Omit it.")
        if tool["name"] in allowed:
            sent = {name: tool[name] for name in _TOOL_FIELDS if tool.get(name) is not None}
            functions.append({"type": "function", "function": sent})
    asked: dict[str, Any] = {"tools": functions}
    if choice is not None:
        asked["tool_choice"] = choice
    if request.parallel_tool_calls is not None:
        asked["parallel_tool_calls"] = request.parallel_tool_calls
    return asked


def _tool_choice(
    choice: str | dict[str, Any] | None, names: list[str]
) -> tuple[str | dict[str, Any] | None, list[str]]:
    """The chat form of a choice, and the names of the tools it leaves."""
    match choice:
        case None | "none" | "auto":
            return choice, names
        case "required" if names:
            return choice, names
        case {"type": "function", "name": str(name)} if name in names:
            return {"type": "function", "function": {"name": name}}, names
        case {"type": "allowed_tools", "tools": list(tools), **rest}:
            mode = "auto" if rest.get("mode") is None else rest["mode"]
            allowed = [
                tool.get("name")
                for tool in tools
                if isinstance(tool, dict) and tool.get("type") == "function"
            ]
            named = len(allowed) == len(tools) and allowed and set(allowed) <= set(names)
            if named and mode in ("auto", "required"):
                return str(mode), [name for name in names if name in allowed]
    raise WireError(
        "Invalid 'tool_choice'. It is 'none', 'auto', 'required', a function or allowed functions, "
        "and needs the functions it names in 'tools'.",
        param="tool_choice",
    )


def _messages(
    instructions: str | None, history: Sequence[Item], items: Sequence[Item]
) -> list[dict[str, Any]]:
    conversation = _Conversation(instructions)
    for item, param in sayable(history, items):
        conversation.add(item, param)
    return conversation.messages


def sayable(history: Sequence[Item], items: Sequence[Item]) -> Iterator[tuple[Item, str | None]]:
    """Every item that an upstream can be given, and where it stands in the request, None for
    history. Raises `WireError` for calls and outputs that do not belong together."""
    _check_calls((*history, *items))
    unanswered = _calls((*history, *items)) - _outputs((*history, *items))
    for place, item in enumerate((*history, *items), -len(history)):
        if item["type"] != "function_call" or item["call_id"] not in unanswered:
            yield item, f"input[{place}]" if place >= 0 else None


def _calls(items: Sequence[Item]) -> set[str]:
    return {item["call_id"] for item in items if item["type"] == "function_call"}


def _outputs(items: Sequence[Item]) -> set[str]:
    return {item["call_id"] for item in items if item["type"] == "function_call_output"}


def _check_calls(items: Sequence[Item]) -> None:
    """Every output answers a call, and every call is answered, except one that was cut short:
    nobody could answer it, and it is left out."""
    calls, outputs = _calls(items), _outputs(items)
    for item in items:
        if item["type"] == "function_call_output" and item["call_id"] not in calls:
            raise WireError(
                f"No tool call found for function call output with call_id {item['call_id']}.",
                param="input",
            )
        if (
            item["type"] == "function_call"
            and item["call_id"] not in outputs
            and item["status"] == "completed"
        ):
            raise WireError(
                f"No tool output found for function call {item['call_id']}. Send an item of type "
                "'function_call_output' with this call_id.",
                param="input",
            )


class _Conversation:
    """Chat messages in the making. What an assistant says, thinks and calls in one go is one
    message, because a chat upstream expects the outputs right after it."""

    def __init__(self, instructions: str | None) -> None:
        self.messages: list[dict[str, Any]] = []
        self._turn: dict[str, Any] | None = None
        self._thought = ""
        if instructions is not None:
            self.messages.append({"role": "system", "content": instructions})

    def add(self, item: Item, param: str | None) -> None:
        """Take the next item. `param` is where it stands in the request, None for history."""
        match item:
            case {"type": "message", "role": "assistant"}:
                self._say(text_of(item))
            case {"type": "message", "role": role}:
                system = role in ("system", "developer")
                content = _content(item["content"], item, param, text_only=system)
                self._put({"role": "system" if system else "user", "content": content})
            case {"type": "function_call"}:
                self._call(item)
            case {"type": "function_call_output", "output": output}:
                if not isinstance(output, str):
                    output = _content(output, item, param, text_only=True)
                message = {"role": "tool", "tool_call_id": item["call_id"], "content": output}
                self._put(message)
            case {"type": "reasoning"}:
                self._thought = text_of(item)
            case _:
                raise unmappable(f"an item of type '{item['type']}'", item, param)

    def _put(self, message: dict[str, Any]) -> None:
        self.messages.append(message)
        self._turn = None
        self._thought = ""

    def _say(self, text: str) -> None:
        turn = self._turn
        if turn is not None and "tool_calls" in turn:
            turn["content"] = f"{turn['content']}\n{text}" if turn["content"] else text
        else:
            thought = self._thought
            self._put({"role": "assistant", "content": text})
            self._turn, self._thought = self.messages[-1], thought

    def _call(self, item: Item) -> None:
        """Thoughts go back only with the calls they led to: that is where models expect them,
        and some servers refuse them elsewhere."""
        if self._turn is None:
            self._turn = {"role": "assistant", "content": None}
            self.messages.append(self._turn)
        if self._thought:
            self._turn["reasoning_content"] = self._thought
            self._thought = ""
        function = {"name": item["name"], "arguments": item["arguments"]}
        self._turn.setdefault("tool_calls", []).append(
            {"id": item["call_id"], "type": "function", "function": function}
        )


def _content(
    parts: list[Item], item: Item, param: str | None, *, text_only: bool
) -> str | list[dict[str, Any]]:
    """Content as one string where it is text, the form every server takes; else as parts."""
    for part in parts:
        if part["type"] == "input_image" and part.get("image_url") and not text_only:
            continue
        if part["type"] != "input_text":
            source = " by 'file_id'" if part.get("file_id") else ""
            raise unmappable(f"content of type '{part['type']}'{source}", item, param)
    if (text_only or len(parts) == 1) and all(part["type"] == "input_text" for part in parts):
        return "\n".join(part["text"] for part in parts)
    return [
        {"type": "text", "text": part["text"]}
        if part["type"] == "input_text"
        else {
            "type": "image_url",
            "image_url": {"url": part["image_url"], "detail": part["detail"]},
        }
        for part in parts
    ]


def unmappable(what: str, item: Item, param: str | None) -> WireError:
    """What an upstream cannot be given, by its place in the request or in history."""
    where = "" if param else f" It is item '{item['id']}' of an earlier turn."
    return WireError(
        f"Unsupported input: {what} cannot be given to the upstream of this model.{where}",
        param=param or "input",
        code="unsupported_value",
    )


OUTPUT_ITEMS_MAX = 1_000
"""In one response; it ends in one commit, which is bounded."""


class _Call(msgspec.Struct, frozen=True):
    output_index: int
    id: str | None


_ITEM_OF = {"output_text": "message", "refusal": "message", "reasoning_text": "reasoning"}

_FINISHES: dict[str, Outcome] = {
    "length": Outcome(status="incomplete", incomplete_details={"reason": "max_output_tokens"}),
    "content_filter": Outcome(status="incomplete", incomplete_details={"reason": "content_filter"}),
    "abort": failed("The upstream aborted the answer."),
    "error": failed("The upstream ended the answer with an error."),
    "insufficient_system_resource": failed("The upstream ran out of resources."),
}
"""Every other reason (stop, tool_calls, names of servers' own) is an answer that is whole."""


class ChatReader:
    """Reads the chunks of one streamed answer and tells them as numbered response events.

    Every event it returns is already in `view`, which is how items are put together: the same
    fold that recovery uses. One message or thought is written at a time; calls may run in
    parallel, by index. With a `continuation` the first is the message it goes on with; where the
    upstream does not, reading raises `NotContinued` and nothing was told.
    """

    def __init__(self, view: View, clock: Clock, continuation: Continuation | None = None) -> None:
        self.view = view
        self._clock = clock
        self._made: list[Event] = []
        self._continuation = continuation
        self._writing = None if continuation is None else continuation.output_index
        self._calls: dict[int, _Call] = {}
        self._finish: str | None = None
        self._usage: Usage | None = None
        self._failure: Outcome | None = None

    @property
    def failed(self) -> bool:
        """Whether the upstream said that it failed, so that nothing more counts."""
        return self._failure is not None

    @property
    def finished(self) -> bool:
        """Whether the upstream said how its answer ended."""
        return self._finish is not None

    def read(self, chunk: dict[str, Any]) -> list[Event]:
        """The events one chunk amounts to. Chunks after an error are not read."""
        if self._failure is not None:
            return []
        try:
            read = msgspec.convert(chunk, ChatChunk)
        except msgspec.ValidationError as error:
            self._failure = failed(f"The upstream sent a chunk that cannot be read: {error}.")
            return []
        if read.error or read.object == "error":
            self._failure = upstream_error(read.error or chunk)
            return []
        self._usage = read.usage or self._usage
        for choice in read.choices or ():
            if self.view.next_index > OUTPUT_ITEMS_MAX:
                break  # whoever reads on sees in the view that there is no room for more
            if (delta := choice.delta or choice.message) is not None:
                self._delta(delta, choice.logprobs)
            self._finish = choice.finish_reason or self._finish
        return self._flush()

    def end(self, failure: Outcome | None = None) -> tuple[list[Event], Outcome]:
        """The last events, which close every open item, and how it ended. `failure` is what the
        connection to the upstream died of; a stream that just stops is a failure too."""
        outcome = failure or self._failure
        if outcome is None and self._finish and self._continuation is not None:
            raise NotContinued("the upstream added nothing to the message.")
        if outcome is None and self._finish is None:
            outcome = failed("The upstream closed the stream before it had finished its answer.")
        if outcome is None:
            outcome = _FINISHES.get(self._finish or "", Outcome(status="completed"))
        if outcome.status == "completed" and not self.view.output():
            self._write("output_text", "")
        status = "completed" if outcome.status == "completed" else "incomplete"
        for index in self.view.open_indexes():
            self._take(*closing(self.view, index, status))
        return self._flush(), msgspec.structs.replace(outcome, usage=response_usage(self._usage))

    def _delta(self, delta: Delta, logprobs: Logprobs | None) -> None:
        content = delta.content
        if isinstance(content, list):
            content = "".join(str(part.get("text") or "") for part in content)
        thought = delta.reasoning_content or delta.reasoning
        if self._continuation is not None:
            if thought or delta.refusal or delta.tool_calls:
                raise NotContinued("the upstream says something else than text.")
            if not (content := self._continuation.new(content or "")):
                return
            self._continuation = None
        if thought:
            self._write("reasoning_text", thought)
        if content:
            self._write("output_text", content, _logprobs(logprobs))
        if delta.refusal:
            self._write("refusal", delta.refusal)
        for call in delta.tool_calls or ():
            if self._failure is None and self.view.next_index <= OUTPUT_ITEMS_MAX:
                self._call(call)

    def _write(self, type: str, text: str, logprobs: Sequence[Item] = ()) -> None:
        """Add to the open part of that type, opening item and part where there is none."""
        place = self._writing
        if place is None or self.view.items[place].item["type"] != _ITEM_OF[type]:
            self._close_writing()
            place = self._writing = self._open(_new_item(_ITEM_OF[type], self._clock))
        item = self.view.items[place]
        at = {"output_index": place, "item_id": item.item["id"]}
        index = len(item.content) - 1
        if index < 0 or item.content[index].part["type"] != type:
            if index >= 0:
                self._take(*closing_part(self.view, place, index))
            index += 1
            self._take(ev.ContentPartAdded(**at, content_index=index, part=NEW_PARTS[type]))
        at["content_index"] = index
        match type:
            case _ if not text:
                pass
            case "output_text":
                self._take(ev.OutputTextDelta(**at, delta=text, logprobs=list(logprobs)))
            case "refusal":
                self._take(ev.RefusalDelta(**at, delta=text))
            case _:
                self._take(ev.ReasoningTextDelta(**at, delta=text))

    def _call(self, delta: ToolCallDelta) -> None:
        index = self._index_of(delta)
        call = self._calls.get(index)
        name = delta.function.name if delta.function else None
        if call is None or (name and delta.id and delta.id != call.id):
            if not name:
                self._failure = failed("The upstream began a tool call without a name.")
                return
            self._close_writing()
            taken = any(o.item.get("call_id") == delta.id for o in self.view.items.values())
            item = _new_item("function_call", self._clock) | {
                "call_id": self._clock.new_id("call") if taken or not delta.id else delta.id,
                "name": name,
            }
            call = self._calls[index] = _Call(self._open(item), delta.id)
        arguments = delta.function.arguments if delta.function else None
        if isinstance(arguments, dict):
            arguments = codec.encode(arguments).decode()
        if arguments:
            self._take(
                ev.FunctionCallArgumentsDelta(
                    output_index=call.output_index,
                    item_id=self.view.items[call.output_index].item["id"],
                    delta=arguments,
                )
            )

    def _index_of(self, delta: ToolCallDelta) -> int:
        """Which call a piece belongs to. Without an index its id tells; without that, a name begins
        the next call and anything else goes on with the last."""
        if delta.index is not None:
            return delta.index
        for index, call in self._calls.items():
            if delta.id and call.id == delta.id:
                return index
        begins = delta.function is not None and delta.function.name
        return max(self._calls, default=-1) + 1 if begins else max(self._calls, default=0)

    def _open(self, item: Item) -> int:
        index = self.view.next_index
        self._take(ev.OutputItemAdded(output_index=index, item=item))
        return index

    def _close_writing(self) -> None:
        if self._writing is not None:
            self._take(*closing(self.view, self._writing, "completed"))
            self._writing = None

    def _take(self, *events: Event) -> None:
        self._made += take(self.view, *events)

    def _flush(self) -> list[Event]:
        made, self._made = self._made, []
        return made


def upstream_error(error: Any) -> Outcome:
    """How a response ends whose upstream sent an error object."""
    said = error.get("message") if isinstance(error, dict) else error
    kind = f"{error.get('code')} {error.get('type')}" if isinstance(error, dict) else ""
    code = "rate_limit_exceeded" if "429" in kind or "rate_limit" in kind else "server_error"
    return failed(f"The upstream reported: {str(said)[:500]}", code=code)


def response_usage(usage: Usage | None) -> dict[str, Any] | None:
    """Usage in the form of the Responses API; None where the upstream counted nothing."""
    if usage is None:
        return None
    read, written = usage.prompt_tokens or 0, usage.completion_tokens or 0
    cached = usage.prompt_tokens_details and usage.prompt_tokens_details.cached_tokens
    thought = usage.completion_tokens_details and usage.completion_tokens_details.reasoning_tokens
    return {
        "input_tokens": read,
        "input_tokens_details": {"cached_tokens": cached or 0, "cache_write_tokens": 0},
        "output_tokens": written,
        "output_tokens_details": {"reasoning_tokens": thought or usage.reasoning_tokens or 0},
        "total_tokens": read + written if usage.total_tokens is None else usage.total_tokens,
    }


NEW_PARTS: dict[str, Item] = {
    "output_text": {"type": "output_text", "text": "", "annotations": [], "logprobs": []},
    "refusal": {"type": "refusal", "refusal": ""},
    "reasoning_text": {"type": "reasoning_text", "text": ""},
}


_NEW_ITEMS: dict[str, Item] = {
    "message": {"role": "assistant", "content": []},
    "reasoning": {"summary": [], "content": [], "encrypted_content": None},
    "function_call": {"call_id": "", "name": "", "arguments": ""},
}


def _new_item(type: str, clock: Clock) -> Item:
    id = clock.new_id(KINDS[type].prefix)
    return {"id": id, "type": type, "status": "in_progress"} | _NEW_ITEMS[type]


def _logprobs(logprobs: Logprobs | None) -> list[Item]:
    found = logprobs.content if logprobs is not None else None
    return [
        _logprob(token) | {"top_logprobs": [_logprob(near) for near in token.top_logprobs or ()]}
        for token in found or ()
    ]


def _logprob(token: TokenLogprob) -> Item:
    return {"token": token.token, "logprob": token.logprob, "bytes": token.bytes or []}
