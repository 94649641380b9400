"""The disk module, on a real file system: what is synced, in which order, and what is left."""

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from perdure.core.disk import Disk, full_disk
from perdure.core.errors import StorageFull, StoreLocked


class Recording(Disk):
    """Notes every durable edge, in order."""

    def __init__(self) -> None:
        self.edges: list[tuple[str, str]] = []

    def write_all(self, fd: int, data: bytes, path: Path) -> None:
        self.edges.append(("write", path.name))
        super().write_all(fd, data, path)

    def sync(self, fd: int, path: Path) -> None:
        self.edges.append(("sync", path.name))
        super().sync(fd, path)

    def replace(self, source: Path, target: Path) -> None:
        self.edges.append(("replace", target.name))
        super().replace(source, target)

    def sync_directory(self, path: Path) -> None:
        self.edges.append(("sync_directory", path.name))
        super().sync_directory(path)


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """What the system is asked for, and for which inode. The proofs of other modules record and
    refuse at the methods of `Disk`: that these do what they say is proven here."""
    told: list[tuple[str, int]] = []
    write, fsync, replace = os.write, os.fsync, os.replace

    def short_write(fd: int, data: memoryview) -> int:
        told.append(("write", os.fstat(fd).st_ino))
        return write(fd, data[:3])

    def noted_fsync(fd: int) -> None:
        told.append(("fsync", os.fstat(fd).st_ino))
        fsync(fd)

    def noted_replace(source: Path, target: Path) -> None:
        told.append(("replace", source.stat().st_ino))
        replace(source, target)

    monkeypatch.setattr(os, "write", short_write)
    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    return told


# proves C4, C5
def test_the_system_is_asked_for_every_sync_and_a_short_write_goes_on(
    tmp_path: Path, called: list[tuple[str, int]]
) -> None:
    path = tmp_path / "a"
    Disk().write_file(path, b"eight by")
    file, directory = path.stat().st_ino, tmp_path.stat().st_ino
    assert path.read_bytes() == b"eight by"
    assert called == [
        *[("write", file)] * 3,
        *(("fsync", file), ("replace", file), ("fsync", directory)),
    ]
    called.clear()
    Disk().sync_file(path)
    Disk().remove(path)
    Disk().make_directory(tmp_path / "b")
    assert called == [("fsync", file), ("fsync", directory), ("fsync", directory)]


# proves C9
@pytest.mark.parametrize("what", ["file", "directory"])
def test_a_sync_that_the_system_refuses_is_not_kept_quiet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    path, fsync = tmp_path / "a", os.fsync
    Disk().write_file(path, b"old")

    def refusing(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode) == (what == "directory"):
            raise OSError(errno.EIO, "planned")
        fsync(fd)

    monkeypatch.setattr(os, "fsync", refusing)
    with pytest.raises(OSError, match="planned"):
        Disk().write_file(path, b"new")
    assert path.read_bytes() == (b"old" if what == "file" else b"new")


class Full(Disk):
    """Has room for `room` bytes."""

    def __init__(self, room: int) -> None:
        self.room = room

    def write_all(self, fd: int, data: bytes, path: Path) -> None:
        with full_disk(path):
            if len(data) > self.room:
                super().write_all(fd, data[: self.room], path)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            super().write_all(fd, data, path)


# proves C3
def test_a_file_is_synced_renamed_and_its_directory_synced_in_that_order(tmp_path: Path) -> None:
    disk = Recording()
    disk.write_file(tmp_path / "state", b"one")
    assert disk.edges == [
        ("write", "state.tmp"),
        ("sync", "state.tmp"),
        ("replace", "state"),
        ("sync_directory", tmp_path.name),
    ]
    assert (tmp_path / "state").read_bytes() == b"one"


# proves C10
def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    Disk().write_file(tmp_path / "state", b"old")
    with pytest.raises(StorageFull, match="no space left"):
        Full(2).write_file(tmp_path / "state", b"new and longer")
    assert [path.name for path in tmp_path.iterdir()] == ["state"]
    assert (tmp_path / "state").read_bytes() == b"old"


def test_an_unpublished_file_is_discarded(tmp_path: Path) -> None:
    writer = Disk().writer(tmp_path / "part.tmp")
    writer.write(b"x")
    writer.discard()
    writer.discard()
    assert list(tmp_path.iterdir()) == []


def test_every_directory_made_is_synced_into_its_parent(tmp_path: Path) -> None:
    disk = Recording()
    disk.make_directory(tmp_path / "a" / "b")
    assert disk.edges == [("sync_directory", tmp_path.name), ("sync_directory", "a")]


def test_a_directory_found_is_synced_too_for_its_maker_may_have_died_before_that(
    tmp_path: Path,
) -> None:
    disk = Recording()
    (tmp_path / "a").mkdir()
    disk.make_directory(tmp_path / "a")
    assert disk.edges == [("sync_directory", tmp_path.name)]


def test_a_directory_whose_parent_may_not_be_opened_is_taken_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    disk = Recording()
    (tmp_path / "a").mkdir()
    disk.make_directory(tmp_path / "a")
    assert disk.edges == []


def test_removing_what_is_absent_changes_nothing(tmp_path: Path) -> None:
    Disk().remove(tmp_path / "never")
    Disk().remove(tmp_path / "no directory" / "never")
    assert list(tmp_path.iterdir()) == []


# proves C11
def test_a_lock_names_its_holder_and_dies_with_it(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    program = (
        "import sys, os, pathlib; from perdure.core.disk import Disk\n"
        "lock = Disk().lock(pathlib.Path(sys.argv[1])); lock.note(f'{os.getpid()}\\nboot\\n')\n"
        "print('held', flush=True); sys.stdin.read()\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", program, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(StoreLocked, match=str(holder.pid)) as locked:
            Disk().lock(path)
        assert locked.value.holder == holder.pid
        holder.kill()
        holder.wait()
    Disk().lock(path).release()


# proves C11
def test_a_child_that_was_forked_does_not_keep_the_lock_of_its_parent(tmp_path: Path) -> None:
    """The next owner was refused as long as it lived, in the name of a process that was dead."""
    path = tmp_path / "lock"
    program = (
        "import sys, os, pathlib; from perdure.core.disk import Disk\n"
        "lock = Disk().lock(pathlib.Path(sys.argv[1]))\n"
        "if os.fork() == 0: print('forked', flush=True); os.close(1)\n"
        "sys.stdin.read()\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", program, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"forked\n"
        with pytest.raises(StoreLocked):
            Disk().lock(path)
        holder.kill()
        holder.wait()
        Disk().lock(path).release()


def test_shared_locks_go_together_and_exclude_the_owner(tmp_path: Path) -> None:
    disk = Disk()
    owner = disk.lock(tmp_path / "lock")
    owner.note("4711\n")
    with pytest.raises(StoreLocked, match="process 4711"):
        disk.lock(tmp_path / "lock", shared=True)
    owner.release()
    first, second = (disk.lock(tmp_path / "lock", shared=True) for _ in range(2))
    with pytest.raises(StoreLocked, match="in use by another process"):  # and not by the dead one
        disk.lock(tmp_path / "lock")
    first.release()
    second.release()
    second.release()
    disk.lock(tmp_path / "lock").release()


def test_a_fixed_file_is_made_once_and_overwritten_in_place(tmp_path: Path) -> None:
    disk, path = Disk(), tmp_path / "mark"
    for data in (b"ab", b"cd"):
        fd = disk.open_fixed(path, 4)
        disk.overwrite(fd, data, 1)
        os.close(fd)
    assert path.read_bytes() == b"\0cd\0"


def test_a_file_is_read_in_chunks_from_any_place(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abcdefg")
    assert list(Disk().read_chunks(tmp_path / "f", 2, 2)) == [b"cd", b"ef", b"g"]
    assert list(Disk().read_chunks(tmp_path / "f", 9, 2)) == []


def test_a_large_file_is_written_out_while_it_grows(tmp_path: Path) -> None:
    written: list[tuple[int, int]] = []

    class Watched(Disk):
        def write_out(self, fd: int, offset: int, size_bytes: int) -> None:
            super().write_out(fd, offset, size_bytes)
            written.append((offset, size_bytes))

    chunk = bytes(range(256)) * 4_096
    writer = Watched().writer(tmp_path / "large.tmp")
    for _ in range(20):
        writer.write(chunk)
    writer.publish(tmp_path / "large")
    assert (tmp_path / "large").read_bytes() == chunk * 20
    assert written == [(0, 8 * len(chunk)), (8 * len(chunk), 8 * len(chunk))]
