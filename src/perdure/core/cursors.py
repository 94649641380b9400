"""Cursors: opaque, bound to the question they continue, and refused for any other.

A cursor holds the position after which to go on, and a keyed digest over store, collection and
question. It carries no authority (the route checks the tenant), so the key is the store's id.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from typing import Any

import msgspec

from perdure.core import keys
from perdure.core.errors import CursorRefused, Invalid, LimitExceeded, Trimmed
from perdure.core.keys import Key
from perdure.core.layouts import Column, Columns, Index, Log, Records, check_column
from perdure.core.limits import PAGE_MAX
from perdure.core.values import Record, Tip

_DIGEST_BYTES = 9


class Question(msgspec.Struct, frozen=True, array_like=True):
    """What a scan asks: a cursor continues exactly this."""

    store_id: str
    collection: str
    prefix: Key
    index: str | None = None
    where: tuple[Column, ...] = ()
    descending: bool = False


class Position(msgspec.Struct, frozen=True, array_like=True):
    """The place of the last item seen: its remaining index fields, and its joined key."""

    columns: Columns
    place: str


def pack(question: Question, position: Position) -> str:
    """The cursor that goes on after `position`."""
    body = msgspec.json.encode(position)
    return base64.urlsafe_b64encode(_digest(question, body) + body).decode().rstrip("=")


def unpack(question: Question, cursor: str) -> Position:
    """The position in a cursor. Raises `CursorRefused` unless it was packed for `question`."""
    try:
        data = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True)
        digest, body = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
        if digest != _digest(question, body):
            raise ValueError
        return msgspec.json.decode(body, type=Position)
    except (ValueError, msgspec.MsgspecError):
        raise CursorRefused(
            f"the cursor {cursor[:40]!r} does not continue this list of "
            f"{question.collection}; start again without a cursor."
        ) from None


def at_record(
    store_id: str,
    records: Records[Any],
    prefix: Key,
    record: Record[Any],
    *,
    index: str | None = None,
    where: Sequence[Column] = (),
    descending: bool = False,
) -> str:
    """The cursor that continues a scan after `record`, whether or not a scan returned it."""
    question = Question(store_id, records.name, prefix, index, tuple(where), descending)
    return pack(question, position_of(records, record, question))


def at_entry(store_id: str, log: Log[Any], stream: Key, incarnation: int, seq: int) -> str:
    """The cursor behind an entry of a stream, of this incarnation of it."""
    question = Question(store_id, log.name, stream)
    return pack(question, Position((incarnation, seq), keys.join(stream)))


def entry_at(store_id: str, log: Log[Any], stream: Key, cursor: str) -> tuple[int, int]:
    """The incarnation and the number in such a cursor. Raises `CursorRefused` for one of another
    stream, log or store."""
    match unpack(Question(store_id, log.name, stream), cursor).columns:
        case (int(incarnation), int(seq)):
            return incarnation, seq
    raise CursorRefused(f"the cursor {cursor[:40]!r} is none of {log.name}.")


def position_of(records: Records[Any], record: Record[Any], question: Question) -> Position:
    """The place of `record` in the order in which `question` is answered."""
    columns: Columns = ()
    if question.index is not None:
        own = records.column_of(records.index(question.index), records.columns(record.value))
        columns = own[len(question.where) :]
    return Position(columns, keys.join(record.key))


def sortable(column: Column | None) -> tuple[int, Column]:
    """None before numbers before text, so that mixed columns compare."""
    if column is None:
        return (0, 0)
    return (1, column) if isinstance(column, int) else (2, column)


def order_of(position: Position) -> tuple[Any, ...]:
    """What positions are compared by: the one order of every engine."""
    return (*map(sortable, position.columns), position.place)


def check_limit(limit: int) -> None:
    """Raises `LimitExceeded` for a limit over `limits.PAGE_MAX` or below zero."""
    if not 0 <= limit <= PAGE_MAX:
        raise LimitExceeded("the limit", limit, PAGE_MAX)


def check_question(records: Records[Any], question: Question) -> Index | None:
    """The index a question scans, None for key order. Raises `Invalid` where they do not fit."""
    keys.span(question.prefix)
    if question.index is None:
        if question.where:
            raise Invalid(f"a scan of {records.name} by key takes no `where`; name an index.")
        return None
    index = records.index(question.index)
    wanted = 0 if index.every_tenant else 1
    if len(question.prefix) != wanted or len(question.where) > len(index.fields):
        raise Invalid(
            f"the index {index.name} of {records.name} is scanned by "
            f"{'no prefix' if index.every_tenant else 'the tenant'} and at most "
            f"{len(index.fields)} fields."
        )
    for field, part in zip(index.fields, question.where, strict=False):
        check_column(records.name, field, part)
    return index


def check_group(records: Records[Any], index: Index | None, group: int) -> None:
    """Refuse to count by fields that the index does not have."""
    fields = 0 if index is None else len(index.fields)
    if not 0 <= group <= fields:
        raise Invalid(f"{records.name} can be counted by 0 to {fields} fields here, not {group}.")


def check_position(
    log: Log[Any], stream: Key, tip: Tip, after: int, incarnation: int | None
) -> None:
    """Refuse to read a stream from a place it does not have (any more)."""
    where = f"{log.name} {keys.show(stream)}"
    if incarnation is not None and incarnation != tip.incarnation:
        raise CursorRefused(f"{where}: the stream was dropped since this cursor was made.")
    if after < 0:
        raise Invalid(f"{where}: entries are read after a number from 0, not {after}.")
    if after + 1 < tip.first:
        raise Trimmed(where, tip.first)


def _digest(question: Question, body: bytes) -> bytes:
    return hashlib.blake2b(msgspec.json.encode(question) + body, digest_size=_DIGEST_BYTES).digest()
