"""The disk that forgets, itself: what it may lose and what it must keep."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from perdure.proving.powercut import Platter

SEEDS = [str(seed) for seed in range(24)]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    data = tmp_path / "data"
    data.mkdir()
    (data / "old").write_bytes(b"old")
    return data


def outcomes(platter: Platter, home: Path, name: str) -> set[bytes | None]:
    """What a file may be after a cut."""
    found: set[bytes | None] = set()
    for survivor in survivors(platter, home):
        path = survivor / name
        found.add(path.read_bytes() if path.exists() else None)
    return found


def survivors(platter: Platter, home: Path) -> Iterator[Path]:
    for seed in SEEDS:
        into = home / f"cut-{seed}"
        platter.cut(into, seed)
        platter._lock.release()
        yield into


def test_what_was_there_stays(data: Path, tmp_path: Path) -> None:
    assert outcomes(Platter(data), tmp_path, "old") == {b"old"}


def test_a_published_file_is_there(data: Path, tmp_path: Path) -> None:
    platter = Platter(data)
    platter.disk.write_file(data / "new", b"whole")
    assert outcomes(platter, tmp_path, "new") == {b"whole"}


def test_a_rename_without_a_synced_directory_may_be_lost(data: Path, tmp_path: Path) -> None:
    platter = Platter(data)
    disk = platter.disk
    fd = disk.open_new(data / "new.tmp")
    disk.write_all(fd, b"whole", data / "new.tmp")
    disk.sync(fd, data / "new.tmp")
    disk.replace(data / "new.tmp", data / "old")
    assert outcomes(platter, tmp_path, "old") == {b"old", b"whole"}


def test_a_rename_before_the_sync_of_its_file_may_be_empty(data: Path, tmp_path: Path) -> None:
    platter = Platter(data)
    disk = platter.disk
    fd = disk.open_new(data / "new.tmp")
    disk.write_all(fd, b"whole", data / "new.tmp")
    disk.replace(data / "new.tmp", data / "new")
    disk.sync_directory(data)
    assert {b"", b"whole"} <= outcomes(platter, tmp_path, "new")


def test_overwriting_without_a_sync_may_be_lost(data: Path, tmp_path: Path) -> None:
    platter = Platter(data)
    fd = platter.disk.open_fixed(data / "fixed", 4)
    platter.disk.overwrite(fd, b"mark", 0)
    assert outcomes(platter, tmp_path, "fixed") == {bytes(4), b"mark"}


def test_a_log_that_is_made_anew_and_synced_is_there(data: Path, tmp_path: Path) -> None:
    platter = Platter(data)
    log = data / "old"
    platter.named(log, None)
    platter.opened(log)
    platter.changed(log, (0, b"new"))
    assert None in outcomes(platter, tmp_path / "before", "old")
    platter.synced(log, name_too=True)
    assert outcomes(platter, tmp_path / "after", "old") == {b"new"}
