"""The sqlite engine beyond what every engine must do: who owns a store, which stores it refuses,
what a read costs, and what is forgotten in time."""

from __future__ import annotations

import asyncio
import os
from contextlib import closing
from pathlib import Path
from typing import Any

import apsw
import pytest

from perdure.core.batch import append, delete, drop, put
from perdure.core.clock import SystemClock
from perdure.core.cursors import Position, Question
from perdure.core.disk import Disk
from perdure.core.errors import (
    Closed,
    CursorRefused,
    Damaged,
    Invalid,
    Latched,
    Missing,
    NewerFormat,
    PromiseBroken,
    StoreLocked,
    Unavailable,
)
from perdure.core.layouts import Records
from perdure.core.limits import CLOCK_OFF_S, OPERATION_KEPT_S, TOMBSTONE_KEPT_S
from perdure.core.values import Tip
from perdure.engines import open_engine, sqlite_driver, sqlite_recovery
from perdure.engines.sqlite import SqliteEngine
from perdure.engines.sqlite_scan import _order, _ranges, _source
from perdure.engines.sqlite_schema import SQL, Table
from perdure.engines.sqlite_verify import verify_store
from perdure.proving.steps import EVENTS, LAYOUTS, NOTES, Note, last_step, step
from tests.engines.sqlite_stores import damage, opened

KEY = ("t", "a")


def _contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


# proves C11
async def test_a_second_opener_is_told_who_holds_the_store(tmp_path: Path) -> None:
    engine = await opened(tmp_path / "state.db")
    engine.announce(f"{os.getpid()}\nboot_1\n/run/perdure.sock\n")
    for read_only in (False, True):
        with pytest.raises(StoreLocked) as refused:
            await opened(tmp_path / "state.db", read_only=read_only)
        assert refused.value.holder == os.getpid()
        assert refused.value.control_socket == "/run/perdure.sock"
    await engine.close()
    await engine.close()
    with pytest.raises(Closed):
        await engine.get(NOTES, KEY)
    await (await opened(tmp_path / "state.db")).close()


# proves C11
async def test_an_owner_whose_lock_file_is_gone_writes_nothing_beside_the_next(
    tmp_path: Path,
) -> None:
    """Both wrote, and the first marked the store clean under the second at its end."""
    path = tmp_path / "state.db"
    lock = path.with_name("state.db.lock")
    first = await opened(path)
    await first.commit(put(NOTES, KEY, Note("first")))
    lock.unlink()
    second = await opened(path)
    with pytest.raises(Latched, match="another process has taken it over"):
        await first.commit(put(NOTES, KEY, Note("again")))
    await second.commit(put(NOTES, KEY, Note("second")))
    assert await first.get(NOTES, KEY) == await second.get(NOTES, KEY)
    await first.close()
    lock.unlink()
    third = await opened(path)
    with pytest.raises(Latched, match="nothing was written at this close"):
        await second.close()
    assert third._store.connection.execute(SQL["fact"], ("clean",)).get == 0
    await third.close()
    last = await opened(path)
    assert last.recovered.clean
    record = await last.get(NOTES, KEY)
    assert record is not None
    assert (record.value, record.version) == (Note("second"), 2)
    await last.close()


# proves C11
async def test_what_looks_lost_while_another_commits_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second process read the mark of commits that were made since it had read the store, and
    advised to restore a backup."""
    path = tmp_path / "state.db"
    first = await opened(path)
    path.with_name("state.db.lock").unlink()
    look = sqlite_recovery.post_mortem

    def late(*seen: Any) -> Any:
        for text in "abc":
            done = asyncio.run_coroutine_threadsafe(first.commit(put(NOTES, KEY, Note(text))), loop)
            done.result(10)
        return look(*seen)

    loop = asyncio.get_running_loop()
    monkeypatch.setattr(sqlite_recovery, "post_mortem", late)
    with pytest.raises(StoreLocked, match="in use by another process"):
        await opened(path)
    await first.close()


async def test_a_newer_store_is_refused_untouched(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    await (await opened(path)).close()
    connection = sqlite_driver.connect(str(path))
    connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 0)
    connection.pragma("user_version", 2)
    connection.close()
    before = _contents(tmp_path)
    for read_only in (False, True):
        with pytest.raises(NewerFormat, match="store format 2; this release knows up to 1"):
            await opened(path, read_only=read_only)
    assert {name: _contents(tmp_path)[name] for name in before if name != "state.db.lock"} == {
        name: data for name, data in before.items() if name != "state.db.lock"
    }


async def test_a_collection_of_a_newer_declaration_is_refused_untouched(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    newer = Records("notes", Note, key=("tenant", "note"), version=2)
    engine = await open_engine(f"sqlite:///{path}", [newer])
    await engine.commit(put(newer, KEY, Note("x")))
    await engine.close()
    before = path.read_bytes()
    with pytest.raises(NewerFormat, match="notes was written in version 2"):
        await opened(path)
    assert path.read_bytes() == before
    other = Records("notes", Note, key=("tenant", "box", "note"), version=2)
    with pytest.raises(Invalid, match="another key"):
        await open_engine(f"sqlite:///{path}", [other])
    engine = await open_engine(f"sqlite:///{path}", [newer])
    assert await engine.get(newer, KEY) is not None
    await engine.close()


async def test_a_file_of_another_kind_is_refused_untouched(tmp_path: Path) -> None:
    text, foreign = tmp_path / "notes.txt", tmp_path / "other.db"
    text.write_text("dear diary, " * 20)
    connection = apsw.Connection(str(foreign))
    connection.execute("CREATE TABLE theirs (x)")
    connection.close()
    for path in (text, foreign):
        before = path.read_bytes()
        with pytest.raises(Invalid, match="is not a Perdure store"):
            await opened(path)
        assert path.read_bytes() == before


# proves C8
async def test_a_store_whose_head_is_gone_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    await (await opened(path)).close()
    data = path.read_bytes()
    for broken in (b"\0" * 100 + data[100:], data[:20] + b"\0" + data[21:], data[:50]):
        path.write_bytes(broken)
        with pytest.raises(Damaged):
            await opened(path)


async def test_a_log_without_its_database_is_not_replayed_into_a_new_one(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    path.with_name("state.db-wal").write_bytes(b"x" * 5000)
    with pytest.raises(Damaged, match=r"it is gone, but .* is still there"):
        await opened(path)
    assert not path.exists()


async def test_a_path_that_cannot_be_a_store_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path, tmp_path / "file" / "state.db"):
        with pytest.raises(Unavailable, match=r"cannot be (opened|made)"):
            await opened(path)


async def test_a_setting_that_is_not_in_force_refuses_the_store(
    tmp_path: Path,
) -> None:
    path = tmp_path / "state.db"
    await (await opened(path)).close()
    connection = apsw.Connection(str(path), vfs=sqlite_driver.CHECKSUM_VFS)
    connection.pragma("journal_mode", "delete")
    connection.close()
    with pytest.raises(PromiseBroken, match="journal_mode=delete, not wal"):
        await opened(path)


async def test_the_checksum_vfs_is_not_forced_on_the_whole_process() -> None:
    sqlite_driver.register_checksums()
    assert apsw.vfs_names()[0] != sqlite_driver.CHECKSUM_VFS


async def test_a_store_read_only_is_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    with pytest.raises(Missing):
        await opened(path, read_only=True)
    engine = await open_engine(f"sqlite:///{path}", [EVENTS])
    await engine.commit(append(EVENTS, KEY, [Note("x")]))
    await engine.close()
    before = _contents(tmp_path)
    looking = await opened(path, read_only=True)
    beside = await opened(path, read_only=True)
    # Notes are not in the store yet: to a reader that is an empty collection.
    assert await looking.get(NOTES, KEY) is None
    assert (await looking.scan(NOTES, ("t",), index="by_state", limit=9)).items == []
    assert await looking.count(NOTES, ()) == {}
    assert len(await beside.read(EVENTS, KEY, limit=9)) == 1
    assert await damage(looking) == []
    assert looking.latched is not None
    with pytest.raises(Latched, match="reading only"):
        await looking.commit(put(NOTES, KEY, Note("x")))
    await looking.close()
    await beside.close()
    after = {name: data for name, data in _contents(tmp_path).items() if data}
    after.pop("state.db-shm")  # SQLite's memory of the log, made anew by every opener
    assert after == before


# proves C19
async def test_cursors_survive_a_restart_and_belong_to_one_store(tmp_path: Path) -> None:
    engine = await opened(tmp_path / "state.db")
    for number in range(1, 8):
        await engine.commit(step(0, number))
    page = await engine.scan(NOTES, (), index="due", limit=3)
    await engine.close()
    engine = await opened(tmp_path / "state.db")
    rest = await engine.scan(NOTES, (), index="due", limit=100, cursor=page.cursor)
    seen = [record.value.at for record in (*page.items, *rest.items)]
    assert seen == [1, 2, 3, 4, 5, 6, 7, 7]
    other = await opened(tmp_path / "other.db")
    with pytest.raises(CursorRefused):
        await other.scan(NOTES, (), index="due", limit=3, cursor=page.cursor)
    await engine.close()
    await other.close()


# proves C13
async def test_a_store_closed_in_order_is_clean_and_whole_in_one_file(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    engine = await opened(path)
    assert engine.recovered.clean
    with closing(sqlite_driver.connect(str(path), read_only=True)) as beside:
        assert beside.execute("SELECT value FROM store WHERE name = 'clean'").get == 0
    commits = [asyncio.ensure_future(engine.commit(step(at, 1))) for at in range(40)]
    await asyncio.sleep(0)
    waiting = asyncio.ensure_future(engine.wait(EVENTS, ("t", "w0"), 9, timeout_s=60))
    await asyncio.sleep(0)
    await engine.close()
    await asyncio.gather(*commits)
    with pytest.raises(Closed):
        await waiting
    path.with_name("state.db.mark").unlink()
    assert sorted(_contents(tmp_path)) == ["state.db", "state.db.lock"]
    engine = await opened(path)
    assert engine.recovered.clean
    for writer in range(40):
        assert await last_step(engine, writer) == 1
    await engine.close()


async def test_a_cancelled_caller_does_not_undo_its_commit(tmp_path: Path) -> None:
    engine = await opened(tmp_path / "state.db")
    caller = asyncio.ensure_future(engine.commit(step(0, 1)))
    await asyncio.sleep(0)
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    await engine.commit(step(1, 1))
    assert await last_step(engine, 0) == 1
    await engine.close()


# proves C18
@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize(
    ("index", "where", "after"),
    [
        (None, (), None),
        (None, (), Position((), "t\x1fa")),
        ("by_state", (), None),
        ("by_state", ("open",), None),
        ("by_state", ("open", 3), None),
        ("by_state", ("open", None), Position((), "t\x1fa")),
        ("by_state", ("open",), Position((3,), "t\x1fa")),
        ("by_state", ("open",), Position((None,), "t\x1fa")),
        ("by_state", (), Position(("open", None), "t\x1fa")),
        ("due", (), Position((3,), "t\x1fa")),
    ],
)
async def test_every_scan_is_a_walk_along_an_index(
    tmp_path: Path,
    index: str | None,
    where: tuple[str | int | None, ...],
    after: Position | None,
    descending: bool,
) -> None:
    engine = await opened(tmp_path / "state.db")
    table = Table(NOTES)
    prefix = () if index == "due" else ("t",)
    question = Question("", "notes", prefix, index, where, descending)
    declared = None if index is None else NOTES.index(index)
    lead, order = _order(table, declared, question)
    direction = " DESC" if descending else ""
    for condition, values in _ranges(lead, order, after, descending=descending):
        plan = engine._reader.execute(
            f"EXPLAIN QUERY PLAN SELECT {table.row} FROM {_source(table, declared)} "
            f"WHERE {condition} ORDER BY {', '.join(column + direction for column in order)}",
            values,
        ).fetchall()
        shown = " ".join(line[-1] for line in plan)
        assert "SEARCH" in shown or (index == "due" and "USING INDEX" in shown), shown
        assert "TEMP B-TREE" not in shown, shown
    await engine.close()


# proves C18
async def test_reading_a_stream_is_a_search_however_long_it_is(tmp_path: Path) -> None:
    engine = await opened(tmp_path / "state.db")
    asked = {"log": "events", "key": "t\x1fw0", "after": 5, "limit": 5}
    plan = engine._reader.execute(f"EXPLAIN QUERY PLAN {SQL['read']}", asked).fetchall()
    shown = [line[-1] for line in plan]
    assert len(shown) == 2
    assert all("SEARCH" in line for line in shown), shown
    await engine.close()


class _Clock(SystemClock):
    """A wall clock that a test moves."""

    ahead_s = 0.0

    def now_s(self) -> float:
        return super().now_s() + self.ahead_s


async def test_old_operations_and_tombstones_are_forgotten_in_bounds(tmp_path: Path) -> None:
    clock = _Clock()
    engine = await opened(tmp_path / "state.db", clock=clock)
    for at in range(10):
        await engine.commit(put(NOTES, ("t", f"n{at}"), Note("x")).named(f"put{at}"))
        await engine.commit(delete(NOTES, ("t", f"n{at}")))
    clock.ahead_s = OPERATION_KEPT_S + CLOCK_OFF_S + 10
    for at in range(3):
        await engine.commit(put(NOTES, ("t", f"m{at}"), Note("x")).named(f"more{at}"))
    assert _rows(engine, "operations") == 10 - 6 + 3
    assert _rows(engine, "tombstones") == 10
    clock.ahead_s = TOMBSTONE_KEPT_S + 10
    await engine.commit(delete(NOTES, ("t", "m0")) + delete(NOTES, ("t", "m1")))
    assert _rows(engine, "tombstones") == 10 - 4 + 2
    await engine.close()


async def test_old_drops_are_forgotten_and_their_cursors_still_refused(tmp_path: Path) -> None:
    clock = _Clock()
    engine = await opened(tmp_path / "state.db", clock=clock)
    for at in range(4):
        await engine.commit(append(EVENTS, ("t", f"s{at}"), [Note("old")]))
        await engine.commit(drop(EVENTS, ("t", f"s{at}")))
    clock.ahead_s = TOMBSTONE_KEPT_S + 10
    await engine.commit(append(EVENTS, ("t", "s0"), [Note("new")]))
    for at in range(2):
        await engine.commit(append(EVENTS, ("t", f"n{at}"), [Note("x")]))
        await engine.commit(drop(EVENTS, ("t", f"n{at}")))
    assert _rows(engine, "streams") == 1 + 2
    for key in (("t", "s1"), ("t", "s2")):
        assert await engine.tip(EVENTS, key) == Tip(2)
        assert (await engine.commit(append(EVENTS, key, [Note("new")]))).numbers == (1,)
        with pytest.raises(CursorRefused):
            await engine.read(EVENTS, key, incarnation=1, limit=9)
        assert len(await engine.read(EVENTS, key, incarnation=2, limit=9)) == 1
    assert await damage(engine) == []
    await engine.close()


def _rows(engine: SqliteEngine, table: str) -> int:
    return int(engine._reader.execute(f"SELECT count(*) FROM {table}").get)


# proves C22
async def test_an_operation_id_answers_again_after_a_restart(tmp_path: Path) -> None:
    engine = await opened(tmp_path / "state.db")
    first = await engine.commit(step(0, 1).named("once"))
    await engine.close()
    engine = await opened(tmp_path / "state.db")
    both = await asyncio.gather(*(engine.commit(step(0, 1).named("once")) for _ in range(2)))
    assert both == [first, first]
    twice = await asyncio.gather(*(engine.commit(step(0, 2).named("two")) for _ in range(2)))
    assert twice[0] == twice[1]
    with pytest.raises(Invalid, match="another batch"):
        await engine.commit(step(0, 3).named("once"))
    assert await last_step(engine, 0) == 2
    await engine.close()


async def test_many_readers_and_writers_at_once(tmp_path: Path) -> None:
    engine = await opened(tmp_path / "state.db")

    async def write(writer: int) -> None:
        for number in range(1, 40):
            await engine.commit(step(writer, number))

    async def follow(writer: int) -> int:
        seen = 0
        while seen < 39:
            await engine.wait(EVENTS, ("t", f"w{writer}"), seen, timeout_s=30)
            entries = await engine.read(EVENTS, ("t", f"w{writer}"), after=seen, limit=100)
            assert [entry.seq for entry in entries] == list(
                range(seen + 1, seen + 1 + len(entries))
            )
            seen += len(entries)
            await engine.scan(NOTES, ("t",), index="by_state", where=("open",), limit=100)
        return seen

    await asyncio.gather(*map(write, range(8)), *map(follow, range(8)))
    assert await engine.count(NOTES, ("t",)) == {(): 8 * 39 + 8}
    assert await damage(engine) == []
    assert engine.stats.commits == 8 * 39
    assert engine.stats.groups < engine.stats.commits
    await engine.close()


async def test_verifying_is_done_in_steps_even_where_nothing_is_wrong(tmp_path: Path) -> None:
    engine = await opened(tmp_path / "state.db")
    for number in range(0, 1_200, 100):
        batches = (put(NOTES, ("t", f"n{number + at}"), Note("x")) for at in range(100))
        await asyncio.gather(*map(engine.commit, batches))
    steps = list(verify_store(engine._reader, LAYOUTS, "here"))
    assert len(steps) >= 4
    assert not any(steps)
    await engine.close()


async def test_a_store_is_made_with_its_directories(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "state.db"
    engine = await SqliteEngine.open(str(path), LAYOUTS, clock=SystemClock(), disk=Disk())
    assert engine.url == f"sqlite:///{path}"
    await engine.close()
    assert path.parent.stat().st_mode & 0o777 == 0o700
