"""Salvage of a sqlite store: what is sound is brought over as it was, what is not is named, and the
damaged store stays as it was found."""

from __future__ import annotations

from pathlib import Path

import apsw
import pytest

from perdure.core.batch import delete, drop
from perdure.core.errors import Damaged, Invalid, StoreLocked
from perdure.core.values import Lost
from perdure.engines import open_engine, salvage_engine
from perdure.engines.sqlite_driver import PAGE_BYTES, connect
from perdure.proving.steps import EVENTS, LAYOUTS, NOTES, TENANT, step
from tests.engines.sqlite_stores import damage, opened

STEPS = 60


async def filled(path: Path, *, killed: bool = False) -> dict[str, bytes]:
    """A store of known steps, with a deleted record and a dropped stream; its files."""
    engine = await opened(path)
    for number in range(1, STEPS + 1):
        await engine.commit(step(0, number).named(f"step {number}"))
    await engine.commit(step(1, 1))
    await engine.commit(delete(NOTES, (TENANT, "w1-1")) + drop(EVENTS, (TENANT, "w1")))
    if killed:
        left = files(path.parent)
        await engine.close()
        for name, data in left.items():
            (path.parent / name).write_bytes(data)
    await engine.close()
    return files(path.parent)


def files(directory: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes() for path in directory.iterdir() if path.suffix != ".db-shm"
    }


async def salvaged(path: Path, into: Path) -> list[Lost]:
    made = await salvage_engine(
        f"sqlite:///{path}", f"sqlite:///{into}", LAYOUTS, lambda what, done: None
    )
    assert [it.name for it in into.parent.iterdir() if it.name.endswith(".tmp")] == []
    return made.lost


async def there(path: Path) -> tuple[set[int], int]:
    """Which steps have their record, as it was written, and how many entries there are; the store
    is sound and can be written."""
    engine = await opened(path)
    assert await damage(engine) == []
    whole = set()
    for number in range(1, STEPS + 1):
        found = await engine.get(NOTES, (TENANT, f"w0-{number}"))
        if found is not None:
            assert (found.value, found.version) == (
                step(0, number).ops[0].records.decode(found.key, step(0, number).ops[0].value),
                1,
            )
            whole.add(number)
    tip = await engine.tip(EVENTS, (TENANT, "w0"))
    entries = await engine.read(EVENTS, (TENANT, "w0"), limit=STEPS)
    assert [it.seq for it in entries] == list(range(1, tip.last + 1))
    await engine.commit(step(7, 1))
    await engine.close()
    return whole, tip.last


def change(path: Path, sql: str, *values: object) -> None:
    """Through SQLite, so that page checksums fit and only the row's own does not."""
    connection = connect(str(path))
    connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 0)
    connection.execute(sql, values)
    connection.close()


# proves C7
async def test_of_a_sound_store_everything_comes_over_and_nothing_is_lost(tmp_path: Path) -> None:
    path, into = tmp_path / "a" / "state.db", tmp_path / "b" / "state.db"
    before = await filled(path)
    assert await salvaged(path, into) == []
    assert files(path.parent) == before
    engine = await opened(into)
    assert await engine.commit(step(0, 3).named("step 3"))  # it is known, and not done again
    assert (await engine.commit(step(1, 1))).numbers[0] == 3  # above the version of the tombstone
    assert (await engine.tip(EVENTS, (TENANT, "w1"))).incarnation == 2
    await engine.close()
    assert await there(into) == (set(range(1, STEPS + 1)), STEPS)


# proves C7
async def test_a_changed_row_is_named_and_all_else_comes_over(tmp_path: Path) -> None:
    path, into = tmp_path / "a" / "state.db", tmp_path / "b" / "state.db"
    await filled(path)
    change(path, "UPDATE records_notes SET value = x'7b7d' WHERE key LIKE '%w0-17'")
    before = files(path.parent)
    assert await salvaged(path, into) == [
        Lost("notes", "it does not match its checksum", f"{TENANT}/w0-17")
    ]
    assert files(path.parent) == before
    assert await there(into) == (set(range(1, STEPS + 1)) - {17}, STEPS)


# proves C7
async def test_a_stream_is_kept_up_to_its_first_damaged_entry(tmp_path: Path) -> None:
    path, into = tmp_path / "a" / "state.db", tmp_path / "b" / "state.db"
    await filled(path)
    change(path, "UPDATE entries SET value = x'7b7d' WHERE id & 0xffffffff = 41")
    (lost,) = await salvaged(path, into)
    assert (lost.collection, lost.key, lost.entries) == ("events", f"{TENANT}/w0", (41, STEPS))
    assert await there(into) == (set(range(1, STEPS + 1)), 40)


# proves C7
@pytest.mark.parametrize("at", [0, 5, 2000])
async def test_a_byte_changed_in_any_page_costs_no_more_than_what_it_is_in(
    tmp_path: Path, at: int
) -> None:
    path = tmp_path / "a" / "state.db"
    await filled(path)
    sound = path.read_bytes()
    for page in range(len(sound) // PAGE_BYTES):
        hurt = bytearray(sound)
        hurt[page * PAGE_BYTES + at] ^= 0x10
        path.write_bytes(hurt)
        into = tmp_path / f"into-{page}" / "state.db"
        try:
            lost = await salvaged(path, into)
        except Damaged:
            assert page == 0
            continue
        whole, entries = await there(into)
        named = {one.key for one in lost if one.collection == "notes"}
        blind = any(one.key is None for one in lost)
        for number in range(1, STEPS + 1):
            assert number in whole or f"{TENANT}/w0-{number}" in named or blind, (page, number)
        assert entries == STEPS or lost, page


# proves C7
async def test_of_a_log_that_lost_commits_what_is_left_comes_over(tmp_path: Path) -> None:
    path, into = tmp_path / "a" / "state.db", tmp_path / "b" / "state.db"
    await filled(path, killed=True)
    log = path.with_name("state.db-wal")
    hurt = bytearray(log.read_bytes())
    hurt[len(hurt) // 2] ^= 1
    log.write_bytes(hurt)
    with pytest.raises(Damaged):
        await opened(path)
    before = files(path.parent)
    (lost,) = await salvaged(path, into)
    assert lost.collection == ""
    assert "are gone" in lost.why
    assert files(path.parent) == before
    whole, entries = await there(into)
    assert whole == set(range(1, entries + 1))
    assert 0 < entries < STEPS


async def test_what_is_not_to_be_salvaged_is_refused(tmp_path: Path) -> None:
    path, into = tmp_path / "a" / "state.db", tmp_path / "b" / "state.db"
    await filled(path)
    with pytest.raises(Invalid, match="exists"):
        await salvaged(path, path)
    engine = await open_engine(f"sqlite:///{path}", LAYOUTS)
    with pytest.raises(StoreLocked):
        await salvaged(path, into)
    await engine.close()
    with pytest.raises(Invalid, match="a salvage goes from"):
        await salvage_engine("memory://", f"sqlite:///{into}", LAYOUTS, print)
    other = tmp_path / "other.db"
    apsw.Connection(str(other)).execute("CREATE TABLE t (a)")
    with pytest.raises(Invalid, match="not a Perdure store"):
        await salvaged(other, into)
    assert not into.exists()
