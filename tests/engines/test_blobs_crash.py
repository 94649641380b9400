"""Every state a power cut may leave a directory of blobs in, judged by what was acknowledged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from perdure.proving.crashstates import RecordingDisk
from perdure.proving.drills.blob_cuts import CutBlobs
from perdure.proving.drills.drill import Trial
from perdure.proving.planted_disks import DISKS


# proves C3
# proves C4
async def test_no_power_cut_loses_a_blob_or_shows_half_of_one(tmp_path: Path) -> None:
    trial = Trial(tmp_path, "1", seconds=120)
    await CutBlobs().run(trial)
    assert trial.violations == []
    assert trial.cases == trial.planned
    assert trial.cases > 100


@pytest.mark.parametrize("planted", DISKS.values(), ids=lambda planted: planted.__name__)
async def test_a_disk_that_does_less_than_it_says_is_caught(
    planted: Callable[[], RecordingDisk], tmp_path: Path
) -> None:
    trial = Trial(tmp_path, "1", seconds=60)
    await CutBlobs(planted).run(trial)
    assert trial.violations
