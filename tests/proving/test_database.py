"""The drill that kills databases and cuts their connections, and that it can fail."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from perdure.engines.postgres_commit import Committer
from perdure.proving.drills.database import FailingDatabase, Network
from perdure.proving.drills.drill import Trial


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
