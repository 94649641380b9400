"""What a copy finds out before it calls itself complete: planted, each of these would be a store
that is not what it was copied from."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import apsw
import msgspec
import pytest

from perdure import library
from perdure.core.batch import append, put
from perdure.core.clock import SystemClock
from perdure.core.engine import Engine
from perdure.core.errors import Damaged, LimitExceeded, Unavailable
from perdure.core.rows import At, RecordRow, Row, Rows, StreamRow
from perdure.engines import files, open_blobs, open_engine
from perdure.engines.wrapping import Wrapping
from perdure.services import copying
from perdure.services.blobs import BlobKeeper
from perdure.services.copying import Copied
from perdure.surfaces.blobs import REFERENCES, Reference
from perdure.surfaces.conversations import CONVERSATIONS, Conversation
from perdure.surfaces.jobs import JOB_EVENTS, JobEvent
from perdure.surfaces.state import LAYOUTS

KEY = ("default", "conv_1")
EVENT = JobEvent(type="began", attempt=1, at_s=1, runner="boot_1")


class ChangesAValue(Wrapping):
    """Writes what would pass every checksum, and is not what it was given."""

    async def load(self, rows: Sequence[Row], *, complete: bool = False) -> None:
        changed = [
            msgspec.structs.replace(row, value=row.value.replace(b"given", b"other"))
            if isinstance(row, RecordRow) and row.value
            else row
            for row in rows
        ]
        await super().load(changed, complete=complete)


class LosesTheLastEntry(Wrapping):
    async def load(self, rows: Sequence[Row], *, complete: bool = False) -> None:
        cut = [
            msgspec.structs.replace(row, values=row.values[:-1])
            if isinstance(row, StreamRow)
            else row
            for row in rows
        ]
        await super().load(cut, complete=complete)


class IsWrittenTo(Wrapping):
    """A source that somebody writes to between the copy and the look at both sides."""

    pages = 0

    async def rows(self, *, after: At | None = None, partition: str | None = None) -> Rows:
        page = await super().rows(after=after, partition=partition)
        self.pages += 1
        if self.pages == 1:
            await self.engine.commit(put(CONVERSATIONS, KEY, Conversation(2, {})))
        return page


async def source() -> Engine:
    engine = await open_engine("memory://", LAYOUTS)
    await engine.commit(put(CONVERSATIONS, KEY, Conversation(1, {"as": "given"})))
    await engine.commit(append(JOB_EVENTS, ("default", "job"), [EVENT, EVENT]))
    return engine


async def copy(source: Engine, target: Engine) -> Copied:
    blobs, clock = await open_blobs("memory://"), SystemClock()
    keeper = BlobKeeper(target, blobs, clock, "boot")
    return await copying.copy(source, target, blobs, keeper, lambda *told: None)


async def target_of(source: Engine, tmp_path: Path) -> Engine:
    url = f"sqlite:///{tmp_path / 'copy.db'}"
    return await open_engine(url, LAYOUTS, copy_of=source.store_id)


# proves C17
@pytest.mark.parametrize(
    ("planted", "named"), [(ChangesAValue, "conversations"), (LosesTheLastEntry, "job_events")]
)
async def test_a_copy_that_is_not_the_same_is_never_complete(
    planted: type[Wrapping], named: str, tmp_path: Path
) -> None:
    given = await source()
    target = await target_of(given, tmp_path)
    with pytest.raises(Unavailable, match=f"{named} differ"):
        await copy(given, planted(target))
    await target.close()
    with pytest.raises(Unavailable, match="is not complete"):
        await open_engine(f"sqlite:///{tmp_path / 'copy.db'}", LAYOUTS)


# proves C17
async def test_a_source_that_is_written_to_meanwhile_is_found_out(tmp_path: Path) -> None:
    given = IsWrittenTo(await source())
    target = await target_of(given, tmp_path)
    with pytest.raises(Unavailable, match="was written to since"):
        await copy(given, target)
    await target.close()


# proves C17, C4
async def test_a_copy_without_the_bytes_that_its_records_name_is_not_complete(
    tmp_path: Path,
) -> None:
    given = await source()
    await given.commit(put(REFERENCES, ("default", "0" * 64, "files/1"), Reference("0" * 64, 7)))
    target = await target_of(given, tmp_path)
    with pytest.raises(Damaged, match="now it is absent"):
        await copy(given, target)
    await target.close()


# proves C17, C7
async def test_a_damaged_row_ends_a_copy_and_is_named(tmp_path: Path) -> None:
    path = tmp_path / "perdure.db"
    async with library.open(f"sqlite:///{path}") as state:
        await state.commit(put(CONVERSATIONS, KEY, Conversation(1, {"as": "given"})))

    def damage() -> None:
        connection = apsw.Connection(str(path), vfs="cksmvfs")
        connection.execute("UPDATE records_conversations SET version = 7")
        connection.close()

    await asyncio.to_thread(damage)
    blobs = f"file:///{tmp_path / 'blobs'}"
    with pytest.raises(Damaged, match="conversations conv_1"):
        await library.copy(
            f"sqlite:///{path}", f"sqlite:///{tmp_path / 'b.db'}", blobs, blobs, lambda *told: None
        )


# proves C17
async def test_what_is_too_much_for_plain_files_is_refused_before_any_of_it_is_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = f"sqlite:///{tmp_path / 'a.db'}", f"file:///{tmp_path / 'b'}"
    blobs = f"file:///{tmp_path / 'blobs'}"
    async with library.open(source) as state:
        for number in range(3):
            await state.commit(put(CONVERSATIONS, ("default", f"c{number}"), Conversation(1, {})))
        await state.commit(append(JOB_EVENTS, ("default", "job"), [EVENT] * 9))
    monkeypatch.setattr(files, "PLACES_MAX", 3)
    with pytest.raises(LimitExceeded, match=r"kept in file:///\S+ is 4, over the limit of 3"):
        await library.copy(source, target, blobs, blobs, lambda *told: None)
    assert [path.name for path in (tmp_path / "b").iterdir()] == [".perdure"]
    monkeypatch.setattr(files, "PLACES_MAX", 4)
    copied = await library.copy(source, target, blobs, blobs, lambda *told: None)
    assert copied.counts == {"conversations": 3, "job_events": 9}
