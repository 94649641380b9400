"""The drills of damage can fail: an engine that checks no rows, one that checks no pages, and blobs
that are not verified give themselves away."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import apsw
import pytest

from perdure.core.keys import Key
from perdure.core.layouts import Records
from perdure.core.values import Finding, Record
from perdure.engines import sqlite, sqlite_driver, sqlite_schema
from perdure.engines.blobs_local import LocalBlobs
from perdure.proving.drills.damage import DamagedBlobs, DamagedEngine
from perdure.proving.drills.drill import Drill, Trial


class UntilOne(Trial):
    """A trial that one violation ends."""

    @property
    def over(self) -> bool:
        return bool(self.violations) or super().over


async def found(drill: Drill, home: Path) -> list[str]:
    """What the first case that is not right is found guilty of."""
    trial = UntilOne(home, "1", seconds=60)
    await drill.run(trial)
    return [one.what for one in trial.violations]


# proves C8
async def test_an_engine_that_checks_no_rows_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unchecked(records: Records[Any], key: Key, place: str, row: Any) -> Record[Any]:
        version, _, value, attachment = row
        return Record(key, version, records.decode(key, value), attachment)

    for module in (sqlite, sqlite_schema):
        monkeypatch.setattr(module, "checked_record", unchecked)
    wrong = await found(DamagedEngine(), tmp_path)
    assert any("alter" in one and "was stored" in one for one in wrong)


# proves C8
async def test_an_engine_that_checks_no_pages_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require: Callable[[apsw.Connection, str, object], None] = sqlite_driver._require

    def lax(connection: apsw.Connection, pragma: str, value: object) -> None:
        if pragma == "checksum_verification":
            connection.pragma(pragma, 0)
        else:
            require(connection, pragma, value)

    monkeypatch.setattr(sqlite_driver, "_require", lax)
    assert await found(DamagedEngine(), tmp_path) != []


# proves C7
async def test_blobs_that_are_read_unverified_are_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def read(blobs: LocalBlobs, digest: str) -> AsyncIterator[bytes]:
        yield blobs._path(digest).read_bytes()

    monkeypatch.setattr(LocalBlobs, "read", read)
    wrong = await found(DamagedBlobs(), tmp_path)
    assert any("other bytes than were stored" in one for one in wrong)


# proves C7
async def test_a_verification_that_reads_no_blobs_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unread(blobs: LocalBlobs, digest: str) -> Finding | None:
        return None

    monkeypatch.setattr(LocalBlobs, "_verify", unread)
    wrong = await found(DamagedBlobs(), tmp_path)
    assert any("verify does not name it" in one for one in wrong)
