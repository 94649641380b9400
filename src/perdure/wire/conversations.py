"""The Conversations API: requests and objects."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from perdure.wire.errors import WireError, typed
from perdure.wire.metadata import check_metadata

ITEMS_MAX = 20
"""Most items one request may add to a conversation."""


class Conversation(msgspec.Struct, frozen=True, kw_only=True):
    """A conversation as the API shows it."""

    id: str
    object: Literal["conversation"] = "conversation"
    created_at: int
    metadata: dict[str, str]


class ConversationDeleted(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to deleting a conversation."""

    id: str
    object: Literal["conversation.deleted"] = "conversation.deleted"
    deleted: bool = True


class CreateConversation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Start a conversation, with up to `ITEMS_MAX` items in it."""

    metadata: dict[str, str] | None = None
    items: list[dict[str, Any]] | None = None


class UpdateConversation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Replace a conversation's metadata."""

    metadata: dict[str, str] | None


class CreateItems(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Add items to the end of a conversation."""

    items: list[dict[str, Any]]


def parse_create_conversation(body: Any) -> CreateConversation:
    """Raises `WireError`. An empty body starts an empty conversation."""
    request = typed({} if body is None else body, CreateConversation)
    check_metadata(request.metadata)
    _check_count(request.items or [])
    return request


def parse_update_conversation(body: Any) -> UpdateConversation:
    """Raises `WireError`."""
    request = typed(body, UpdateConversation)
    check_metadata(request.metadata)
    return request


def parse_create_items(body: Any) -> CreateItems:
    """Raises `WireError` for none, or more than `ITEMS_MAX`, items."""
    request = typed(body, CreateItems)
    if not request.items:
        raise WireError(
            "Invalid 'items': empty array. Expected at least one item.",
            param="items",
            code="empty_array",
        )
    _check_count(request.items)
    return request


def _check_count(items: list[dict[str, Any]]) -> None:
    if len(items) > ITEMS_MAX:
        raise WireError(
            f"Invalid 'items': array too long. Expected an array of at most {ITEMS_MAX} items, "
            f"but got {len(items)} instead. Add them in several requests.",
            param="items",
            code="array_above_max_length",
        )
