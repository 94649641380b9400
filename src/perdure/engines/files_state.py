"""What a store of files holds, in memory: every place with its version or tip, all orders, and the
*overlay*: what is committed and not in the files yet.

All of it belongs to the event loop, or to the one thread that opens the store. Values are not here
but in the files, or in the overlay, where a read looks first.

Invariants
- A place that is not in the overlay has in its file exactly what its row says.
- Taking a frame that was taken before changes nothing but the overlay, so that recovery takes all
  frames that the files may not have yet, whatever the manifest knows of them already.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Sequence

import msgspec
from msgspec.structs import replace

from perdure.core.batch import RecordOp
from perdure.core.deciding import LogWrite, Place
from perdure.core.layouts import Columns, Layout, Records
from perdure.core.limits import CLOCK_OFF_S, OPERATION_KEPT_S, TOMBSTONE_KEPT_S
from perdure.core.values import Committed, Tip, record_sum
from perdure.engines.files_format import Identity
from perdure.engines.files_journal import Frame, RecordChange, StreamChange
from perdure.engines.files_manifest import (
    Head,
    Manifest,
    OperationRow,
    RecordRow,
    Row,
    StreamRow,
)
from perdure.engines.group import Effects, Known, OperationKey, Request
from perdure.engines.ordered import Listed, Ordered

_OPERATION_OLD_S = OPERATION_KEPT_S + CLOCK_OFF_S


class WaitingRecord(msgspec.Struct):
    """A record that its file does not hold yet, and the versions whose attachments may lie about
    when it does."""

    change: RecordChange
    attachments: set[int]


class WaitingStream(msgspec.Struct):
    """A stream whose file is behind: the entries from number `first` on that it lacks."""

    first: int
    entries: deque[bytes]

    def at(self, seq: int) -> bytes:
        return self.entries[seq - self.first]


class Work(msgspec.Struct, frozen=True):
    """What the files lack as of one commit."""

    number: int
    records: Sequence[tuple[RecordChange, tuple[int, ...]]]
    streams: Sequence[tuple[StreamRow, int, tuple[bytes, ...]]]
    """Each its row, and its entries from a number on."""


class FilesEffects(Effects):
    """What a group writes, as it stands in a frame."""

    def __init__(self) -> None:
        super().__init__()
        self.streams: list[StreamChange] = []

    def add_entries(self, write: LogWrite) -> None:
        self.streams.append(StreamChange(write.log.name, write.place, write.tip, write.entries))

    def frame(self, number: int, at_s: int) -> Frame:
        records = [
            RecordChange(name, place, one.version, one.value, one.attachment, one.columns)
            for name, writes in self.records.items()
            for place, one in writes.items()
        ]
        operations = [
            OperationRow(*operation, digest, committed.numbers, at_s)
            for operation, digest, committed in self.operations
        ]
        return Frame(
            *(number, at_s, records, self.streams, operations),
            *(self.floors, self.complete),
        )


class State:
    """See the head of this file."""

    def __init__(self, manifest: Manifest) -> None:
        head = manifest.head
        self.format = head.perdure_format
        self.store_id = head.store_id
        self.number = head.number
        self.applied = head.applied
        self.layouts = {row.name: row for row in head.layouts}
        self.incarnations = dict(head.incarnations)
        self.copy_of = head.copy_of
        self.records: dict[Place, RecordRow] = {}
        self.streams: dict[Place, StreamRow] = {}
        self.operations: dict[OperationKey, OperationRow] = {}
        self.waiting_records: dict[Place, WaitingRecord] = {}
        self.waiting_streams: dict[Place, WaitingStream] = {}
        self.frames: deque[tuple[int, bytes]] = deque()
        """What is in the journal and may not be in the files, in order."""
        self.waiting_bytes = 0
        self.orders: dict[str, Ordered] = {}
        self.listed: dict[str, Listed] = {}
        for row in manifest.rows:
            match row:
                case RecordRow():
                    self.records[(row.collection, row.place)] = row
                case StreamRow():
                    self.streams[(row.log, row.place)] = row
                case OperationRow():
                    self.operations[(row.id, row.partition)] = row

    @property
    def places(self) -> int:
        """How much is remembered of whatever kind."""
        return len(self.records) + len(self.streams) + len(self.operations)

    @property
    def waiting_files(self) -> int:
        """How many files lack something."""
        return len(self.waiting_records) + len(self.waiting_streams)

    def open_orders(self, layouts: Sequence[Layout]) -> None:
        """Sort every live record where its columns say, and list every stream with entries."""
        live: dict[str, dict[str, Columns]] = defaultdict(dict)
        for (collection, place), row in self.records.items():
            if row.version > 0:
                live[collection][place] = row.columns
        for layout in layouts:
            if isinstance(layout, Records):
                self.orders[layout.name] = Ordered(layout)
                self.orders[layout.name].fill(live[layout.name])
            else:
                self.listed[layout.name] = Listed()
        for (log, place), stream in self.streams.items():
            if log in self.listed and stream.tip.last >= stream.tip.first:
                self.listed[log].set(place, kept=True)

    def take(self, frame: Frame, data: bytes) -> None:
        """Let the state be what a group of batches made of it."""
        for change in frame.records:
            self._take_record(change, frame.at_s)
        for stream in frame.streams:
            self._take_stream(stream, frame.at_s)
        for operation in frame.operations:
            self.operations[(operation.id, operation.partition)] = operation
        for log, incarnation in frame.incarnations.items():
            self._raise_floor(log, incarnation)
        if frame.complete:
            self.copy_of = None
        self.number = max(self.number, frame.number)
        self.frames.append((frame.number, data))
        self.waiting_bytes += len(data)

    def known(self, group: Iterable[Request]) -> Known:
        """What there is at the places that a group touches."""
        known = Known()
        for request in group:
            for op in request.batch.ops:
                if isinstance(op, RecordOp):
                    place = (op.records.name, op.place)
                    if row := self.records.get(place):
                        known.facts.versions[place] = row.version
                else:
                    place = (op.log.name, op.place)
                    known.facts.tips[place] = self.tip(place)
            if request.operation is not None and (done := self.operations.get(request.operation)):
                known.operations[request.operation] = (done.digest, Committed(done.numbers))
        return known

    def tip(self, place: Place) -> Tip:
        """Where a stream stands; one that is not known is above every incarnation that a cursor may
        still name."""
        row = self.streams.get(place)
        return row.tip if row is not None else Tip(self.incarnations.get(place[0], 1))

    def work(self) -> Work:
        """Everything that the files lack now."""
        return Work(
            self.number,
            [(one.change, tuple(one.attachments)) for one in self.waiting_records.values()],
            [
                (self.streams[place], one.first, tuple(one.entries))
                for place, one in self.waiting_streams.items()
            ],
        )

    def done(self, work: Work, streams: Iterable[StreamRow]) -> None:
        """The files have it, durably; `streams` say what those of the streams hold now."""
        for change, _ in work.records:
            place = (change.collection, change.place)
            row = self.records[place]
            on_disk = change.version if change.attachment is not None else 0
            self.records[place] = replace(row, on_disk=on_disk)
            waiting = self.waiting_records[place]
            if waiting.change is change:
                del self.waiting_records[place]
            else:
                waiting.attachments.add(on_disk)
        for file in streams:
            self._stream_done(file)
        self.applied = work.number
        while self.frames and self.frames[0][0] <= work.number:
            self.waiting_bytes -= len(self.frames.popleft()[1])

    def sweep(self, now_s: int) -> None:
        """Forget tombstones, drops and operation ids that have had their time."""
        for place, row in tuple(self.records.items()):
            old = row.version < 0 and row.at_s < now_s - TOMBSTONE_KEPT_S
            if old and place not in self.waiting_records:
                del self.records[place]
        for place, stream in tuple(self.streams.items()):
            gone = stream.tip.last == 0 and stream.at_s < now_s - TOMBSTONE_KEPT_S
            if gone and place not in self.waiting_streams:
                self._raise_floor(place[0], stream.tip.incarnation)
                del self.streams[place]
        for key, operation in tuple(self.operations.items()):
            if operation.at_s < now_s - _OPERATION_OLD_S:
                del self.operations[key]

    def manifest(self) -> tuple[Head, list[Row]]:
        """The state as it is written down. Rows are values: it may be written in any thread."""
        head = Head(
            *(self.format, self.store_id, self.number, self.applied),
            tuple(self.layouts.values()),
            dict(self.incarnations),
            self.copy_of,
        )
        return head, [
            *self.records.values(),
            *self.streams.values(),
            *self.operations.values(),
        ]

    def _raise_floor(self, log: str, incarnation: int) -> None:
        self.incarnations[log] = max(self.incarnations.get(log, 1), incarnation)

    def _take_record(self, change: RecordChange, at_s: int) -> None:
        place = (change.collection, change.place)
        before, waiting = self.records.get(place), self.waiting_records.get(place)
        attachments = waiting.attachments if waiting else {before.on_disk if before else 0}
        attachments.add(change.version if change.attachment is not None else 0)
        self.waiting_records[place] = WaitingRecord(change, attachments)
        gone = change.value is None
        checksum = record_sum(*place, change.version, change.value, change.attachment)
        self.records[place] = RecordRow(
            *place,
            -change.version if gone else change.version,
            0 if gone else checksum,
            change.columns,
            change.attachment is not None,
            before.on_disk if before else 0,
            at_s if gone else 0,
        )
        if (order := self.orders.get(change.collection)) is not None:
            order.set(change.place, None if gone else change.columns)

    def _take_stream(self, change: StreamChange, at_s: int) -> None:
        place, tip = (change.log, change.place), change.tip
        row = self.streams.get(place) or StreamRow(*place, Tip())
        waiting = self.waiting_streams.get(place)
        if waiting is None or row.tip.incarnation != tip.incarnation:
            same = row.size_bytes and row.file_incarnation == tip.incarnation
            first = row.file_last + 1 if same else tip.last - len(change.entries) + 1
            waiting = WaitingStream(first, deque())
            self.waiting_streams[place] = waiting
        waiting.entries.extend(change.entries)
        assert waiting.first + len(waiting.entries) in (tip.last + 1, waiting.first), place
        while waiting.entries and waiting.first < tip.first:
            waiting.entries.popleft()
            waiting.first += 1
        waiting.first = max(waiting.first, tip.first)
        self.streams[place] = replace(row, tip=tip, at_s=at_s if tip.last == 0 else 0)
        if change.log in self.listed:
            self.listed[change.log].set(change.place, kept=tip.last >= tip.first)

    def _stream_done(self, file: StreamRow) -> None:
        place = (file.log, file.place)
        row = replace(
            self.streams[place],
            file_incarnation=file.file_incarnation,
            file_first=file.file_first,
            file_last=file.file_last,
            size_bytes=file.size_bytes,
        )
        self.streams[place] = row
        waiting = self.waiting_streams[place]
        if row.tip.incarnation == file.file_incarnation:
            while waiting.entries and waiting.first <= file.file_last:
                waiting.entries.popleft()
                waiting.first += 1
        held = (row.file_incarnation, row.file_first, row.file_last)
        if held == (row.tip.incarnation, row.tip.first, row.tip.last):
            del self.waiting_streams[place]


def identity_of(row: StreamRow) -> Identity:
    """What the entries of a stream are checked with."""
    return Identity(row.log, row.place, row.tip.incarnation)
