"""What is stored and read back: records, entries, tips and pages, and their checksums."""

from __future__ import annotations

from typing import Generic, TypeVar

import msgspec
import xxhash

from perdure.core.keys import Key

T = TypeVar("T")


class Record(msgspec.Struct, Generic[T], frozen=True):
    """One version of one record. `attachment` is raw bytes kept beside the JSON value."""

    key: Key
    version: int
    value: T
    attachment: bytes | None = None


class Entry(msgspec.Struct, Generic[T], frozen=True):
    """One entry of a log; `seq` counts from 1 within the stream's incarnation."""

    seq: int
    value: T


class Tip(msgspec.Struct, frozen=True):
    """Where a stream stands: entries `first`..`last` are kept; it is empty when last < first.

    `incarnation` rises with every drop, so that a cursor of a dropped stream can be refused.
    """

    incarnation: int = 1
    first: int = 1
    last: int = 0


class Page(msgspec.Struct, Generic[T], frozen=True):
    """A bounded answer. `cursor` continues after the last item and is None at the end.

    `missing` names shards that could not answer; it is empty unless partial results were asked.
    """

    items: list[T]
    cursor: str | None = None
    missing: tuple[str, ...] = ()


class Committed(msgspec.Struct, frozen=True):
    """What a commit did: one number per operation of the batch, in order.

    put, delete, check: the record's version afterwards; append: the last number of the stream;
    trim: the first number kept; drop: the new incarnation.
    """

    numbers: tuple[int, ...]


class Finding(msgspec.Struct, frozen=True):
    """One thing `verify` found: where (collection and key, or file and offset), and why it is so.

    `kind` is `damaged`, `cut` (a torn tail that recovery removed), `leftover` (bytes that were
    never published), `stray` (a file that is none of the store's), `misplaced` (in a shard that is
    not its home) or `unreadable`.
    """

    where: str
    why: str
    kind: str = "damaged"


class Lost(msgspec.Struct, frozen=True):
    """What a salvage could not bring over. `key` and `entries` (the first and last number) are None
    where damage hides them; with an empty `collection` it is about the whole store."""

    collection: str
    why: str
    key: str | None = None
    entries: tuple[int, int] | None = None


def record_sum(
    collection: str, key: str, version: int, value: bytes | None, attachment: bytes | None
) -> int:
    """Checksum (XXH3-64, as a signed integer) of all that identifies and fills a record.

    A tombstone has no value; absent and empty attachments differ.
    """
    head = (
        f"r\x1e{collection}\x1e{key}\x1e{version}\x1e"
        f"{-1 if value is None else len(value)}\x1e"
        f"{-1 if attachment is None else len(attachment)}\x1e"
    ).encode()
    return _signed(xxhash.xxh3_64_intdigest(head + (value or b"") + (attachment or b"")))


def entry_sum(collection: str, stream: str, incarnation: int, seq: int, value: bytes) -> int:
    """Checksum of one log entry and of its place."""
    sealed = _sealed_entry(collection, stream, incarnation, seq, value)
    return _signed(xxhash.xxh3_64_intdigest(sealed))


def entry_sum_hex(collection: str, stream: str, incarnation: int, seq: int, value: bytes) -> str:
    """The same as 16 hexadecimal digits, for engines that keep text."""
    return xxhash.xxh3_64_hexdigest(_sealed_entry(collection, stream, incarnation, seq, value))


def _sealed_entry(collection: str, stream: str, incarnation: int, seq: int, value: bytes) -> bytes:
    head = f"e\x1e{collection}\x1e{stream}\x1e{incarnation}\x1e{seq}\x1e{len(value)}\x1e"
    return head.encode() + value


def tip_sum(collection: str, stream: str, tip: Tip) -> int:
    """Checksum of a stream's tip, so that a lost tail of entries cannot pass unseen."""
    head = f"t\x1e{collection}\x1e{stream}\x1e{tip.incarnation}\x1e{tip.first}\x1e{tip.last}"
    return _signed(xxhash.xxh3_64_intdigest(head.encode()))


def _signed(digest: int) -> int:
    return digest - (1 << 64) if digest >> 63 else digest
