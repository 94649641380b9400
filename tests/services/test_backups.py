"""Backups as a whole: the manifest, the blobs, the name, and what is refused."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import msgspec
import pytest

from perdure import library
from perdure.core.batch import put
from perdure.core.clock import SystemClock
from perdure.core.disk import Disk
from perdure.core.engine import Progress, Snapshot
from perdure.core.errors import Damaged, Invalid, Missing, NewerFormat, StorageFull
from perdure.engines import open_blobs, open_engine
from perdure.engines.wrapping import Wrapping
from perdure.frontends.cli.verify import tell, verify
from perdure.services import backups
from perdure.services.backups import MANIFEST, Manifest
from perdure.services.blobs import BlobKeeper
from perdure.services.config import load
from perdure.services.lifecycle import Node
from perdure.services.verification import Reclaimable, Verified
from perdure.surfaces.conversations import CONVERSATIONS, Conversation
from perdure.surfaces.state import LAYOUTS
from tests.services.test_files import bytes_of, keep

KEY = ("default", "conv_1")


def ignored(what: str, done: int, total: int) -> None:
    pass


async def chunks(data: bytes) -> AsyncIterator[bytes]:
    yield data


async def made(data: Path, *blobs: bytes) -> None:
    """A data directory with a record in it, and blobs."""
    engine = await open_engine(f"sqlite:///{data / 'perdure.db'}", LAYOUTS)
    await engine.commit(put(CONVERSATIONS, KEY, Conversation(1, {"a": "b"})))
    await engine.close()
    if blobs:
        kept = await open_blobs(f"file:///{data / 'blobs'}")
        for blob in blobs:
            await kept.put(chunks(blob), size_bytes_max=len(blob))
        await kept.close()


async def back_up(data: Path, target: Path) -> Manifest:
    return await library.back_up(
        f"sqlite:///{data / 'perdure.db'}", f"file:///{data / 'blobs'}", target, ignored
    )


async def restore(source: Path, data: Path) -> Manifest:
    return await library.restore(
        f"sqlite:///{data / 'perdure.db'}", f"file:///{data / 'blobs'}", source, ignored
    )


# proves C17
async def test_a_restored_store_has_every_record_and_every_blob(tmp_path: Path) -> None:
    await made(tmp_path / "data", b"one", b"", b"three" * 100_000)
    manifest = await back_up(tmp_path / "data", tmp_path / "backup")
    assert manifest.blobs.count == 3
    assert manifest.size_bytes > 500_000
    assert sorted(path.name for path in (tmp_path / "backup").iterdir()) == [
        "blobs",
        "manifest.json",
        "perdure.db",
    ]
    assert await restore(tmp_path / "backup", tmp_path / "other") == manifest
    async with library.open(f"sqlite:///{tmp_path / 'other' / 'perdure.db'}") as state:
        assert (await state.conversations.get(*KEY)).value.metadata == {"a": "b"}
        assert [finding async for finding in state.engine.verify()] == []
    blobs = await open_blobs(f"file:///{tmp_path / 'other' / 'blobs'}", read_only=True)
    assert [finding async for finding in blobs.verify()] == []
    assert [blob.size_bytes async for blob in blobs.list()] == [
        blob.stat().st_size for blob in sorted((tmp_path / "backup" / "blobs").iterdir())
    ]


class Meanwhile(Wrapping):
    """Lets something else happen on either side of the moment that a backup is of."""

    before: Callable[[], Awaitable[object]]
    after: Callable[[], Awaitable[object]]

    async def backup(self, into: Path, progress: Progress) -> Snapshot:
        await self.before()
        snapshot = await super().backup(into, progress)
        await self.after()
        return snapshot


# proves C17
async def test_a_backup_has_the_bytes_it_names_whatever_comes_and_goes_meanwhile(
    tmp_path: Path,
) -> None:
    flags = {"data": str(tmp_path / "data")}
    node = Node(load(environment={}, flags=flags), environment={}, wrap=Meanwhile)
    await node.open()
    engine = node.state.engine
    assert isinstance(engine, Meanwhile)
    going = await keep(node, b"goes behind the moment")
    engine.before = lambda: keep(node, b"comes before it")
    engine.after = lambda: node.files.delete("default", going["id"])
    await node.back_up(tmp_path / "backup", ignored)
    listed = await node.files.list("default", purpose=None, order="asc", limit=9, after=None)
    await node.close()
    (coming,) = listed.data
    await restore(tmp_path / "backup", tmp_path / "other")
    other = Node(load(environment={}, flags={"data": str(tmp_path / "other")}), environment={})
    await other.open()
    assert await bytes_of(other, going["id"]) == b"goes behind the moment"
    assert await bytes_of(other, coming.id) == b"comes before it"
    await other.close()


# proves C17
async def test_every_changed_byte_of_a_backup_is_refused(tmp_path: Path) -> None:
    await made(tmp_path / "data", b"a blob of some bytes")
    await back_up(tmp_path / "data", tmp_path / "backup")
    for path in sorted(path for path in (tmp_path / "backup").rglob("*") if path.is_file()):
        sound = path.read_bytes()
        for at in range(0, len(sound), max(1, len(sound) // 40)):
            if path.name == MANIFEST and chr(sound[at]).isspace():
                continue
            path.write_bytes(sound[:at] + bytes([sound[at] ^ 1]) + sound[at + 1 :])
            with pytest.raises((Damaged, NewerFormat)):  # not for a place that is not empty
                await restore(tmp_path / "backup", tmp_path / "other")
            assert not (tmp_path / "other" / "perdure.db").exists(), f"{path} at {at}"
            shutil.rmtree(tmp_path / "other", ignore_errors=True)
        path.write_bytes(sound)
    for torn in ("perdure.db", "blobs", MANIFEST):
        (tmp_path / "backup" / torn).rename(tmp_path / "away")
        with pytest.raises((Damaged, Missing)):
            await restore(tmp_path / "backup", tmp_path / "another")
        (tmp_path / "away").rename(tmp_path / "backup" / torn)
    (tmp_path / "backup" / "stranger").write_bytes(b"")
    with pytest.raises(Damaged, match="does not belong"):
        await restore(tmp_path / "backup", tmp_path / "another")


async def test_a_backup_never_overwrites(tmp_path: Path) -> None:
    await made(tmp_path / "data")
    (tmp_path / "backup").mkdir()
    with pytest.raises(Invalid, match="never overwrites"):
        await back_up(tmp_path / "data", tmp_path / "backup")
    assert not (tmp_path / "backup.tmp").exists()


async def test_a_restore_never_overwrites(tmp_path: Path) -> None:
    await made(tmp_path / "data", b"blob")
    await back_up(tmp_path / "data", tmp_path / "backup")
    for data in (tmp_path / "data", tmp_path / "taken"):
        (tmp_path / "taken" / "blobs").mkdir(parents=True, exist_ok=True)
        (tmp_path / "taken" / "blobs" / "something").touch()
        with pytest.raises(Invalid, match="empty place"):
            await restore(tmp_path / "backup", data)


# proves C17
async def test_what_a_killed_backup_left_is_no_backup_and_no_hindrance(tmp_path: Path) -> None:
    await made(tmp_path / "data")
    await back_up(tmp_path / "data", tmp_path / "whole")
    left = tmp_path / "backup.tmp"
    (left / "blobs").mkdir(parents=True)
    (left / "perdure.db").write_bytes((tmp_path / "whole" / "perdure.db").read_bytes()[:50_000])
    (left / "blobs" / "torn").write_bytes(b"to")
    with pytest.raises(Missing, match="cut short"):
        await restore(left, tmp_path / "other")
    await back_up(tmp_path / "data", tmp_path / "backup")
    await restore(tmp_path / "backup", tmp_path / "other")
    assert not left.exists()


async def test_a_newer_backup_is_refused(tmp_path: Path) -> None:
    await made(tmp_path / "data")
    manifest = await back_up(tmp_path / "data", tmp_path / "backup")
    newer = msgspec.structs.replace(manifest, format=2)
    (tmp_path / "backup" / MANIFEST).write_bytes(msgspec.json.encode(newer))
    with pytest.raises(NewerFormat):
        await restore(tmp_path / "backup", tmp_path / "other")


class Full(Disk):
    """A disk without room for a manifest."""

    def write_file(self, path: Path, data: bytes) -> None:
        raise StorageFull(f"no space left to write {path}.")


async def test_a_backup_that_fails_leaves_nothing(tmp_path: Path) -> None:
    await made(tmp_path / "data")
    engine = await open_engine(f"sqlite:///{tmp_path / 'data' / 'perdure.db'}", LAYOUTS)
    keeper = BlobKeeper(engine, await open_blobs("memory://"), SystemClock(), "boot")

    async def tried(disk: Disk, progress: backups.Progress = ignored) -> Manifest:
        return await backups.back_up(
            engine, keeper, tmp_path / "backup", progress, clock=SystemClock(), disk=disk
        )

    with pytest.raises(StorageFull):
        await tried(Full())
    assert not list(tmp_path.glob("backup*"))
    reached = asyncio.Event()
    trying = asyncio.create_task(tried(Disk(), lambda what, done, total: reached.set()))
    await reached.wait()
    trying.cancel()
    with pytest.raises(asyncio.CancelledError):
        await trying
    assert not list(tmp_path.glob("backup*"))
    await tried(Disk())
    await engine.close()


class Recording(Disk):
    """Notes every durable edge, in order."""

    def __init__(self) -> None:
        self.edges: list[tuple[str, str]] = []

    def sync(self, fd: int, path: Path) -> None:
        self.edges.append(("sync", path.name))
        super().sync(fd, path)

    def replace(self, source: Path, target: Path) -> None:
        self.edges.append(("name", target.name))
        super().replace(source, target)

    def sync_directory(self, path: Path) -> None:
        self.edges.append(("sync", path.name))
        super().sync_directory(path)


# proves C17
async def test_a_backup_has_its_name_only_when_all_of_it_is_durable(tmp_path: Path) -> None:
    await made(tmp_path / "data", b"blob")
    disk = Recording()
    engine = await open_engine(f"sqlite:///{tmp_path / 'data' / 'perdure.db'}", LAYOUTS, disk=disk)
    blobs = await open_blobs(f"file:///{tmp_path / 'data' / 'blobs'}", read_only=True)
    disk.edges.clear()
    keeper = BlobKeeper(engine, blobs, SystemClock(), "boot")
    manifest = await backups.back_up(
        engine, keeper, tmp_path / "backup", ignored, clock=SystemClock(), disk=disk
    )
    await engine.close()
    named = disk.edges.index(("name", "backup"))
    (blob,) = (path.name for path in (tmp_path / "backup" / "blobs").iterdir())
    for name in ("perdure.db", blob, "blobs", "manifest.json.tmp", "backup.tmp"):
        assert ("sync", name) in disk.edges[:named], f"{name} is not durable"
    assert disk.edges[named + 1] == ("sync", tmp_path.name)
    assert manifest.blobs.count == 1


async def with_a_file(data: Path, *contents: bytes) -> list[str]:
    """A data directory with files in it; the digests of their bytes."""
    engine = await open_engine(f"sqlite:///{data / 'perdure.db'}", LAYOUTS)
    kept = await open_blobs(f"file:///{data / 'blobs'}")
    keeper = BlobKeeper(engine, kept, SystemClock(), "boot")
    claims = [await keeper.put("default", chunks(data), size_bytes_max=99) for data in contents]
    for number, claim in enumerate(claims):
        await engine.commit(keeper.uses.refer(claim, f"files/{number}"))
    await kept.close()
    await engine.close()
    return [claim.value.digest for claim in claims]


def blob_at(data: Path, digest: str) -> Path:
    return data / "blobs" / digest[:2] / digest


# proves C17, C4
async def test_a_store_whose_bytes_are_gone_is_not_backed_up(tmp_path: Path) -> None:
    data = tmp_path / "data"
    lost, _ = await with_a_file(data, b"one", b"two")
    blob_at(data, lost).unlink()
    with pytest.raises(Damaged, match=f"{lost} of files/0") as refused:
        await back_up(data, tmp_path / "backup")
    assert "absent" in refused.value.why
    assert not list(tmp_path.glob("backup*"))


# proves C17, C4
async def test_a_backup_that_lacks_bytes_is_not_restored(tmp_path: Path) -> None:
    """However it came to be: its manifest says what is there, and that is not enough."""
    data, backup, other = tmp_path / "data", tmp_path / "backup", tmp_path / "other"
    lost, _ = await with_a_file(data, b"one", b"two")
    manifest = await back_up(data, backup)
    (backup / "blobs" / lost).unlink()
    manifest = msgspec.structs.replace(
        manifest, blobs=backups._list(backups._blobs_in(backup / "blobs"))
    )
    manifest = msgspec.structs.replace(manifest, digest=backups._digest(manifest))
    (backup / MANIFEST).write_bytes(msgspec.json.encode(manifest))
    with pytest.raises(Damaged, match=f"{lost} of files/0"):
        await restore(backup, other)
    left = [path.name for path in other.iterdir()]
    assert left == ["perdure.db.lock"], "something is there, or is left unfinished"
    await back_up(data, tmp_path / "sound")
    await restore(tmp_path / "sound", other)


# proves C8, C4
async def test_verify_without_a_server_looks_for_bytes_and_counts_what_is_left_over(
    tmp_path: Path,
) -> None:
    data = tmp_path / "data"
    url, blobs = f"sqlite:///{data / 'perdure.db'}", f"file:///{data / 'blobs'}"
    lost, shorter, changed, _ = await with_a_file(data, b"one", b"two", b"three", b"kept")
    found = await library.verify(url, blobs)
    assert (found.ok, found.findings, found.reclaimable) == (True, [], Reclaimable())
    kept = await open_blobs(blobs)
    await kept.put(chunks(b"nobody's"), size_bytes_max=99)
    await kept.close()
    (data / "blobs" / "incoming" / "blob_1.tmp").write_bytes(b"half")
    left = Reclaimable(blobs=1, size_bytes=8, leftovers=1)
    found = await library.verify(url, blobs)
    assert (found.ok, found.findings, found.reclaimable) == (True, [], left)

    blob_at(data, lost).unlink()
    blob_at(data, shorter).write_bytes(b"tw")
    blob_at(data, changed).write_bytes(b"THREE")
    found = await library.verify(url, blobs)
    told = {finding.where: finding.why for finding in found.findings}
    assert (found.ok, found.reclaimable, len(told)) == (False, left, 4)
    assert "absent" in told[f"the blob {lost} of files/0 (tenant default)"]
    assert "2 bytes" in told[f"the blob {shorter} of files/1 (tenant default)"]
    for digest in (shorter, changed):
        assert "another digest" in told[f"the blob {digest}"]


# proves C4
async def test_a_file_that_is_none_of_the_stores_is_named_and_no_server_is_said_to_remove_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url, blobs = f"file:///{tmp_path / 'state'}", f"file:///{tmp_path / 'blobs'}"
    async with library.open(url):
        pass
    (tmp_path / "state/notes").write_text("mine")
    found = await library.verify(url, blobs)
    assert (found.ok, found.reclaimable) == (True, Reclaimable())
    assert [stray.where for stray in found.strays] == [str(tmp_path / "state/notes")]
    tell(found, json=False)
    said = capsys.readouterr().out
    assert said.startswith("nothing is damaged")
    assert "stray" in said
    assert "sweep" not in said


# proves C8
def test_what_was_accepted_is_told_to_a_program_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"file:///{tmp_path / 'state'}"
    with library.blocking(url) as state:
        state.workers.create_runtime({"id": "lab"})
    kept = tmp_path / "state/runtimes/lab/runtime.json"
    kept.write_text(kept.read_text().replace("{}", '{"a":1}'))
    verify(data=str(tmp_path), engine=url, accept=True, json=True)
    told = msgspec.json.decode(capsys.readouterr().out, type=Verified)
    assert (told.ok, [one.where for one in told.accepted]) == (True, ["runtimes lab"])


# proves C8, C4
async def test_verify_reports_references_where_there_are_no_blobs_at_all(tmp_path: Path) -> None:
    data = tmp_path / "data"
    await with_a_file(data, b"one")
    shutil.rmtree(data / "blobs")
    found = await library.verify(f"sqlite:///{data / 'perdure.db'}", f"file:///{data / 'blobs'}")
    assert [finding.kind for finding in found.findings] == ["damaged"]
    assert not (data / "blobs").exists(), "looking made something"
