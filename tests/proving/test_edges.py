"""No durable edge is out of reach: a life of the server that uses every surface comes by most, the
tests that edges.toml names by the others, and what is left is named there with a reason. And what
the disks of the proofs do not see of the disk module or of SQLite is named as well."""

from __future__ import annotations

import asyncio
import inspect
import os
import random
import sys
import tomllib
from pathlib import Path

import apsw
import pytest

from perdure.core.disk import Disk
from perdure.proving import edges, powercut, refusing, watched
from perdure.proving.campaign import Campaign, Life, Stage
from perdure.proving.crashstates import RecordingDisk
from perdure.proving.drills.cuts import Recording
from perdure.proving.drills.failures import FailedCalls
from perdure.proving.edges import Edge, changes
from perdure.proving.powercut import PlatterDisk
from perdure.proving.refusing import RefusingDisk
from perdure.proving.watched import small_checkpoints
from tests.tidy.tree import ROOT

NAMED = tomllib.loads(Path(__file__).with_name("edges.toml").read_text())

LIVES = (
    Life(workers=1, steps=18, choices="edges", stop=True, kill_after_s=60),
    Life(
        workers=1,
        steps=22,
        choices="c",
        surfaces=("conversations", "responses"),
        stop=True,
        kill_after_s=60,
    ),
)


def trouble(found: list[Edge], reached: set[str], excused: dict[str, str]) -> list[str]:
    """What is wrong with the edges there are, those that were come by, and the excuses."""
    there = {edge.name for edge in found}
    return [
        *(
            f"nothing comes by {name}: let a life or a test of tests/proving/edges.toml use it"
            for name in sorted(there - reached - excused.keys())
        ),
        *(
            f"{name} is excused in tests/proving/edges.toml and need not be: delete the line"
            for name in sorted(excused.keys() - (there - reached))
        ),
    ]


# proves C3
async def test_every_durable_edge_is_come_by(tmp_path: Path) -> None:
    told = tmp_path / "edges"
    async with Stage(tmp_path) as stage:
        with Campaign(stage, tmp_path / "campaign", edges=told) as campaign:
            for life in LIVES:
                assert await campaign.live(life), campaign.verdict.violations
    tests = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "pytest", "-q", "-p", "tests.proving.witness"),
        *("-p", "no:cacheprovider", "--basetemp", str(tmp_path / "tests")),
        *NAMED["tests"],
        cwd=ROOT,
        env=os.environ | {"EDGES": str(told)},
        stdout=asyncio.subprocess.PIPE,
    )
    said, _ = await tests.communicate()
    assert tests.returncode == 0, said.decode()
    wrong = trouble(edges.edges(), edges.seen(told), NAMED["excused"])
    assert not wrong, "\n".join(wrong)


EDGE = Edge("services/files.py Files.put commit", "services/files.py", 7)


@pytest.mark.parametrize(
    ("reached", "excused", "wrong"),
    [
        (set(), {}, "nothing comes by services/files.py Files.put commit"),
        ({EDGE.name}, {EDGE.name: "why"}, "Files.put commit is excused"),
        ({EDGE.name}, {"services/gone.py gone commit": "why"}, "gone commit is excused"),
        (set(), {EDGE.name: "why"}, None),
        ({EDGE.name}, {}, None),
    ],
)
def test_an_edge_without_a_way_to_it_is_named(
    reached: set[str], excused: dict[str, str], wrong: str | None
) -> None:
    found = trouble([EDGE], reached, excused)
    assert (wrong in found[0]) if wrong else (found == [])


SYSTEM = {"os", "fcntl", "shutil", "tempfile", "mkdir", "unlink", "rmdir"}
"""What a method calls that asks the system itself, and not another method."""


@pytest.mark.parametrize("disk", [RefusingDisk, PlatterDisk, RecordingDisk])
def test_a_disk_of_the_proofs_sees_every_change(disk: type[Disk]) -> None:
    asking = {
        name
        for name in changes(Disk)
        if SYSTEM & set(inspect.unwrap(getattr(Disk, name)).__code__.co_names)
    }
    unseen = NAMED["unseen"]["any"] | NAMED["unseen"].get(disk.__name__, {})
    assert asking - vars(disk).keys() == set(unseen)


@pytest.mark.parametrize("module", [watched, powercut, refusing])
def test_a_file_of_sqlite_is_seen_by_every_proof(module: object) -> None:
    (kind,) = [
        kind
        for _, kind in inspect.getmembers(module, inspect.isclass)
        if issubclass(kind, apsw.VFSFile)
    ]
    assert {"xWrite", "xTruncate", "xSync"} <= vars(kind).keys()


async def test_every_kind_of_call_that_sqlite_makes_is_refused_in_turn(tmp_path: Path) -> None:
    with small_checkpoints():
        recording = Recording(tmp_path / "state.db", random.Random(1))
        await recording.run(8)
    calls = {call for call in recording.disk.counts if call[0] != "read"}
    assert calls == {(call, suffix) for call, suffix, _ in FailedCalls.calls}
