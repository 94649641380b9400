"""A clock that jumps: programs that trust it are caught."""

from __future__ import annotations

from pathlib import Path

import pytest

from perdure.core.clock import SystemClock
from perdure.engines import sqlite_commit
from perdure.engines.blobs_local import LocalBlobs
from perdure.proving.drills.clocks import JumpedBlobs, JumpedEngine, JumpedServer
from perdure.proving.drills.drill import Drill, Trial
from perdure.proving.jumping import DAY_S, Jumps


async def found(drill: Drill, home: Path) -> list[str]:
    trial = Trial(home, "1", seconds=30)
    await drill.run(trial)
    return [violation.what for violation in trial.violations]


async def test_an_engine_that_forgets_by_the_time_of_day_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A day's jump ended every operation id at once: a repeat was carried out again."""
    monkeypatch.setattr(sqlite_commit, "CLOCK_OFF_S", 0)
    assert any(
        "after the jumps: Conflict" in what for what in await found(JumpedEngine(), tmp_path)
    )


# proves C22
async def test_a_server_that_forgets_by_the_time_of_day_is_caught(tmp_path: Path) -> None:
    """Request keys went the same way, and a request that was sent twice had two effects."""
    drill = JumpedServer(Jumps(off_s=-DAY_S), plant="trusts-clock")
    assert any("is one of 2" in what for what in await found(drill, tmp_path))


async def test_blobs_dropped_by_the_time_of_day_are_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove, began_s = LocalBlobs._remove, SystemClock().now_s()

    def by_time(blobs: LocalBlobs, path: Path) -> None:
        if blobs._clock.now_s() >= began_s:
            remove(blobs, path)

    monkeypatch.setattr(LocalBlobs, "_remove", by_time)
    assert any("are there" in what for what in await found(JumpedBlobs(), tmp_path))
