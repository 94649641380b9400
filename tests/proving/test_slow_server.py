"""A server on a slow disk that does the wrong thing is caught."""

from __future__ import annotations

from pathlib import Path

import pytest

from perdure.proving.drills.drill import Trial
from perdure.proving.drills.slow_server import SlowServer


@pytest.mark.parametrize(
    ("plant", "seen"),
    [
        ("acknowledges-early", "was acknowledged, and after a kill it is answered 404"),
        ("reads-behind", "is not answered within"),
        ("starts-in-line", "a sync of the start hangs, and GET /livez is not answered"),
    ],
)
async def test_a_server_that_does_the_wrong_thing_is_caught(
    tmp_path: Path, plant: str, seen: str
) -> None:
    trial = Trial(tmp_path, "1", seconds=60, wrong_max=1)
    await SlowServer(plant).run(trial)
    assert any(seen in violation.what for violation in trial.violations), trial.violations
