"""The committer's thread: nobody waits for ever where it ends by a mistake of ours."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from perdure.core.batch import put
from perdure.core.errors import CommitUnknown, Unavailable
from perdure.engines.sqlite_checkpoint import Checkpointer
from perdure.proving.steps import NOTES, Note
from tests.engines.sqlite_stores import opened


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_a_bug_in_the_committer_refuses_writes_and_hangs_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = await opened(tmp_path / "state.db")

    def broken(*_: object) -> None:
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr(Checkpointer, "after_group", broken)
    async with asyncio.timeout(10):
        await engine.commit(put(NOTES, ("t", "a"), Note("kept")))
        for _ in range(3):
            with pytest.raises((CommitUnknown, Unavailable)):
                await engine.commit(put(NOTES, ("t", "b"), Note("refused")))
        assert engine.latched == "the committer stopped by an internal error"
        assert await engine.get(NOTES, ("t", "a")) is not None
        await engine.close()
    again = await opened(tmp_path / "state.db")
    assert await again.get(NOTES, ("t", "a")) is not None
    await again.close()
