"""Conversations: a lasting list of items that responses read from and add to.

The record holds the next free position and, while a response runs, who holds the conversation.
Every change writes the record with the version it was read at, so two writers never interleave:
one wins, the other reads again.
"""

from __future__ import annotations

import msgspec

from perdure.core.batch import Batch, delete, put
from perdure.core.engine import Engine, Survives
from perdure.core.keys import Key
from perdure.core.layouts import Index, Records
from perdure.core.paging import Slice, page_of
from perdure.core.promises import Durability, Promise
from perdure.core.values import Page, Record
from perdure.wire.errors import ConversationLocked, NotFound


class Conversation(msgspec.Struct, frozen=True):
    """`held_by` is the id of the response that is running on it."""

    created_at_s: int
    metadata: dict[str, str]
    next_position: int = 0
    held_by: str | None = None


CONVERSATIONS = Records(
    "conversations",
    Conversation,
    key=("tenant", "conversation_id"),
    indexes=(Index("by_age", ("created_at_s",)),),
)

RETRY_AFTER_MS = 1_000
"""How long a client that finds a conversation held is told to wait."""

Held = Record[Conversation]


class Conversations:
    """Reads of conversations, and the batches that write them."""

    promise = Promise(
        surface="conversations",
        durability=Durability.SHARED,
        acknowledgement="durable in the store before the answer is sent",
        survives=Survives(process_crash=True, power_cut=True, failed_sync=True, damage=True),
        owner="the response that runs on it, named in the record",
        recovery="what a dead process held is released with the response that held it",
        retention="until deleted; items stay readable by id",
        layouts=(CONVERSATIONS,),
        statements=("C3", "C4", "R7", "R8", "R13"),
    )

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def get(self, tenant: str, conversation_id: str) -> Held:
        """The conversation's record. Raises `Missing`."""
        record = await self._engine.get(CONVERSATIONS, (tenant, conversation_id))
        if record is None:
            raise NotFound("Conversation", conversation_id)
        return record

    async def page(
        self,
        tenant: str,
        wanted: Slice[Conversation],
    ) -> Page[Held]:
        """Conversations in the order they were created. Raises `Damaged`, which can resume."""
        return await page_of(self._engine, CONVERSATIONS, (tenant,), wanted, index="by_age")

    def create(self, key: Key, conversation: Conversation) -> Batch:
        """A new conversation; `next_position` counts the items that are written with it."""
        return put(CONVERSATIONS, key, conversation, expect=0)

    def describe(self, held: Held, metadata: dict[str, str]) -> Batch:
        """Replace the metadata."""
        return self._write(held, msgspec.structs.replace(held.value, metadata=metadata))

    def append(self, held: Held, count: int, *, release: str | None = None) -> Batch:
        """Set aside `count` positions from `held.value.next_position` for items written with
        this; `release` is the response that lets go. Raises `ConversationLocked`."""
        require_free(held, release)
        position = held.value.next_position + count
        return self._write(
            held, msgspec.structs.replace(held.value, next_position=position, held_by=None)
        )

    def hold(self, held: Held, response_id: str) -> Batch:
        """Let a response run on it. Raises `ConversationLocked` where another one does."""
        require_free(held, response_id)
        return self._write(held, msgspec.structs.replace(held.value, held_by=response_id))

    def touch(self, held: Held) -> Batch:
        """Let its items change only while nobody holds it. Raises `ConversationLocked`."""
        require_free(held, None)
        return self._write(held, held.value)

    def delete(self, held: Held) -> Batch:
        """Delete the conversation. Its items stay readable by their ids.

        Raises `ConversationLocked` while a response runs on it.
        """
        require_free(held, None)
        return delete(CONVERSATIONS, held.key, expect=held.version)

    def _write(self, held: Held, changed: Conversation) -> Batch:
        return put(CONVERSATIONS, held.key, changed, expect=held.version)


def require_free(held: Held, response_id: str | None) -> None:
    """Raises `ConversationLocked` where another response than `response_id` holds it."""
    holder = held.value.held_by
    if holder is not None and holder != response_id:
        raise ConversationLocked(held.key[-1], RETRY_AFTER_MS)
