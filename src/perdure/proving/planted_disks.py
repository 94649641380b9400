"""Disks that do less than they say, as software that uses them wrongly does: every one of them must
show in the states that a power cut leaves.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from perdure.proving.crashstates import RecordingDisk


class ForgetsToSyncBytes(RecordingDisk):
    def sync(self, fd: int, path: Path) -> None:
        pass


class ForgetsToSyncNames(RecordingDisk):
    def sync_directory(self, path: Path) -> None:
        pass


class ForgetsToSyncNewDirectories(RecordingDisk):
    def make_directory(self, path: Path) -> None:
        for part in reversed([part for part in (path, *path.parents) if not part.exists()]):
            self.add_directory(part)


class WritesInPlace(RecordingDisk):
    """Copies the bytes under their name instead of renaming the file."""

    def replace(self, source: Path, target: Path) -> None:
        data = source.read_bytes()
        fd = self.open_new(target)
        self.write_all(fd, data, target)
        self.sync(fd, target)
        self.unlink(source)


DISKS: dict[str, Callable[[], RecordingDisk]] = {
    "a blob is renamed into place without a sync of its bytes": ForgetsToSyncBytes,
    "a blob is renamed into place without a sync of its directory": ForgetsToSyncNames,
    "a new directory is used without a sync of the one it is in": ForgetsToSyncNewDirectories,
    "a blob is copied to its name instead of renamed": WritesInPlace,
}
"""What is wrong with a disk, and how to make one."""
