"""Mistakes that engines on plain files really make, each put into ours as one change.

A disk that does less than it says must show in the states that a power cut leaves; what is wrong in
the code, in those or in the rules of the conformance suite.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from perdure.core.disk import Disk
from perdure.engines.files_apply import Applier
from perdure.engines.files_manifest import RecordRow
from perdure.engines.files_names import OWN
from perdure.engines.files_read import stored_record
from perdure.engines.files_recovery import Store
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


def never_cut(disk: Disk, fd: int, size_bytes: int) -> None:
    """Leave what a write that failed, or a crash, has left of a frame or of lines."""
