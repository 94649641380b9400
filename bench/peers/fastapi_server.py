"""The same requests on FastAPI: validated by pydantic, kept in dictionaries; nothing is durable
unless a database is named, and then each item is a row inserted and committed on its own."""

from __future__ import annotations

import secrets
import sqlite3
import sys
import time
from typing import Any, Literal

import uvicorn
from fastapi import FastAPI, HTTPException
from pydantic import BaseModel


class Content(BaseModel):
    """A part of a message."""

    type: Literal["input_text"]
    text: str


class Message(BaseModel):
    """An item as it is sent."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: list[Content]
    status: str = "completed"
    id: str = ""


class NewItems(BaseModel):
    """The body of the measured request."""

    items: list[Message]


class NewConversation(BaseModel):
    """The body that begins a conversation."""

    metadata: dict[str, str] = {}


class Conversation(BaseModel):
    """A conversation as it is shown."""

    id: str
    object: Literal["conversation"] = "conversation"
    created_at: int
    metadata: dict[str, str]


class ItemList(BaseModel):
    """The answer to the measured request."""

    object: Literal["list"] = "list"
    data: list[Message]
    first_id: str
    last_id: str
    has_more: bool = False


app = FastAPI()
conversations: dict[str, Conversation] = {}
items: dict[str, list[Message]] = {}
responses: dict[str, dict[str, Any]] = {}
database: list[sqlite3.Connection] = []


@app.get("/readyz")
async def ready() -> str:
    return "ready"


@app.post("/v1/conversations")
async def create(sent: NewConversation) -> Conversation:
    id = f"conv_{secrets.token_hex(24)}"
    conversations[id] = Conversation(id=id, created_at=int(time.time()), metadata=sent.metadata)
    items[id] = []
    return conversations[id]


@app.get("/v1/conversations/{id}")
async def retrieve(id: str) -> Conversation:
    if id not in conversations:
        raise HTTPException(404)
    return conversations[id]


@app.post("/v1/conversations/{id}/items")
async def add(id: str, sent: NewItems) -> ItemList:
    if id not in conversations:
        raise HTTPException(404)
    for item in sent.items:
        item.id = f"msg_{secrets.token_hex(24)}"
    for connection in database:
        rows = [(item.id, id, item.model_dump_json()) for item in sent.items]
        connection.executemany("INSERT INTO items VALUES (?, ?, ?)", rows)
    items[id] += sent.items
    return ItemList(data=sent.items, first_id=sent.items[0].id, last_id=sent.items[-1].id)


@app.put("/v1/responses/{id}")
async def keep(id: str, sent: dict[str, Any]) -> None:
    responses[id] = sent


@app.get("/v1/responses/{id}")
async def response(id: str) -> dict[str, Any]:
    if id not in responses:
        raise HTTPException(404)
    return responses[id]


if __name__ == "__main__":
    if len(sys.argv) > 2:
        database.append(sqlite3.connect(sys.argv[2], isolation_level=None))
        database[0].execute("PRAGMA journal_mode=WAL")
        database[0].execute("PRAGMA synchronous=FULL")
        database[0].execute(
            "CREATE TABLE items (id TEXT PRIMARY KEY, conversation TEXT, body TEXT)"
        )
    uvicorn.run(app, port=int(sys.argv[1]), log_level="warning", access_log=False)
