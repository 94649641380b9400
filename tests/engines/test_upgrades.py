"""An upgrade between formats is cut off, and its store is old or new, and goes on by itself. The
steps are steps of tests: there has been one format so far."""

from __future__ import annotations

from pathlib import Path

from perdure.proving.upgrades import cut_files, cut_sqlite, upgraded_over_a_bad_snapshot


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
