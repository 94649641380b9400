"""Routes of the Responses API."""

from __future__ import annotations

import asyncio
from typing import Any
from urllib.parse import quote

import msgspec

from perdure.core import codec
from perdure.frontends.http.call import Answer, Call, Disconnected, EventStream
from perdure.frontends.http.errors import Headers
from perdure.frontends.http.queries import (
    ItemsQuery,
    ResponsesQuery,
    RetrieveQuery,
    list_query,
    query_of,
)
from perdure.frontends.http.routes import Route
from perdure.frontends.http.schemas import (
    CompactBody,
    CompactionObject,
    CreateResponseBody,
    InputTokensBody,
    ItemList,
    ResponseList,
    ResponseObject,
)
from perdure.frontends.http.service import Service, listed, listed_objects, shown
from perdure.services import listing
from perdure.services.gateway import Started
from perdure.services.requests import Caller
from perdure.surfaces.responses import Status, wire_body
from perdure.wire.input_tokens import InputTokens
from perdure.wire.responses import ResponseDeleted, without_unsupported_tools

CALLS_NAMED_MAX = 20
"""In a header; the body's `perdure` field names all of them."""

DROPPED_TOOLS = b"x-perdure-dropped-tools"
TOOLS_NAMED_MAX = 50

ESTIMATED = ((b"x-perdure-tokens", b"estimate"),)


async def create(service: Service, call: Call) -> Answer | EventStream:
    caller, sent = await service.named(call)
    sent, dropped = _runnable(service, sent)
    gateway = service.node.gateway
    started = await gateway.create(caller, sent)
    noted = (*dropped, *notices(started.notes))
    if started.accepted is not None and not started.stream:
        return Answer(started.accepted, headers=noted)
    goes_on = started.accepted is not None or (
        started.stored and service.node.config.on_disconnect == "continue"
    )
    if started.stream:
        return EventStream(
            gateway.events(started, after=-1),
            left=None if goes_on else lambda: gateway.abandon(started, caller),
            headers=noted,
        )
    if goes_on:
        return Answer(await gateway.finished(started), headers=noted)
    return Answer(await _while_connected(service, call, started, caller), headers=noted)


def notices(notes: dict[str, Any]) -> tuple[tuple[bytes, bytes], ...]:
    """Headers that say what was done that the request did not ask for."""
    noted = []
    if calls := notes.get("unanswered_calls"):
        named = ",".join(call["id"] for call in calls[:CALLS_NAMED_MAX])
        more = ",..." if len(calls) > CALLS_NAMED_MAX else ""
        noted.append((b"x-perdure-unanswered-calls", f"{named}{more}".encode()))
    if notes.get("store") == "always":
        noted.append((b"x-perdure-store", b"always; the operator stores what this caller asks"))
    return tuple(noted)


async def list_all(service: Service, call: Call) -> Answer:
    page = list_query(call, ResponsesQuery)
    asked = query_of(call, ResponsesQuery).status
    status = Status(asked) if asked else None
    found = await listing.responses(service.node.state, call.tenant, page, status)
    return listed_objects(found, [msgspec.Raw(wire_body(held)) for held in found.items])


async def retrieve(service: Service, call: Call) -> Answer | EventStream:
    query = query_of(call, RetrieveQuery)
    response_id = call.param("response_id")
    if not query.stream:
        return Answer(await service.stored.get(call.tenant, response_id))
    started = await service.stored.follow(call.tenant, response_id)
    after = -1 if query.starting_after is None else query.starting_after
    return EventStream(service.node.gateway.events(started, after=after))


async def delete(service: Service, call: Call) -> Answer:
    response_id = call.param("response_id")
    await service.stored.delete(call.tenant, response_id)
    return shown(ResponseDeleted(id=response_id))


async def cancel(service: Service, call: Call) -> Answer:
    return Answer(await service.stored.cancel(call.tenant, call.param("response_id")))


async def input_items(service: Service, call: Call) -> Answer:
    query = list_query(call)
    return listed(await service.stored.input_items(call.tenant, call.param("response_id"), query))


async def input_tokens(service: Service, call: Call) -> Answer:
    sent = await call.parse(await call.body(service.limits.body_bytes_max))
    sent, dropped = _runnable(service, sent)
    counted = await service.node.tokens.count(call.tenant, sent)
    body = codec.encode(InputTokens(input_tokens=counted.tokens))
    return Answer(body, headers=(*dropped, *(() if counted.exact else ESTIMATED)))


async def compact(service: Service, call: Call) -> Answer:
    sent = await call.parse(await call.body(service.limits.body_bytes_max))
    compacting = asyncio.create_task(service.node.compactor.compact(call.tenant, sent))
    left = asyncio.create_task(call.disconnected())
    try:
        await asyncio.wait((compacting, left), return_when=asyncio.FIRST_COMPLETED)
        if not compacting.done():
            raise Disconnected("the client left before its conversation was compacted.")
        made = compacting.result()
    finally:
        compacting.cancel()
        left.cancel()
        await asyncio.wait((compacting, left))
    return Answer(codec.encode(made.answer), headers=() if made.counted else ESTIMATED)


def _runnable(service: Service, sent: Any) -> tuple[Any, Headers]:
    """A request without what nobody here can run, where that is the policy, and the header that
    names it as far as a header can: the rest is percent-encoded."""
    if service.node.config.tools.unsupported == "refuse":
        return sent, ()
    sent, dropped = without_unsupported_tools(sent)
    named = ", ".join(quote(tool[:64], safe=":") for tool in dropped[:TOOLS_NAMED_MAX])
    return sent, ((DROPPED_TOOLS, named.encode()),) if dropped else ()


async def _while_connected(service: Service, call: Call, started: Started, caller: Caller) -> bytes:
    """The finished body; generation stops when its client leaves."""
    gateway = service.node.gateway
    finished = asyncio.create_task(gateway.finished(started))
    left = asyncio.create_task(call.disconnected())
    try:
        await asyncio.wait((finished, left), return_when=asyncio.FIRST_COMPLETED)
        if not finished.done():
            await gateway.abandon(started, caller)
        return await finished
    finally:
        left.cancel()
        finished.cancel()


ROUTES = (
    Route(
        method="POST",
        path="/v1/responses/input_tokens",
        name="count_input_tokens",
        summary="Count what a request would give the model to read; `x-perdure-tokens: "
        "estimate` where the upstream has no tokenizer.",
        handler=input_tokens,
        body=InputTokensBody,
        answer=InputTokens,
        statuses=(404,),
    ),
    Route(
        method="POST",
        path="/v1/responses/compact",
        name="compact_response",
        summary="Have the model summarise a conversation; the item that comes back stands for it.",
        handler=compact,
        body=CompactBody,
        answer=CompactionObject,
        statuses=(404, 422, 502),
    ),
    Route(
        method="GET",
        path="/v1/responses",
        name="list_responses",
        summary="Stored responses, the newest first unless asked otherwise (an extension).",
        handler=list_all,
        query=ResponsesQuery,
        answer=ResponseList,
    ),
    Route(
        method="GET",
        path="/v1/responses/{response_id}",
        name="retrieve_response",
        summary="A response as it was stored; with `stream=true` its events, also after its end.",
        handler=retrieve,
        query=RetrieveQuery,
        answer=ResponseObject,
        statuses=(404,),
        streams=True,
    ),
    Route(
        method="POST",
        path="/v1/responses",
        name="create_response",
        summary="Generate a response, stored unless `store` is false; with `stream` as events; "
        "with `background` answered at once and generated after.",
        handler=create,
        body=CreateResponseBody,
        answer=ResponseObject,
        gives={"response_id": "/id"},
        builds={
            "response_id": {
                "model": "$response.body#/model",
                "input": "And then?",
                "previous_response_id": "$response.body#/id",
            }
        },
        statuses=(404, 409, 422, 502),
        idempotent=True,
        streams=True,
    ),
    Route(
        method="DELETE",
        path="/v1/responses/{response_id}",
        name="delete_response",
        summary="Delete a response, its input items and its events.",
        handler=delete,
        answer=ResponseDeleted,
        statuses=(404,),
    ),
    Route(
        method="GET",
        path="/v1/responses/{response_id}/input_items",
        name="list_input_items",
        summary="The items a response was created with.",
        handler=input_items,
        query=ItemsQuery,
        answer=ItemList,
        statuses=(404,),
    ),
    Route(
        method="POST",
        path="/v1/responses/{response_id}/cancel",
        name="cancel_response",
        summary="Cancel a background response; those of a waiting client cannot be cancelled.",
        handler=cancel,
        answer=ResponseObject,
        statuses=(404,),
    ),
)
