"""Pages of listings and the conversations API: bounds of queries, envelopes, request bodies."""

from __future__ import annotations

from typing import Any

import pytest
from openai._models import validate_type
from openai.pagination import SyncConversationCursorPage, SyncCursorPage
from openai.types.conversations import Conversation as OfficialConversation
from openai.types.conversations import ConversationDeletedResource, ConversationItem
from openai.types.conversations import ConversationItemList as OfficialList

from perdure.core import codec
from perdure.core.clock import SystemClock
from perdure.wire.conversations import (
    ITEMS_MAX,
    Conversation,
    ConversationDeleted,
    parse_create_conversation,
    parse_create_items,
    parse_update_conversation,
)
from perdure.wire.errors import WireError
from perdure.wire.items import sound_items
from perdure.wire.lists import ListQuery, page, parse_list_query

MESSAGE = {"role": "user", "content": "x"}


def wire(value: Any) -> Any:
    return codec.parse(codec.encode(value))


# proves R8
def test_a_query_has_the_apis_defaults() -> None:
    assert parse_list_query({}) == ListQuery(20, "desc", None)
    assert parse_list_query({"limit": "100", "order": "asc", "after": "msg_1"}) == ListQuery(
        100, "asc", "msg_1"
    )


@pytest.mark.parametrize(
    ("query", "param"),
    [
        *(
            ({"limit": limit}, "limit")
            for limit in ("0", "101", "-1", "x", "", "1e2", "٣", "9" * 30)
        ),
        ({"order": "up"}, "order"),
    ],
)
def test_a_query_out_of_bounds_is_refused(query: dict[str, str], param: str) -> None:
    with pytest.raises(WireError) as caught:
        parse_list_query(query)
    assert caught.value.param == param


# proves R8
def test_pages_are_what_the_official_client_reads() -> None:
    items = sound_items([MESSAGE, MESSAGE], SystemClock())
    full = wire(page(items, has_more=True))
    assert (full["first_id"], full["last_id"]) == (items[0]["id"], items[1]["id"])
    validate_type(type_=OfficialList, value=full)
    validate_type(type_=SyncConversationCursorPage[ConversationItem], value=full)
    empty = wire(page([], has_more=False))
    assert empty == {
        "object": "list",
        "data": [],
        "first_id": None,
        "last_id": None,
        "has_more": False,
    }
    validate_type(type_=SyncConversationCursorPage[ConversationItem], value=empty)
    validate_type(type_=SyncCursorPage[ConversationItem], value=empty)


# proves R8
def test_conversations_are_what_the_official_client_reads() -> None:
    shown = wire(Conversation(id="conv_1", created_at=1, metadata={"a": "b"}))
    validate_type(type_=OfficialConversation, value=shown)
    validate_type(type_=ConversationDeletedResource, value=wire(ConversationDeleted(id="conv_1")))


# proves R8
def test_conversation_requests_are_bounded() -> None:
    assert parse_create_conversation(None).items is None
    assert len(parse_create_items({"items": [MESSAGE] * ITEMS_MAX}).items) == ITEMS_MAX
    assert parse_update_conversation({"metadata": None}).metadata is None
    for parse, body, param in (
        (parse_create_conversation, {"items": [MESSAGE] * (ITEMS_MAX + 1)}, "items"),
        (parse_create_conversation, {"metadata": {"a": "x" * 513}}, "metadata.a"),
        (parse_create_conversation, {"title": "x"}, "title"),
        (parse_create_items, {"items": [MESSAGE] * (ITEMS_MAX + 1)}, "items"),
        (parse_create_items, {"items": []}, "items"),
        (parse_create_items, {}, "items"),
        (parse_create_items, {"items": ["x"]}, "items[0]"),
        (parse_update_conversation, {}, "metadata"),
    ):
        with pytest.raises(WireError) as caught:
            parse(body)
        assert caught.value.param == param
