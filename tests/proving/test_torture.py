"""The torture run: what it holds against a store, and that it can fail."""

from __future__ import annotations

import asyncio
import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner

from perdure.core.errors import Invalid, StorageFull
from perdure.engines import sqlite_commit, sqlite_driver
from perdure.engines.sqlite_commit import Committer
from perdure.frontends.cli.main import app
from perdure.proving import torture as proving_torture
from perdure.proving.drills import DRILLS
from perdure.proving.drills.blob_cuts import CutBlobs
from perdure.proving.drills.cuts import CutEngine
from perdure.proving.drills.drill import Drill, Subject, Trial
from perdure.proving.drills.failures import FailedCalls, FullDisk, opened
from perdure.proving.faults import FAULTS, POWER_CUT
from perdure.proving.steps import last_step, step
from perdure.proving.torture import PER_CHANGE, Order, Report, torture, undrilled
from perdure.proving.watched import DISK_FULL, WatchedDisk


def untold(what: str, done: int, total: int) -> None:
    pass


def order(home: Path, **what: object) -> Order:
    return msgspec.structs.replace(Order(home=home, seed="1", seconds=1), **what)


# proves C3, W4
@pytest.mark.parametrize("drill", DRILLS, ids=lambda drill: f"{drill.fault.name}-{drill.subject}")
async def test_every_drill_judges_and_finds_nothing(drill: Drill, tmp_path: Path) -> None:
    if (lacks := drill.lacks()) is not None:
        pytest.skip(lacks)
    trial = Trial(tmp_path, "ci", seconds=1)  # `make proof` judges by count, and CI runs it
    await drill.run(trial)
    assert trial.violations == []
    assert trial.cases > 0
    assert trial.cases <= (trial.planned or trial.cases)


def test_what_no_drill_does_is_every_fault_and_part_but_those_of_the_drills() -> None:
    drilled = {f"{drill.fault.name} / {drill.subject}" for drill in DRILLS}
    every = {f"{fault.name} / {part}" for fault in FAULTS for part in ("engine", "blobs", "server")}
    assert set(undrilled(DRILLS)) == every - drilled
    assert "power-cut / engine" not in undrilled([CutEngine()])
    assert "power-cut / blobs" in undrilled([CutEngine()])
    assert undrilled(())[0] == "process-crash / engine"
    assert len(undrilled(())) == len(every)


class Stops:
    """A drill whose second case ends by what nobody expected."""

    fault = POWER_CUT
    says = "nothing"

    def __init__(self, subject: Subject, error: Exception) -> None:
        self.subject = subject
        self._error = error

    def lacks(self) -> str | None:
        return None

    async def run(self, trial: Trial) -> None:
        await trial.each(self._judge)

    async def _judge(self, case: int, place: Path) -> list[str]:
        if case == 2:
            raise self._error
        return []


async def test_a_drill_that_ends_by_an_error_is_told_and_the_others_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drills = (
        Stops("engine", IndexError("no such page")),
        Stops("blobs", OSError(errno.ENOSPC, "full")),
        Stops("server", IndexError()),
    )
    monkeypatch.setattr(proving_torture, "DRILLS", drills)
    report = await torture(order(tmp_path), untold)
    (wrong,), (), (_,) = (row.violations for row in report.rows)
    assert wrong.case == 2
    assert "IndexError('no such page') in test_torture.py" in wrong.what
    assert report.rows[0].again is not None
    assert "no space left" in str(report.rows[1].lacks)


@pytest.mark.parametrize("seconds", ["nan", "-5", "0"])
def test_no_time_is_refused(tmp_path: Path, seconds: str) -> None:
    path = f"sqlite:///{tmp_path}/state.db"
    refused = CliRunner().invoke(app, ["torture", "--engine", path, "--seconds", seconds])
    assert isinstance(refused.exception, Invalid)
    assert list(tmp_path.iterdir()) == []


async def test_one_that_is_told_to_end_leaves_nothing(tmp_path: Path) -> None:
    arguments = ("--engine", f"sqlite:///{tmp_path}/state.db", "--faults", "process-crash")
    running = await asyncio.create_subprocess_exec(
        *(str(Path(sys.executable).with_name("perdure")), "torture", *arguments),
        *("--subject", "process"),
        stderr=asyncio.subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))},
    )
    assert running.stderr is not None
    assert b"process-crash" in await asyncio.wait_for(running.stderr.readline(), 30)
    running.terminate()
    await asyncio.wait_for(running.wait(), 60)
    assert running.returncode != 0
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def synced_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite as most programs run it: commits are synced with the next checkpoint."""
    force: Callable[[object, str, object], None] = sqlite_driver._force
    monkeypatch.setattr(
        sqlite_driver,
        "_force",
        lambda connection, pragma, value: force(
            connection, pragma, 1 if pragma == "synchronous" else value
        ),
    )


@pytest.mark.usefixtures("synced_less")
async def test_a_violation_names_its_case_keeps_the_store_and_can_be_repeated(
    tmp_path: Path,
) -> None:
    asked = order(tmp_path / "first", faults=("power-cut",), subject="engine", seconds=30)
    report = await torture(asked, untold)
    (row,) = report.rows
    assert not report.ok
    assert row.verdict == "VIOLATED"
    violation = row.violations[0]
    assert "acknowledged" in violation.what
    assert (Path(violation.kept) / "state.db").exists()
    assert row.again == (
        f"perdure torture --faults power-cut --subject engine --seed 1 --case {violation.case}"
    )


async def test_an_engine_that_forgets_its_latch_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Committer, "latch", lambda committer, why: None)
    trial = Trial(tmp_path, "1", seconds=30)
    await FailedCalls().run(trial)
    assert any("was acknowledged by the same engine" in one.what for one in trial.violations)


async def test_an_engine_that_latches_on_a_full_disk_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_commit, "leaves_doubt", lambda error: True)
    trial = Trial(tmp_path, "1", seconds=30)
    await FullDisk().run(trial)
    assert any("without space" in one.what for one in trial.violations)


@pytest.mark.parametrize("short", [False, True])
async def test_a_short_write_leaves_half_of_its_bytes_in_the_file(
    tmp_path: Path, short: bool
) -> None:
    disk, log = WatchedDisk(hasty=True), tmp_path / "state.db-wal"
    engine = await opened(tmp_path / "state.db", disk)
    before = log.stat().st_size
    disk.short = short
    disk.refuse("write", "-wal", DISK_FULL)
    with pytest.raises(StorageFull):
        await engine.commit(step(0, 1))
    assert (log.stat().st_size > before) is short
    disk.heal()
    await engine.commit(step(0, 1))
    assert await last_step(engine, 0) == 1
    await engine.close()


async def test_one_case_alone_is_judged_again(tmp_path: Path) -> None:
    trial = Trial(tmp_path, "1", seconds=30, case=7)
    await CutEngine().run(trial)
    assert trial.cases == 1
    assert trial.planned is not None
    assert trial.planned > 1000


async def test_what_every_change_must_pass_is_judged_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PER_CHANGE, "power-cut / blobs", 7)
    asked = order(tmp_path, faults=("power-cut",), subject="blobs", seconds=60, counted=True)
    report = await torture(asked, untold)
    (row,) = report.rows
    assert (row.cases, row.wanted, row.verdict, report.ok) == (7, 7, "holds", True)


async def test_fewer_than_every_change_must_pass_is_no_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PER_CHANGE, "damage / engine", 1_000_000)
    asked = order(tmp_path, faults=("damage",), subject="engine", seconds=1, counted=True)
    report = await torture(asked, untold)
    assert (report.rows[0].verdict, report.ok) == ("too few in the time given", False)


def test_every_count_is_of_a_drill() -> None:
    assert set(PER_CHANGE) <= {f"{drill.fault.name} / {drill.subject}" for drill in DRILLS}


@pytest.mark.parametrize(
    ("what", "why"),
    [
        ({"faults": ("flood",)}, "no fault is named flood"),
        ({"faults": ("two-owners",), "subject": "ext4"}, "no drill"),
        ({"case": 3}, "belongs to one drill"),
    ],
)
async def test_an_order_that_means_nothing_is_refused(
    tmp_path: Path, what: dict[str, object], why: str
) -> None:
    with pytest.raises(Invalid, match=why):
        await torture(order(tmp_path, **what), untold)


def test_the_command_says_what_held_and_leaves_nothing(tmp_path: Path) -> None:
    run = CliRunner().invoke(
        app,
        [
            *("torture", "--engine", f"sqlite:///{tmp_path}/state.db", "--json"),
            *("--faults", "power-cut", "--subject", "blobs", "--seconds", "30", "--seed", "x"),
        ],
    )
    assert run.exit_code == 0
    report = msgspec.json.decode(run.stdout, type=Report)
    assert report.ok
    assert report.seed == "x"
    assert report.rows[0].cases > 10
    assert report.undrilled == undrilled(DRILLS)
    assert list(tmp_path.iterdir()) == []


def test_an_engine_that_promises_nothing_is_refused() -> None:
    run = CliRunner().invoke(app, ["torture", "--engine", "memory://"])
    assert isinstance(run.exception, Invalid)


def test_a_refused_order_leaves_nothing(tmp_path: Path) -> None:
    run = CliRunner().invoke(
        app, ["torture", "--engine", f"sqlite:///{tmp_path}/state.db", "--faults", "flood"]
    )
    assert isinstance(run.exception, Invalid)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("synced_less")
def test_the_command_ends_with_1_and_says_how_to_see_a_violation_again(tmp_path: Path) -> None:
    asked = ["--engine", f"sqlite:///{tmp_path}/state.db", "--faults", "power-cut"]
    run = CliRunner().invoke(app, ["torture", *asked, "--subject", "engine", "--seconds", "30"])
    assert run.exit_code == 1
    assert "VIOLATION power-cut / engine case" in run.stdout
    assert f"again: perdure torture --engine sqlite:///{tmp_path}/state.db --faults" in run.stdout
    (kept,) = tmp_path.iterdir()
    assert f"kept in {kept}" in run.stdout


class Lacking:
    """A drill that this machine cannot run."""

    fault = POWER_CUT
    subject: Subject = "engine"
    says = "nothing"

    def lacks(self) -> str | None:
        return "it needs root: run it as root, or believe the other drills."

    async def run(self, trial: Trial) -> None:
        raise AssertionError("it was run")


def test_what_could_not_be_tested_is_said_and_is_no_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proving_torture, "DRILLS", (Lacking(),))
    run = CliRunner().invoke(app, ["torture", "--engine", f"sqlite:///{tmp_path}/state.db"])
    assert run.exit_code == 1
    assert "not tested here: power-cut / engine: it needs root" in run.stdout
    assert "nothing was tested" in run.stdout
    assert "in no drill yet: process-crash / engine, process-crash / blobs," in run.stdout


class Idle(Lacking):
    """A drill that gets to no case in its time."""

    def lacks(self) -> str | None:
        return None

    async def run(self, trial: Trial) -> None:
        assert trial.cases == 0


def test_a_drill_that_judged_nothing_is_no_proof(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proving_torture, "DRILLS", (CutBlobs(), Idle()))
    command = ["torture", "--engine", f"sqlite:///{tmp_path}/state.db", "--seconds", "30"]
    run = CliRunner().invoke(app, command)
    assert run.exit_code == 0
    assert "1 drill judged nothing: give more --seconds" in run.stdout
