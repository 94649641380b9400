"""Backups of a sqlite store: one moment of it, whatever is written, read or broken meanwhile."""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest

from perdure.core.batch import append, put
from perdure.core.engine import Snapshot
from perdure.core.errors import Closed, Damaged, Invalid, PerdureError, StorageFull, Unavailable
from perdure.engines import restore_engine, sqlite_backup, sqlite_checkpoint, sqlite_driver
from perdure.engines.sqlite import SqliteEngine
from perdure.engines.sqlite_wal import FRAME_BYTES
from perdure.proving.steps import EVENTS, LAYOUTS, NOTES, Note
from tests.engines.sqlite_stores import opened

MIB = 1024 * 1024


def ignored(done: int, total: int) -> None:
    pass


async def filled(path: Path, mib: int = 4) -> SqliteEngine:
    engine = await opened(path)
    for number in range(mib):
        notes = [put(NOTES, ("t", f"{number}-{at}"), Note("x" * 64 * 1024)) for at in range(16)]
        batch = notes[0]
        for more in notes[1:]:
            batch += more
        await engine.commit(batch + append(EVENTS, ("t", "s"), [Note(f"{number}")]))
    return engine


def emptied(path: Path) -> Path:
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    return path


async def restore(into: Path, copy: Path) -> SqliteEngine:
    await restore_engine(f"sqlite:///{into / 'r.db'}", copy, LAYOUTS, ignored)
    return await opened(into / "r.db")


# proves C17
async def test_a_backup_is_one_moment_while_writers_and_readers_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log grows past the bound at which readers are otherwise interrupted; nobody is."""
    monkeypatch.setattr(sqlite_backup, "_STEP_PAGES", 1)
    monkeypatch.setattr(sqlite_checkpoint, "_MAKE_WAY_FRAMES", 4 * MIB // FRAME_BYTES)
    engine = await filled(tmp_path / "a.db", 12)
    slowest_s, number, largest_bytes = 0.0, 0, 0

    async def write() -> None:
        nonlocal slowest_s, number, largest_bytes
        while not backing_up.done():
            number += 1
            began_s = time.monotonic()
            record = put(NOTES, ("t", "pair"), Note(f"{number}"), attachment=b"y" * MIB)
            await engine.commit(record + append(EVENTS, ("t", "pair"), [Note(f"{number}")]))
            slowest_s = max(slowest_s, time.monotonic() - began_s)
            largest_bytes = max(largest_bytes, engine.stats.log_size_bytes)

    async def read() -> None:
        while not backing_up.done():
            assert len((await engine.scan(NOTES, ("t",), limit=1_000)).items) >= 12 * 16

    backing_up = asyncio.create_task(engine.backup(emptied(tmp_path / "copy"), ignored))
    await asyncio.gather(write(), read())
    snapshot = await backing_up
    assert largest_bytes > 6 * MIB
    assert slowest_s < 3
    assert (snapshot.store_id, snapshot.number < number + 20) == (engine.store_id, True)
    restored = await restore(tmp_path / "r", tmp_path / "copy")
    pair = await restored.get(NOTES, ("t", "pair"))
    assert (await restored.tip(EVENTS, ("t", "pair"))).last == (int(pair.value.text) if pair else 0)
    assert restored.store_id != engine.store_id
    await restored.close()
    for _ in range(60):  # what has piled up is moved, and the bound is kept again
        await engine.commit(put(NOTES, ("t", "after"), Note("z"), attachment=b"z" * MIB))
    assert engine.stats.log_size_bytes < 64 * MIB
    await engine.close()


async def test_a_store_nobody_holds_is_backed_up_without_touching_it(tmp_path: Path) -> None:
    await (await filled(tmp_path / "a.db")).close()
    before = (tmp_path / "a.db").read_bytes()
    engine = await opened(tmp_path / "a.db", read_only=True)
    snapshot = await engine.backup(emptied(tmp_path / "copy"), ignored)
    await engine.close()
    assert (tmp_path / "a.db").read_bytes() == before
    assert [path.name for path in (tmp_path / "copy").iterdir()] == ["perdure.db"]
    assert snapshot.number > 4


async def test_one_backup_at_a_time(tmp_path: Path) -> None:
    engine = await filled(tmp_path / "a.db")
    first = asyncio.create_task(engine.backup(emptied(tmp_path / "one"), ignored))
    await asyncio.sleep(0)
    with pytest.raises(Unavailable, match="under way"):
        await engine.backup(emptied(tmp_path / "two"), ignored)
    await first
    await engine.backup(emptied(tmp_path / "two"), ignored)
    await engine.close()


# proves C17
async def test_a_backup_gives_up_before_the_log_fills_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_backup, "_STEP_PAGES", 1)
    monkeypatch.setattr(sqlite_backup, "LOG_BYTES_MAX", 2 * MIB)
    engine = await filled(tmp_path / "a.db")
    backing_up = asyncio.create_task(engine.backup(emptied(tmp_path / "copy"), ignored))
    while not backing_up.done():
        await engine.commit(put(NOTES, ("t", "more"), Note("x"), attachment=b"x" * MIB))
    with pytest.raises(Unavailable, match="Back up while less is written"):
        await backing_up
    await engine.close()


async def test_a_cancelled_backup_lets_go_and_the_next_one_works(tmp_path: Path) -> None:
    engine = await filled(tmp_path / "a.db")
    reached = asyncio.Event()
    backing_up = asyncio.create_task(
        engine.backup(emptied(tmp_path / "copy"), lambda done, total: reached.set())
    )
    await reached.wait()
    backing_up.cancel()
    with pytest.raises(asyncio.CancelledError):
        await backing_up
    assert isinstance(await engine.backup(emptied(tmp_path / "copy"), ignored), Snapshot)
    await engine.close()


async def test_closing_ends_a_backup(tmp_path: Path) -> None:
    engine = await filled(tmp_path / "a.db")
    reached = asyncio.Event()
    backing_up = asyncio.create_task(
        engine.backup(emptied(tmp_path / "copy"), lambda done, total: reached.set())
    )
    await reached.wait()
    await engine.close()
    with pytest.raises(Closed):
        await backing_up
    with pytest.raises(Closed):
        await engine.backup(emptied(tmp_path / "copy"), ignored)


# proves C17
async def test_damage_is_not_backed_up_as_if_it_were_sound(tmp_path: Path) -> None:
    await (await filled(tmp_path / "a.db")).close()
    data = bytearray((tmp_path / "a.db").read_bytes())
    data[data.rfind(b"x" * 64) + 5] ^= 1
    (tmp_path / "a.db").write_bytes(data)
    engine = await opened(tmp_path / "a.db")
    with pytest.raises(Damaged):
        await engine.backup(emptied(tmp_path / "copy"), ignored)
    await engine.close()


# proves C17
async def test_a_row_that_fits_its_page_and_not_its_checksum_is_not_backed_up(
    tmp_path: Path,
) -> None:
    await (await filled(tmp_path / "a.db", 1)).close()
    with closing(sqlite_driver.connect(str(tmp_path / "a.db"))) as beside:
        beside.execute("UPDATE records_notes SET version = 2 WHERE key LIKE '%0-7'")
    engine = await opened(tmp_path / "a.db")
    with pytest.raises(Damaged, match="0-7"):
        await engine.backup(emptied(tmp_path / "copy"), ignored)
    await engine.close()


# proves C17
async def test_a_flipped_byte_anywhere_in_a_copy_is_refused_or_harmless(tmp_path: Path) -> None:
    engine = await opened(tmp_path / "a.db")
    for number in range(40):
        await engine.commit(
            put(NOTES, ("t", f"{number}"), Note("x" * 100, "open", number))
            + append(EVENTS, ("t", f"{number % 3}"), [Note("e")])
        )
    await engine.backup(emptied(tmp_path / "copy"), ignored)
    await engine.close()
    sound = (tmp_path / "copy" / "perdure.db").read_bytes()
    wanted = await contents(await restore(tmp_path / "sound", tmp_path / "copy"))
    refused = 0
    for at in range(0, len(sound), 1_021):
        bad = bytearray(sound)
        bad[at] ^= 0x10
        (tmp_path / "copy" / "perdure.db").write_bytes(bad)
        into = emptied(tmp_path / "r")
        try:
            restored = await restore(into, tmp_path / "copy")
        except PerdureError:
            refused += 1
            assert not (into / "r.db").exists()
        else:
            assert await contents(restored) == wanted, f"byte {at} changed an answer"
    assert refused > 0.9 * len(sound) / 1_021


async def contents(engine: SqliteEngine) -> list[object]:
    found: list[object] = list((await engine.scan(NOTES, ("t",), limit=1_000)).items)
    for stream in (await engine.streams(EVENTS, ("t",), limit=1_000)).items:
        found += await engine.read(EVENTS, stream, limit=1_000)
    await engine.close()
    return found


async def test_a_store_is_never_restored_over_another(tmp_path: Path) -> None:
    engine = await filled(tmp_path / "a.db")
    await engine.backup(emptied(tmp_path / "copy"), ignored)
    await engine.close()
    before = (tmp_path / "a.db").read_bytes()
    with pytest.raises(Invalid, match="empty place"):
        await restore_engine(f"sqlite:///{tmp_path / 'a.db'}", tmp_path / "copy", LAYOUTS, ignored)
    assert (tmp_path / "a.db").read_bytes() == before
    with pytest.raises(Invalid, match="sqlite:///"):
        await restore_engine("memory://", tmp_path / "copy", LAYOUTS, ignored)


async def test_another_database_is_not_restored(tmp_path: Path) -> None:
    copy = emptied(tmp_path / "copy")
    sqlite3.connect(copy / "perdure.db").execute("CREATE TABLE a (b)").connection.close()
    with pytest.raises(Invalid, match="not a Perdure store"):
        await restore(tmp_path / "r", copy)
    assert not list((tmp_path / "r").glob("r.db*.tmp*"))


async def test_a_disk_that_fills_up_is_said_to_be_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy may not be larger than a few pages, as on a disk without space."""
    engine = await filled(tmp_path / "a.db")
    opens = sqlite_backup._open_copy

    def small(target: Path, vfs: str | None) -> object:
        copy = opens(target, vfs)
        copy.pragma("max_page_count", 50)
        return copy

    monkeypatch.setattr(sqlite_backup, "_open_copy", small)
    with pytest.raises(StorageFull):
        await engine.backup(emptied(tmp_path / "copy"), ignored)
    monkeypatch.undo()
    await engine.commit(put(NOTES, ("t", "goes on"), Note("x")))
    await engine.backup(emptied(tmp_path / "copy"), ignored)
    await engine.close()
