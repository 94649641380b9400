"""Lists: the one envelope and the one set of query parameters that every listing uses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec

from perdure.wire.errors import WireError, not_among

LIMIT_MAX = 100
LIMIT_DEFAULT = 20

Order = Literal["asc", "desc"]


class ListQuery(msgspec.Struct, frozen=True):
    """A page of a listing: at most `limit` objects after the one with id `after`, in `order`."""

    limit: int = LIMIT_DEFAULT
    order: Order = "desc"
    after: str | None = None


class ListPage(msgspec.Struct, frozen=True, kw_only=True):
    """One page. `first_id` and `last_id` are null where the page is empty."""

    object: Literal["list"] = "list"
    data: list[Any]
    first_id: str | None
    last_id: str | None
    has_more: bool


def parse_list_query(params: Mapping[str, str]) -> ListQuery:
    """The query of a listing. Raises `WireError` naming the parameter out of range."""
    text = params.get("limit", str(LIMIT_DEFAULT))
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise WireError(
            f"Invalid type for 'limit': expected an integer, but got '{text[:20]}' instead.",
            param="limit",
            code="invalid_type",
        )
    limit = int(text)
    if not 1 <= limit <= LIMIT_MAX:
        raise WireError(
            f"Invalid 'limit': {limit} is not from 1 to {LIMIT_MAX}.",
            param="limit",
            code="integer_below_min_value" if limit < 1 else "integer_above_max_value",
        )
    order = params.get("order", "desc")
    if order not in ("asc", "desc"):
        raise not_among("order", order, ("asc", "desc"))
    return ListQuery(limit, "asc" if order == "asc" else "desc", params.get("after") or None)


def no_such_after(noun: str, id: str) -> WireError:
    """The refusal of a listing that is to go on after what is not there."""
    return WireError(f"No {noun} with id '{id}' to list after.", param="after")


def page(data: Sequence[dict[str, Any]], *, has_more: bool) -> ListPage:
    """The envelope of objects that carry an `id`."""
    return ListPage(
        data=list(data),
        first_id=data[0]["id"] if data else None,
        last_id=data[-1]["id"] if data else None,
        has_more=has_more,
    )
