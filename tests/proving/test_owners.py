"""Two servers on one store: one that was replaced and writes on is caught."""

from __future__ import annotations

from pathlib import Path

from perdure.proving.drills.drill import Trial
from perdure.proving.drills.owned_server import OwnedServer


# proves C11
async def test_a_server_that_was_replaced_and_writes_on_is_caught(tmp_path: Path) -> None:
    trial = Trial(tmp_path, "1", seconds=60, wrong_max=1)
    await OwnedServer("writes-beside").run(trial)
    assert any("was replaced, and a write got done" in one.what for one in trial.violations)
