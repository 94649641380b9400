"""The same requests on Starlette with msgspec: validated and typed, kept in dictionaries; nothing
is durable. What this stack gives when nothing is stored is the ceiling of a server built on it."""

from __future__ import annotations

import secrets
import sys
import time
from typing import Literal

import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route


class Content(msgspec.Struct):
    """A part of a message."""

    type: Literal["input_text"]
    text: str


class Message(msgspec.Struct):
    """An item as it is sent."""

    role: Literal["user", "assistant", "system", "developer"]
    content: list[Content]
    type: Literal["message"] = "message"
    status: str = "completed"
    id: str = ""


class NewItems(msgspec.Struct):
    """The body of the measured request."""

    items: list[Message]


class NewConversation(msgspec.Struct):
    """The body that begins a conversation."""

    metadata: dict[str, str] = {}


class Conversation(msgspec.Struct):
    """A conversation as it is shown."""

    id: str
    created_at: int
    metadata: dict[str, str]
    object: str = "conversation"


class ItemList(msgspec.Struct):
    """The answer to the measured request."""

    data: list[Message]
    first_id: str
    last_id: str
    has_more: bool = False
    object: str = "list"


new_items = msgspec.json.Decoder(NewItems).decode
new_conversation = msgspec.json.Decoder(NewConversation).decode
encode = msgspec.json.Encoder().encode
conversations: dict[str, Conversation] = {}
items: dict[str, list[Message]] = {}
responses: dict[str, object] = {}


def answer(value: object) -> Response:
    return Response(encode(value), media_type="application/json")


async def create(request: Request) -> Response:
    sent = new_conversation(await request.body())
    id = f"conv_{secrets.token_hex(24)}"
    conversations[id] = Conversation(id, int(time.time()), sent.metadata)
    items[id] = []
    return answer(conversations[id])


async def retrieve(request: Request) -> Response:
    found = conversations.get(request.path_params["id"])
    if found is None:
        raise HTTPException(404)
    return answer(found)


async def add(request: Request) -> Response:
    id = request.path_params["id"]
    if id not in conversations:
        raise HTTPException(404)
    sent = new_items(await request.body())
    for item in sent.items:
        item.id = f"msg_{secrets.token_hex(24)}"
    items[id] += sent.items
    return answer(ItemList(sent.items, sent.items[0].id, sent.items[-1].id))


async def keep(request: Request) -> Response:
    responses[request.path_params["id"]] = msgspec.json.decode(await request.body())
    return answer(None)


async def response(request: Request) -> Response:
    found = responses.get(request.path_params["id"])
    if found is None:
        raise HTTPException(404)
    return answer(found)


async def ready(_request: Request) -> Response:
    return answer("ready")


app = Starlette(
    routes=[
        Route("/readyz", ready),
        Route("/v1/conversations", create, methods=["POST"]),
        Route("/v1/conversations/{id}", retrieve),
        Route("/v1/conversations/{id}/items", add, methods=["POST"]),
        Route("/v1/responses/{id}", keep, methods=["PUT"]),
        Route("/v1/responses/{id}", response),
    ]
)

if __name__ == "__main__":
    uvicorn.run(app, port=int(sys.argv[1]), log_level="warning", access_log=False)
