"""The drills from outside a process: that they can fail, and say what they lack."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from perdure.proving.drills.accepted import KilledInput
from perdure.proving.drills.calls import (
    FailedSystemCalls,
    FullSystem,
    Injection,
    KilledCalls,
)
from perdure.proving.drills.drill import Drill, Trial
from perdure.proving.drills.ext4 import CutExt4, image


def wrong(how: str) -> tuple[str, ...]:
    return (sys.executable, str(Path(__file__).with_name("wrong_writer.py")), how)


def lacking(drill: Drill) -> pytest.MarkDecorator:
    lacks = drill.lacks()
    return pytest.mark.skipif(lacks is not None, reason=f"{lacks}")


@lacking(KilledCalls())
@pytest.mark.parametrize(
    ("drill", "what"),
    [
        (KilledCalls(wrong("hasty")), "steps acknowledged"),
        (FailedSystemCalls(wrong("untyped"), file="-wal"), "the writer ended with 1"),
        (FullSystem(wrong("deaf")), "steps acknowledged"),
    ],
    ids=("hasty", "untyped", "deaf"),
)
async def test_a_wrong_writer_is_caught(drill: KilledCalls, what: str, tmp_path: Path) -> None:
    trial = Trial(tmp_path, "1", seconds=60)
    await drill.run(trial)
    assert any(what in one.what for one in trial.violations), trial.violations


@lacking(KilledInput())
@pytest.mark.parametrize("store", ["files", "engine"])
@pytest.mark.parametrize(
    ("how", "what"),
    [
        ("in two", "its state counts 1 of worker_transcripts, and 1 to 0 are there"),
        ("hasty", "0 inputs are there, acknowledged: True"),
    ],
)
async def test_an_input_that_is_not_one_commit_is_caught(
    how: str, what: str, store: str, tmp_path: Path
) -> None:
    program = (sys.executable, str(Path(__file__).with_name("wrong_accepting.py")), how)
    trial = Trial(tmp_path, "1", seconds=60, wrong_max=1)
    await KilledInput(store, program).run(trial)
    assert any(what in one.what for one in trial.violations), trial.violations


def test_a_machine_without_strace_is_told_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert "apt-get install strace" in (KilledCalls().lacks() or "")


# proves C3
@lacking(FailedSystemCalls())
async def test_a_new_store_whose_log_could_not_be_folded_in_is_not_given_its_name(
    tmp_path: Path,
) -> None:
    """SQLite folds the log in as it closes, and tells nobody that it failed: below the VFS only."""
    drill, trial = FailedSystemCalls(), Trial(tmp_path, "1", seconds=60)
    counts = await drill._watched(trial, tmp_path / "store", kept=False)
    last = counts["pwrite64", "state.db.tmp"]
    for n in range(last - 4, last + 1):
        with trial.place(n) as place:
            folding = Injection(False, "pwrite64", "state.db.tmp", n, "error=EIO", False)
            assert await drill._judge(trial, folding, place) == []


@lacking(CutExt4())
async def test_a_writer_that_syncs_too_little_is_caught_by_a_real_power_cut(tmp_path: Path) -> None:
    trial = Trial(tmp_path, "1", seconds=30)
    await CutExt4(wrong("synced-less")).run(trial)
    assert any("steps acknowledged" in one.what for one in trial.violations), trial.violations
    assert not os.path.ismount(tmp_path / "mounted")


@lacking(CutExt4())
def test_an_image_is_unmounted_whatever_happens_and_nothing_else_is_cut(tmp_path: Path) -> None:
    with suppress(KeyboardInterrupt), image(tmp_path) as made:
        assert os.path.ismount(made.root)
        raise KeyboardInterrupt
    assert not os.path.ismount(made.root)
    with pytest.raises(AssertionError):
        made.cut()
