"""The manifest: what the store holds and how far its files are, as of one commit.

One line a record, stream and operation id, between a head and a line with the checksum of all
before it. A record's line has its version and checksum, so a file that was edited, put back from an
older copy or removed is known for what it is; a stream's has its tip, and how long its file is. A
tombstone has no file: it is here alone, and so are operation ids and incarnations of streams that
were dropped.

It is written when the journal starts over and when the store is closed, always as a whole: a file
synced and renamed. `number` is the commit whose state it is; files may be as old as `applied`, and
the journal holds every commit after that.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import msgspec
import xxhash

from perdure.core.disk import Disk
from perdure.core.errors import Damaged, NewerFormat
from perdure.core.layouts import Columns
from perdure.core.values import Tip


class RecordRow(msgspec.Struct, frozen=True, array_like=True, tag="record", gc=False):
    """A record. `version` is negative, and `at_s` when that came about, where it is deleted.
    `attached` says that it has an attachment; `on_disk` is the version whose attachment may lie in
    a file at the commit `applied`, 0 for none."""

    collection: str
    place: str
    version: int
    sum: int = 0
    columns: Columns = ()
    attached: bool = False
    on_disk: int = 0
    at_s: int = 0


class StreamRow(msgspec.Struct, frozen=True, array_like=True, tag="stream", gc=False):
    """A stream: its tip, when it was dropped, and what its file holds at the commit `applied`:
    entries `file_first` to `file_last` of an incarnation, in so many bytes (0: there is none)."""

    log: str
    place: str
    tip: Tip
    at_s: int = 0
    file_incarnation: int = 1
    file_first: int = 1
    file_last: int = 0
    size_bytes: int = 0


class OperationRow(msgspec.Struct, frozen=True, array_like=True, tag="operation", gc=False):
    """An operation id, what it stands for, and the first answer."""

    id: str
    partition: str
    digest: int
    numbers: tuple[int, ...]
    at_s: int


class LayoutRow(msgspec.Struct, frozen=True, array_like=True):
    """A collection as it was declared when it was last written, and where it lies since it was
    first."""

    name: str
    version: int
    shape: str
    path: str = ""


class Head(msgspec.Struct, frozen=True):
    """The first line."""

    perdure_format: int
    store_id: str
    number: int
    applied: int
    layouts: tuple[LayoutRow, ...] = ()
    incarnations: dict[str, int] = {}
    """Of each log the highest incarnation of a stream whose line was forgotten."""

    copy_of: str | None = None
    """The store of which this one is to become a copy, until it is complete."""


Row = RecordRow | StreamRow | OperationRow


class Manifest(msgspec.Struct):
    """All of it."""

    head: Head
    rows: list[Row]


class _Sum(msgspec.Struct, frozen=True):
    """The last line."""

    sum: str


_rows = msgspec.json.Decoder(Row)


def write_manifest(disk: Disk, path: Path, head: Head, rows: Iterable[Row]) -> int:
    """Replace the manifest, durably; how many bytes it has."""
    lines = msgspec.json.encode(head) + b"\n" + msgspec.json.Encoder().encode_lines(rows)
    checksum = _Sum(xxhash.xxh3_128_hexdigest(lines))
    data = lines + msgspec.json.encode(checksum) + b"\n"
    disk.write_file(path, data)
    return len(data)


def read_manifest(path: Path, newest: int) -> Manifest:
    """Raises `NewerFormat` for a format beyond `newest`, and `Damaged` where it is not as it
    was written: then nothing can be said of any file."""
    data = path.read_bytes()
    lines, end = data[: data.rfind(b"\n", 0, -1) + 1], data[data.rfind(b"\n", 0, -1) + 1 :]
    try:
        first = lines[: lines.find(b"\n") + 1]
        format = msgspec.json.decode(first, type=_Format).perdure_format
        if format > newest:
            raise NewerFormat(
                f"{path.parent.parent} was written in format {format}; this release knows up to "
                f"{newest}. The store was left untouched; open it with a newer Perdure."
            )
        whole = end == msgspec.json.encode(_Sum(xxhash.xxh3_128_hexdigest(lines))) + b"\n"
        if whole:
            head = msgspec.json.decode(first, type=Head)
            return Manifest(head, _rows.decode_lines(lines[len(first) :]))
    except (msgspec.MsgspecError, UnicodeDecodeError):
        whole = False
    raise Damaged(str(path), "it is not as it was written. Bring it back, or restore a backup")


class _Format(msgspec.Struct):
    perdure_format: int
