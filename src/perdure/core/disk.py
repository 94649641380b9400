"""The disk module: the only code that writes, syncs, renames, removes or locks files.

Invariant: when `write_file` or `Writer.publish` returns, the bytes and their directory entry are
on the disk, in that order (sync the file, rename it, sync its directory). Nothing bypasses this,
so a test can wrap one `Disk` and see, fail or forget every durable edge.

SQLite does its own I/O; its faults enter through its VFS.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import takewhile
from pathlib import Path
from weakref import WeakSet

from perdure.core.errors import StorageFull, StoreLocked, Unavailable

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""No room: on the disk, in the user's quota, or within a limit of the file's size."""

READ_ONLY = {errno.EROFS, errno.EACCES, errno.EPERM}
"""Nothing may be written: there at all, or by this user."""

_WRITE_BEHIND_BYTES = 8 * 1024 * 1024
TEMPORARY = ".tmp"
"""Suffix of files that are not published yet; recovery and verify may remove them."""


class Lock:
    """An advisory lock on a file, released by `release` or by the death of the process. A process
    that is forked from the holder has no part in it: it would hold the lock beyond that death."""

    def __init__(self, fd: int, path: Path) -> None:
        self._fd = fd
        self.path = path
        _held.add(self)

    def note(self, text: str) -> None:
        """Write into the lock file who holds it, for people and for the control socket's path."""
        note = text.encode()
        with translated(self.path), full_disk(self.path):
            os.pwrite(self._fd, note, 0)
            os.ftruncate(self._fd, len(note))  # after it, so that the holder is always named

    def take_alone(self) -> None:
        """Have it alone, in the file that has this name."""
        fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(self._fd), self.path.stat()):
            raise FileNotFoundError(errno.ENOENT, "another file has this name", str(self.path))

    def share(self) -> None:
        """Let others that share the file have it too."""
        fcntl.flock(self._fd, fcntl.LOCK_SH)

    def release(self) -> None:
        """Let go. Releasing twice is harmless."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


_held: WeakSet[Lock] = WeakSet()


def _let_go_in_child() -> None:
    for lock in tuple(_held):
        lock.release()  # of one of the two descriptors: the parent's still holds


os.register_at_fork(after_in_child=_let_go_in_child)


class Writer:
    """A new file that does not exist for readers until `publish`."""

    def __init__(self, disk: Disk, temporary: Path) -> None:
        self._disk = disk
        self._temporary = temporary
        self._fd = disk.open_new(temporary)
        self._size_bytes = 0
        self._sent_bytes = 0

    def write(self, data: bytes) -> None:
        """Add bytes. Raises `StorageFull`."""
        self._disk.write_all(self._fd, data, self._temporary)
        self._size_bytes += len(data)
        waiting = self._size_bytes - self._sent_bytes
        if waiting >= _WRITE_BEHIND_BYTES:
            self._disk.write_out(self._fd, self._sent_bytes, waiting)
            self._sent_bytes = self._size_bytes

    def publish(self, path: Path) -> None:
        """Give the file its name, durably, replacing what had it."""
        self.move_to(path)
        self._disk.sync_directory(path.parent)

    def move_to(self, path: Path) -> None:
        """The same, but that whoever renames many files syncs their directory once."""
        self._disk.sync(self._fd, self._temporary)
        os.close(self._fd)
        self._fd = -1
        self._disk.replace(self._temporary, path)

    def discard(self) -> None:
        """Forget the file unless it was published. Safe to call in a `finally`."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self._disk.unlink(self._temporary)


class Disk:
    """The real disk. Tests wrap or subclass it; product code only ever receives one."""

    def write_file(self, path: Path, data: bytes) -> None:
        """Create or replace a small file, atomically and durably."""
        writer = Writer(self, path.with_name(path.name + TEMPORARY))
        try:
            writer.write(data)
            writer.publish(path)
        finally:
            writer.discard()

    def writer(self, temporary: Path) -> Writer:
        """Start a new file under a temporary name on the file system it will be published to."""
        return Writer(self, temporary)

    def make_directory(self, path: Path) -> None:
        """Create a directory and its parents, each durable in its own parent. One that exists is
        synced too: whoever made it may have died before that. Raises `Unavailable`."""
        if path.is_dir() and not os.access(path.parent, os.R_OK):
            return  # an operator's, in a directory that this process may not even open
        try:
            with full_disk(path):
                missing = [*takewhile(lambda part: not part.exists(), path.parents)]
                for part in (*reversed(missing), path):
                    self.add_directory(part)
                    self.sync_directory(part.parent)
        except OSError as error:
            raise Unavailable(
                f"the directory {path} cannot be made: {error.strerror}. "
                "Name another, or give this user the right to write there."
            ) from error

    def remove(self, path: Path) -> None:
        """Remove a file durably. Removing what is absent changes nothing."""
        self.unlink(path)
        if path.parent.exists():
            self.sync_directory(path.parent)

    def lock(self, path: Path, *, shared: bool = False) -> Lock:
        """Take the advisory lock on `path` at once. Raises `StoreLocked` naming the holder by what
        it noted in the file. `shared` needs no right to write, and on a file system where nothing
        can be written no file either: nobody owns what they cannot lock."""
        try:
            with full_disk(path):
                fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            if not shared or error.errno not in READ_ONLY:
                raise
            if error.errno == errno.EROFS and not path.exists():
                return Lock(-1, path)
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except OSError as error:
            noted = shared or not _only_looked_at(fd)
            os.close(fd)
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            raise StoreLocked(str(path.parent), *(_holder(path) if noted else (0, ""))) from None
        return Lock(fd, path)

    def lock_existing(self, path: Path) -> Lock:
        """The same on a file that is there, whatever it holds. Raises `StoreLocked`, and
        `FileNotFoundError` where there is none, or by now another of that name."""
        lock = Lock(os.open(path, os.O_RDWR | os.O_CLOEXEC), path)
        try:
            lock.take_alone()
        except OSError as error:
            lock.release()
            if error.errno != errno.EWOULDBLOCK:
                raise
            raise StoreLocked(str(path), 0) from None
        return lock

    def private_directory(self, within: Path | None = None) -> Path:
        """A new temporary directory that only this user can enter."""
        return Path(tempfile.mkdtemp(prefix="perdure-", dir=within))

    def remove_tree(self, path: Path) -> None:
        """Remove a directory and everything in it, if it is there."""
        with suppress(FileNotFoundError):
            shutil.rmtree(path)

    def clear_directory(self, path: Path, *, keep: str) -> None:
        """Remove everything in a directory but the file `keep`."""
        for part in path.iterdir():
            if part.is_dir():
                shutil.rmtree(part)
            elif part.name != keep:
                part.unlink()

    def remove_directory(self, path: Path) -> bool:
        """Remove a directory if nothing is in it; whether it is gone. Durable only after
        `sync_directory` of its parent."""
        try:
            path.rmdir()
        except FileNotFoundError:
            return True
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR, errno.EBUSY):
                raise
            return False
        return True

    def open_new(self, path: Path) -> int:
        """Open a file for writing, empty."""
        with full_disk(path):
            return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)

    def open_end(self, path: Path) -> int:
        """Open a file for writing at its end; created where it is absent."""
        with full_disk(path):
            return os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def cut(self, fd: int, size_bytes: int) -> None:
        """Cut an open file to a size, and write on from there; durable only after `sync`."""
        os.ftruncate(fd, size_bytes)
        os.lseek(fd, size_bytes, os.SEEK_SET)

    def open_fixed(self, path: Path, size_bytes: int) -> int:
        """Open a file of fixed size for overwriting in place; created durably, zero-filled."""
        if not path.exists():
            self.write_file(path, bytes(size_bytes))
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)

    def overwrite(self, fd: int, data: bytes, offset: int) -> None:
        """Write in place without a sync: for hints whose loss is legal, never for promises."""
        os.pwrite(fd, data, offset)

    def write_all(self, fd: int, data: bytes, path: Path) -> None:
        """Write every byte at the file's position."""
        view = memoryview(data)
        with full_disk(path):
            while view:
                view = view[os.write(fd, view) :]

    @contextmanager
    def writing(self, path: Path) -> Iterator[Callable[[bytes], None]]:
        """Write a new file piece by piece; durable only after `sync_file` and `sync_directory`."""
        fd = self.open_new(path)
        try:
            yield lambda data: self.write_all(fd, data, path)
        finally:
            os.close(fd)

    def sync_file(self, path: Path) -> None:
        """Make the bytes durable that somebody wrote to a file."""
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self.sync(fd, path)
        finally:
            os.close(fd)

    def write_out(self, fd: int, offset: int, size_bytes: int) -> None:
        """Let the system start to write these bytes while more are coming, so that a large file
        neither fills memory with unwritten pages nor is written all at once by `sync`, which
        alone makes it durable."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(fd, offset, size_bytes, os.POSIX_FADV_DONTNEED)

    def sync(self, fd: int, path: Path) -> None:
        """Make a file's bytes durable."""
        with full_disk(path):
            os.fsync(fd)

    def replace(self, source: Path, target: Path) -> None:
        """Rename, replacing the target; durable only after `sync_directory`."""
        with full_disk(target):
            os.replace(source, target)

    def add_directory(self, path: Path) -> None:
        """Create a directory if it is absent; durable only after `sync_directory` of its parent."""
        path.mkdir(mode=0o700, exist_ok=True)

    def unlink(self, path: Path) -> None:
        """Remove a name if it is there; durable only after `sync_directory`."""
        path.unlink(missing_ok=True)

    def discard(self, path: Path) -> None:
        """The same, and for what a crash left of a file that was to have the name."""
        self.unlink(path)
        self.unlink(path.with_name(path.name + TEMPORARY))

    def sync_directory(self, path: Path) -> None:
        """Make the names in a directory durable."""
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def free_bytes(self, path: Path) -> int:
        """How much room there is for this user where `path` is, or will be."""
        found = os.statvfs(next(part for part in (path, *path.parents) if part.exists()))
        return found.f_bavail * found.f_frsize

    def read_chunks(self, path: Path, start: int, chunk_bytes: int) -> Iterator[bytes]:
        """The bytes of a file from `start`, in chunks."""
        with path.open("rb") as file:
            file.seek(start)
            while chunk := file.read(chunk_bytes):
                yield chunk


@contextmanager
def translated(path: Path) -> Iterator[None]:
    """Turn what the operating system says into our words; a full disk has them already."""
    try:
        yield
    except OSError as error:
        raise Unavailable(f"{path} could not be used: {error}. Try again.") from error


class full_disk:  # noqa: N801 - reads as a statement: `with full_disk(path):`
    """Turn the operating system's words for a full disk into `StorageFull`."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError) and error.errno in FULL:
            raise StorageFull(
                f"no space left to write {self._path}. Nothing was kept of this write; "
                "free some space and try again."
            ) from error


def _only_looked_at(fd: int) -> bool:
    """Whether who holds the lock shares it. Such a one notes nothing: what is noted is of a process
    that may be dead, and its number another's by now."""
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _holder(path: Path) -> tuple[int, str]:
    """The pid and the control socket in the note of a lock file: its first and third line."""
    try:
        pid, _, socket = (*path.read_text().split("\n"), "", "")[:3]
        return int(pid), socket
    except (OSError, ValueError):
        return 0, ""
