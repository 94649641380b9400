"""Routes of the Conversations API."""

from __future__ import annotations

import msgspec

from perdure.frontends.http.call import Answer, Call
from perdure.frontends.http.queries import (
    IncludeQuery,
    ItemsQuery,
    ListedQuery,
    list_query,
    query_of,
)
from perdure.frontends.http.routes import Route
from perdure.frontends.http.schemas import (
    ConversationList,
    CreateConversationBody,
    CreateItemsBody,
    ItemList,
    ItemObject,
    UpdateConversationBody,
)
from perdure.frontends.http.service import Service, encode, listed, listed_objects, shown
from perdure.services import listing
from perdure.services.conversations import shown as wire
from perdure.wire.conversations import Conversation, ConversationDeleted


async def create(service: Service, call: Call) -> Answer:
    caller, sent = await service.named(call)
    return Answer(await service.node.conversations.create(caller, sent))


async def list_all(service: Service, call: Call) -> Answer:
    page = list_query(call, ListedQuery)
    found = await listing.conversations(service.node.state, call.tenant, page)
    return listed_objects(found, [msgspec.Raw(encode(wire(held))) for held in found.items])


async def retrieve(service: Service, call: Call) -> Answer:
    return Answer(await service.node.conversations.get(call.tenant, call.param("conversation_id")))


async def update(service: Service, call: Call) -> Answer:
    caller, sent = await service.named(call)
    conversation_id = call.param("conversation_id")
    return Answer(await service.node.conversations.update(caller, conversation_id, sent))


async def delete(service: Service, call: Call) -> Answer:
    conversation_id = call.param("conversation_id")
    await service.node.conversations.delete(call.tenant, conversation_id)
    return shown(ConversationDeleted(id=conversation_id))


async def create_items(service: Service, call: Call) -> Answer:
    query_of(call, IncludeQuery)
    caller, sent = await service.named(call)
    conversation_id = call.param("conversation_id")
    return Answer(await service.node.conversations.add_items(caller, conversation_id, sent))


async def list_items(service: Service, call: Call) -> Answer:
    query = list_query(call)
    conversation_id = call.param("conversation_id")
    return listed(await service.node.conversations.items(call.tenant, conversation_id, query))


async def retrieve_item(service: Service, call: Call) -> Answer:
    query_of(call, IncludeQuery)
    return Answer(
        await service.node.conversations.item(
            call.tenant, call.param("conversation_id"), call.param("item_id")
        )
    )


async def delete_item(service: Service, call: Call) -> Answer:
    return Answer(
        await service.node.conversations.remove_item(
            call.tenant, call.param("conversation_id"), call.param("item_id")
        )
    )


ROUTES = (
    Route(
        method="POST",
        path="/v1/conversations/{conversation_id}/items",
        name="create_conversation_items",
        summary="Add up to 20 items to the end of a conversation.",
        handler=create_items,
        query=IncludeQuery,
        body=CreateItemsBody,
        answer=ItemList,
        gives={"item_id": "/data/0/id"},
        statuses=(404,),
        idempotent=True,
    ),
    Route(
        method="GET",
        path="/v1/conversations/{conversation_id}/items",
        name="list_conversation_items",
        summary="Items of a conversation, the newest first unless asked otherwise.",
        handler=list_items,
        query=ItemsQuery,
        answer=ItemList,
        statuses=(404,),
    ),
    Route(
        method="GET",
        path="/v1/conversations/{conversation_id}/items/{item_id}",
        name="retrieve_conversation_item",
        summary="One item of a conversation.",
        handler=retrieve_item,
        query=IncludeQuery,
        answer=ItemObject,
        statuses=(404,),
    ),
    Route(
        method="DELETE",
        path="/v1/conversations/{conversation_id}/items/{item_id}",
        name="delete_conversation_item",
        summary="Take an item out of a conversation.",
        handler=delete_item,
        answer=Conversation,
        statuses=(404,),
    ),
    Route(
        method="GET",
        path="/v1/conversations",
        name="list_conversations",
        summary="Conversations, the newest first unless asked otherwise (an extension).",
        handler=list_all,
        query=ListedQuery,
        answer=ConversationList,
    ),
    Route(
        method="POST",
        path="/v1/conversations",
        name="create_conversation",
        summary="Start a conversation, with up to 20 items in it.",
        handler=create,
        body=CreateConversationBody,
        body_required=False,
        answer=Conversation,
        gives={"conversation_id": "/id"},
        statuses=(404,),
        idempotent=True,
    ),
    Route(
        method="GET",
        path="/v1/conversations/{conversation_id}",
        name="retrieve_conversation",
        summary="A conversation, without its items.",
        handler=retrieve,
        answer=Conversation,
        statuses=(404,),
    ),
    Route(
        method="POST",
        path="/v1/conversations/{conversation_id}",
        name="update_conversation",
        summary="Replace a conversation's metadata.",
        handler=update,
        body=UpdateConversationBody,
        answer=Conversation,
        statuses=(404,),
    ),
    Route(
        method="DELETE",
        path="/v1/conversations/{conversation_id}",
        name="delete_conversation",
        summary="Delete a conversation. Its items stay readable by id in the responses they "
        "came from.",
        handler=delete,
        answer=ConversationDeleted,
        statuses=(404,),
    ),
)
