"""The part of chat completions that is read here: of a request what decides where it goes, and the
chunks of a streamed answer.

Model servers differ in what they leave out, send as null or send at once, so nearly everything in
a chunk may be absent. What is asked of them is a plain dict, built in services/bridge.py.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec


class CreateChat(msgspec.Struct, frozen=True, kw_only=True):
    """A request for a chat completion; all else in it is the upstream's business."""

    model: Annotated[str, msgspec.Meta(min_length=1)]
    messages: list[Any]
    stream: bool | None = None
    store: bool | None = None


class FunctionDelta(msgspec.Struct, frozen=True):
    """A piece of a call; a server that does not stream arguments may send them as an object."""

    name: str | None = None
    arguments: str | dict[str, Any] | None = None


class ToolCallDelta(msgspec.Struct, frozen=True):
    """A piece of the call at `index`, which some servers leave out or never change."""

    index: int | None = None
    id: str | None = None
    function: FunctionDelta | None = None


class Delta(msgspec.Struct, frozen=True):
    """What one chunk adds. Thoughts come under one of two names."""

    content: str | list[dict[str, Any]] | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class TokenLogprob(msgspec.Struct, frozen=True):
    """The log probability of a token, and of those that were nearly chosen."""

    token: str
    logprob: float
    bytes: list[int] | None = None
    top_logprobs: list[TokenLogprob] | None = None


class Logprobs(msgspec.Struct, frozen=True):
    """Log probabilities of the tokens in one chunk."""

    content: list[TokenLogprob] | None = None


class Choice(msgspec.Struct, frozen=True):
    """The one answer that is asked for. A server that does not stream sends it as `message`."""

    delta: Delta | None = None
    message: Delta | None = None
    logprobs: Logprobs | None = None
    finish_reason: str | None = None


class PromptDetails(msgspec.Struct, frozen=True):
    """Of the prompt's tokens."""

    cached_tokens: int | None = None


class CompletionDetails(msgspec.Struct, frozen=True):
    """Of the answer's tokens."""

    reasoning_tokens: int | None = None


class Usage(msgspec.Struct, frozen=True):
    """Tokens read and written. Reasoning tokens stand among the details, or beside the others."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    total_tokens: int | None = None
    reasoning_tokens: int | None = None
    prompt_tokens_details: PromptDetails | None = None
    completion_tokens_details: CompletionDetails | None = None


class ChatChunk(msgspec.Struct, frozen=True):
    """One `chat.completion.chunk`, or the error that took its place: under `error`, or, where
    `object` says that it is one, the chunk itself."""

    object: str | None = None
    choices: list[Choice] | None = None
    usage: Usage | None = None
    error: Any = None
