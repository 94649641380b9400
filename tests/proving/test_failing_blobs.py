"""Blobs that do the wrong thing on a disk that fails are caught."""

from __future__ import annotations

from contextlib import nullcontext, suppress
from pathlib import Path

import pytest

from perdure.core.disk import Disk, Writer
from perdure.core.errors import Unavailable
from perdure.engines import blobs_local
from perdure.proving.drills.drill import Trial
from perdure.proving.drills.failing_blobs import FAILING_BLOBS, FailingBlobs

FAILED, FULL, READ_ONLY = FAILING_BLOBS


async def found(drill: FailingBlobs, home: Path) -> list[str]:
    trial = Trial(home, "1", seconds=30)
    await drill.run(trial)
    return [violation.what for violation in trial.violations]


async def test_a_put_that_hides_a_failed_sync_and_rename_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish = Writer.publish

    def hides(writer: Writer, path: Path) -> None:
        with suppress(OSError, Unavailable):
            publish(writer, path)

    monkeypatch.setattr(Writer, "publish", hides)
    assert any("acknowledged" in what for what in await found(FAILED, tmp_path))


async def test_bytes_left_lying_about_are_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Writer, "discard", lambda writer: None)
    monkeypatch.setattr(Disk, "remove", lambda disk, path: None)
    assert any("verify" in what for what in await found(FULL, tmp_path))


# proves C10
async def test_what_the_system_says_never_leaves_the_blobs_in_its_own_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A temporary file that cannot be removed raised the system's own error, which a client of the
    server met as an internal one."""
    assert await found(READ_ONLY, tmp_path / "as it is") == []
    monkeypatch.setattr(blobs_local, "translated", nullcontext)
    assert any("not in our words" in what for what in await found(READ_ONLY, tmp_path / "bare"))
