"""What a failing disk does to a sqlite store: who is told, what goes on, what comes back."""

from __future__ import annotations

import asyncio
import errno
import itertools
import subprocess
import sys
from pathlib import Path

import apsw
import pytest

from perdure.core.batch import append, delete, drop, put
from perdure.core.disk import Disk
from perdure.core.errors import CommitUnknown, Damaged, Latched, StorageFull, Unavailable
from perdure.engines import sqlite_checkpoint, sqlite_driver
from perdure.engines.sqlite import SqliteEngine
from perdure.proving.forgetting import lost_to_a_failed_sync
from perdure.proving.steps import EVENTS, NOTES, Note, last_step, step, troubles
from perdure.proving.watched import (
    DISK_FULL,
    READ_FAILED,
    SYNC_FAILED,
    WRITE_FAILED,
    WatchedDisk,
    broken,
)
from tests.engines.sqlite_stores import damage, opened

KEY = ("t", "a")


async def _written(path: Path, disk: WatchedDisk) -> SqliteEngine:
    engine = await opened(path, vfs=disk.name)
    await engine.commit(step(0, 1))
    return engine


async def _until_refused(engine: SqliteEngine) -> Latched | None:
    """Commit until another thread has latched the engine."""
    for number in range(2, 2_000):
        (outcome,) = await asyncio.gather(engine.commit(step(0, number)), return_exceptions=True)
        if isinstance(outcome, Latched):
            return outcome
    return None


# proves C3
async def test_a_store_is_made_whole_or_not_at_all_whichever_call_fails(tmp_path: Path) -> None:
    refused = 0
    for n in itertools.count(1):
        disk, calls = WatchedDisk(hasty=True), itertools.count(1)

        def refuse(call: str, suffix: str) -> None:
            if call != "read" and next(calls) == n:  # noqa: B023 - asked within this round
                raise WRITE_FAILED

        disk.watch = refuse
        path = tmp_path / f"{n}" / "state.db"
        try:
            await (await opened(path, vfs=disk.name)).close()
        except Unavailable:
            refused += 1
        engine = await opened(path)
        assert await troubles(engine, {0: 0}, {0: 0}) == []
        await engine.close()
        if next(calls) <= n:
            break
    assert refused > 40


# proves C3
async def test_a_mark_that_cannot_be_written_at_the_end_is_named_and_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = await opened(tmp_path / "state.db")
    await engine.commit(step(0, 1))

    def full(disk: Disk, fd: int, data: bytes, offset: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Disk, "overwrite", full)
        with pytest.raises(Unavailable, match="mark of the last commit"):
            await engine.close()
    engine = await opened(tmp_path / "state.db")
    assert await troubles(engine, {0: 1}, {0: 1}) == []
    await engine.close()


# proves C3
async def test_an_acknowledgement_costs_one_sync_alone_and_a_fraction_in_company(
    tmp_path: Path,
) -> None:
    disk = WatchedDisk()
    engine = await _written(tmp_path / "state.db", disk)
    disk.counts.clear()
    for number in range(100):
        await engine.commit(put(NOTES, ("t", f"a{number}"), Note("x")))
    assert disk.counts[("sync", "-wal")] == 100
    disk.counts.clear()

    async def write(writer: int) -> None:
        for number in range(20):
            await engine.commit(put(NOTES, ("t", f"b{writer}-{number}"), Note("x")))

    await asyncio.gather(*map(write, range(64)))
    assert 0 < disk.counts[("sync", "-wal")] <= 0.02 * 64 * 20
    await engine.close()


# proves C3
async def test_nobody_is_told_before_the_sync_has_returned(tmp_path: Path) -> None:
    disk = WatchedDisk()
    engine = await _written(tmp_path / "state.db", disk)
    told: list[str] = []
    disk.watch = lambda call, suffix: told.append(f"{call}{suffix}")

    async def write(number: int) -> None:
        await engine.commit(put(NOTES, ("t", f"a{number}"), Note("x")))
        told.append("acknowledged")

    await asyncio.gather(*map(write, range(5)))
    await write(5)
    disk.watch = lambda call, suffix: None
    assert told[told.index("acknowledged") - 1] == "sync-wal"
    assert told[-2:] == ["sync-wal", "acknowledged"]
    assert told.count("sync-wal") == 2
    await engine.close()


class _NamesDisk(Disk):
    """Tells when a file gets its name, and when names become durable; `lost` refuses the latter
    once the store has a log."""

    def __init__(self, told: list[str], *, lost: bool = False) -> None:
        self._told = told
        self._lost = lost

    def replace(self, source: Path, target: Path) -> None:
        super().replace(source, target)
        self._told.append(f"{target.name} named")

    def sync_directory(self, path: Path) -> None:
        if self._lost and (path / "state.db-wal").exists():
            raise OSError(5, "as planned")
        super().sync_directory(path)
        self._told.append("names synced")


# proves C3
async def test_a_new_store_has_a_durable_name_before_it_has_a_log(tmp_path: Path) -> None:
    told: list[str] = []
    disk = WatchedDisk()
    disk.watch = lambda call, suffix: told.append(f"{call}{suffix}")
    engine = await opened(tmp_path / "state.db", vfs=disk.name, disk=_NamesDisk(told))
    disk.watch = lambda call, suffix: None
    await engine.close()
    named, logged = told.index("state.db named"), told.index("write-wal")
    assert "names synced" in told[named:logged]
    # What is built under another name is whole by then: its own log was folded into it.
    assert "sync.tmp" in told[:named]
    assert "names synced" in told[logged : told.index("state.db.mark named")]


# proves C3
async def test_a_log_without_a_durable_name_is_not_written_to(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    with pytest.raises(Unavailable):
        await opened(path, disk=_NamesDisk([], lost=True))
    engine = await opened(path)
    await engine.commit(step(0, 1))
    await engine.close()


# proves C9
@pytest.mark.parametrize("error", [SYNC_FAILED, broken(apsw.SQLITE_IOERR_SHMSIZE)])
async def test_a_failed_sync_latches_and_the_commit_is_unknown(
    tmp_path: Path, error: apsw.Error
) -> None:
    path = tmp_path / "state.db"
    disk = WatchedDisk()
    engine = await _written(path, disk)
    disk.refuse("sync", "-wal", error)
    group = [engine.commit(put(NOTES, ("t", f"g{at}"), Note("x")).named(f"g{at}")) for at in (1, 2)]
    outcomes = await asyncio.gather(*group, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [CommitUnknown, CommitUnknown]
    disk.heal()
    assert engine.latched is not None
    assert "sync" in engine.latched
    with pytest.raises(Latched, match="Reopen"):
        await engine.commit(step(0, 2))
    assert await last_step(engine, 0) == 1
    assert await damage(engine) == []
    await engine.close()

    engine = await opened(path, vfs=disk.name)
    assert not engine.recovered.clean
    for at in (1, 2):
        again = await engine.commit(put(NOTES, ("t", f"g{at}"), Note("x")).named(f"g{at}"))
        assert again.numbers == (1,)
    await engine.commit(step(0, 2))
    await engine.close()


# proves C9
async def test_a_rollback_that_fails_latches(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    engine = await _written(path, WatchedDisk())

    def refuse(cursor: apsw.Cursor, sql: str, bindings: object) -> bool:
        if sql == "ROLLBACK":
            raise apsw.BusyError("as planned")
        return True

    engine._committer._connection.exec_trace = refuse  # type: ignore[union-attr]
    with pytest.raises(Unavailable):
        await engine.commit(put(NOTES, KEY, Note("x"), expect=7))
    assert "rollback" in str(engine.latched)
    with pytest.raises(Latched, match="rollback"):
        await engine.commit(step(0, 2))
    assert await last_step(engine, 0) == 1
    await engine.close()
    engine = await opened(path)
    assert not engine.recovered.clean
    assert await last_step(engine, 0) == 1
    await engine.close()


# proves C9
async def test_what_was_recovered_is_synced_anew_before_the_first_acknowledgement(
    tmp_path: Path,
) -> None:
    path = tmp_path / "state.db"
    disk = WatchedDisk()
    engine = await _written(path, disk)
    disk.refuse("sync", "-wal", SYNC_FAILED)
    with pytest.raises(CommitUnknown):
        await engine.commit(step(0, 2))
    disk.heal()
    await engine.close()
    calls: list[str] = []
    disk.watch = lambda call, suffix: calls.append(f"{call}{suffix}")
    engine = await opened(path, vfs=disk.name)
    disk.watch = lambda call, suffix: None
    # The pages of the log are in the database, synced, and the log is empty; then it is taken.
    assert calls.index("write") < calls.index("sync") < calls.index("truncate-wal")
    assert calls[-1] == "sync-wal"
    assert await last_step(engine, 0) == 2
    await engine.close()


# proves C3, C9
async def test_nothing_acknowledged_rests_on_what_a_failed_sync_left(tmp_path: Path) -> None:
    assert await lost_to_a_failed_sync(tmp_path) == []


# proves C9
async def test_an_end_that_was_not_synced_is_no_clean_one(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    disk = WatchedDisk()
    engine = await _written(path, disk)
    disk.refuse("sync", "-wal", SYNC_FAILED)
    with pytest.raises(Unavailable):
        await engine.close()
    disk.heal()
    engine = await opened(path, vfs=disk.name)
    assert not engine.recovered.clean
    assert await last_step(engine, 0) == 1
    await engine.close()
    engine = await opened(path, vfs=disk.name)
    assert engine.recovered.clean
    await engine.close()


# proves C9
async def test_a_failed_checkpoint_latches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite_checkpoint, "FEW_STEP_FRAMES", 5)
    disk = WatchedDisk()
    engine = await _written(tmp_path / "state.db", disk)
    disk.refuse("sync", "", SYNC_FAILED)
    assert "checkpoint" in str(await _until_refused(engine))
    disk.heal()
    with pytest.raises(Latched, match="checkpoint"):
        await engine.commit(step(0, 1000))
    assert await last_step(engine, 0) >= 1
    await engine.close()


# proves C9
async def test_a_write_that_fails_at_the_commit_latches(tmp_path: Path) -> None:
    disk = WatchedDisk()
    engine = await _written(tmp_path / "state.db", disk)
    disk.refuse("write", "-wal", WRITE_FAILED)
    with pytest.raises(CommitUnknown):
        await engine.commit(step(0, 2))
    disk.heal()
    with pytest.raises(Latched):
        await engine.commit(step(0, 2))
    await engine.close()


# proves C9
async def test_a_write_that_fails_before_the_commit_latches(tmp_path: Path) -> None:
    disk = WatchedDisk()
    engine = await _written(tmp_path / "state.db", disk)
    disk.refuse("write", "-wal", WRITE_FAILED)
    large = put(NOTES, KEY, Note("x"), attachment=bytes(24 * 1024 * 1024))  # more than is cached
    with pytest.raises(Unavailable):
        await engine.commit(large)
    disk.heal()
    with pytest.raises(Latched, match="writing failed"):
        await engine.commit(step(0, 2))
    assert await last_step(engine, 0) == 1
    await engine.close()


# proves C7
async def test_a_read_that_fails_fails_its_batch_alone(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    await (await _written(path, WatchedDisk())).close()
    disk = WatchedDisk()
    engine = await opened(path, vfs=disk.name)
    disk.refuse("read", "", READ_FAILED)
    with pytest.raises(Unavailable):
        await engine.commit(step(0, 2))
    disk.heal()
    assert engine.latched is None
    await engine.commit(step(0, 2))
    assert await last_step(engine, 0) == 2
    await engine.close()


class _NoMarkDisk(Disk):
    def overwrite(self, fd: int, data: bytes, offset: int) -> None:
        raise OSError(5, "as planned")


# proves C9
async def test_a_disk_that_refuses_the_mark_is_not_trusted_further(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    engine = await opened(path)
    engine._store.mark._disk = _NoMarkDisk()  # type: ignore[union-attr]
    await engine.commit(step(0, 1))
    with pytest.raises(Latched, match="mark"):
        await engine.commit(step(0, 2))
    await engine.close()
    engine = await opened(path)
    assert await last_step(engine, 0) == 1
    await engine.close()


# proves C10
@pytest.mark.parametrize("why", [errno.EDQUOT, errno.EFBIG])
async def test_a_quota_or_a_limit_of_the_file_is_a_full_disk(tmp_path: Path, why: int) -> None:
    disk = WatchedDisk()
    engine = await _written(tmp_path / "state.db", disk)
    disk.errno = why
    disk.refuse("write", "-wal", WRITE_FAILED)
    for _ in range(3):
        with pytest.raises(StorageFull):
            await engine.commit(step(0, 2))
    assert engine.latched is None
    assert await last_step(engine, 0) == 1
    disk.heal()
    await engine.commit(step(0, 2))
    assert await last_step(engine, 0) == 2
    disk.errno = errno.EIO
    disk.refuse("write", "-wal", WRITE_FAILED)
    with pytest.raises(CommitUnknown):
        await engine.commit(step(0, 3))
    assert engine.latched is not None
    await engine.close()


# proves C10
async def test_a_full_disk_refuses_and_writes_resume_by_themselves(tmp_path: Path) -> None:
    disk = WatchedDisk()
    engine = await _written(tmp_path / "state.db", disk)
    disk.refuse("write", "-wal", DISK_FULL)
    outcomes = await asyncio.gather(
        *(engine.commit(put(NOTES, ("t", f"g{at}"), Note("x"))) for at in range(3)),
        return_exceptions=True,
    )
    assert [type(outcome) for outcome in outcomes] == [StorageFull] * 3
    assert engine.latched is None
    assert await last_step(engine, 0) == 1
    assert await engine.get(NOTES, ("t", "g0")) is None
    disk.heal()
    await engine.commit(step(0, 2))
    assert await last_step(engine, 0) == 2
    await engine.close()


_FILL = """
import asyncio, resource, sys
from pathlib import Path
from perdure.core.batch import put
from perdure.core.errors import StorageFull
from perdure.proving.steps import NOTES, Note
from tests.engines.sqlite_stores import damage, opened

async def main(path):
    engine = await opened(path)
    kept = 0
    while True:
        try:
            await engine.commit(put(NOTES, ("t", f"n{kept}"), Note("x" * 3000), expect=0))
        except StorageFull:
            break
        kept += 1
    for at in range(kept):
        assert await engine.get(NOTES, ("t", f"n{at}")), at
    assert await engine.get(NOTES, ("t", f"n{kept}")) is None
    assert engine.latched is None
    make_room()
    await engine.commit(put(NOTES, ("t", f"n{kept}"), Note("x" * 3000), expect=0))
    assert await damage(engine) == []
    await engine.close()
    engine = await opened(path)
    assert engine.recovered.clean
    assert await engine.get(NOTES, ("t", f"n{kept}"))
    await engine.close()
    print("kept", kept)

path = Path(sys.argv[1]) / "state.db"
if "limited" in sys.argv:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, hard))
    make_room = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
else:
    path.with_name("ballast").write_bytes(bytes(600_000))
    make_room = path.with_name("ballast").unlink
asyncio.run(main(path))
"""


# proves C10
def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    space = "mount -t tmpfs -o size=2m tmpfs "
    tried = subprocess.run(
        ["unshare", "-Urm", "sh", "-c", f"{space} {tmp_path}"], capture_output=True, check=False
    )
    if tried.returncode:
        pytest.skip("this machine mounts no file system of a given size for its users")
    done = subprocess.run(
        [
            *("unshare", "-Urm", "sh", "-c", f'{space} {tmp_path} && "$0" -c "$1" {tmp_path}'),
            *(sys.executable, _FILL),
        ],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[1]) > 20


# proves C10
def test_a_file_that_really_may_not_grow(tmp_path: Path) -> None:
    """The system says something else than of a full disk, and SQLite that a write failed."""
    done = subprocess.run(
        [sys.executable, "-c", _FILL, str(tmp_path), "limited"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[1]) > 20


# proves C7
async def test_a_batch_that_touches_damage_fails_alone(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    engine = await opened(path)
    await engine.commit(append(EVENTS, KEY, [Note("x")]) + put(NOTES, KEY, Note("x")))
    await engine.commit(delete(NOTES, KEY))
    await engine.close()
    connection = sqlite_driver.connect(str(path))
    connection.execute("UPDATE streams SET last = 7")
    connection.execute("UPDATE tombstones SET version = 9")
    connection.close()
    engine = await opened(path)
    outcomes = await asyncio.gather(
        engine.commit(put(NOTES, ("t", "b"), Note("x"))),
        engine.commit(append(EVENTS, KEY, [Note("y")])),
        engine.commit(drop(EVENTS, KEY)),
        engine.commit(put(NOTES, KEY, Note("y"))),
        engine.commit(put(NOTES, ("t", "c"), Note("x"))),
        return_exceptions=True,
    )
    assert [isinstance(outcome, Damaged) for outcome in outcomes] == [0, 1, 1, 1, 0]
    assert engine.latched is None
    assert await engine.get(NOTES, ("t", "c"))
    await engine.close()


# proves C18
async def test_the_log_stays_within_its_bound_while_a_reader_holds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_checkpoint, "FEW_STEP_FRAMES", 50)
    monkeypatch.setattr(sqlite_checkpoint, "FINISH_FRAMES", 100)
    monkeypatch.setattr(sqlite_checkpoint, "_MAKE_WAY_FRAMES", 300)
    path = tmp_path / "state.db"
    engine = await opened(path)
    await engine.commit(step(0, 1))

    def read_for_ever(connection: apsw.Connection) -> None:
        connection.execute(
            "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) "
            "SELECT count(*) FROM n, records_notes"
        ).fetchall()

    reading = asyncio.ensure_future(engine._off_loop(read_for_ever))
    for number in range(2, 400):
        await engine.commit(step(0, number))
    with pytest.raises(Unavailable, match="Try again"):
        await reading
    assert path.with_name("state.db-wal").stat().st_size < 450 * 4120
    assert await last_step(engine, 0) == 399
    await engine.close()


# proves C9
async def test_a_store_whose_file_is_replaced_under_it_takes_no_more_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_checkpoint, "FEW_STEP_FRAMES", 20)
    path = tmp_path / "state.db"
    engine = await opened(path)
    await engine.commit(step(0, 1))
    path.unlink()
    refused = await _until_refused(engine)
    assert "removed or replaced" in str(refused)
    await engine.close()


async def test_the_log_of_one_large_batch_is_cut_back(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    engine = await opened(path)
    large = bytes(48 * 1024 * 1024)
    await engine.commit(
        put(NOTES, ("t", "a"), Note("x"), attachment=large)
        + put(NOTES, ("t", "b"), Note("x"), attachment=large)
    )
    log = path.with_name("state.db-wal")
    assert log.stat().st_size > 96 * 1024 * 1024
    await engine.commit(step(0, 1))
    await engine.commit(step(0, 2))
    assert log.stat().st_size <= 64 * 1024 * 1024
    record = await engine.get(NOTES, ("t", "b"))
    assert record is not None
    assert record.attachment == large
    await engine.close()
