"""What operators list: responses, conversations and jobs, the newest first, damaged ones by name.

A page goes on after the id of the last object seen, as every list of the API does. Damage does not
end a list: what cannot be read is named beside what can, as often as it is met.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Generic, TypeVar

import msgspec

from perdure.core.errors import Damaged, Missing
from perdure.core.values import Finding, Page, Record
from perdure.surfaces.conversations import Conversation
from perdure.surfaces.jobs import Job
from perdure.surfaces.jobs import Status as JobStatus
from perdure.surfaces.responses import Response, Status
from perdure.surfaces.state import State
from perdure.wire.errors import WireError
from perdure.wire.lists import ListQuery

T = TypeVar("T")

_DAMAGED_MAX = 1_000


class Listed(msgspec.Struct, Generic[T], frozen=True):
    """One page; `more` says that it is not the last."""

    items: list[Record[T]]
    damaged: list[Finding]
    more: bool


async def responses(
    state: State, tenant: str, query: ListQuery, status: Status | None
) -> Listed[Response]:
    """A page of responses. Raises `WireError` for an `after` that is not there."""
    after = await _after(query, "response", partial(state.responses.get, tenant))
    return await _readable(
        query.limit,
        lambda limit, cursor: state.responses.page(
            tenant,
            limit=limit,
            status=status,
            after=after,
            cursor=cursor,
            descending=query.order == "desc",
        ),
    )


async def conversations(state: State, tenant: str, query: ListQuery) -> Listed[Conversation]:
    """A page of conversations. Raises `WireError` for an `after` that is not there."""
    after = await _after(query, "conversation", partial(state.conversations.get, tenant))
    return await _readable(
        query.limit,
        lambda limit, cursor: state.conversations.page(
            tenant,
            limit=limit,
            after=after,
            cursor=cursor,
            descending=query.order == "desc",
        ),
    )


async def jobs(
    state: State, tenant: str, query: ListQuery, *, status: JobStatus | None, kind: str | None
) -> Listed[Job]:
    """A page of jobs. Raises `WireError` for an `after` that is not there."""
    after = await _after(query, "job", partial(state.jobs.get, tenant))
    return await _readable(
        query.limit,
        lambda limit, cursor: state.jobs.page(
            tenant,
            limit=limit,
            status=status,
            kind=kind,
            after=after,
            cursor=cursor,
            descending=query.order == "desc",
        ),
    )


async def _after(
    query: ListQuery, noun: str, get: Callable[[str], Awaitable[Record[T]]]
) -> Record[T] | None:
    if query.after is None:
        return None
    try:
        return await get(query.after)
    except Missing:
        raise WireError(
            f"No {noun} with id '{query.after}' to list after.", param="after"
        ) from None


async def _readable(
    limit: int, page: Callable[[int, str | None], Awaitable[Page[Record[T]]]]
) -> Listed[T]:
    """The next `limit` records that can be read, and what could not be on the way there."""
    items: list[Record[T]] = []
    damaged: list[Finding] = []
    cursor: str | None = None
    while True:
        try:
            found = await page(limit - len(items), cursor)
        except Damaged as damage:
            damaged.append(Finding(damage.where, damage.why))
            if damage.resume is None or len(damaged) == _DAMAGED_MAX:
                return Listed(items, damaged, damage.resume is not None)
            cursor = damage.resume
            continue
        items += found.items
        cursor = found.cursor
        if cursor is None or len(items) == limit:
            return Listed(items, damaged, cursor is not None)
