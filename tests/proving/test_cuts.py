"""The states of a power cut are the same in every run of a seed: a case can be seen again."""

from __future__ import annotations

import random
from pathlib import Path

from perdure.engines import sqlite_driver
from perdure.proving.catching import replaced
from perdure.proving.drills.cuts import CutEngine, Moment, Recording
from perdure.proving.drills.drill import Trial
from perdure.proving.watched import small_checkpoints


async def recorded(home: Path, seed: str) -> list[Moment]:
    home.mkdir()
    with small_checkpoints():
        return await Recording(home / "state.db", random.Random(seed)).run(8)


def shape(moment: Moment) -> object:
    """All that decides which states there are: ids and times within the bytes do not."""
    sizes = {name: len(data) for name, data in moment.contents.synced.items()}
    loose = [(write.name, write.offset, len(write.data)) for write in moment.contents.loose]
    return sizes, loose, len(moment.marks), moment.acknowledged, moment.begun


async def test_a_seed_gives_one_recording(tmp_path: Path) -> None:
    first, again, other = [
        [shape(moment) for moment in await recorded(tmp_path / name, name[0])]
        for name in ("1", "1 again", "2")
    ]
    assert first == again
    assert first != other


async def test_groups_are_of_every_size_and_some_lie_in_the_midst_of_a_checkpoint(
    tmp_path: Path,
) -> None:
    moments = await recorded(tmp_path / "store", "1")
    waiting = {sum(one.begun.values()) - sum(one.acknowledged.values()) for one in moments}
    assert waiting == {0, 1, 2, 3}
    assert any(
        {write.name for write in one.contents.loose} == {"state.db", "state.db-wal"}
        for one in moments
    )


async def test_a_case_that_shows_a_violation_shows_it_again(tmp_path: Path) -> None:
    """SQLite syncs with the next checkpoint only."""
    force = sqlite_driver._force
    with replaced(
        sqlite_driver,
        "_force",
        lambda connection, pragma, value: force(
            connection, pragma, 1 if pragma == "synchronous" else value
        ),
    ):
        trial = Trial(tmp_path / "first", "1", seconds=60)
        await CutEngine().run(trial)
        seen = trial.violations[0]
        alone = Trial(tmp_path / "again", "1", seconds=60, case=seen.case)
        await CutEngine().run(alone)
    again = [one.what.replace(str(alone.home), str(trial.home)) for one in alone.violations]
    assert seen.what in again
