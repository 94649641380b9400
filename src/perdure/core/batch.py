"""The one way to write: a batch of operations with preconditions, committed whole or not at all.

A batch is a value. `put`, `append` and their kin make batches of one operation; `+` joins them;
only `Engine.commit` runs one. Every check that needs no stored state happens while the batch is
built, so bad input is refused before any engine sees it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import msgspec
import xxhash

from perdure.core import keys
from perdure.core.errors import Invalid, LimitExceeded, SpansPartitions
from perdure.core.keys import Key
from perdure.core.layouts import Columns, Log, Records
from perdure.core.limits import (
    ATTACHMENT_BYTES_MAX,
    BATCH_BYTES_MAX,
    BATCH_OPS_MAX,
    OPERATION_ID_BYTES_MAX,
)

T = TypeVar("T")


class Put(msgspec.Struct, frozen=True, gc=False):
    """Write a record; its version rises by one."""

    records: Records[Any]
    key: Key
    place: str
    value: bytes
    columns: Columns
    attachment: bytes | None
    expect: int | None


class Delete(msgspec.Struct, frozen=True, gc=False):
    """Replace a record by a tombstone that keeps, and raises, its version."""

    records: Records[Any]
    key: Key
    place: str
    expect: int | None


class Check(msgspec.Struct, frozen=True, gc=False):
    """A precondition without a write."""

    records: Records[Any]
    key: Key
    place: str
    expect: int


class Append(msgspec.Struct, frozen=True, gc=False):
    """Add entries to the end of a stream."""

    log: Log[Any]
    key: Key
    place: str
    entries: tuple[bytes, ...]
    after: int | None


class Trim(msgspec.Struct, frozen=True, gc=False):
    """Forget the entries of a stream numbered below `before`."""

    log: Log[Any]
    key: Key
    place: str
    before: int


class Drop(msgspec.Struct, frozen=True, gc=False):
    """Forget a whole stream; the next append starts a new incarnation at 1."""

    log: Log[Any]
    key: Key
    place: str


RecordOp = Put | Delete | Check
LogOp = Append | Trim | Drop
Op = RecordOp | LogOp


class Batch(msgspec.Struct, frozen=True):
    """Operations that take effect together or not at all; falsy when there are none.

    `operation_id` makes the commit idempotent for `limits.OPERATION_KEPT_S`.
    """

    ops: tuple[Op, ...] = ()
    operation_id: str | None = None

    def __add__(self, other: Batch) -> Batch:
        return join((self, other))

    def __bool__(self) -> bool:
        return bool(self.ops)

    def named(self, operation_id: str) -> Batch:
        """The same batch, committed at most once under this id."""
        size_bytes = len(operation_id.encode(errors="replace"))
        if size_bytes > OPERATION_ID_BYTES_MAX:
            raise LimitExceeded("the operation id, in bytes,", size_bytes, OPERATION_ID_BYTES_MAX)
        keys.join((operation_id,))
        return Batch(self.ops, operation_id)


NOTHING = Batch()


def join(batches: Iterable[Batch]) -> Batch:
    """Many batches as one, in order."""
    joined: list[Op] = []
    operation_id: str | None = None
    for batch in batches:
        if operation_id and batch.operation_id and operation_id != batch.operation_id:
            raise Invalid("batches with two different operation ids cannot be joined.")
        joined += batch.ops
        operation_id = operation_id or batch.operation_id
    return Batch(tuple(joined), operation_id)


def put(
    records: Records[T],
    key: Key,
    value: T,
    *,
    expect: int | None = None,
    attachment: bytes | None = None,
) -> Batch:
    """Write `value` at `key`. `expect` is the version that must be there now; 0 means absent
    (never written, or deleted); None writes whatever is there."""
    if attachment is not None and len(attachment) > ATTACHMENT_BYTES_MAX:
        raise LimitExceeded("the attachment, in bytes,", len(attachment), ATTACHMENT_BYTES_MAX)
    place = _place(records, key)
    text = records.encode(value)
    return Batch(
        (Put(records, key, place, text, records.columns(value), attachment, _expect(expect)),)
    )


def delete(records: Records[Any], key: Key, *, expect: int | None = None) -> Batch:
    """Delete the record at `key`. Deleting what is absent changes nothing, unless `expect`."""
    return Batch((Delete(records, key, _place(records, key), _expect(expect)),))


def check(records: Records[Any], key: Key, expect: int) -> Batch:
    """Commit only if `key` is at version `expect` (0: absent) when the batch is decided."""
    if expect is None:
        raise Invalid("a check needs the version it expects.")
    return Batch((Check(records, key, _place(records, key), _expect(expect) or 0),))


def append(log: Log[T], stream: Key, entries: Sequence[T], *, after: int | None = None) -> Batch:
    """Add `entries` to `stream`, in order. `after` is the number that must be last now."""
    if not entries:
        raise Invalid(f"{log.name}: an append needs at least one entry.")
    texts = tuple(log.encode(entry) for entry in entries)
    return Batch((Append(log, stream, _place(log, stream), texts, _expect(after)),))


def trim(log: Log[Any], stream: Key, before: int) -> Batch:
    """Forget entries numbered below `before`; numbers past the end trim to an empty stream."""
    return Batch((Trim(log, stream, _place(log, stream), _expect(before) or 0),))


def drop(log: Log[Any], stream: Key) -> Batch:
    """Forget `stream`. Dropping what is empty and was never written changes nothing."""
    return Batch((Drop(log, stream, _place(log, stream)),))


def layout_of(op: Op) -> Records[Any] | Log[Any]:
    """The layout an operation writes by."""
    return op.records if isinstance(op, RecordOp) else op.log


def partition_of(batch: Batch) -> str | None:
    """The one partition a batch lies in, after checking its size and that no record is written
    twice. Every engine calls this first.

    Raises `SpansPartitions`, `LimitExceeded`, or `Invalid`.
    """
    ops = batch.ops
    if len(ops) == 1:
        if isinstance(ops[0], Append):  # a record's own limits are the smaller ones
            _check_limits(batch, ops)
        return layout_of(ops[0]).partition_of(ops[0].key)
    ops = tuple(op for op in ops if not _is_everywhere(op))
    _check_limits(batch, ops)
    partitions: set[str | None] = set()
    written: set[tuple[str, str]] = set()
    for op in ops:
        partitions.add(layout_of(op).partition_of(op.key))
        if isinstance(op, Put | Delete):
            if (op.records.name, op.place) in written:
                raise Invalid(
                    f"the batch writes {op.records.name} {keys.show(op.key)} twice; "
                    "decide on one value."
                )
            written.add((op.records.name, op.place))
    if len(partitions) > 1:
        named = ", ".join(sorted(str(part) for part in partitions))
        raise SpansPartitions(f"the batch spans the partitions {named}; commit one batch for each.")
    return partitions.pop() if partitions else None


def size_bytes(batch: Batch) -> int:
    """Bytes of values, attachments and entries in a batch."""
    total = 0
    for op in batch.ops:
        if isinstance(op, Put):
            total += len(op.value) + len(op.attachment or b"")
        elif isinstance(op, Append):
            total += sum(map(len, op.entries))
    return total


def digest(batch: Batch) -> int:
    """What an operation id stands for: equal for equal content, whatever the process or boot, and
    whatever the shard that it lies in knew of itself."""
    state = xxhash.xxh3_64()
    for op in batch.ops:
        if _is_everywhere(op):
            continue
        fields = [type(op).__name__]
        bodies: tuple[bytes, ...] = ()
        match op:
            case Put():
                fields += [op.records.name, op.place, str(op.expect), str(op.attachment is None)]
                bodies = (op.value, op.attachment or b"")
            case Delete() | Check():
                fields += [op.records.name, op.place, str(op.expect)]
            case Append():
                fields += [op.log.name, op.place, str(op.after)]
                bodies = op.entries
            case Trim():
                fields += [op.log.name, op.place, str(op.before)]
            case Drop():
                fields += [op.log.name, op.place]
        fields += [str(len(body)) for body in bodies]
        fields.append("")  # ends the last length, so that no body can pass for a part of it
        state.update("\x1e".join(fields).encode())
        for body in bodies:
            state.update(body)
    number = state.intdigest()
    return number - (1 << 64) if number >> 63 else number


def _check_limits(batch: Batch, ops: Sequence[Op]) -> None:
    count = sum([len(op.entries) if isinstance(op, Append) else 1 for op in ops])
    if count > BATCH_OPS_MAX:
        raise LimitExceeded("the number of operations and entries", count, BATCH_OPS_MAX)
    if (total_bytes := size_bytes(batch)) > BATCH_BYTES_MAX:
        raise LimitExceeded("the batch, in bytes,", total_bytes, BATCH_BYTES_MAX)


def _is_everywhere(op: Op) -> bool:
    return isinstance(op, Check) and op.records.everywhere


def _place(layout: Records[Any] | Log[Any], key: Key) -> str:
    if len(key) != len(layout.key):
        raise Invalid(
            f"a key of {layout.name} has {len(layout.key)} segments "
            f"({', '.join(layout.key)}), not {len(key)}."
        )
    return keys.join(key)


def _expect(number: int | None) -> int | None:
    if number is not None and (type(number) is not int or not 0 <= number < 2**63):
        raise Invalid(f"an expected number is a whole number from 0, not {number!r}.")
    return number
