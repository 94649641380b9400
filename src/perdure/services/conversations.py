"""What clients do with conversations: create, describe, add, list, remove.

Writers of one conversation race for its record; the loser reads it again. So items of two requests
never interleave, and a conversation that a response holds refuses both.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import msgspec

from perdure.core.batch import Batch
from perdure.core.clock import Clock
from perdure.core.errors import Conflict, Unavailable
from perdure.core.values import Page, Record
from perdure.services.requests import Caller, Requests
from perdure.services.sealing import Sealing
from perdure.surfaces.conversations import Conversation, Held
from perdure.surfaces.items import Item, NewItem, body
from perdure.surfaces.state import State
from perdure.wire.conversations import Conversation as WireConversation
from perdure.wire.conversations import (
    parse_create_conversation,
    parse_create_items,
    parse_update_conversation,
)
from perdure.wire.errors import NotFound
from perdure.wire.items import REFERENCE, duplicate, sound_items
from perdure.wire.lists import ListQuery

T = TypeVar("T")

_TRIES_MAX = 64

encode = msgspec.json.encode


class Conversations:
    """Conversations of one state; every method names the caller or tenant first."""

    def __init__(self, state: State, requests: Requests, sealing: Sealing, clock: Clock) -> None:
        self._state = state
        self._sealing = sealing
        self._requests = requests
        self._clock = clock

    async def create(self, caller: Caller, sent: Any) -> bytes:
        """Start a conversation; returns its wire body. Raises `WireError`."""
        request = parse_create_conversation(sent)
        items = await self.resolve(caller.tenant, request.items or [])
        conversation_id = self._clock.new_id("conv")
        conversation = Conversation(
            created_at_s=int(self._clock.now_s()),
            metadata=request.metadata or {},
            next_position=len(items),
        )
        key = (caller.tenant, conversation_id)
        answer = encode(shown(Record(key, 1, conversation)))
        return await self._requests.once(
            caller,
            self._state.conversations.create(key, conversation)
            + self._state.items.add(key, "items", new_items(items)),
            answer,
        )

    async def get(self, tenant: str, conversation_id: str) -> bytes:
        """The wire body. Raises `NotFound`."""
        return encode(shown(await self._state.conversations.get(tenant, conversation_id)))

    async def update(self, caller: Caller, conversation_id: str, sent: Any) -> bytes:
        """Replace the metadata; returns the wire body. Raises `NotFound` and `WireError`."""
        metadata = parse_update_conversation(sent).metadata or {}

        async def attempt() -> bytes:
            held = await self._state.conversations.get(caller.tenant, conversation_id)
            changed = msgspec.structs.replace(held.value, metadata=metadata)
            answer = encode(shown(Record(held.key, held.version + 1, changed)))
            return await self._requests.once(
                caller, self._state.conversations.describe(held, metadata), answer
            )

        return await decided(attempt)

    async def delete(self, tenant: str, conversation_id: str) -> None:
        """Delete a conversation; its items stay readable by id. Raises `NotFound`."""

        async def attempt() -> None:
            held = await self._state.conversations.get(tenant, conversation_id)
            await self._state.commit(self._state.conversations.delete(held))

        await decided(attempt)

    async def add_items(self, caller: Caller, conversation_id: str, sent: Any) -> bytes:
        """Add items at the end; returns the wire list of what was added."""
        request = parse_create_items(sent)
        items = await self.resolve(caller.tenant, request.items)
        answer = encode(_list(items, has_more=False))
        named = {at: sent["id"] for at, sent in enumerate(request.items) if sent.get("id")}

        async def attempt() -> bytes:
            held = await self._state.conversations.get(caller.tenant, conversation_id)
            if named and await self._requests.recall(caller) is None:
                await self._refuse_repeats(held, named)
            return await self._requests.once(
                caller, append_items(self._state, held, new_items(items)), answer
            )

        return await decided(attempt)

    async def items(
        self, tenant: str, conversation_id: str, query: ListQuery
    ) -> Page[Record[Item]]:
        """One page of items. Raises `NotFound` for the conversation."""
        held = await self._state.conversations.get(tenant, conversation_id)
        return await self._state.items.page(held.key, "items", query)

    async def item(self, tenant: str, conversation_id: str, item_id: str) -> bytes:
        """One item's JSON. Raises `NotFound` for the conversation and for the item."""
        held = await self._state.conversations.get(tenant, conversation_id)
        return body(await self._state.items.within(held.key, "items", item_id))

    async def remove_item(self, tenant: str, conversation_id: str, item_id: str) -> bytes:
        """Take an item out; returns the conversation's wire body."""

        async def attempt() -> bytes:
            held = await self._state.conversations.get(tenant, conversation_id)
            item = await self._state.items.within(held.key, "items", item_id)
            await self._state.commit(
                self._state.conversations.touch(held) + self._state.items.remove([item.key])
            )
            return encode(shown(held))

        return await decided(attempt)

    async def resolve(self, tenant: str, sent: str | Sequence[Any]) -> list[dict[str, Any]]:
        """Sent items in their full form, references replaced by the stored items they name.
        Raises `WireError`, also for a compaction that no response could be made of later."""
        items = await resolve_items(self._state, tenant, sound_items(sent, self._clock))
        await self._sealing.opened(tenant, items, at="items")
        return items

    async def _refuse_repeats(self, held: Held, named: dict[int, str]) -> None:
        """Raises `WireError` for an item that is in the conversation already."""
        for place, item_id in named.items():
            with suppress(NotFound):
                await self._state.items.within(held.key, "items", item_id)
                raise duplicate(item_id, f"items[{place}].id")


async def resolve_items(
    state: State, tenant: str, items: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Items with every `item_reference` replaced by what it names. Raises `NotFound`."""
    return [
        msgspec.json.decode(body(await state.items.find(tenant, item["id"])))
        if item["type"] == REFERENCE
        else item
        for item in items
    ]


def append_items(
    state: State, held: Held, items: Sequence[NewItem], *, release: str | None = None
) -> Batch:
    """Add items to the end of a conversation that is free, or that `release` holds."""
    position = held.value.next_position
    return state.conversations.append(held, len(items), release=release) + state.items.add(
        held.key, "items", items, position=position
    )


def new_items(items: Sequence[dict[str, Any]]) -> list[NewItem]:
    """Items in full form, as the store takes them."""
    return [NewItem(item["id"], item["type"], encode(item)) for item in items]


def shown(held: Held) -> WireConversation:
    """A conversation as the API shows it."""
    return WireConversation(
        id=held.key[-1], created_at=held.value.created_at_s, metadata=held.value.metadata
    )


async def decided(attempt: Callable[[], Awaitable[T]], what: str = "the conversation") -> T:
    """Run a read-then-commit until no other writer comes between. Bounded: a conversation that
    is written to without pause raises `Unavailable` rather than holding a request for ever."""
    for _ in range(_TRIES_MAX):
        try:
            return await attempt()
        except Conflict as conflict:
            if not getattr(conflict, "should_retry", True):
                raise
    raise Unavailable(f"{what} is written to by too many requests at once; try again.")


def _list(items: Sequence[dict[str, Any]], *, has_more: bool) -> dict[str, Any]:
    return {
        "object": "list",
        "data": items,
        "first_id": items[0]["id"] if items else None,
        "last_id": items[-1]["id"] if items else None,
        "has_more": has_more,
    }
