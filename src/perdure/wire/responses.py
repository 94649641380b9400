"""The Responses API: the request, what this server refuses of it, and the response object.

Requests are validated through structs, but what is nested in them (items, tools, formats) stays
the plain dict that was sent, so that fields this version does not know are kept and given back.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Any, Literal

import msgspec

from perdure.wire.errors import (
    WireError,
    missing,
    not_among,
    typed,
    unsupported,
    unsupported_value,
)
from perdure.wire.items import Item
from perdure.wire.metadata import check_metadata

Body = dict[str, Any]

Status = Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
Summary = Literal["auto", "concise", "detailed"]

INCLUDES = (
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
    "reasoning.encrypted_content",
    "message.output_text.logprobs",
)
"""Accepted in `include`. Except for logprobs they name fields that are always shown if present."""


RUN_BY_CLIENT = frozenset({"function"})
"""Types of tools that need nothing from this server."""


class CreateResponse(msgspec.Struct, frozen=True, kw_only=True):
    """Everything a client may send to create a response.

    `extra` holds top-level fields of no standard: they are forwarded to the upstream (samplers and
    template switches of model servers) and given back in the response.
    """

    model: Annotated[str, msgspec.Meta(min_length=1)]
    input: str | list[Any] | None = None
    instructions: str | None = None
    previous_response_id: Annotated[str, msgspec.Meta(min_length=1)] | None = None
    conversation: str | dict[str, Any] | None = None
    store: bool | None = None
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None
    background: bool | None = None
    include: list[str] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    max_tool_calls: Annotated[int, msgspec.Meta(ge=1)] | None = None
    max_output_tokens: Annotated[int, msgspec.Meta(ge=1)] | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, msgspec.Meta(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, msgspec.Meta(ge=-2, le=2)] | None = None
    top_logprobs: Annotated[int, msgspec.Meta(ge=0, le=20)] | None = None
    reasoning: dict[str, Any] | None = None
    text: dict[str, Any] | None = None
    truncation: Literal["auto", "disabled"] | None = None
    metadata: dict[str, str] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    service_tier: (
        Literal["auto", "default", "flex", "scale", "priority", "fast", "ultrafast"] | None
    ) = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: Literal["in_memory", "24h"] | None = None
    prompt_cache_options: dict[str, Any] | None = None
    prompt: dict[str, Any] | None = None
    context_management: list[Any] | None = None
    moderation: dict[str, Any] | None = None
    access_programs: dict[str, Any] | None = None
    background_options: dict[str, Any] | None = None
    image: dict[str, Any] | None = None
    extra: dict[str, Any] = {}

    @property
    def stored(self) -> bool:
        """Responses are stored unless the client says otherwise."""
        return self.store is not False

    @property
    def conversation_id(self) -> str | None:
        """The conversation the response belongs to."""
        held = self.conversation
        return held["id"] if isinstance(held, dict) else held

    @property
    def allowed_tools(self) -> frozenset[str] | None:
        """The functions that the model may call, where the choice narrows them."""
        match self.tool_choice:
            case "none":
                return frozenset()
            case {"type": "allowed_tools", "tools": list(tools)}:
                return frozenset(str(t.get("name")) for t in tools if isinstance(t, dict))
        return None

    @property
    def logprobs(self) -> bool:
        """Whether the client asked for log probabilities of the output text."""
        return bool(self.top_logprobs) or "message.output_text.logprobs" in (self.include or ())


class TextFormat(msgspec.Struct, frozen=True):
    """How text is to be shaped; `name` and `schema` belong to `json_schema`."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None
    description: str | None = None


class TextConfig(msgspec.Struct, frozen=True):
    """The request's `text`."""

    format: TextFormat | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class Reasoning(msgspec.Struct, frozen=True):
    """The request's `reasoning`."""

    effort: Effort | None = None
    summary: Summary | None = None
    generate_summary: Summary | None = None
    context: Literal["auto", "current_turn", "all_turns"] | None = None


class StreamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The request's `stream_options`."""

    include_obfuscation: bool | None = None


class FunctionTool(msgspec.Struct, frozen=True):
    """The one type of tool that is run by the client, and so needs nothing from this server."""

    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class _ConversationRef(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    id: str


_FIELDS = frozenset(CreateResponse.__struct_fields__) - {"extra"}

_MOVED = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
    "verbosity": "text.verbosity",
    "functions": "tools",
    "function_call": "tool_choice",
    "logprobs": "include",
}
"""Fields of chat completions and what they are called here."""


def parse_create_response(body: Any) -> CreateResponse:
    """The request of a parsed JSON body, checked in everything but its items (`sound_items`) and
    what only an upstream's format can refuse (the bridge).

    Raises `WireError` naming the parameter that is malformed, contradictory or not supported.
    """
    if not isinstance(body, dict):
        raise WireError("The request body must be a JSON object.", code="invalid_type")
    known = {name: value for name, value in body.items() if name in _FIELDS}
    extra = {name: value for name, value in body.items() if name not in _FIELDS}
    _check_extra(extra)
    request = msgspec.structs.replace(typed(known, CreateResponse), extra=extra)
    _refuse_unsupported(request)
    _check_nested(request)
    _check_origin(request)
    check_metadata(request.metadata)
    return request


def parse_part_of_create(body: Any, takes: Collection[str]) -> CreateResponse:
    """The request of an operation that takes some of what creating a response takes. Raises
    `WireError`, also for a standard parameter that this operation does not take."""
    for name in body if isinstance(body, dict) else ():
        if name in _FIELDS and name not in takes:
            raise WireError(f"Unknown parameter: '{name}'.", param=name, code="unknown_parameter")
    return parse_create_response(body)


def without_unsupported_tools(body: Any) -> tuple[Any, list[str]]:
    """A request's body without the tools that nobody here can run, and what those were: their
    type, and the name of one that has it. Anything else about the body is left to its check."""
    tools = body.get("tools") if isinstance(body, dict) else None
    if not isinstance(tools, list):
        return body, []
    kept: list[Any] = []
    dropped: list[str] = []
    for tool in tools:
        if not isinstance(tool, dict) or tool.get("type") in RUN_BY_CLIENT:
            kept.append(tool)
        else:
            named = [str(tool[field]) for field in ("type", "name") if tool.get(field)]
            dropped.append(":".join(named))
    return {**body, "tools": kept} if dropped else body, dropped


def _check_extra(extra: dict[str, Any]) -> None:
    for name in extra:
        if name in _MOVED:
            raise WireError(
                f"Unsupported parameter: '{name}'. In the Responses API, this parameter has moved "
                f"to '{_MOVED[name]}'.",
                param=name,
                code="unsupported_parameter",
            )
        if name in _NOT_SENT:
            raise WireError(f"Unknown parameter: '{name}'.", param=name, code="unknown_parameter")


def _refuse_unsupported(request: CreateResponse) -> None:
    if request.truncation == "auto":
        raise unsupported_value("'auto'", "truncation", "Shorten the input, or omit 'truncation'.")
    for name in (
        "prompt",
        "context_management",
        "prompt_cache_options",
        "moderation",
        "access_programs",
        "background_options",
        "image",
    ):
        if getattr(request, name) is not None:
            raise unsupported("This parameter", name, "Omit it.")
    for place, value in enumerate(request.include or ()):
        if value not in INCLUDES:
            raise not_among(f"include[{place}]", value, INCLUDES)
    for place, tool in enumerate(request.tools or ()):
        type = tool.get("type")
        if not isinstance(type, str) or type not in RUN_BY_CLIENT:
            raise unsupported_value(
                f"the tool type '{type}'",
                f"tools[{place}].type",
                "Use tools of type 'function'.",
            )


def _check_nested(request: CreateResponse) -> None:
    if request.text is not None:
        format = typed(request.text, TextConfig, at="text").format
        if format is not None and format.type == "json_schema":
            for field in ("name", "schema"):
                if getattr(format, field) is None:
                    raise missing(f"text.format.{field}")
    if request.reasoning is not None:
        typed(request.reasoning, Reasoning, at="reasoning")
        if request.reasoning.get("mode") not in (None, "standard"):
            raise unsupported_value("this mode", "reasoning.mode", "Omit it.")
        if request.reasoning.get("context") not in (None, "auto"):
            raise unsupported_value("this context", "reasoning.context", "Omit it.")
    if request.stream_options is not None:
        options = typed(request.stream_options, StreamOptions, at="stream_options")
        if not request.stream:
            raise WireError(
                "The 'stream_options' parameter is only allowed when 'stream' is enabled.",
                param="stream_options",
            )
        if options.include_obfuscation:
            raise unsupported("Stream obfuscation", "stream_options.include_obfuscation")
    for place, tool in enumerate(request.tools or ()):
        typed(tool, FunctionTool, at=f"tools[{place}]")


def _check_origin(request: CreateResponse) -> None:
    if isinstance(request.conversation, dict):
        typed(request.conversation, _ConversationRef, at="conversation")
    if request.conversation is not None and request.previous_response_id is not None:
        raise WireError(
            "Mutually exclusive parameters: 'previous_response_id' and 'conversation'. Ensure you "
            "are only providing one of them.",
            param="previous_response_id",
            code="mutually_exclusive_parameters",
        )
    nothing_before = request.conversation is None and request.previous_response_id is None
    if request.input in (None, []) and nothing_before:
        raise WireError(
            "One of 'input', 'previous_response_id' or 'conversation' must be provided.",
            param="input",
            code="missing_required_parameter",
        )


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """How generation ended: what a terminal response says beyond its output."""

    status: Status
    error: dict[str, Any] | None = None
    incomplete_details: dict[str, Any] | None = None
    usage: dict[str, Any] | None = None
    perdure: dict[str, Any] | None = None


def failed(
    message: str, *, code: str = "server_error", perdure: dict[str, Any] | None = None
) -> Outcome:
    """An outcome without an answer. `code` is one of OpenAI's; ours belong in `perdure`."""
    return Outcome(status="failed", error={"code": code, "message": message}, perdure=perdure)


def response_body(request: CreateResponse, *, id: str, created_at: int) -> Body:
    """The response object at its start: every field of the specification. What the request does
    not say is null where that is allowed, else the specification's default (`_DEFAULTS`), which no
    upstream is sent. `finished` makes the terminal one of it."""
    conversation = request.conversation_id
    return {
        "id": id,
        "object": "response",
        "created_at": created_at,
        "status": "queued" if request.background else "in_progress",
        "background": bool(request.background),
        "completed_at": None,
        "conversation": None if conversation is None else {"id": conversation},
        "error": None,
        "incomplete_details": None,
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "max_tool_calls": request.max_tool_calls,
        "metadata": request.metadata or {},
        "model": request.model,
        "moderation": None,
        "output": [],
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "previous_response_id": request.previous_response_id,
        "prompt": None,
        "prompt_cache_key": request.prompt_cache_key,
        "prompt_cache_retention": request.prompt_cache_retention,
        "reasoning": {"effort": None, "summary": None} | (request.reasoning or {}),
        "safety_identifier": request.safety_identifier,
        "store": request.stored,
        "text": {"format": {"type": "text"}} | _given(request.text or {}),
        "tool_choice": _choice(request.tool_choice),
        "tools": [_TOOL | tool for tool in request.tools or ()],
        "top_logprobs": request.top_logprobs or 0,
        "usage": None,
        "user": request.user,
        **{
            name: default if (sent := getattr(request, name)) is None else sent
            for name, default in _DEFAULTS.items()
        },
    } | request.extra


def finished(body: Body, outcome: Outcome, output: list[Item], *, completed_at: int) -> Body:
    """The terminal response. `completed_at` is kept only where it completed, as OpenAI does."""
    ended = body | {
        "status": outcome.status,
        "completed_at": completed_at if outcome.status == "completed" else None,
        "error": outcome.error,
        "incomplete_details": outcome.incomplete_details,
        "output": output,
        "usage": outcome.usage,
    }
    if outcome.perdure is None:
        return ended
    return ended | {"perdure": body.get("perdure", {}) | outcome.perdure}


class _Told(msgspec.Struct):
    output: list[Item] = []


_TOLD = msgspec.json.Decoder(_Told)


def output_of(body: bytes) -> list[Item]:
    """The output items of a wire body, whatever else is in it."""
    return _TOLD.decode(body).output


class ResponseDeleted(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to deleting a response."""

    id: str
    object: Literal["response"] = "response"
    deleted: bool = True


_DEFAULTS: dict[str, Any] = {
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "service_tier": "default",
    "temperature": 1.0,
    "top_p": 1.0,
    "truncation": "disabled",
}
_TOOL: dict[str, Any] = {"description": None, "parameters": None, "strict": None}


def _choice(choice: str | dict[str, Any] | None) -> str | dict[str, Any]:
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        return {"mode": "auto"} | _given(choice)
    return "auto" if choice is None else choice


def _given(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


_NOT_SENT = frozenset(response_body(CreateResponse(model=""), id="", created_at=0)) | {
    "output_text",
    "perdure",
    "n",
    "modalities",
    "audio",
    "prediction",
}
"""Fields that are answers rather than questions, or would change the shape of an answer."""
