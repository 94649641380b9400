"""The drill that kills databases and cuts their connections, and that it can fail."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any, get_args

import pytest

from perdure.core.errors import StorageFull
from perdure.engines.postgres_commit import Committer
from perdure.proving.drills.database import FailingDatabase, Network
from perdure.proving.drills.drill import Trial
from perdure.proving.drills.full_database import FullDatabase


# proves C12
async def test_every_way_to_lose_a_database_is_survived(tmp_path: Path) -> None:
    trial = Trial(tmp_path, "ci", seconds=120, enough=13)
    await FailingDatabase().run(trial)
    assert trial.violations == []
    assert trial.cases == 13
    assert set(get_args(Network)) | {"kill", "stop", "backend killed"} <= trial.notes.keys()


@pytest.mark.parametrize(
    ("answer", "told"), [(False, "Conflict"), (True, "lost what it had confirmed")]
)
async def test_a_commit_that_is_guessed_is_found(
    answer: bool, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def guess(committer: Committer, number: int, lost: BaseException) -> bool:
        return answer

    monkeypatch.setattr(Committer, "_took_place", guess)
    trial = Trial(tmp_path, "ci", seconds=60, enough=4, wrong_max=1)
    await FailingDatabase().run(trial)
    assert trial.violations
    assert any(told in violation.what for violation in trial.violations)


@pytest.fixture
def full() -> FullDatabase:
    if (lacks := FullDatabase().lacks()) is not None:
        pytest.skip(lacks)
    return FullDatabase()


# proves C10, C12
async def test_a_log_that_cannot_grow_ends_the_server_and_not_the_engine(
    full: FullDatabase, tmp_path: Path
) -> None:
    trial = Trial(tmp_path, "ci", seconds=60, case=2)
    await full.run(trial)
    assert trial.violations == []
    assert trial.notes["log"] == 1


async def test_an_engine_that_a_full_disk_latches_is_found(
    full: FullDatabase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt = Committer._patiently

    async def latches(committer: Committer, group: Any) -> Any:
        try:
            return await attempt(committer, group)
        except StorageFull:
            committer._latch.close("as planted")
            raise

    monkeypatch.setattr(Committer, "_patiently", latches)
    trial = Trial(tmp_path, "ci", seconds=60, case=1)
    await full.run(trial)
    assert any("as planted" in violation.what for violation in trial.violations)


# proves C3, C12
@pytest.mark.skipif(
    shutil.which("iptables") is None or os.geteuid() != 0, reason="needs iptables, root"
)
@pytest.mark.parametrize("guesses", [False, True])
async def test_packets_that_are_dropped_lose_nothing_and_repeat_nothing(guesses: bool) -> None:
    with tempfile.TemporaryDirectory(prefix="perdure-pg-") as place:
        script = 'ip link set lo up && exec "$@"'
        program = (sys.executable, "-m", "tests.proving.partitioned", place, *["plant"] * guesses)
        apart = await asyncio.create_subprocess_exec(
            *("unshare", "--net", "sh", "-c", script, "sh", *program),
            stdout=asyncio.subprocess.PIPE,
        )
        said, _ = await asyncio.wait_for(apart.communicate(), 120)
    *wrong, steps = said.decode().split("\n")[:-1]
    assert steps.endswith(" steps"), steps
    assert bool("".join(wrong)) == guesses, wrong
