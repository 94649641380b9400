"""A server whose disk fails is judged, and a server that then does the wrong thing is caught."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from perdure.proving.drills.drill import Trial
from perdure.proving.drills.failing_server import FailingServer
from perdure.proving.faults import FAILED_SYNC, FULL_DISK, READ_ONLY
from perdure.proving.refusing import Trouble

SYNCS = Trouble(calls=("sqlite.sync",), n=25, times=None)
NO_SPACE = Trouble(calls=("sqlite.write",), n=20, times=None, errno=errno.ENOSPC)
BLOBS = Trouble(calls=("disk.sync",), n=3, times=None)


# proves C9, C10
@pytest.mark.parametrize("trouble", [SYNCS, NO_SPACE, BLOBS], ids=str)
async def test_a_server_whose_disk_fails_holds_what_it_promises(
    tmp_path: Path, trouble: Trouble
) -> None:
    trial = Trial(tmp_path, "1", seconds=30)
    await FailingServer(FAILED_SYNC, "", [trouble]).run(trial)
    assert trial.violations == []
    assert trial.notes["met"] == 1


# proves C9
async def test_a_server_that_cannot_answer_its_operator_is_never_ready(tmp_path: Path) -> None:
    """It said that it was ready, and then ended as it could not make its control socket. The first
    life leaves one, as it is killed."""
    kept = Trouble(calls=("disk.unlink",), n=1, times=None, errno=errno.EROFS)
    trial = Trial(tmp_path, "1", seconds=30)
    await FailingServer(READ_ONLY, "", [kept] * 2).run(trial)
    assert trial.violations == []
    assert "control.sock could not be used" in (tmp_path / "server.log").read_text()


@pytest.mark.parametrize(
    ("plant", "trouble", "seen"),
    [
        ("hides-failures", SYNCS, "acknowledged"),
        ("ready-too-soon", SYNCS, "/readyz says 200"),
        ("stops-reading", SYNCS, "its disk failed, and reading got 503"),
    ],
)
async def test_a_server_that_does_the_wrong_thing_is_caught(
    tmp_path: Path, plant: str, trouble: Trouble, seen: str
) -> None:
    drill = FailingServer(FULL_DISK, "", [trouble] * 2)  # the second life reads of the first
    drill.plant = plant
    trial = Trial(tmp_path, "1", seconds=30)
    await drill.run(trial)
    assert any(seen in violation.what for violation in trial.violations)
