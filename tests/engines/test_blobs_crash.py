"""Every state a power cut may leave a directory of blobs in, judged by what was acknowledged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from perdure.proving.crashstates import RecordingDisk
from perdure.proving.drills.blob_cuts import CutBlobs
from perdure.proving.drills.drill import Trial


# proves C3
# proves C4
async def test_no_power_cut_loses_a_blob_or_shows_half_of_one(tmp_path: Path) -> None:
    trial = Trial(tmp_path, "1", seconds=120)
    await CutBlobs().run(trial)
    assert trial.violations == []
    assert trial.cases == trial.planned
    assert trial.cases > 100


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


@pytest.mark.parametrize(
    "planted",
    [ForgetsToSyncBytes, ForgetsToSyncNames, ForgetsToSyncNewDirectories, WritesInPlace],
)
async def test_a_disk_that_does_less_than_it_says_is_caught(
    planted: Callable[[], RecordingDisk], tmp_path: Path
) -> None:
    trial = Trial(tmp_path, "1", seconds=60)
    await CutBlobs(planted).run(trial)
    assert trial.violations
