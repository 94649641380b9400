"""What a kill, a power cut and damage leave of a sqlite store: everything acknowledged, or an
error that says what is not there; never another value, and no false alarm."""

from __future__ import annotations

import asyncio
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from perdure.core.disk import Disk
from perdure.core.errors import Damaged, PerdureError, StoreLocked
from perdure.core.keys import Key
from perdure.core.values import Record
from perdure.engines import sqlite_checkpoint, sqlite_driver
from perdure.engines.sqlite import SqliteEngine
from perdure.engines.sqlite_driver import PAGE_BYTES
from perdure.engines.sqlite_wal import FRAME_BYTES
from perdure.proving.steps import EVENTS, NOTES, Note, last_step, step
from perdure.proving.watched import WatchedDisk
from tests.engines.sqlite_stores import WRITERS, damage, opened

ROOT = Path(__file__).parents[2]


# proves C3
# proves C4
# proves C6
# proves C11
@pytest.mark.parametrize("seed", range(3))
async def test_a_killed_writer_leaves_all_that_it_acknowledged(tmp_path: Path, seed: int) -> None:
    path = tmp_path / "state.db"
    chance = random.Random(seed)
    acked = dict.fromkeys(range(WRITERS), 0)
    for _ in range(3):
        writer = subprocess.Popen(
            [sys.executable, "-m", "tests.engines.sqlite_stores", str(path)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
        )
        assert writer.stdout is not None
        with writer, writer.stdout as told:
            assert told.readline() == b"ready\n"
            for _ in range(chance.randrange(1, 800)):
                who, number = map(int, told.readline().split())
                acked[who] = number
            writer.send_signal(signal.SIGSTOP)  # paused, it still owns the store
            with pytest.raises(StoreLocked) as refused:
                await opened(path)
            assert refused.value.holder == writer.pid
            writer.kill()
            for line in told:
                if line.endswith(b"\n"):
                    who, number = map(int, line.split())
                    acked[who] = number
        engine = await opened(path)
        assert not engine.recovered.clean
        for who, number in acked.items():
            assert await last_step(engine, who) in (number, number + 1)
            acked[who] = (await engine.tip(EVENTS, ("t", f"w{who}"))).last
        assert await damage(engine) == []
        await engine.close()


# proves C14
async def test_recovery_replays_the_log_and_not_the_store(tmp_path: Path) -> None:
    pages_read = []
    for records in (500, 5_000):
        path = tmp_path / f"{records}" / "state.db"
        engine = await opened(path)
        await asyncio.gather(*(engine.commit(step(0, 1 + at)) for at in range(records)))
        await engine.close()
        engine = await opened(path)
        await engine.commit(step(1, 1))
        crashed = _crash(path, tmp_path / f"crashed{records}")
        await engine.close()
        disk = WatchedDisk()
        engine = await opened(crashed, vfs=disk.name)
        pages_read.append(disk.counts[("read", "")])
        assert 0 < engine.recovered.replayed < 30
        assert await last_step(engine, 1) == 1
        await engine.close()
    few, many = pages_read
    assert 0 < few < 30
    assert many <= few + 5  # the trees of ten times as much are a little deeper


def _crash(path: Path, target: Path, *, marked: bool = True) -> Path:
    """What a kill at this moment leaves of an open store, in another directory."""
    target.mkdir()
    for suffix in ("", "-wal", *((".mark",) if marked else ())):
        shutil.copy(path.with_name(path.name + suffix), target / (path.name + suffix))
    return target / path.name


class PowerCuts:
    """What a power cut would have left at each moment of a run, and what had been acknowledged."""

    def __init__(self, disk: WatchedDisk, path: Path, seed: int) -> None:
        self.states: list[tuple[int, int, dict[str, bytes]]] = []
        """Acknowledged before the state was taken, at most begun by then, and the files."""
        self.acked = 0
        self._disk = disk
        self._mark = path.with_name(path.name + ".mark")
        self._old_mark = self._mark.read_bytes()
        self._chance = random.Random(seed)
        disk.watch = self._cut

    def _cut(self, call: str, suffix: str) -> None:
        if call != "sync" and self._chance.random() > 0.03:
            return
        # In this order: other threads write meanwhile, and a mark never runs ahead of the log.
        acked, mark_now = self.acked, self._mark.read_bytes()
        contents = self._disk.contents()
        for share in (0.0, 0.7):
            kept = [at for at in range(len(contents.loose)) if self._chance.random() < share]
            # The mark is never synced: the disk holds the newest one, or one long gone.
            for mark in (self._old_mark, mark_now):
                left = contents.survivors(kept)
                self.states.append((acked, self.acked + 1, left | {self._mark.name: mark}))


async def _run_until_power_cut(tmp_path: Path, seed: int) -> PowerCuts:
    path = tmp_path / "state.db"
    await (await opened(path)).close()
    disk = WatchedDisk()
    engine = await opened(path, vfs=disk.name)
    cuts = PowerCuts(disk, path, seed)
    for number in range(1, 16):
        await engine.commit(step(0, number))
        cuts.acked = number
    await engine.close()
    return cuts


async def _judge(tmp_path: Path, cuts: PowerCuts) -> Iterator[str]:
    wrong = []
    for at, (acked, begun, files) in enumerate(cuts.states):
        left = tmp_path / f"cut{at}"
        left.mkdir()
        for name, data in files.items():
            (left / name).write_bytes(data)
        try:
            engine = await opened(left / "state.db")
        except PerdureError as error:
            wrong.append(f"state {at}, {acked} acknowledged: {error}")
            continue
        found = await last_step(engine, 0)
        if not acked <= found <= begun:
            wrong.append(f"state {at}: {acked} acknowledged, {found} there")
        await engine.commit(step(0, found + 1))
        await engine.close()
        shutil.rmtree(left)
    return iter(wrong)


# proves C3
# proves C7
@pytest.mark.parametrize("seed", range(3))
async def test_a_power_cut_leaves_all_that_was_acknowledged(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if seed % 2:  # with checkpoints under way and the log starting over
        monkeypatch.setattr(sqlite_checkpoint, "FEW_STEP_FRAMES", 12)
        monkeypatch.setattr(sqlite_checkpoint, "FINISH_FRAMES", 25)
    cuts = await _run_until_power_cut(tmp_path, seed)
    assert len(cuts.states) > 60
    assert list(await _judge(tmp_path, cuts)) == []


async def test_the_power_cut_is_noticed_where_commits_are_not_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test above can fail: with the weaker setting it does."""
    force = sqlite_driver._force
    monkeypatch.setattr(
        sqlite_driver,
        "_force",
        lambda connection, pragma, value: force(
            connection, pragma, 1 if pragma == "synchronous" else value
        ),
    )
    cuts = await _run_until_power_cut(tmp_path, 0)
    # Too few syncs to cut at: look at what each acknowledgement rested on.
    cuts.states.append((cuts.acked, cuts.acked, cuts._disk.contents().survivors()))
    assert any("acknowledged" in wrong for wrong in await _judge(tmp_path, cuts))


async def _crashed_store(tmp_path: Path, *, marked: bool = True, steps: int = 6) -> Path:
    path = tmp_path / "open" / "state.db"
    engine = await opened(path)
    for number in range(1, steps + 1):
        await engine.commit(step(0, number))
    crashed = _crash(path, tmp_path / "crashed", marked=marked)
    await engine.close()
    return crashed


def _copy(path: Path, target: Path) -> Path:
    shutil.copytree(path.parent, target)
    return target / path.name


# proves C7
async def test_a_torn_tail_is_cut_and_reported(tmp_path: Path) -> None:
    crashed = await _crashed_store(tmp_path, marked=False)
    log = crashed.with_name("state.db-wal")
    whole = log.stat().st_size
    for lost in (1, FRAME_BYTES - 1, FRAME_BYTES + 1):
        torn = _copy(crashed, tmp_path / f"torn{lost}")
        with torn.with_name("state.db-wal").open("r+b") as file:
            file.truncate(whole - lost)
        engine = await opened(torn)
        (cut,) = engine.recovered.cut
        name, _, offset = cut.where.rpartition(":")
        assert name.endswith("state.db-wal")
        assert whole - 20 * FRAME_BYTES < int(offset) < whole
        assert await last_step(engine, 0) == 5
        await engine.commit(step(0, 6))
        await engine.close()
        engine = await opened(torn)
        assert engine.recovered.clean
        assert await last_step(engine, 0) == 6
        await engine.close()


# proves C7
# proves C8
@pytest.mark.parametrize("left", [1, 24, PAGE_BYTES // 2, PAGE_BYTES - 1])
async def test_a_database_cut_within_its_last_page_is_damaged(tmp_path: Path, left: int) -> None:
    """SQLite reads zeros for what a short page lacks, and its checksums let that pass: an index
    that was cut had no entries."""
    path = tmp_path / "store" / "state.db"
    path.parent.mkdir()
    engine = await opened(path)
    for number in range(1, 6):
        await engine.commit(step(0, number))
    await engine.close()
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - PAGE_BYTES + left)
    with pytest.raises(Damaged, match=f"it ends {left} bytes into a page"):
        await opened(path)
    looking = await opened(path, read_only=True)
    assert any("into a page" in found for found in await damage(looking))
    await looking.close()


# proves C3
async def test_a_page_that_a_checkpoint_wrote_in_part_is_made_whole_by_the_log(
    tmp_path: Path,
) -> None:
    crashed = await _crashed_store(tmp_path)
    with crashed.open("r+b") as file:
        file.truncate(crashed.stat().st_size + PAGE_BYTES // 2)
    engine = await opened(crashed)
    assert await last_step(engine, 0) == 6
    assert await damage(engine) == []
    await engine.close()
    assert crashed.stat().st_size % PAGE_BYTES == 0


# proves C7
# proves C8
# proves C17
async def test_a_lost_acknowledged_commit_is_damage_and_changes_nothing(tmp_path: Path) -> None:
    crashed = await _crashed_store(tmp_path)
    log = crashed.with_name("state.db-wal")
    with log.open("r+b") as file:
        file.truncate(log.stat().st_size - FRAME_BYTES)
    before = {file.name: file.read_bytes() for file in crashed.parent.iterdir()}
    with pytest.raises(Damaged, match=r"at least 1 of the commits .* are gone"):
        await opened(crashed)
    after = {file.name: file.read_bytes() for file in crashed.parent.iterdir()}
    assert {name: after[name] for name in before} == before
    looking = await opened(crashed, read_only=True)
    assert await last_step(looking, 0) == 5
    assert any("are gone" in found for found in await damage(looking))
    (tmp_path / "copy").mkdir()
    with pytest.raises(Damaged, match="are gone"):
        await looking.backup(tmp_path / "copy", lambda done, total: None)
    await looking.close()


# proves C7
# proves C8
@pytest.mark.parametrize("marked", [True, False])
async def test_one_flipped_bit_in_the_log_is_never_a_silent_loss(
    tmp_path: Path, marked: bool
) -> None:
    crashed = await _crashed_store(tmp_path, marked=marked)
    log = crashed.with_name("state.db-wal")
    data = log.read_bytes()
    chance = random.Random(7)
    detected = 0
    for _ in range(150):
        at = chance.randrange(len(data))
        flipped = _copy(crashed, tmp_path / "flipped")
        broken = bytearray(data)
        broken[at] ^= 1 << chance.randrange(8)
        flipped.with_name("state.db-wal").write_bytes(broken)
        try:
            engine = await opened(flipped)
        except Damaged:
            detected += 1
        else:
            found = await last_step(engine, 0)
            # Without a mark the last group cannot be told from one that was never acknowledged,
            # and then it is cut and reported.
            assert found == 6 or (not marked and found == 5 and engine.recovered.cut), at
            await engine.close()
        shutil.rmtree(flipped.parent)
    assert detected > 60


# proves C8
async def test_one_flipped_bit_in_the_database_is_never_a_wrong_answer(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    engine = await opened(path)
    for number in range(1, 13):
        await engine.commit(step(0, number).named(f"op{number}"))
    right = await _answers(engine)
    await engine.close()
    data = path.read_bytes()
    chance = random.Random(11)
    refused = damaged = 0
    for at in range(0, len(data), 131):
        broken = bytearray(data)
        broken[at] ^= 1 << chance.randrange(8)
        path.write_bytes(broken)
        try:
            engine = await opened(path, read_only=True)
        except PerdureError:
            refused += 1
            continue
        answers = await _answers(engine)
        assert all(answer in ("Damaged", right[at]) for at, answer in enumerate(answers)), at
        if "Damaged" in answers:
            damaged += 1
            assert await damage(engine) != []
        await engine.close()
    assert damaged > 50
    assert refused > 10


async def _answers(engine: SqliteEngine) -> list[object]:
    """Every kind of read, each its answer or that it found damage."""
    keys = [("t", f"w0-{number}") for number in range(1, 14)]
    reads = [
        *(engine.get(NOTES, key) for key in keys),
        engine.get_many(NOTES, keys),
        _whole_scan(engine, ("t",)),
        _whole_scan(engine, ("t",), index="by_state", where=("open",)),
        _whole_scan(engine, (), index="due", descending=True),
        engine.count(NOTES, ("t",), index="by_state", group=1),
        engine.tip(EVENTS, ("t", "w0")),
        engine.read(EVENTS, ("t", "w0"), limit=100),
        engine.streams(EVENTS, (), limit=100),
    ]
    answers: list[object] = []
    for read in reads:
        try:
            answers.append(await read)
        except Damaged:
            answers.append("Damaged")
    return answers


async def _whole_scan(engine: SqliteEngine, prefix: Key, **asked: Any) -> list[Record[Note]]:
    """All pages of a scan; a page ends before damage, and the next one raises it."""
    page = await engine.scan(NOTES, prefix, limit=100, **asked)
    items = page.items
    while page.cursor is not None:
        page = await engine.scan(NOTES, prefix, limit=100, cursor=page.cursor, **asked)
        items += page.items
    return items


# proves C8
async def test_damage_is_found_record_by_record(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    engine = await opened(path)
    for number in range(1, 13):
        await engine.commit(step(0, number))
    await engine.close()
    connection = sqlite_driver.connect(str(path))
    connection.execute(
        "UPDATE records_notes SET value = CAST(replace(value, '-3 ', '-4 ') AS BLOB)"
    )
    connection.execute("UPDATE records_notes SET field_state = 'gone' WHERE key LIKE '%w0-5'")
    connection.execute("UPDATE entries SET value = x'7b7d' WHERE id & 0xffffffff IN (2, 7)")
    connection.execute("DELETE FROM entries WHERE id & 0xffffffff = 9")
    connection.close()
    engine = await opened(path)
    found = "\n".join(await damage(engine))
    for where in ("notes t/w0-3", "notes t/w0-5", *(f"events t/w0 entry {n}" for n in (2, 7, 9))):
        assert found.count(f"{where}:") == 1, found
    assert found.count("\n") == 4
    with pytest.raises(Damaged):
        await engine.get(NOTES, ("t", "w0-3"))
    with pytest.raises(Damaged):
        await engine.scan(NOTES, ("t",), index="by_state", where=("gone",), limit=10)
    with pytest.raises(Damaged):
        await engine.read(EVENTS, ("t", "w0"), after=5, limit=5)
    assert len(await engine.read(EVENTS, ("t", "w0"), after=2, limit=4)) == 4
    await engine.commit(step(1, 1))
    await engine.close()


# proves C8
async def test_a_row_that_an_index_leaves_out_is_found_by_verify(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    engine = await opened(path)
    for number in range(1, 5):
        await engine.commit(step(0, number))
    await engine.close()
    hidden = "FROM sqlite_schema WHERE name = 'index_notes_by_state'"
    with closing(sqlite_driver.connect(str(path))) as connection:
        connection.pragma("writable_schema", 1)
        (index,) = connection.execute(f"SELECT * {hidden}").fetchall()
        connection.execute(f"DELETE {hidden}")
    with closing(sqlite_driver.connect(str(path))) as connection:
        rows = connection.execute("SELECT * FROM records_notes WHERE key LIKE '%w0-3'").fetchall()
        connection.execute("DELETE FROM records_notes WHERE key LIKE '%w0-3'")
        moved = (rows[0][0] + 1_000, *rows[0][1:])
        connection.execute(f"INSERT INTO records_notes VALUES ({'?, ' * 8}?)", moved)
        connection.pragma("writable_schema", 1)
        connection.execute("INSERT INTO sqlite_schema VALUES (?, ?, ?, ?, ?)", index)
    engine = await opened(path)
    assert await last_step(engine, 0) == 4
    found = await damage(engine)
    assert any("missing from index index_notes_by_state" in line for line in found), found
    await engine.close()


async def test_a_store_that_was_never_finished_is_made_again(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    Disk().write_file(tmp_path / "state.db.tmp", b"half a store")
    path.touch()
    engine = await opened(path)
    assert engine.recovered.clean
    await engine.commit(step(0, 1))
    await engine.close()
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        *("state.db", "state.db.lock", "state.db.mark")
    ]
