"""Copying a whole store of files, as it is at one moment, and making a store of such a copy.

A copy is two files: a manifest without rows, and `frames`, which holds all records and streams as a
journal would. Restoring is recovery: the frames are applied to an empty directory. It is made while
nobody writes the files; what is committed meanwhile stays in the overlay, and where that becomes
too much the backup gives up.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import msgspec

from perdure.core.disk import TEMPORARY, Disk
from perdure.core.engine import Snapshot
from perdure.core.errors import Damaged, Invalid
from perdure.core.keys import split
from perdure.core.layouts import Layout
from perdure.core.stored import check_layouts
from perdure.core.values import Tip
from perdure.engines.files_apply import Applier
from perdure.engines.files_format import StreamFile
from perdure.engines.files_journal import (
    Frame,
    Journal,
    RecordChange,
    StreamChange,
    frames_in,
    sealed,
)
from perdure.engines.files_manifest import (
    Head,
    Manifest,
    OperationRow,
    RecordRow,
    StreamRow,
    read_manifest,
    write_manifest,
)
from perdure.engines.files_names import OWN, Tree
from perdure.engines.files_read import lacks_entry, reading, stored_record, where_of
from perdure.engines.files_recovery import Place, tree_of
from perdure.engines.files_state import State, WaitingRecord, identity_of

FRAMES = "frames"
MANIFEST = "manifest"

_FRAME_BYTES = 4 * 1024 * 1024
_ROW_BYTES = 200
"""About what a row takes besides its value."""

Step = tuple[int, int]
"""Bytes done, and bytes in all."""


class Moment:
    """All of a state, as of one commit, while the files are left as they are."""

    def __init__(self, state: State) -> None:
        head, _ = state.manifest()
        self.head = head
        self.records = list(state.records.values())
        self.streams = list(state.streams.values())
        self.operations = list(state.operations.values())
        self.waiting_records: dict[tuple[str, str], WaitingRecord] = dict(state.waiting_records)
        self.waiting_streams = {
            place: (one.first, tuple(one.entries)) for place, one in state.waiting_streams.items()
        }


def backup_steps(
    disk: Disk, tree: Tree, moment: Moment, into: Path, at_s: int
) -> Generator[Step | Snapshot, None, None]:
    """Copy a moment; steps, and at last what the copy holds."""
    head = moment.head
    total = len(moment.records) + len(moment.streams) + 1
    done = number = 0
    with disk.writing(into / FRAMES) as write:
        for frame, places in _frames(tree, moment, at_s):
            number, done = frame.number, done + places
            write(sealed(frame, head.store_id))
            yield done, 2 * total
    disk.sync_file(into / FRAMES)
    whole = msgspec.structs.replace(head, applied=number)
    write_manifest(disk, into / MANIFEST, whole, [])
    if read_manifest(into / MANIFEST, head.perdure_format).head != whole:
        raise Damaged(str(into / MANIFEST), "it is not what was written")
    for at, _ in enumerate(_checked(into, whole), 1):
        yield total + at * total // number, 2 * total
    yield Snapshot(head.store_id, head.number, head.perdure_format)


def restore_steps(
    place: Place, source: Path, layouts: Sequence[Layout]
) -> Generator[Step | Path, None, None]:
    """Make a store at `place` of the copy in `source`. It has its name, and so exists, only after
    all of it was verified and is durable. Last comes where it lies until then: whoever finds
    something wrong with it there goes no further.

    Raises `Invalid` where a store is already, `Damaged`, `NewerFormat`, `StoreLocked`.
    """
    root, disk = place.root, place.disk
    if root.exists() and any(root.iterdir()):
        raise Invalid(f"{root} is not empty. A backup is restored into an empty place only.")
    if not (source / MANIFEST).exists():
        raise Invalid(f"{source} holds no backup of a store of files.")
    head = read_manifest(source / MANIFEST, place.format).head
    rows = [(row.name, row.version, row.shape) for row in head.layouts]
    check_layouts(rows, str(source), layouts)
    made = Place(root.with_name(root.name + TEMPORARY), place.clock, disk)
    disk.remove_tree(made.root)
    disk.make_directory(made.root / OWN)
    with ExitStack() as undo:
        undo.callback(disk.remove_tree, made.root)
        undo.callback(disk.lock(made.lock).release)
        fresh = msgspec.structs.replace(
            head, store_id=place.clock.new_id("store"), number=0, applied=0
        )
        state = State(Manifest(fresh, []))
        applier = Applier(disk, tree_of(made.root, head.layouts))
        for frame in _checked(source, head):
            state.take(frame, b"")
            work = state.work()
            state.done(work, applier.apply(work))
            yield frame.number, head.applied
        state.number = state.applied = head.number
        Journal.create(disk, made.journal, state.store_id, state.number, closed=True).close()
        write_manifest(disk, made.manifest, *state.manifest())
        yield made.root
        if root.exists():
            disk.remove_directory(root)
        disk.replace(made.root, root)
        disk.sync_directory(root.parent)


def _checked(source: Path, head: Head) -> Iterator[Frame]:
    """Every frame of a copy. Raises `Damaged` unless all of them are there and sound."""
    number = 0
    with reading(str(source / FRAMES)):
        for frame in frames_in(source / FRAMES, head.store_id):
            number = frame.number
            yield frame
    if number != head.applied:
        raise Damaged(str(source / FRAMES), f"it ends after {number} of {head.applied} frames")


def _frames(tree: Tree, moment: Moment, at_s: int) -> Iterator[tuple[Frame, int]]:
    """All there is, in frames of a bounded size, each with how many places it completes. Raises
    `Damaged`: a copy of a damaged store would be taken for a sound one."""
    records: list[RecordChange] = []
    streams: list[StreamChange] = []
    number = size_bytes = places = 0
    for change, size, completes in _changes(tree, moment):
        if isinstance(change, RecordChange):
            records.append(change)
        else:
            streams.append(change)
        size_bytes, places = size_bytes + size, places + completes
        if size_bytes >= _FRAME_BYTES:
            number += 1
            yield Frame(number, at_s, records, streams), places
            records, streams, size_bytes, places = [], [], 0, 0
    operations: list[OperationRow] = moment.operations
    yield Frame(number + 1, at_s, records, streams, operations), places + 1


def _changes(tree: Tree, moment: Moment) -> Iterator[tuple[RecordChange | StreamChange, int, bool]]:
    for row in moment.records:
        record = _record(tree, moment, row)
        yield record, len(record.value or b"") + len(record.attachment or b"") + _ROW_BYTES, True
    for stream in moment.streams:
        for part in _stream(tree, moment, stream):
            size_bytes = sum(map(len, part.entries)) + _ROW_BYTES
            yield part, size_bytes, part.tip == stream.tip


def _record(tree: Tree, moment: Moment, row: RecordRow) -> RecordChange:
    waiting = moment.waiting_records.get((row.collection, row.place))
    if waiting is not None:
        return waiting.change
    at = (row.collection, row.place, abs(row.version))
    if row.version < 0:
        return RecordChange(*at, None, None, row.columns)
    return RecordChange(*at, *stored_record(tree, row), row.columns)


def _stream(tree: Tree, moment: Moment, row: StreamRow) -> Iterator[StreamChange]:
    """First that it is there, and from which number on; then its entries."""
    tip, place = row.tip, (row.log, row.place)
    begun = Tip(tip.incarnation, tip.first, tip.first - 1)
    yield StreamChange(*place, begun, ())
    part: list[bytes] = []
    size_bytes, seq = 0, begun.last
    for value in _entries(tree, moment, row):
        part.append(value)
        size_bytes, seq = size_bytes + len(value), seq + 1
        if size_bytes >= _FRAME_BYTES:
            yield StreamChange(*place, Tip(tip.incarnation, tip.first, seq), tuple(part))
            part, size_bytes = [], 0
    if part:
        yield StreamChange(*place, Tip(tip.incarnation, tip.first, seq), tuple(part))


def _entries(tree: Tree, moment: Moment, row: StreamRow) -> Iterator[bytes]:
    first, entries = moment.waiting_streams.get((row.log, row.place), (row.tip.last + 1, ()))
    seq = row.tip.first
    if seq < first:
        where = where_of(row)
        path = tree.stream(row.log, split(row.place))
        with reading(where), StreamFile(path, identity_of(row)) as file:
            for found, value, _ in file.entries(seq, first - 1):
                if found != seq:
                    break
                yield value
                seq += 1
        if seq < first:
            raise lacks_entry(where, seq)
    yield from entries
