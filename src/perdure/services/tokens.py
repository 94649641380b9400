"""Counts what a request would give the model to read: by the upstream's own tokenizer where it
has one, else by an estimate that says so.

No standard covers tokenizers, and their routes stand beside the version path of the API. As the
servers document them:

    vLLM, SGLang   POST /tokenize {"model", "messages", "tools"} -> {"count", "tokens", ...}; the
                   chat template is applied. Versions that only know a `prompt` refuse.
    llama.cpp      POST /apply-template {"messages", "tools"} -> {"prompt"}, then
                   POST /tokenize {"content"} -> {"tokens"}; a body without content has no tokens.
    Ollama         none, nor have hosted services.
"""

from __future__ import annotations

from typing import Any

import msgspec

from perdure.core.clock import Clock
from perdure.services.bridge import chat_request
from perdure.services.context import Context
from perdure.services.conversations import resolve_items
from perdure.services.upstream import Upstream, UpstreamFailed
from perdure.services.upstreams import Target, Upstreams
from perdure.surfaces.state import State
from perdure.wire.input_tokens import ANY_MODEL, parse_count_input
from perdure.wire.items import sound_items

_BYTES_PER_TOKEN = 4
_TOKENS_PER_MESSAGE = 4
"""What a chat template puts around one."""

_TOKENS_PER_IMAGE = 765
"""A square of 1024 pixels in high detail, at the rate OpenAI publishes."""

_TEMPLATED = ("chat_template_kwargs", "reasoning_effort", "tool_choice")
"""What else of a request may change the prompt that a chat template makes."""


class Counted(msgspec.Struct, frozen=True):
    """How many tokens, and whether a tokenizer said so."""

    tokens: int
    exact: bool


class TokenCounter:
    """Counts for requests of one state."""

    def __init__(self, state: State, context: Context, upstreams: Upstreams, clock: Clock) -> None:
        self._state = state
        self._context = context
        self._upstreams = upstreams
        self._clock = clock

    async def count(self, tenant: str, sent: Any) -> Counted:
        """Tokens of the request `sent`, with what it builds on. Raises `WireError` and `NotFound`
        as creating a response of it would."""
        request = parse_count_input(sent)
        items = sound_items(request.input or [], self._clock)
        items = await resolve_items(self._state, tenant, items)
        given = await self._context.given(tenant, request, items)
        target = await self._target(request.model)
        model = request.model if target is None else target.model
        asked = chat_request(request, given.history, given.items, model=model)
        if request.model == ANY_MODEL:
            del asked["model"]
        exact = None if target is None else await _tokenized(target.upstream, asked)
        return Counted(estimated(asked), False) if exact is None else Counted(exact, True)

    async def _target(self, model: str) -> Target | None:
        """Whose tokenizer to ask; a request that names no model is counted by the first. None where
        nobody can be asked now."""
        if not self._upstreams:
            return None
        if model == ANY_MODEL:
            return Target(self._upstreams.members[0].upstream, model)
        try:
            return (await self._upstreams.resolve(model))[0]
        except UpstreamFailed:
            return None


async def _tokenized(upstream: Upstream, asked: dict[str, Any]) -> int | None:
    """The count of the upstream's tokenizer; None where it has none that takes messages."""
    chat = {name: asked[name] for name in ("messages", "tools") if name in asked}
    options = {name: asked[name] for name in ("model", *_TEMPLATED) if name in asked}
    told = await upstream.ask_beside("/tokenize", chat | options | {"add_special_tokens": False})
    if told is None:
        return None
    if isinstance(told.get("count"), int):
        return int(told["count"])
    templated = await upstream.ask_beside("/apply-template", chat | options)
    if templated is None or not isinstance(templated.get("prompt"), str):
        return None
    content = {"content": templated["prompt"], "add_special": True}
    told = await upstream.ask_beside("/tokenize", content)
    tokens = None if told is None else told.get("tokens")
    return len(tokens) if isinstance(tokens, list) else None


def estimated_text(text: str) -> int:
    """About how many tokens a text has."""
    return -(-len(text.encode()) // _BYTES_PER_TOKEN)


def estimated(asked: dict[str, Any]) -> int:
    """About how many tokens a chat request gives to read: four bytes a token, which is near for
    English, and high enough for code and other scripts."""
    tokens = _TOKENS_PER_MESSAGE * len(asked["messages"])
    size_bytes = len(msgspec.json.encode(asked["tools"])) if "tools" in asked else 0
    for message in asked["messages"]:
        if isinstance(message["content"], list):
            for part in message["content"]:
                size_bytes += len(part.get("text", "").encode())
                tokens += _TOKENS_PER_IMAGE * (part["type"] == "image_url")
        else:
            size_bytes += len((message["content"] or "").encode())
        size_bytes += len(message.get("reasoning_content", "").encode())
        for call in message.get("tool_calls", ()):
            size_bytes += len((call["function"]["name"] + call["function"]["arguments"]).encode())
    return tokens - -size_bytes // _BYTES_PER_TOKEN
