"""What operators list: responses, conversations, jobs, runtimes and workers, the newest first,
damaged ones by name.

A page goes on after the id of the last object seen, as every list of the API does. Damage does not
end a list: what cannot be read is named beside what can, as often as it is met.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Generic, TypeVar

import msgspec

from perdure.core.errors import Damaged, Missing
from perdure.core.keys import Key
from perdure.core.paging import Slice
from perdure.core.values import Finding, Page, Record
from perdure.surfaces.conversations import Conversation
from perdure.surfaces.jobs import Job
from perdure.surfaces.jobs import Status as JobStatus
from perdure.surfaces.responses import Response, Status
from perdure.surfaces.state import State
from perdure.surfaces.workers import Diagnostic, Runtime, Worker
from perdure.surfaces.workers import Status as WorkerStatus
from perdure.wire.lists import ListQuery, no_such_after

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
    asked = await _slice(query, "response", partial(state.responses.get, tenant))
    return await _readable(asked, partial(state.responses.page, tenant, status=status))


async def conversations(state: State, tenant: str, query: ListQuery) -> Listed[Conversation]:
    """A page of conversations. Raises `WireError` for an `after` that is not there."""
    asked = await _slice(query, "conversation", partial(state.conversations.get, tenant))
    return await _readable(asked, partial(state.conversations.page, tenant))


async def jobs(
    state: State, tenant: str, query: ListQuery, *, status: JobStatus | None, kind: str | None
) -> Listed[Job]:
    """A page of jobs. Raises `WireError` for an `after` that is not there."""
    asked = await _slice(query, "job", partial(state.jobs.get, tenant))
    return await _readable(asked, partial(state.jobs.page, tenant, status=status, kind=kind))


async def runtimes(state: State, tenant: str, query: ListQuery) -> Listed[Runtime]:
    """A page of runtimes. Raises `WireError` for an `after` that is not there."""
    asked = await _slice(query, "runtime", lambda one: state.runtimes.runtime((tenant, one)))
    return await _readable(asked, partial(state.runtimes.page_of_runtimes, tenant))


async def workers(
    state: State, home: Key, query: ListQuery, status: WorkerStatus | None
) -> Listed[Worker]:
    """A page of the workers of the runtime `home`. Raises `WireError` for an `after` that is not
    there."""
    asked = await _slice(query, "worker", lambda one: state.runtimes.get((*home, one)))
    return await _readable(asked, partial(state.runtimes.page, home, status=status))


async def diagnostics(state: State, home: Key, query: ListQuery) -> Listed[Diagnostic]:
    """A page of what there is to know of the workers of the runtime `home`. Raises `WireError` for
    an `after` that is not there."""
    asked = await _slice(query, "diagnostic", lambda one: state.runtimes.diagnostic((*home, one)))
    return await _readable(asked, partial(state.runtimes.diagnostics, home))


async def _slice(
    query: ListQuery, noun: str, get: Callable[[str], Awaitable[Record[T]]]
) -> Slice[T]:
    last: Record[T] | None = None
    if query.after is not None:
        try:
            last = await get(query.after)
        except Missing:
            raise no_such_after(noun, query.after) from None
    return Slice(query.limit, last, descending=query.order == "desc")


async def _readable(
    asked: Slice[T], page: Callable[[Slice[T]], Awaitable[Page[Record[T]]]]
) -> Listed[T]:
    """The records of a slice that can be read, and what could not be on the way there."""
    items: list[Record[T]] = []
    damaged: list[Finding] = []
    cursor: str | None = None
    while True:
        try:
            left = asked.limit - len(items)
            found = await page(msgspec.structs.replace(asked, limit=left, cursor=cursor))
        except Damaged as damage:
            damaged.append(Finding(damage.where, damage.why))
            if damage.resume is None or len(damaged) == _DAMAGED_MAX:
                return Listed(items, damaged, damage.resume is not None)
            cursor = damage.resume
            continue
        items += found.items
        cursor = found.cursor
        if cursor is None or len(items) == asked.limit:
            return Listed(items, damaged, cursor is not None)
