"""Mistakes that engines on plain files really make, each put into ours as one change.

A disk that does less than it says must show in the states that a power cut leaves; what is wrong in
the code, in those or in the rules of the conformance suite; what a writer does, to whoever watches
its process: `python -m perdure.proving.planted_files PLANT ARGUMENTS` is `perdure.proving.writer`
with one of `WRITERS`.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from perdure.core.batch import Batch
from perdure.core.disk import Disk
from perdure.core.errors import CommitUnknown, Damaged, PerdureError
from perdure.core.keys import split
from perdure.core.values import Committed
from perdure.engines.files import FilesEngine
from perdure.engines.files_apply import Applier
from perdure.engines.files_commit import Committer
from perdure.engines.files_format import Identity, parse_line, parse_record
from perdure.engines.files_journal import Journal
from perdure.engines.files_manifest import RecordRow
from perdure.engines.files_names import OWN, Tree
from perdure.engines.files_read import reading, stored_record, where_of
from perdure.engines.files_recovery import Store
from perdure.engines.group import Request
from perdure.proving import writer
from perdure.proving.drills.file_cuts import Met


class ForgetsToSyncTheJournal(Met):
    def sync(self, fd: int, path: Path) -> None:
        if path.name != "journal":
            super().sync(fd, path)


class ForgetsToSyncTheFiles(Met):
    def sync(self, fd: int, path: Path) -> None:
        if path.parent.name == OWN:
            super().sync(fd, path)


class ForgetsToSyncNames(Met):
    def sync_directory(self, path: Path) -> None:
        pass


class ForgetsToSyncTheNameOfTheJournal(Met):
    def sync_directory(self, path: Path) -> None:
        if path.name != OWN:
            super().sync_directory(path)


class MakesDirectoriesInPassing(Met):
    def make_directory(self, path: Path) -> None:
        for directory in (*reversed(path.parents), path):
            self.add_directory(directory)


DISKS: dict[str, Callable[[], Met]] = {
    "a commit is answered without a sync of the journal": ForgetsToSyncTheJournal,
    "the journal starts over though the files were never synced": ForgetsToSyncTheFiles,
    "files are renamed into place without a sync of their directory": ForgetsToSyncNames,
    "the journal starts over without a sync of its directory": ForgetsToSyncTheNameOfTheJournal,
    "a directory is made, or made again, and not synced in its own": MakesDirectoriesInPassing,
}
"""What is wrong with a disk, and how to make one."""

_start_journal = Store.start_journal


def drop_frames(
    store: Store, base: int, frames: Sequence[bytes] = (), *, closed: bool = False
) -> None:
    """Start over without the commits that the files lack."""
    _start_journal(store, base, (), closed=closed)


def read_past_the_overlay(store: Store, row: RecordRow) -> tuple[bytes, bytes | None]:
    """Read the file, whatever is committed and not in it yet."""
    return stored_record(store.tree, row)


def forget_what_was_removed(applier: Applier, directory: Path) -> None:
    """Leave directories in which nothing is left."""


def unchecked_record(tree: Tree, row: RecordRow) -> tuple[bytes, bytes | None]:
    """Believe what a record's file says."""
    key = split(row.place)
    with reading(where_of(row)):
        file = parse_record(tree.record(row.collection, key).read_bytes())
        if file is None:
            raise Damaged(where_of(row), "it does not decode")
        path = tree.attachment(row.collection, key, row.version)
        return bytes(file.value), path.read_bytes() if row.attached else None


def unchecked_line(line: bytes, identity: Identity | None) -> tuple[int, bytes] | None:
    """Believe what a line says."""
    return parse_line(line, None)


def never_cut(disk: Disk, fd: int, size_bytes: int) -> None:
    """Leave what a write that failed, or a crash, has left of a frame or of lines."""


def give_up(journal: Journal) -> None:
    """Say of a frame that found no space that it may be there."""
    raise CommitUnknown("the disk failed while committing")


def gather_one(committer: Committer) -> list[Request]:
    """Let nobody share a sync."""
    return [committer._waiting.popleft()]


_commit = FilesEngine.commit
_sync = Disk.sync
_under_way: set[asyncio.Future[Committed]] = set()


async def answer_first(engine: FilesEngine, batch: Batch) -> Committed:
    committing = asyncio.ensure_future(_commit(engine, batch))
    _under_way.add(committing)
    committing.add_done_callback(_forget)
    return Committed(())


def _forget(committing: asyncio.Future[Committed]) -> None:
    """It was answered, whatever became of it."""
    _under_way.discard(committing)
    if not committing.cancelled():
        committing.exception()


async def _answer_anyway(engine: FilesEngine, batch: Batch) -> Committed:
    with suppress(PerdureError):
        return await _commit(engine, batch)
    return Committed(())


async def _answer_in_its_own_words(engine: FilesEngine, batch: Batch) -> Committed:
    try:
        return await _commit(engine, batch)
    except PerdureError as error:
        raise error.__cause__ or error from None


def _sync_no_journal(disk: Disk, fd: int, path: Path) -> None:
    if path.name != "journal":
        _sync(disk, fd, path)


WRITERS: dict[str, tuple[str, object, str, object]] = {
    "hasty": ("a commit is answered as it is handed over", FilesEngine, "commit", answer_first),
    "deaf": ("a commit that was refused is answered", FilesEngine, "commit", _answer_anyway),
    "untyped": (
        "what the system says of a disk that fails leaves the engine in its own words",
        *(FilesEngine, "commit", _answer_in_its_own_words),
    ),
    "unsynced": ("the journal is never synced", Disk, "sync", _sync_no_journal),
}
"""What is wrong with a writer, and what is put in whose place."""


if __name__ == "__main__":
    plant, *arguments = sys.argv[1:]
    setattr(*WRITERS[plant][1:])
    writer.main(arguments)
