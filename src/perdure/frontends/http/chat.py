"""The route of chat completions, for clients that want nothing stored."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import Any

from perdure.core.errors import Unavailable
from perdure.frontends.http.call import Answer, Call, Disconnected, EventStream
from perdure.frontends.http.routes import Route
from perdure.frontends.http.service import Service
from perdure.services.passing import pass_chat
from perdure.wire.chat import CreateChat


async def create(service: Service, call: Call) -> Answer | EventStream:
    if service.node.draining:
        raise Unavailable("the server is stopping; send the request again.")
    body = await call.body(service.limits.body_bytes_max)
    sent = await call.parse(body)
    answered = asyncio.create_task(_answer(service, sent, body))
    left = asyncio.create_task(call.disconnected())
    try:
        await asyncio.wait((answered, left), return_when=asyncio.FIRST_COMPLETED)
        if not answered.done():
            raise Disconnected("the client left before its answer came.")
        return answered.result()
    finally:
        left.cancel()
        answered.cancel()


async def _answer(service: Service, sent: Any, body: bytes) -> Answer | EventStream:
    """The beginning of a streamed answer, or all of another."""
    passage = await pass_chat(service.node.upstreams, sent, body)
    if passage.media.startswith("text/event-stream"):
        return EventStream(passage.groups, framed=True)
    async with aclosing(passage.groups) as groups:
        whole = b"".join([part async for group in groups for part in group])
    return Answer(whole, media=passage.media.encode("latin-1"))


ROUTES = (
    Route(
        method="POST",
        path="/v1/chat/completions",
        name="create_chat_completion",
        summary="A chat completion of an upstream's, passed through and not stored.",
        handler=create,
        body=CreateChat,
        answer=dict[str, Any],
        statuses=(404, 422, 502),
        streams=True,
    ),
)
