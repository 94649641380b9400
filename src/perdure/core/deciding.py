"""How a batch is decided: preconditions against what is stored now, then the rows to write.

One pure function for every engine, so that all of them give one set of answers. An engine reads
the facts of the keys and streams a group of batches touches, decides the batches in order (each
sees the effects of those before it), and writes the effects of the survivors.
"""

from __future__ import annotations

from typing import Any

import msgspec

from perdure.core.batch import Append, Batch, Check, Delete, Drop, Op, Put, RecordOp, Trim
from perdure.core.errors import Conflict
from perdure.core.keys import Key, show
from perdure.core.layouts import Columns, Log, Records
from perdure.core.values import Tip

Place = tuple[str, str]
"""Collection and joined key: the identity of one record or stream."""

NEVER = 0


class RecordWrite(msgspec.Struct, frozen=True, gc=False):
    """A record's new row. `value` is None for a tombstone."""

    records: Records[Any]
    key: Key
    place: str
    version: int
    value: bytes | None
    attachment: bytes | None
    columns: Columns


class LogWrite(msgspec.Struct, frozen=True, gc=False):
    """A stream's new tip, with the entries that end it; `forget` are numbers to remove, inclusive.

    `before` is the tip the write starts from. A drop forgets a whole earlier incarnation.
    """

    log: Log[Any]
    key: Key
    place: str
    before: Tip
    tip: Tip
    entries: tuple[bytes, ...] = ()
    forget: tuple[int, int] | None = None


Write = RecordWrite | LogWrite


class Facts:
    """What is known of the places a group touches.

    `versions` holds a record's version, negative for a tombstone and 0 for never written;
    `tips` a stream's tip. Absent places count as never written: an engine loads them first.
    `floors` holds the incarnation in which a stream of a log begins that is absent, if not in 1.
    """

    __slots__ = ("floors", "tips", "versions")

    def __init__(self) -> None:
        self.versions: dict[Place, int] = {}
        self.tips: dict[Place, Tip] = {}
        self.floors: dict[str, int] = {}

    def tip(self, place: Place) -> Tip:
        """Where a stream stands."""
        return self.tips.get(place) or Tip(self.floors.get(place[0], 1))


class Decision(msgspec.Struct, frozen=True):
    """The rows a batch writes and the numbers it answers with."""

    writes: list[Write]
    numbers: tuple[int, ...]


def places(batch: Batch) -> tuple[set[Place], set[Place]]:
    """The records and the streams a batch touches, which an engine must load into `Facts`."""
    records: set[Place] = set()
    streams: set[Place] = set()
    for op in batch.ops:
        if isinstance(op, RecordOp):
            records.add((op.records.name, op.place))
        else:
            streams.add((op.log.name, op.place))
    return records, streams


def decide(batch: Batch, facts: Facts) -> Decision:
    """Check every precondition, then say what to write; `facts` then include the effects.

    Preconditions on records look at the state before the batch (a batch writes a record once);
    operations on one stream take effect in their order. Raises `Conflict` and changes nothing.
    """
    versions: dict[Place, int] = {}
    tips: dict[Place, Tip] = {}
    writes: list[Write] = []
    numbers: list[int] = []
    for op in batch.ops:
        if isinstance(op, RecordOp):
            number = _decide_record(op, facts, versions, writes)
        else:
            place = (op.log.name, op.place)
            before = tips.get(place) or facts.tip(place)
            write, number = _decide_log(op, before)
            if write is not None:
                tips[place] = write.tip
                writes.append(write)
        numbers.append(number)
    facts.versions.update(versions)
    facts.tips.update(tips)
    return Decision(writes, tuple(numbers))


def _decide_record(
    op: RecordOp, facts: Facts, versions: dict[Place, int], writes: list[Write]
) -> int:
    place = (op.records.name, op.place)
    stored = facts.versions.get(place, NEVER)
    live = max(stored, 0)
    if op.expect is not None and op.expect != live:
        raise Conflict(f"{_verb(op)} {op.records.name} {show(op.key)}", op.expect, live)
    if isinstance(op, Check):
        return live
    if isinstance(op, Delete) and live == 0:
        return abs(stored)
    version = abs(stored) + 1
    if isinstance(op, Put):
        versions[place] = version
        writes.append(
            RecordWrite(op.records, op.key, op.place, version, op.value, op.attachment, op.columns)
        )
    else:
        versions[place] = -version
        blank = (None,) * len(op.records.fields)
        writes.append(RecordWrite(op.records, op.key, op.place, version, None, None, blank))
    return version


def _decide_log(op: Append | Trim | Drop, before: Tip) -> tuple[LogWrite | None, int]:
    if isinstance(op, Append):
        if op.after is not None and op.after != before.last:
            raise Conflict(f"append to {op.log.name} {show(op.key)}", op.after, before.last)
        tip = Tip(before.incarnation, before.first, before.last + len(op.entries))
        return LogWrite(op.log, op.key, op.place, before, tip, op.entries), tip.last
    if isinstance(op, Trim):
        first = max(before.first, min(op.before, before.last + 1))
        if first == before.first:
            return None, first
        tip = Tip(before.incarnation, first, before.last)
        forget = (before.first, first - 1)
        return LogWrite(op.log, op.key, op.place, before, tip, forget=forget), first
    if before.last == 0:
        return None, before.incarnation
    tip = Tip(before.incarnation + 1)
    forget = (before.first, before.last)
    return LogWrite(op.log, op.key, op.place, before, tip, forget=forget), tip.incarnation


def _verb(op: Op) -> str:
    return type(op).__name__.lower()
