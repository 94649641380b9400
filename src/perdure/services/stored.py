"""What clients do with responses that exist: read them, list what they were given, delete them."""

from __future__ import annotations

from perdure.core.batch import Batch
from perdure.core.values import Page, Record
from perdure.services.background import job_key, job_removal
from perdure.services.conversations import decided
from perdure.services.gateway import Gateway, Started
from perdure.services.jobs import Jobs
from perdure.surfaces.items import Item
from perdure.surfaces.responses import wire_body
from perdure.surfaces.state import State
from perdure.wire.errors import WireError
from perdure.wire.lists import ListQuery


class Stored:
    """Stored responses of one state. Every method raises `NotFound` for an unknown id."""

    def __init__(self, state: State, gateway: Gateway, jobs: Jobs) -> None:
        self._state = state
        self._gateway = gateway
        self._jobs = jobs

    async def get(self, tenant: str, response_id: str) -> bytes:
        """The wire body, as it was stored."""
        held = await self._state.responses.get(tenant, response_id)
        return wire_body(held)

    async def follow(self, tenant: str, response_id: str) -> Started:
        """A handle for `Gateway.events`."""
        held = await self._state.responses.get(tenant, response_id)
        return Started(held.key, stored=True, stream=True)

    async def input_items(
        self, tenant: str, response_id: str, query: ListQuery
    ) -> Page[Record[Item]]:
        """One page of the items the response was created with."""
        held = await self._state.responses.get(tenant, response_id)
        return await self._state.items.page(held.key, "input", query)

    async def cancel(self, tenant: str, response_id: str) -> bytes:
        """Cancel a background response, unless it has ended; returns the wire body it ended with.
        Others cannot be cancelled: they end with their client's request."""
        held = await self._state.responses.get(tenant, response_id)
        if held.value.job_id is None:
            raise WireError("Cannot cancel a synchronous response.", param="response_id")
        if not held.value.status.terminal:
            await self._jobs.cancel(job_key(held.key, held.value))
        return await self.get(tenant, response_id)

    async def delete(self, tenant: str, response_id: str) -> None:
        """Delete a response with its items, events and job; one that still runs is stopped first.
        Items that joined a conversation stay there."""

        async def attempt() -> None:
            held = await self._state.responses.get(tenant, response_id)
            if not held.value.status.terminal:
                if held.value.job_id is not None:
                    await self._jobs.cancel(job_key(held.key, held.value))
                await self._gateway.interrupt(held.key)
                held = await self._state.responses.get(tenant, response_id)
            keys = [item.key async for item in self._state.items.all(held.key, "input", "output")]
            batch: Batch = self._state.responses.delete(held) + self._state.items.remove(keys)
            await self._state.commit(batch + await job_removal(self._state, held))

        await decided(attempt)
