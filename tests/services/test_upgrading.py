"""An older store is upgraded only after a snapshot of it, in each of the ways to open one."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
from typer.testing import CliRunner

from perdure import library
from perdure.core.batch import put
from perdure.core.clock import SystemClock
from perdure.core.disk import Disk
from perdure.core.errors import Damaged, NeedsUpgrade, NewerFormat, StorageFull
from perdure.core.layouts import Layout, Records
from perdure.engines import open_blobs, open_engine, restore_engine
from perdure.frontends.cli.main import app
from perdure.proving.edges import changes
from perdure.proving.watched import HastyDisk
from perdure.services.backups import MANIFEST, check_backup
from perdure.services.config import load
from perdure.services.lifecycle import Node
from perdure.services.upgrading import Migration, Upgrading
from perdure.surfaces.blobs import BlobUses
from perdure.surfaces.conversations import CONVERSATIONS, Conversation
from perdure.surfaces.state import LAYOUTS

FEWER = Records("conversations", Conversation, key=CONVERSATIONS.key)
OLDER: tuple[Layout, ...] = tuple(FEWER if it is CONVERSATIONS else it for it in LAYOUTS)
"""What this release declares, but for an index."""

FEW: tuple[Layout, ...] = (CONVERSATIONS, *BlobUses.promise.layouts)
KEY = ("default", "conv_1")
TALK = Conversation(1, {"a": "b"})
BYTES = b"the bytes of a file"

both = pytest.mark.parametrize("kind", ["sqlite", "files"])


def ignored(*told: object) -> None:
    pass


def url_of(kind: str, data: Path) -> str:
    return f"sqlite:///{data / 'perdure.db'}" if kind == "sqlite" else f"file:///{data / 'store'}"


async def chunks(data: bytes) -> AsyncIterator[bytes]:
    yield data


async def older(kind: str, data: Path, layouts: tuple[Layout, ...] = OLDER) -> str:
    """The URL of a store of the release before, with a record, and with bytes beside it."""
    engine = await open_engine(url_of(kind, data), layouts)
    await engine.commit(put(FEWER, KEY, TALK))
    await engine.close()
    blobs = await open_blobs(f"file:///{data / 'blobs'}")
    await blobs.put(chunks(BYTES), size_bytes_max=len(BYTES))
    await blobs.close()
    return engine.url


def contents(root: Path) -> dict[str, bytes]:
    """All files, but for the empty ones that SQLite makes to look at a store."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file()
        and not path.name.endswith("-shm")
        and not (path.name.endswith("-wal") and path.stat().st_size == 0)
    }


def upgrading(url: str, data: Path, disk: Disk, layouts: tuple[Layout, ...] = LAYOUTS) -> Upgrading:
    opening = partial(open_engine, url, layouts, disk=disk)
    blobs = partial(open_blobs, f"file:///{data / 'blobs'}", read_only=True)
    beside = Path(url.partition(":///")[2])
    return Upgrading(opening, blobs, beside, SystemClock(), disk)


async def by_a_server(kind: str, data: Path) -> None:
    flags = {"data": str(data), "engine": url_of(kind, data)}
    node = Node(load(environment={}, flags=flags), environment={})
    await node.open()
    await node.close()


async def by_a_program(kind: str, data: Path) -> None:
    async with library.open(url_of(kind, data)) as state:
        assert await state.engine.get(CONVERSATIONS, KEY) is not None


async def by_an_operator(kind: str, data: Path) -> None:
    url, blobs = url_of(kind, data), f"file:///{data / 'blobs'}"
    migrated = await library.migrate(url, blobs, data, ignored)
    assert migrated.done
    assert [step.says for step in migrated.steps] == ["new indexes of conversations"]
    assert migrated.steps[0].rows == 1


# proves C16
@both
@pytest.mark.parametrize("opened", [by_a_server, by_a_program, by_an_operator])
async def test_whoever_opens_an_older_store_upgrades_it_after_a_snapshot(
    opened: Callable[[str, Path], Awaitable[None]], kind: str, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    url = await older(kind, data)
    with pytest.raises(NeedsUpgrade, match=r"new indexes of conversations.*perdure migrate"):
        await open_engine(url, LAYOUTS)
    await opened(kind, data)
    engine = await open_engine(url, LAYOUTS)
    assert (
        await engine.count(CONVERSATIONS, ("default",), index=CONVERSATIONS.indexes[0].name)
        is not None
    )
    assert [finding async for finding in engine.verify()] == []
    await engine.close()
    (snapshot,) = data.glob("*.before-upgrade-*")
    again = url_of(kind, tmp_path / "again")
    (tmp_path / "again").mkdir()
    await restore_engine(again, snapshot, OLDER, ignored)
    before = await open_engine(again, OLDER)
    record = await before.get(FEWER, KEY)
    assert record is not None
    assert (record.version, record.value) == (1, TALK)
    await before.close()
    kept = [path.read_bytes() for path in (snapshot / "blobs").glob("*")]
    assert kept == ([] if kind == "files" and opened is by_a_program else [BYTES])


# proves C16
@both
def test_a_dry_run_says_what_it_comes_to_and_changes_nothing(kind: str, tmp_path: Path) -> None:

    url = asyncio.run(older(kind, tmp_path))
    before = contents(tmp_path)
    options = ["--engine", url, "--data", str(tmp_path)]
    ran = CliRunner().invoke(app, ["migrate", "--dry-run", "--json", *options])
    found = msgspec.json.decode(ran.stdout, type=Migration)
    assert (found.format, found.newest, found.done, found.kept) == (1, 1, False, False)
    assert found.steps[0].size_bytes < found.snapshot_size_bytes < found.needed_size_bytes
    assert found.needed_size_bytes < found.free_size_bytes
    shown = CliRunner().invoke(app, ["migrate", "--dry-run", *options]).stdout
    assert "new indexes of conversations" in shown
    assert "nothing was changed" in shown
    assert contents(tmp_path) == before
    ran = CliRunner().invoke(app, ["migrate", *options])
    assert ran.exit_code == 0
    assert "everything verified" in ran.stdout
    assert (Path(found.snapshot) / MANIFEST).exists()
    assert "nothing is to be done" in CliRunner().invoke(app, ["migrate", *options]).stdout


class Small(Disk):
    def free_bytes(self, path: Path) -> int:
        return 1_000


class Fading(Disk):
    """Changes a byte of the snapshot, once it was written and looked at."""

    def replace(self, source: Path, target: Path) -> None:
        super().replace(source, target)
        if "before-upgrade" in target.name:
            copied = next(path for path in target.iterdir() if path.suffix in (".db", ""))
            data = bytearray(copied.read_bytes())
            data[len(data) // 2] ^= 1
            copied.write_bytes(data)


# proves C16
@both
@pytest.mark.parametrize(("disk", "kind_of_error"), [(Small(), StorageFull), (Fading(), Damaged)])
async def test_without_room_or_a_sound_snapshot_nothing_is_changed(
    disk: Disk, kind_of_error: type[Exception], kind: str, tmp_path: Path
) -> None:
    url = await older(kind, tmp_path)
    before = contents(tmp_path)
    with pytest.raises(kind_of_error, match=r"1000 are free|not the file"):
        await upgrading(url, tmp_path, disk).open(ignored)
    after = contents(tmp_path)
    assert {name: after.get(name) for name in before} == before
    if isinstance(disk, Small):
        assert after == before
    engine = await open_engine(url, OLDER)
    await engine.commit(put(FEWER, KEY, TALK, expect=1))
    await engine.close()


class Stop(BaseException):
    """In place of a death."""


class Dying(HastyDisk):
    """Is not there any more from call number `at` on, as to a process that was killed."""

    def __init__(self, at: int) -> None:
        self.at = at
        self.calls = 0

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if name in changes(Disk):
            self.calls += 1
            if self.calls >= self.at > 0:
                raise Stop
        return found


# proves C16
@both
async def test_killed_at_any_call_to_its_disk_an_upgrade_goes_on_by_itself(
    kind: str, tmp_path: Path
) -> None:
    await older(kind, tmp_path / "old", (FEWER, *FEW[1:]))
    whole = Dying(0)
    shutil.copytree(tmp_path / "old", tmp_path / "whole")
    url = url_of(kind, tmp_path / "whole")
    await (await upgrading(url, tmp_path / "whole", whole, FEW).open(ignored)).close()
    assert whole.calls > 20
    for at in range(1, whole.calls + 1):
        data = tmp_path / f"{at}"
        shutil.copytree(tmp_path / "old", data)
        url = url_of(kind, data)
        with pytest.raises(Stop):
            await (await upgrading(url, data, Dying(at), FEW).open(ignored)).close()
        look = await open_engine(url, FEW, read_only=True)
        snapshots = [path for path in data.glob("*.before-upgrade-*") if path.suffix != ".tmp"]
        assert look.written.steps or snapshots
        await look.close()
        for snapshot in snapshots:
            await check_backup(snapshot, ignored)
        engine = await upgrading(url, data, HastyDisk(), FEW).open(ignored)
        assert await engine.count(CONVERSATIONS, ("default",), index="by_age") == {(): 1}
        assert [finding async for finding in engine.verify()] == []
        await engine.close()
        assert not list(data.glob("*.tmp"))


# proves C16
@both
async def test_a_snapshot_that_was_taken_is_used_again_only_while_it_is_of_the_last_commit(
    kind: str, tmp_path: Path
) -> None:
    url = await older(kind, tmp_path)
    taking = upgrading(url, tmp_path, Disk())
    kept = await taking._snapshot(ignored)
    plan = await taking.plan()
    assert plan.kept
    assert plan.needed_size_bytes < plan.snapshot_size_bytes + plan.steps[0].size_bytes
    before = await open_engine(url, OLDER)
    await before.commit(put(FEWER, KEY, TALK, expect=1))
    await before.close()
    with pytest.raises(NeedsUpgrade):
        await open_engine(url, LAYOUTS, snapshots=[kept])
    assert not (await taking.plan()).kept
    engine = await taking.open(ignored)
    record = await engine.get(CONVERSATIONS, KEY)
    assert record is not None
    assert record.version == 2
    await engine.close()
    assert len(list(tmp_path.glob("*.before-upgrade-*"))) == 2


# proves C16
@both
async def test_a_newer_collection_is_refused_byte_for_byte_untouched(
    kind: str, tmp_path: Path
) -> None:
    newer = Records(
        "conversations",
        Conversation,
        key=CONVERSATIONS.key,
        indexes=CONVERSATIONS.indexes,
        version=2,
    )
    layouts = tuple(newer if it is CONVERSATIONS else it for it in LAYOUTS)
    url = url_of(kind, tmp_path)
    engine = await open_engine(url, layouts)
    await engine.commit(put(newer, KEY, TALK))
    await engine.close()
    before = contents(tmp_path)
    for read_only in (True, False):
        with pytest.raises(NewerFormat, match="conversations was written in version 2"):
            await open_engine(url, LAYOUTS, read_only=read_only)
        assert contents(tmp_path) == before
    with pytest.raises(NewerFormat):
        async with library.open(url):
            raise AssertionError("it was opened")
    assert contents(tmp_path) == before
    with pytest.raises(NewerFormat):
        await library.migrate(url, f"file:///{tmp_path / 'blobs'}", tmp_path, ignored)
    assert contents(tmp_path) == before


# proves C16
async def test_shards_are_upgraded_together_after_a_snapshot_of_each(tmp_path: Path) -> None:
    url = f"shards:sqlite:///{tmp_path / 'a.db'},sqlite:///{tmp_path / 'b.db'}"
    engine = await open_engine(url, (FEWER, *FEW[1:]))
    await engine.commit(put(FEWER, KEY, TALK))
    await engine.close()
    with pytest.raises(NeedsUpgrade):
        await open_engine(url, FEW)
    blobs = partial(open_blobs, "memory://")
    taking = Upgrading(
        partial(open_engine, url, FEW), blobs, tmp_path / "store", SystemClock(), Disk()
    )
    engine = await taking.open(ignored)
    assert await engine.count(CONVERSATIONS, ("default",), index="by_age") == {(): 1}
    await engine.close()
    (snapshot,) = tmp_path.glob("store.before-upgrade-*")
    manifest = await check_backup(snapshot, ignored)
    assert [file.path for file in manifest.files] == ["0/perdure.db", "1/perdure.db"]
    assert len(manifest.snapshot.parts) == 2
    again = url.replace("/a.db", "/c.db").replace("/b.db", "/d.db")
    await restore_engine(again, snapshot, (FEWER, *FEW[1:]), ignored)
    before = await open_engine(again, (FEWER, *FEW[1:]))
    assert await before.get(FEWER, KEY) is not None
    await before.close()
    assert not (await taking.plan()).steps
