"""Asking a model: whoever of its upstreams answers first, and what it says as events."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing
from typing import Any

from perdure.services.bridge import ChatReader
from perdure.services.relay import ResponsesReader
from perdure.services.runs import Source
from perdure.services.upstream import UpstreamFailed
from perdure.services.upstreams import Target, first_that_answers
from perdure.wire import events as ev
from perdure.wire.responses import CreateResponse, Outcome, failed

Chunks = AsyncGenerator[dict[str, Any], None]
Asking = Callable[[Target], Awaitable[Source]]


async def at_once(chunks: Iterator[dict[str, Any]]) -> Chunks:
    """What is there already, in the form of what comes in time."""
    for chunk in chunks:
        yield chunk


async def answering(targets: Sequence[Target], ask: Asking) -> Source:
    """What the first upstream says that begins to answer. What that cannot be asked is refused at
    once; the others are readied only to be asked in its place."""

    async def readied(place: int) -> tuple[int, Source]:
        return place, await ask(targets[place])

    place, source = await first_that_answers(range(len(targets)), readied)
    return _begun(source, targets[place + 1 :], ask)


async def _begun(readied: Source, others: Sequence[Target], ask: Asking) -> Source:
    async def begin(to: Target | None) -> tuple[Source, list[ev.Event] | Outcome]:
        source = readied if to is None else await ask(to)
        return source, await anext(source)

    source, first = await first_that_answers((None, *others), begin)
    async with aclosing(source):
        yield first
        async for made in source:
            yield made


async def told(
    chunks: Chunks, reader: ChatReader | ResponsesReader, request: CreateResponse
) -> Source:
    """What a model answers, as events and an outcome. A call that the request does not allow ends
    it: neither the instructions of a model nor its server's are a bound."""
    allowed = request.allowed_tools
    async with aclosing(chunks):
        try:
            async for chunk in chunks:
                if events := reader.read(chunk):
                    yield events
                    if allowed is not None and (name := _called_beyond(allowed, events)):
                        yield failed(
                            f"The model called '{name}', which 'tool_choice' does not allow.",
                            perdure={"reason": "tool_not_allowed"},
                        )
                        return
                if reader.failed:
                    break
        except UpstreamFailed:
            if not reader.finished:
                raise
    events, outcome = reader.end()
    if events:
        yield events
    yield outcome


def _called_beyond(allowed: frozenset[str], events: list[ev.Event]) -> str | None:
    """The first function called that is not among those allowed."""
    for event in events:
        if isinstance(event, ev.OutputItemAdded) and event.item["type"] == "function_call":
            name: str = event.item["name"]
            if name not in allowed:
                return name
    return None
