"""What a request builds on: the items of earlier turns, of a chain or of a conversation, and what
has to be done to them before a model can read them. Whoever asks a model goes through here.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from itertools import islice

import msgspec

from perdure.core.errors import Damaged, Missing
from perdure.core.values import Record
from perdure.services.attachments import Attachments
from perdure.services.config import OrphanPolicy
from perdure.services.holds import Past
from perdure.services.orphans import repaired
from perdure.services.sealing import Sealing
from perdure.surfaces.items import Item as StoredItem
from perdure.surfaces.items import body
from perdure.surfaces.responses import Turn, ancestors_of
from perdure.surfaces.state import State
from perdure.wire.errors import (
    NotFound,
    ResponseInProgress,
    WireError,
    previous_response_not_found,
)
from perdure.wire.items import Item
from perdure.wire.responses import CreateResponse


class Given(msgspec.Struct, frozen=True):
    """What a model is given: the past and what is said now, both in a form that it can read.
    `orphans` are calls of the past that were given an output because none had come; `ancestors`
    are for the response that continues this past to remember."""

    history: list[Item]
    items: list[Item]
    orphans: list[Item] = []
    ancestors: tuple[str, ...] = ()


class Context:
    """Finds what requests of one state build on, and makes it readable."""

    def __init__(
        self, state: State, sealing: Sealing, attachments: Attachments, orphans: OrphanPolicy
    ) -> None:
        self._state = state
        self._sealing = sealing
        self._attachments = attachments
        self._orphans = orphans

    async def given(
        self,
        tenant: str,
        request: CreateResponse,
        items: Sequence[Item],
        past: Past | None = None,
    ) -> Given:
        """What the model is given for a request whose own items are `items`, and which builds on
        `past`, by default on what there is now. Raises what `past` raises, and `WireError` naming
        what cannot be read.
        """
        past = past or await self.past(tenant, request)
        attachments = self._attachments.for_request(past.files)
        history = await self._sealing.opened(tenant, past.history)
        history = await attachments.readable(tenant, history)
        items = await self._sealing.opened(tenant, items, at="input")
        items = await attachments.readable(tenant, items, at="input")
        if self._orphans == "refuse":
            return Given(history, items, ancestors=past.ancestors)
        told = repaired(history, items)
        return Given(told.history, told.items, told.orphans, past.ancestors)

    async def past(self, tenant: str, request: CreateResponse) -> Past:
        """What a request builds on now. Raises `NotFound` for the conversation,
        `ResponseInProgress`, and `WireError` naming what is gone from a chain."""
        chain = await self._chain(tenant, request.previous_response_id)
        history = await self._earlier(tenant, request, chain)
        return Past(history, ancestors=ancestors_of(chain))

    async def _earlier(
        self, tenant: str, request: CreateResponse, chain: Sequence[Turn]
    ) -> list[Item]:
        """The items of earlier turns, the oldest first."""
        items = self._state.items
        if request.conversation_id is not None:
            conversation = await self._state.conversations.get(tenant, request.conversation_id)
            return await _all(items.all(conversation.key, "items"))
        counts = [(turn.key, turn.input_count or 0) for turn in reversed(chain)]
        try:
            said = iter(_decoded(await items.counted("input", counts)))
        except Missing as gone:
            await self._chain(tenant, request.previous_response_id)  # says what was deleted since
            raise Damaged("the input of a response", str(gone)) from None
        history: list[Item] = []
        for turn in reversed(chain):
            if turn.input_count is None:
                history += await _all(items.all(turn.key, "input"))
            else:
                history += islice(said, turn.input_count)
            history += turn.output
        return history

    async def _chain(self, tenant: str, response_id: str | None) -> list[Turn]:
        """The responses of a chain, the newest first, every one ended."""
        if response_id is None:
            return []
        try:
            chain = await self._state.responses.chain(tenant, response_id)
        except NotFound as gone:
            if gone.id == response_id:
                raise previous_response_not_found(response_id) from None
            raise WireError(
                f"The chain of response '{response_id}' is broken: {gone} "
                "Start a new chain, or send the earlier turns as input.",
                param="previous_response_id",
                code="previous_response_not_found",
            ) from None
        for turn in chain:
            if not turn.status.terminal:
                raise ResponseInProgress(turn.key[-1])
        return chain


async def _all(records: AsyncIterator[Record[StoredItem]]) -> list[Item]:
    return _decoded([record async for record in records])


def _decoded(records: Sequence[Record[StoredItem]]) -> list[Item]:
    return [msgspec.json.decode(body(record)) for record in records]
