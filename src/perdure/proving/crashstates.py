"""Every state in which a power cut may leave a directory, from what was done to it.

`RecordingDisk` does the real work and notes each step; `crash_states` replays the notes and, after
each of them, yields what a disk may then hold. Nothing is random: a fault is found or absent.

The fault model, which a store must survive
- Of a file's bytes written, overwritten or cut since its last sync all, half or none are there, and
  where they are more than a sector, the second half without the first, which then is zeros. Each
  file by itself, unless many are un-synced at once.
- Each name created, replaced or removed since the last sync of its directory may have happened or
  not, in any combination; names in a directory whose own name is lost are lost with it.
- A rename is whole: the old name only goes if the new one is there.
- With a directory everything in it is gone, also from a later one of its name.
- Synced bytes under synced names are there.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec

from perdure.core.disk import Disk

_SECTOR_BYTES = 512
_LOOSE_MAX = 6
"""Changes of names that may be undecided at once; older ones have reached the disk by now, or the
number of states would run away."""


_TOGETHER_MAX = 64
"""Combinations of what may be left of several files; beyond it they are looked at one by one."""


class Step(msgspec.Struct, frozen=True):
    """One thing done: `verb` and what it was done to. `mark` is whatever a test wants to know."""

    verb: str
    path: Path
    target: Path | None = None
    file: int = 0
    data: bytes = b""
    mark: str = ""
    offset: int = 0


class State(msgspec.Struct, frozen=True):
    """What a disk may hold: directories, and files with their bytes, by paths within the root.
    `marks` are those made before the power was cut."""

    marks: tuple[str, ...]
    directories: frozenset[Path]
    files: frozenset[tuple[Path, bytes]]

    def write(self, root: Path) -> Path:
        """Make a directory, which is empty or not there yet, hold this state."""
        root.mkdir(exist_ok=True)
        for path in sorted(self.directories):
            (root / path).mkdir()
        for path, data in self.files:
            (root / path).write_bytes(data)
        return root


class RecordingDisk(Disk):
    """The real disk, with notes of every step. `mark` adds what the test itself saw happen."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self._lock = threading.Lock()
        self._files: dict[int, int] = {}
        self._named: dict[Path, int] = {}
        self._count = itertools.count(1)

    def adopt(self, root: Path) -> None:
        """Note what lies below a directory already, all of it safe."""
        for path in sorted(root.rglob("*")):
            if path.is_dir():
                self._note(Step("directory", path))
            else:
                self._named[path] = next(self._count)
                self._note(Step("create", path, file=self._named[path]))
                self._note(Step("write", path, file=self._named[path], data=path.read_bytes()))
                self._note(Step("sync", path, file=self._named[path]))
            self._note(Step("sync names", path.parent))

    def mark(self, what: str) -> None:
        """Note something that is not done to the disk, such as an acknowledgement."""
        self._note(Step("mark", Path(), mark=what))

    def open_new(self, path: Path) -> int:
        fd = super().open_new(path)
        self._create(fd, path)
        return fd

    def open_end(self, path: Path) -> int:
        new = path not in self._named
        fd = super().open_end(path)
        if new:
            self._create(fd, path)
        self._files[fd] = self._named[path]
        return fd

    def open_fixed(self, path: Path, size_bytes: int) -> int:
        fd = super().open_fixed(path, size_bytes)
        self._files[fd] = self._named[path]
        return fd

    def overwrite(self, fd: int, data: bytes, offset: int) -> None:
        super().overwrite(fd, data, offset)
        step = Step("overwrite", Path(), file=self._files[fd], data=data, offset=offset)
        self._note(step)

    def cut(self, fd: int, size_bytes: int) -> None:
        super().cut(fd, size_bytes)
        self._note(Step("cut", Path(), file=self._files[fd], offset=size_bytes))

    def write_all(self, fd: int, data: bytes, path: Path) -> None:
        super().write_all(fd, data, path)
        self._note(Step("write", path, file=self._files[fd], data=data))

    def sync(self, fd: int, path: Path) -> None:
        super().sync(fd, path)
        self._note(Step("sync", path, file=self._files[fd]))

    def replace(self, source: Path, target: Path) -> None:
        super().replace(source, target)
        self._named[target] = self._named.pop(source)
        self._note(Step("replace", source, target))

    def add_directory(self, path: Path) -> None:
        fresh = not path.exists()
        super().add_directory(path)
        if fresh:
            self._note(Step("directory", path))

    def unlink(self, path: Path) -> None:
        there = path.exists()
        super().unlink(path)
        self._named.pop(path, None)
        if there:
            self._note(Step("unlink", path))

    def remove_directory(self, path: Path) -> bool:
        there = path.exists()
        gone = super().remove_directory(path)
        if there and gone:
            self._note(Step("unlink", path))
        return gone

    def sync_directory(self, path: Path) -> None:
        super().sync_directory(path)
        self._note(Step("sync names", path))

    def _create(self, fd: int, path: Path) -> None:
        self._files[fd] = self._named[path] = next(self._count)
        self._note(Step("create", path, file=self._files[fd]))

    def _note(self, step: Step) -> None:
        with self._lock:
            self.steps.append(step)


class _Content(NamedTuple):
    """A file's bytes as they are read, and as they were synced."""

    data: bytes
    safe: bytes

    def survivors(self) -> Iterator[bytes]:
        """What may be left of the file."""
        yield self.data
        if self.data == self.safe:
            return
        yield self.safe
        common = _common_bytes(self.data, self.safe)
        half = (common + len(self.data)) // 2
        yield self.data[:half] + self.safe[half:]
        if len(self.data) - common > _SECTOR_BYTES:
            yield self.safe[:half].ljust(half, b"\0") + self.data[half:]


class _Name(NamedTuple):
    """A change of one name, not yet safe. `file` is 0 for a directory, None for a removal; a
    removal by a rename needs `after`, the name that came instead."""

    path: Path
    file: int | None
    after: Path | None = None


class _Replay:
    """What is safe on the disk, and which changes are not."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.contents: dict[int, _Content] = {}
        self.names: dict[Path, int] = {}
        self.seen: dict[Path, int] = {}
        self.loose: list[_Name] = []
        self._paths: dict[Path, tuple[Path, frozenset[Path]]] = {}
        self._left: dict[int, tuple[_Content, tuple[bytes, ...]]] = {}

    def step(self, step: Step) -> None:
        match step.verb:
            case "create":
                self.contents[step.file] = _Content(b"", b"")
                self._change(_Name(step.path, step.file))
            case "write":
                content = self.contents[step.file]
                self.contents[step.file] = content._replace(data=content.data + step.data)
            case "sync":
                content = self.contents[step.file]
                self.contents[step.file] = content._replace(safe=content.data)
            case "cut":
                content = self.contents[step.file]
                self.contents[step.file] = content._replace(data=content.data[: step.offset])
            case "overwrite":
                content = self.contents[step.file]
                end = step.offset + len(step.data)
                data = content.data[: step.offset] + step.data + content.data[end:]
                self.contents[step.file] = content._replace(data=data)
            case "directory":
                self._change(_Name(step.path, 0))
            case "unlink":
                self._change(_Name(step.path, None))
            case "replace" if step.target is not None:
                self._change(_Name(step.target, self.seen[step.path]))
                self._change(_Name(step.path, None, after=step.target))
            case "sync names":
                self._settle(step.path)

    def survivors(self) -> Iterator[tuple[frozenset[Path], frozenset[tuple[Path, bytes]]]]:
        """Directories and files, for every combination of what may have happened."""
        for kept in itertools.product((True, False), repeat=len(self.loose)):
            happened = [change for change, keep in zip(self.loose, kept, strict=True) if keep]
            there = {change.path for change in happened if change.file is not None}
            if any(c.after and c.after not in there and self._is_loose(c.after) for c in happened):
                continue
            names = dict(self.names)
            for change in happened:
                _apply(names, change)
            yield from self._with_bytes(names)

    def _with_bytes(
        self, names: dict[Path, int]
    ) -> Iterator[tuple[frozenset[Path], frozenset[tuple[Path, bytes]]]]:
        made = {self.root, *(path for path, file in names.items() if not file)}
        reached = {path: file for path, file in names.items() if self._known(path)[1] <= made}
        directories = frozenset(self._known(path)[0] for path, file in reached.items() if not file)
        files = [(self._known(path)[0], file) for path, file in reached.items() if file]
        for chosen in _chosen([self._choices(file) for _, file in files]):
            pairs = zip(files, chosen, strict=True)
            yield directories, frozenset((path, data) for (path, _), data in pairs)

    def _choices(self, file: int) -> tuple[bytes, ...]:
        """What may be left of a file; the same objects while it does not change."""
        content = self.contents[file]
        known = self._left.get(file)
        if known is None or known[0] is not content:
            known = self._left[file] = (content, tuple(dict.fromkeys(content.survivors())))
        return known[1]

    def _known(self, path: Path) -> tuple[Path, frozenset[Path]]:
        """A path within the root, and the directories it lies in."""
        if path not in self._paths:
            above = frozenset(it for it in path.parents if it.is_relative_to(self.root))
            self._paths[path] = (path.relative_to(self.root), above)
        return self._paths[path]

    def _is_loose(self, path: Path) -> bool:
        return any(change.path == path and change.file is not None for change in self.loose)

    def _change(self, change: _Name) -> None:
        self.loose.append(change)
        _apply(self.seen, change)
        while len(self.loose) > _LOOSE_MAX:
            _apply(self.names, self.loose.pop(0))

    def _settle(self, directory: Path) -> None:
        """Names in a directory are safe; a rename out of it takes its new name along."""
        arrivals = {c.after for c in self.loose if c.path.parent == directory and c.after}
        safe = [c for c in self.loose if c.path.parent == directory or c.path in arrivals]
        for change in safe:
            if change.file is None and self.names.get(change.path) == 0:  # a directory
                at = self.loose.index(change)
                self.loose[:at] = [c for c in self.loose[:at] if change.path not in c.path.parents]
            _apply(self.names, change)
        self.loose = [change for change in self.loose if change not in safe]


def crash_states(steps: list[Step], root: Path, *, after: int = 0) -> Iterator[State]:
    """Every state a power cut may leave `root` in, before the first step and after each; or after
    so many of them only."""
    replay = _Replay(root)
    seen: set[State] = set()
    marks: tuple[str, ...] = ()
    for number, step in enumerate((Step("mark", root), *steps)):
        replay.step(step)
        if step.mark:
            marks = (*marks, step.mark)
        if number < after:
            continue
        for directories, files in replay.survivors():
            state = State(marks, directories, files)
            if state not in seen:
                seen.add(state)
                yield state


def _chosen(choices: list[tuple[bytes, ...]]) -> Iterator[tuple[bytes, ...]]:
    """One of each, in every combination; where those are too many, all as they were written, all as
    they were synced, and each other choice by itself."""
    if math.prod(map(len, choices)) <= _TOGETHER_MAX:
        yield from itertools.product(*choices)
        return
    written = tuple(first for first, *_ in choices)
    yield written
    yield tuple(others[0] if others else first for first, *others in choices)
    for at, (_, *others) in enumerate(choices):
        for other in others:
            yield (*written[:at], other, *written[at + 1 :])


def _common_bytes(one: bytes, other: bytes) -> int:
    """How many bytes two files begin with alike."""
    if one.startswith(other):
        return len(other)
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))


def _apply(names: dict[Path, int], change: _Name) -> None:
    if change.file is None:
        if names.pop(change.path, None) == 0:
            for path in [path for path in names if change.path in path.parents]:
                del names[path]
    else:
        names[change.path] = change.file
