"""An upgrade between formats is cut off, and its store is old or new, and goes on by itself. The
steps are steps of tests: there has been one format so far."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from perdure.core.batch import put
from perdure.core.clock import SystemClock
from perdure.core.disk import Disk
from perdure.core.errors import NewerFormat
from perdure.engines.files import FilesEngine
from perdure.engines.sqlite import SqliteEngine
from perdure.proving.subject import FACTS, LAYOUTS, Note
from perdure.proving.upgrades import (
    FILES_STEPS,
    SQLITE_STEPS,
    cut_files,
    cut_sqlite,
    upgraded_over_a_bad_snapshot,
)


# proves C16
async def test_an_upgrade_of_a_database_that_is_cut_off_leaves_the_old_or_the_new(
    tmp_path: Path,
) -> None:
    states, wrong = await cut_sqlite(tmp_path)
    assert wrong == []
    assert states > 20


# proves C16
async def test_an_upgrade_of_plain_files_that_is_cut_off_leaves_the_old_or_the_new(
    tmp_path: Path,
) -> None:
    states, wrong = await cut_files(tmp_path)
    assert wrong == []
    assert states > 150


# proves C16
async def test_nothing_is_upgraded_over_a_bad_snapshot(tmp_path: Path) -> None:
    assert await upgraded_over_a_bad_snapshot(tmp_path) is None


# proves C16
@pytest.mark.parametrize(
    ("engine", "steps"), [(SqliteEngine, SQLITE_STEPS), (FilesEngine, FILES_STEPS)]
)
async def test_a_newer_format_is_refused_byte_for_byte_untouched(
    engine: Any, steps: Any, tmp_path: Path
) -> None:
    at = (str(tmp_path / "state.db"), LAYOUTS)
    parts = {"clock": SystemClock(), "disk": Disk()}
    newer = await engine.open(*at, **parts, steps=steps)
    await newer.commit(put(FACTS, ("t", "1"), Note(rank=1)))
    await newer.close()
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    for read_only in (True, False):
        with pytest.raises(NewerFormat, match=r"format 3.*up to 1.*left untouched"):
            await engine.open(*at, **parts, read_only=read_only)
        after = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
        assert after == before
