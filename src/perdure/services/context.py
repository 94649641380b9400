"""What a request builds on: the items of earlier turns, of a chain or of a conversation."""

from __future__ import annotations

from collections.abc import AsyncIterator

import msgspec

from perdure.core.keys import Key
from perdure.core.values import Record
from perdure.surfaces.items import Item as StoredItem
from perdure.surfaces.items import body
from perdure.surfaces.state import State
from perdure.wire.errors import NotFound, WireError, previous_response_not_found
from perdure.wire.items import Item
from perdure.wire.responses import CreateResponse


async def earlier_items(state: State, tenant: str, request: CreateResponse) -> list[Item]:
    """The items of earlier turns, the oldest first. Raises `NotFound` for the conversation and
    `WireError` naming what is gone from a chain."""
    if request.conversation_id is not None:
        conversation = await state.conversations.get(tenant, request.conversation_id)
        return await _all(state.items.all(conversation.key, "items"))
    if request.previous_response_id is None:
        return []
    history: list[Item] = []
    for owner in reversed(await _chain(state, tenant, request.previous_response_id)):
        history += await _all(state.items.all(owner, "input", "output"))
    return history


async def _chain(state: State, tenant: str, response_id: str) -> list[Key]:
    """The responses of a chain, the newest first, every one ended."""
    owners: list[Key] = []
    try:
        async for held in state.responses.chain(tenant, response_id):
            if not held.value.status.terminal:
                raise WireError(
                    f"Response '{held.key[-1]}' is still being generated; wait for its end "
                    "before continuing from it.",
                    param="previous_response_id",
                    code="response_in_progress",
                )
            owners.append(held.key)
    except NotFound as gone:
        if owners:
            raise WireError(
                f"The chain of response '{response_id}' is broken: {gone} "
                "Start a new chain, or send the earlier turns as input.",
                param="previous_response_id",
                code="previous_response_not_found",
            ) from None
        raise previous_response_not_found(response_id) from None
    return owners


async def _all(records: AsyncIterator[Record[StoredItem]]) -> list[Item]:
    return [msgspec.json.decode(body(record)) async for record in records]
