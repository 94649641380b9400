"""Every state in which a power cut may leave a directory, from what was done to it.

`RecordingDisk` does the real work and notes each step; `crash_states` replays the notes and, after
each of them, yields what a disk may then hold. Nothing is random: a fault is found or absent.

The fault model, which a store must survive
- Of a file's bytes written since its last sync all, half or none are there.
- Each name created, replaced or removed since the last sync of its directory may have happened or
  not, in any combination; names in a directory whose own name is lost are lost with it.
- A rename is whole: the old name only goes if the new one is there.
- Synced bytes under synced names are there.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec

from perdure.core.disk import Disk

_LOOSE_MAX = 6
"""Changes of names that may be undecided at once; older ones have reached the disk by now, or the
number of states would run away."""


class Step(msgspec.Struct, frozen=True):
    """One thing done: `verb` and what it was done to. `mark` is whatever a test wants to know."""

    verb: str
    path: Path
    target: Path | None = None
    file: int = 0
    data: bytes = b""
    mark: str = ""


class State(msgspec.Struct, frozen=True):
    """What a disk may hold: directories, and files with their bytes, by paths within the root.
    `marks` are those made before the power was cut."""

    marks: tuple[str, ...]
    directories: frozenset[Path]
    files: frozenset[tuple[Path, bytes]]

    def write(self, root: Path) -> None:
        """Make an empty directory hold this state."""
        for path in sorted(self.directories):
            (root / path).mkdir()
        for path, data in self.files:
            (root / path).write_bytes(data)


class RecordingDisk(Disk):
    """The real disk, with notes of every step. `mark` adds what the test itself saw happen."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self._lock = threading.Lock()
        self._files: dict[int, int] = {}
        self._count = itertools.count(1)

    def mark(self, what: str) -> None:
        """Note something that is not done to the disk, such as an acknowledgement."""
        self._note(Step("mark", Path(), mark=what))

    def open_new(self, path: Path) -> int:
        fd = super().open_new(path)
        self._files[fd] = next(self._count)
        self._note(Step("create", path, file=self._files[fd]))
        return fd

    def write_all(self, fd: int, data: bytes, path: Path) -> None:
        super().write_all(fd, data, path)
        self._note(Step("write", path, file=self._files[fd], data=data))

    def sync(self, fd: int, path: Path) -> None:
        super().sync(fd, path)
        self._note(Step("sync", path, file=self._files[fd]))

    def replace(self, source: Path, target: Path) -> None:
        super().replace(source, target)
        self._note(Step("replace", source, target))

    def add_directory(self, path: Path) -> None:
        fresh = not path.exists()
        super().add_directory(path)
        if fresh:
            self._note(Step("directory", path))

    def unlink(self, path: Path) -> None:
        there = path.exists()
        super().unlink(path)
        if there:
            self._note(Step("unlink", path))

    def sync_directory(self, path: Path) -> None:
        super().sync_directory(path)
        self._note(Step("sync names", path))

    def _note(self, step: Step) -> None:
        with self._lock:
            self.steps.append(step)


class _Content(NamedTuple):
    data: bytes
    safe_bytes: int


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

    def step(self, step: Step) -> None:
        match step.verb:
            case "create":
                self.contents[step.file] = _Content(b"", 0)
                self._change(_Name(step.path, step.file))
            case "write":
                content = self.contents[step.file]
                self.contents[step.file] = content._replace(data=content.data + step.data)
            case "sync":
                content = self.contents[step.file]
                self.contents[step.file] = content._replace(safe_bytes=len(content.data))
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
        reached = {path: file for path, file in names.items() if self._above(path) <= made}
        directories = frozenset(self._within(path) for path, file in reached.items() if not file)
        files = [(path, self.contents[file]) for path, file in reached.items() if file]
        sizes = [
            dict.fromkeys((len(c.data), (c.safe_bytes + len(c.data)) // 2, c.safe_bytes))
            for _, c in files
        ]
        for chosen in itertools.product(*sizes):
            yield (
                directories,
                frozenset(
                    (self._within(path), content.data[:size])
                    for (path, content), size in zip(files, chosen, strict=True)
                ),
            )

    def _above(self, path: Path) -> set[Path]:
        return {above for above in path.parents if above.is_relative_to(self.root)}

    def _within(self, path: Path) -> Path:
        return path.relative_to(self.root)

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
            _apply(self.names, change)
        self.loose = [change for change in self.loose if change not in safe]


def crash_states(steps: list[Step], root: Path) -> Iterator[State]:
    """Every state a power cut may leave `root` in, before the first step and after each."""
    replay = _Replay(root)
    seen: set[State] = set()
    marks: tuple[str, ...] = ()
    for step in (Step("mark", root), *steps):
        replay.step(step)
        if step.mark:
            marks = (*marks, step.mark)
        for directories, files in replay.survivors():
            state = State(marks, directories, files)
            if state not in seen:
                seen.add(state)
                yield state


def _apply(names: dict[Path, int], change: _Name) -> None:
    if change.file is None:
        names.pop(change.path, None)
    else:
        names[change.path] = change.file
