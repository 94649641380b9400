"""Writing into the files what the journal holds already.

Nothing here decides anything, and all of it may be done again from the start: a record's file is
replaced as a whole, a stream's is cut to what it held and gets the entries it lacks, a directory in
which nothing is left goes last of all. When `apply` returns, all of it is durable; until the
journal starts over, nothing rests on that.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from msgspec import Raw
from msgspec.structs import replace

from perdure.core.disk import TEMPORARY, Disk
from perdure.core.keys import split
from perdure.core.values import record_sum
from perdure.engines.files_format import (
    Identity,
    RecordFile,
    StreamFile,
    entry_line,
    head_line,
    record_text,
    shown_sum,
)
from perdure.engines.files_journal import RecordChange
from perdure.engines.files_manifest import StreamRow
from perdure.engines.files_names import Tree
from perdure.engines.files_state import Work, identity_of


class Applier:
    """Writes into one tree. Its methods block, and are called one after another."""

    def __init__(self, disk: Disk, tree: Tree) -> None:
        self._disk = disk
        self._tree = tree
        self._made: set[Path] = set()
        """Directories that are durable, and all above them."""
        self._changed: dict[Path, None] = {}
        """Directories in which names changed since they were synced."""
        self._emptied: dict[Path, None] = {}
        """Directories that a file was removed from, though perhaps by who died at it."""

    def apply(self, work: Work) -> list[StreamRow]:
        """Let the files be as of `work.number`; what those of streams hold then."""
        for change, attachments in work.records:
            self._write_record(change, attachments)
        streams = [self._write_stream(*stream) for stream in work.streams]
        for directory in self._emptied:
            self._remove_empty(directory)
        for directory in self._changed:
            self._disk.sync_directory(directory)
        self._emptied.clear()
        self._changed.clear()
        return streams

    def _write_record(self, change: RecordChange, attachments: Sequence[int]) -> None:
        key, name = split(change.place), change.collection
        path = self._tree.record(name, key)
        attachment: Path | None = None
        if change.value is None:
            self._remove(path)
        else:
            if change.attachment is not None:
                attachment = self._tree.attachment(name, key, change.version)
                self._replace(attachment, (change.attachment,))
            checksum = record_sum(
                name, change.place, change.version, change.value, change.attachment
            )
            file = RecordFile(
                *(name, key, change.version, shown_sum(checksum), Raw(change.value)),
                attachment.name if attachment is not None else None,
            )
            self._replace(path, (record_text(file),))
        for version in attachments:
            if version and (other := self._tree.attachment(name, key, version)) != attachment:
                self._remove(other)

    def _write_stream(self, row: StreamRow, first: int, entries: Sequence[bytes]) -> StreamRow:
        """Bring a stream's file to its tip: `entries` from number `first` on are what it lacks."""
        path, tip = self._tree.stream(row.log, split(row.place)), row.tip
        held = (row.file_incarnation, row.file_first)
        if tip.last == 0:
            self._remove(path)
            size_bytes = 0
        elif row.size_bytes and held == (tip.incarnation, tip.first):
            lines = _lines(identity_of(row), first, entries)
            size_bytes = self._append(path, row, b"".join(lines))
        else:
            size_bytes = self._replace(path, self._rewritten(path, row, first, entries))
        return replace(
            row,
            file_incarnation=tip.incarnation,
            file_first=tip.first,
            file_last=tip.last,
            size_bytes=size_bytes,
        )

    def _append(self, path: Path, row: StreamRow, data: bytes) -> int:
        """Add lines to a file; what a write that failed or a crash left behind them goes first. A
        file that somebody cut is not made worse: what it lacks stays missing."""
        new = not path.exists()
        fd = self._disk.open_end(path)
        try:
            size_bytes = os.fstat(fd).st_size
            if size_bytes > row.size_bytes:
                size_bytes = row.size_bytes
                self._disk.cut(fd, size_bytes)
            if new:
                data = head_line(identity_of(row), row.file_first) + data
                self._changed[path.parent] = None
            elif size_bytes and os.pread(fd, 1, size_bytes - 1) != b"\n":
                data = b"\n" + data
            self._disk.write_all(fd, data, path)
            self._disk.sync(fd, path)
        finally:
            os.close(fd)
        return size_bytes + len(data)

    def _rewritten(
        self, path: Path, row: StreamRow, first: int, entries: Sequence[bytes]
    ) -> Iterator[bytes]:
        """The lines of a new file: those of the old one that are kept, then the others."""
        identity = identity_of(row)
        yield head_line(identity, row.tip.first)
        kept = row.file_incarnation == row.tip.incarnation and row.tip.first <= row.file_last
        if kept and path.exists():
            with StreamFile(path, identity) as file:
                for _, _, line in file.entries(row.tip.first, row.file_last):
                    yield line
        yield from _lines(identity, first, entries)

    def _replace(self, path: Path, parts: Iterator[bytes] | Sequence[bytes]) -> int:
        """Write a file anew; how many bytes it has."""
        self._make(path.parent)
        size_bytes = 0
        writer = self._disk.writer(path.with_name(path.name + TEMPORARY))
        try:
            for part in parts:
                writer.write(part)
                size_bytes += len(part)
            writer.move_to(path)
        finally:
            writer.discard()
        self._changed[path.parent] = None
        return size_bytes

    def _make(self, directory: Path) -> None:
        """Let a directory below the root be durable. What is there may still be lost: whoever made
        it, or removed an earlier one, may have died before that was."""
        if directory not in self._made and directory != self._tree.root:
            self._make(directory.parent)
            self._disk.make_directory(directory)
            self._made.add(directory)

    def _remove(self, path: Path) -> None:
        if path.parent.exists():
            self._disk.discard(path)
            self._changed[path.parent] = None
        self._emptied[path.parent] = None

    def _remove_empty(self, directory: Path) -> None:
        """Remove a directory, and those above it, up to the first in which something is left."""
        while directory != self._tree.root and self._disk.remove_directory(directory):
            self._made.discard(directory)
            self._changed.pop(directory, None)
            directory = directory.parent
            if directory.exists():
                self._changed[directory] = None


def _lines(identity: Identity, first: int, entries: Sequence[bytes]) -> Iterator[bytes]:
    return (entry_line(identity, seq, value) for seq, value in enumerate(entries, first))
