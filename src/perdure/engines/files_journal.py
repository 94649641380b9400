"""The journal: one frame a group of batches, synced before any of them is acknowledged.

A frame is a head (magic, commit number, length, checksum) and the group's effects: rows with their
versions, entries with their numbers. So it can be applied again and again, and a crash while the
files are written is answered by writing them once more.

Invariants
- Frame n + 1 is written only after the sync of frame n has returned. So of what stands behind the
  last sound frame, at most one frame was never acknowledged: a torn tail. A sound frame behind a
  broken one, or a mark above the last number, tells of acknowledged commits that are gone.
- The file is never written over: it starts over as a new one, synced and renamed, whose head says
  from which commit on. A frame that could not be written is cut off before the next one.
- Whoever may write holds a lock on the file itself, whatever became of the lock file beside it.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

import msgspec
import xxhash

from perdure.core.disk import TEMPORARY, Disk, Lock
from perdure.core.errors import CommitUnknown, Damaged, StorageFull
from perdure.core.layouts import Columns
from perdure.core.limits import BATCH_BYTES_MAX
from perdure.core.values import Tip
from perdure.engines.files_manifest import OperationRow

_MAGIC = b"\x9eperdure"
_HEAD = struct.Struct(">8sQQQ")
FRAME_BYTES_MAX = 2 * BATCH_BYTES_MAX
"""Far above what a group may take; a length beyond it was never written."""


class RecordChange(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A record as a commit left it; `value` is None where it was deleted."""

    collection: str
    place: str
    version: int
    value: bytes | None
    attachment: bytes | None
    columns: Columns


class StreamChange(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A stream's tip as a commit left it, and the entries it added, which end there."""

    log: str
    place: str
    tip: Tip
    entries: tuple[bytes, ...]


class Frame(msgspec.Struct, frozen=True, array_like=True):
    """What one group changed, in order. `incarnations` and `complete` come of rows that were
    loaded: what streams of a log begin with at least, and that the copy is whole now."""

    number: int
    at_s: int
    records: Sequence[RecordChange] = ()
    streams: Sequence[StreamChange] = ()
    operations: Sequence[OperationRow] = ()
    incarnations: dict[str, int] = {}
    complete: bool = False


class JournalHead(msgspec.Struct, frozen=True, array_like=True):
    """The content of the first frame, whose number is that of the last commit before the journal.
    `closed` says that an orderly end wrote it."""

    store_id: str
    closed: bool


class Found(msgspec.Struct, frozen=True):
    """What a journal holds: sound frames with their bytes, where they end and the file does, and
    the number of a sound frame behind a broken one (0: there is none)."""

    head: JournalHead
    base: int
    frames: tuple[tuple[Frame, bytes], ...]
    end: int
    size_bytes: int
    behind: int


_frame = msgspec.msgpack.Decoder(Frame)
_journal_head = msgspec.msgpack.Decoder(JournalHead)


def sealed(frame: Frame, store_id: str) -> bytes:
    """A frame as it stands in the journal of a store."""
    return _sealed(frame.number, msgspec.msgpack.encode(frame), store_id)


def _sealed(number: int, body: bytes, store_id: str) -> bytes:
    return _HEAD.pack(_MAGIC, number, len(body), _sum(number, body, store_id)) + body


def _sum(number: int, body: bytes, store_id: str) -> int:
    seal = xxhash.xxh3_64(f"{store_id}\x1e{number}\x1e{len(body)}\x1e".encode())
    seal.update(body)
    return seal.intdigest()


class Journal:
    """The journal of an open store. Its methods block, and are called one after another."""

    def __init__(self, disk: Disk, path: Path, fd: int, lock: Lock, size_bytes: int) -> None:
        self._disk = disk
        self._path = path
        self._fd = fd
        self._lock = lock
        self.size_bytes = size_bytes

    @classmethod
    def create(
        cls,
        disk: Disk,
        path: Path,
        store_id: str,
        base: int,
        frames: Iterable[bytes] = (),
        *,
        closed: bool = False,
    ) -> Journal:
        """Start over: a new journal of the commits after `base`, durably in the place of the old
        one."""
        temporary = path.with_name(path.name + TEMPORARY)
        head = _sealed(base, msgspec.msgpack.encode(JournalHead(store_id, closed)), store_id)
        data = b"".join((head, *frames))
        with ExitStack() as undo:
            fd = disk.open_new(temporary)
            undo.callback(os.close, fd)
            lock = disk.lock(temporary)
            undo.callback(lock.release)
            disk.write_all(fd, data, temporary)
            disk.sync(fd, temporary)
            disk.replace(temporary, path)
            disk.sync_directory(path.parent)
            undo.pop_all()
        return cls(disk, path, fd, lock, len(data))

    def append(self, data: bytes) -> None:
        """Write a frame and sync it. Raises `StorageFull` where there was no space for it and it
        is known to be gone, and `CommitUnknown` where nobody can say."""
        try:
            self._disk.write_all(self._fd, data, self._path)
        except StorageFull:
            self._cut()
            raise
        except OSError as error:
            raise self._unknown(error) from error
        try:
            self._disk.sync(self._fd, self._path)
        except (OSError, StorageFull) as error:
            raise self._unknown(error) from error
        self.size_bytes += len(data)

    def close(self) -> None:
        """Let go of the file."""
        os.close(self._fd)
        self._lock.release()

    def _cut(self) -> None:
        """Take back what was written of a frame."""
        try:
            self._disk.cut(self._fd, self.size_bytes)
        except OSError as error:
            raise self._unknown(error) from error

    def _unknown(self, error: Exception) -> CommitUnknown:
        return CommitUnknown(
            f"{self._path}: the disk failed while committing ({error}), so this write may or may "
            "not be there. Reopen the store, then ask again with its operation id."
        )


def store_of(path: Path) -> str:
    """The store that a journal says it is of, and its checksum bears out; else nothing."""
    with suppress(FileNotFoundError, msgspec.MsgspecError, struct.error):
        data = path.read_bytes()
        length = _HEAD.unpack_from(data)[2]
        store_id = _journal_head.decode(data[_HEAD.size : _HEAD.size + length]).store_id
        return store_id if _at(data, 0, store_id) is not None else ""
    return ""


def is_new(path: Path) -> bool:
    """Whether a journal has no frame behind its head, whatever store it is of."""
    data = path.read_bytes()
    return len(data) >= _HEAD.size and _HEAD.size + _HEAD.unpack_from(data)[2] == len(data)


def frames_in(path: Path, store_id: str) -> Iterator[Frame]:
    """The frames of a file in which nothing is lost or torn, one by one. Raises `Damaged`."""
    number = 0
    with path.open("rb") as file:
        while head := file.read(_HEAD.size):
            length = _HEAD.unpack(head)[2] if len(head) == _HEAD.size else 0
            found = _at(head + file.read(min(length, FRAME_BYTES_MAX)), 0, store_id)
            if found is None or found[0] != number + 1:
                raise Damaged(str(path), f"frame {number + 1} is not as it was written")
            number = found[0]
            yield _frame.decode(found[1])


def read_journal(path: Path, store_id: str) -> Found:
    """Everything in a journal. Raises `Damaged` where its head is not as it was written."""
    data = path.read_bytes()
    first = _at(data, 0, store_id)
    try:
        if first is None:
            raise Damaged(str(path), "its head is not as it was written, or of another store")
        base, body, end = first
        head = _journal_head.decode(body)
        frames: list[tuple[Frame, bytes]] = []
        number = base
        while (found := _at(data, end, store_id)) is not None and found[0] == number + 1:
            frames.append((_frame.decode(found[1]), data[end : found[2]]))
            number, _, end = found
    except msgspec.MsgspecError as error:
        raise Damaged(str(path), f"a sound frame does not decode: {error}") from None
    return Found(head, base, tuple(frames), end, len(data), _behind(data, end, number, store_id))


def _behind(data: bytes, end: int, number: int, store_id: str) -> int:
    """The number of a later frame behind the broken one at `end`. What a value holds may look like
    one, but is of an earlier commit."""
    at = data.find(_MAGIC, end)
    while at >= 0:
        found = _at(data, at, store_id)
        if found is not None and found[0] > number + 1:
            return found[0]
        at = data.find(_MAGIC, at + 1)
    return 0


def _at(data: bytes, start: int, store_id: str) -> tuple[int, bytes, int] | None:
    """Number, body and end of the sound frame at an offset."""
    end = start + _HEAD.size
    if len(data) < end:
        return None
    magic, number, length, checksum = _HEAD.unpack_from(data, start)
    if magic != _MAGIC or len(data) < end + length:
        return None
    body = data[end : end + length]
    return (number, body, end + length) if _sum(number, body, store_id) == checksum else None
