"""A disk that loses its power: what was written and not synced may be gone.

`Platter` keeps beside the real files what a disk would still hold. SQLite's writes come to it
through a VFS that stands below the checksum VFS, everything else through a `Disk`.

The fault model, which a store must survive
- A write that no later sync of its file covers may be there, be absent, or be torn at a sector,
  each independently of the others and of their order; so may a truncation.
- A rename or a removal that no sync of its directory covers may have happened or not. (SQLite
  syncs the directory itself when it first syncs a log it made.)
- Synced bytes and names are there. Locks and shared memory never are.
"""

from __future__ import annotations

import random
import threading
from pathlib import Path

import apsw

from perdure.core.disk import Disk

_SECTOR_BYTES = 512
_LOOSE_MAX = 256
"""Un-synced writes of one file that may still be lost; older ones have reached the disk by now."""

_VOLATILE = ("-shm", ".lock", ".sock")


class _Content:
    """One file: the bytes that are safe, and the changes that are not."""

    def __init__(self, safe: bytes = b"") -> None:
        self.safe = bytearray(safe)
        self.loose: list[tuple[int, bytes] | int] = []

    def change(self, change: tuple[int, bytes] | int) -> None:
        self.loose.append(change)
        if len(self.loose) > _LOOSE_MAX:
            _apply(self.safe, self.loose.pop(0))

    def settle(self) -> None:
        for change in self.loose:
            _apply(self.safe, change)
        self.loose.clear()

    def survives(self, rng: random.Random) -> bytes:
        """The bytes after a cut. Losing all, some or nothing of what is loose are equally likely:
        each finds other mistakes."""
        left = bytearray(self.safe)
        odds = rng.choice((0.0, 0.5, 1.0))
        for change in self.loose:
            if rng.random() >= odds:
                continue
            if isinstance(change, tuple) and rng.random() < 0.2:
                offset, data = change
                change = (offset, data[: rng.randrange(0, len(data) + 1, _SECTOR_BYTES)])
            _apply(left, change)
        return bytes(left)


class Platter:
    """What a disk holds of one directory. Made before the first file in it is opened."""

    def __init__(self, directory: Path) -> None:
        self.disk = PlatterDisk(self)
        self._directory = directory
        self._lock = threading.Lock()
        self._files: dict[Path, _Content] = {}
        self._names: list[tuple[Path, _Content | None]] = []
        """Names given and taken that no sync of their directory covers yet, in order. None: the
        name was removed."""
        self._seen: dict[Path, _Content] = {}
        """The same files under the names that programs see."""
        self._fresh: set[Path] = set()
        """Directories whose own name no sync of their parent covers yet."""
        if directory.exists():
            for path in directory.rglob("*"):
                if path.is_file() and not path.name.endswith(_VOLATILE):
                    self._files[path] = self._seen[path] = _Content(path.read_bytes())

    def mount(self) -> None:
        """Let every SQLite connection that this process opens from now on write here."""
        self._vfs = _PlatterVFS(self)

    def cut(self, into: Path, seed: str) -> None:
        """Write down what survives; `into` appears when all of it is there, as this process may be
        killed meanwhile. Nothing it writes from now on counts, and whoever tries waits for ever."""
        self._lock.acquire()
        rng = random.Random(seed)
        names = dict(self._files)
        for path, content in self._names:
            if rng.random() < 0.5:
                names.pop(path, None)
                if content is not None:
                    names[path] = content
        lost = {folder for folder in sorted(self._fresh) if rng.random() < 0.5}
        names = {path: names[path] for path in names if lost.isdisjoint(path.parents)}
        unfinished = into.with_name(into.name + "-unfinished")
        unfinished.mkdir(parents=True)
        for path, content in names.items():
            survivor = unfinished / path.relative_to(self._directory)
            survivor.parent.mkdir(parents=True, exist_ok=True)
            survivor.write_bytes(content.survives(rng))
        unfinished.rename(into)

    def opened(self, path: Path) -> None:
        """A file exists under this name; its name is durable with its first sync."""
        with self._lock:
            self._seen.setdefault(path, _Content())

    def changed(self, path: Path, change: tuple[int, bytes] | int) -> None:
        """Bytes were written at an offset, or the file was cut to a size."""
        with self._lock:
            self._seen[path].change(change)

    def synced(self, path: Path, *, name_too: bool) -> None:
        """The bytes of a file are safe; with `name_too` its name is as well, whatever had the
        name before and was removed."""
        with self._lock:
            content = self._seen[path]
            content.settle()
            if name_too:
                self._names = [(name, given) for name, given in self._names if name != path]
                self._files[path] = content

    def named(self, path: Path, source: Path | None) -> None:
        """`source` took this name; None: the name was removed."""
        with self._lock:
            content = None if source is None else self._seen.pop(source)
            if content is None:
                self._seen.pop(path, None)
            else:
                self._seen[path] = content
            if source is not None:
                self._names.append((source, None))
            self._names.append((path, content))

    def made(self, directory: Path) -> None:
        """A directory was made, if it was not there."""
        with self._lock:
            if not directory.exists():
                self._fresh.add(directory)

    def names_synced(self, directory: Path) -> None:
        """The names in a directory are safe, also those of files and directories just made."""
        with self._lock:
            for path in [path for path in self._files if path.parent == directory]:
                del self._files[path]
            self._files |= {
                path: content for path, content in self._seen.items() if path.parent == directory
            }
            self._names = [
                (path, content) for path, content in self._names if path.parent != directory
            ]
            self._fresh = {path for path in self._fresh if path.parent != directory}


class PlatterDisk(Disk):
    """The real disk, telling the platter."""

    def __init__(self, platter: Platter) -> None:
        self._platter = platter
        self._paths: dict[int, Path] = {}
        self._ends: dict[int, int] = {}

    def open_new(self, path: Path) -> int:
        fd = super().open_new(path)
        self._paths[fd], self._ends[fd] = path, 0
        self._platter.opened(path)
        self._platter.changed(path, 0)
        return fd

    def open_end(self, path: Path) -> int:
        fd = super().open_end(path)
        self._paths[fd], self._ends[fd] = path, path.stat().st_size
        self._platter.opened(path)
        return fd

    def cut(self, fd: int, size_bytes: int) -> None:
        super().cut(fd, size_bytes)
        self._platter.changed(self._paths[fd], size_bytes)
        self._ends[fd] = size_bytes

    def write_all(self, fd: int, data: bytes, path: Path) -> None:
        super().write_all(fd, data, path)
        self._platter.changed(path, (self._ends[fd], data))
        self._ends[fd] += len(data)

    def sync(self, fd: int, path: Path) -> None:
        super().sync(fd, path)
        self._platter.synced(path, name_too=False)

    def open_fixed(self, path: Path, size_bytes: int) -> int:
        fd = super().open_fixed(path, size_bytes)
        self._paths[fd] = path
        return fd

    def overwrite(self, fd: int, data: bytes, offset: int) -> None:
        super().overwrite(fd, data, offset)
        self._platter.changed(self._paths[fd], (offset, data))

    def add_directory(self, path: Path) -> None:
        self._platter.made(path)
        super().add_directory(path)

    def replace(self, source: Path, target: Path) -> None:
        super().replace(source, target)
        self._platter.named(target, source)
        self._paths = {fd: target if at == source else at for fd, at in self._paths.items()}

    def unlink(self, path: Path) -> None:
        there = path.exists()
        super().unlink(path)
        if there and not path.name.endswith(_VOLATILE):
            self._platter.named(path, None)

    def remove_directory(self, path: Path) -> bool:
        gone = super().remove_directory(path)
        if gone:
            self._platter.names_synced(path)  # what was in it is not in a later one of its name
        return gone

    def sync_directory(self, path: Path) -> None:
        super().sync_directory(path)
        self._platter.names_synced(path)


class _PlatterFile(apsw.VFSFile):
    def __init__(self, platter: Platter, name: str | apsw.URIFilename, flags: list[int]) -> None:
        super().__init__("unix", name, flags)
        text = name.filename() if isinstance(name, apsw.URIFilename) else name
        self._platter = platter
        self._path = Path(text)
        platter.opened(self._path)

    def xWrite(self, data: bytes, offset: int) -> None:  # noqa: N802 - SQLite's names
        super().xWrite(data, offset)
        self._platter.changed(self._path, (offset, bytes(data)))

    def xTruncate(self, size: int) -> None:  # noqa: N802
        super().xTruncate(size)
        self._platter.changed(self._path, size)

    def xSync(self, flags: int) -> None:  # noqa: N802
        super().xSync(flags)
        self._platter.synced(self._path, name_too=True)


class _PlatterVFS(apsw.VFS):
    """The default of the process, so that the checksum VFS is stacked upon it."""

    def __init__(self, platter: Platter) -> None:
        super().__init__("platter", "unix", makedefault=True)
        self._platter = platter

    def xOpen(  # noqa: N802
        self, name: str | apsw.URIFilename | None, flags: list[int]
    ) -> apsw.VFSFile:
        if name is None:
            return apsw.VFSFile("unix", name, flags)
        return _PlatterFile(self._platter, name, flags)

    def xDelete(self, filename: str, syncdir: bool) -> None:  # noqa: N802
        super().xDelete(filename, syncdir)
        path = Path(filename)
        self._platter.named(path, None)
        if syncdir:
            self._platter.names_synced(path.parent)


def _apply(content: bytearray, change: tuple[int, bytes] | int) -> None:
    if isinstance(change, int):
        del content[change:]
        return
    offset, data = change
    if len(content) < offset:
        content.extend(bytes(offset - len(content)))
    content[offset : offset + len(data)] = data
