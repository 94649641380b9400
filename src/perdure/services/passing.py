"""Chat completions, passed through: routed and bounded like everything else, and never stored."""

from __future__ import annotations

from typing import Any

import msgspec

from perdure.services.upstream import Passage
from perdure.services.upstreams import Target, Upstreams, first_that_answers
from perdure.wire.chat import CreateChat
from perdure.wire.errors import WireError, typed


async def pass_chat(upstreams: Upstreams, sent: Any, body: bytes) -> Passage:
    """The answer of the upstream that has the model to the request `sent`, whose bytes are `body`
    and go on as they are unless the model has another name there.

    Raises `WireError` for what is not served here, and `UpstreamFailed`.
    """
    request = typed(sent, CreateChat)
    if request.store:
        raise WireError(
            "Chat completions are passed through and not stored here. Use POST /v1/responses, "
            "which stores what it answers, or omit 'store'.",
            param="store",
            code="unsupported_value",
        )
    if not upstreams:
        raise WireError(
            f"The model '{request.model}' does not exist here: no upstream is configured. Serve "
            "with --upstream URL, or ask the built-in model by POST /v1/responses.",
            param="model",
            code="model_not_found",
        )

    async def ask(to: Target) -> Passage:
        known = to.model == request.model
        asked = body if known else msgspec.json.encode({**sent, "model": to.model})
        return await to.upstream.pass_chat(asked)

    return await first_that_answers(await upstreams.resolve(request.model), ask)
