"""Batches on their way through an engine that writes several in one go, and how they are decided.

What makes one set of answers of such engines: an operation id is looked up before preconditions, a
batch sees the effects of those before it in its group, and one that is refused leaves the others
as if it had never been there.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Mapping

from perdure.core import batch as batches
from perdure.core.batch import Batch
from perdure.core.deciding import Facts, LogWrite, Place, RecordWrite, Write, decide
from perdure.core.engine import EngineStats
from perdure.core.errors import Conflict, Invalid, PerdureError
from perdure.core.layouts import Layout
from perdure.core.loading import Load, Present, Unloading, decide_load, decide_unload
from perdure.core.values import Committed, Tip

Outcome = tuple[asyncio.Future[Committed], Committed | Exception]
Settle = Callable[[list[Outcome], dict[Place, Tip]], None]
OperationKey = tuple[str, str]
"""An operation id and its partition."""


class Request:
    """One batch on its way through a committer, or rows to be loaded or unloaded."""

    __slots__ = ("batch", "digest", "future", "load", "operation")

    def __init__(
        self,
        batch: Batch,
        partition: str | None,
        future: asyncio.Future[Committed],
        load: Load | None = None,
    ) -> None:
        self.batch = batch
        self.load = load
        self.future = future
        self.operation: OperationKey | None = None
        if batch.operation_id is not None:
            self.operation = (batch.operation_id, partition or "")
            self.digest = batches.digest(batch)


class Known:
    """What the store holds at the places a group touches."""

    def __init__(self) -> None:
        self.facts = Facts()
        self.buried: set[Place] = set()
        self.stream_ids: dict[Place, int] = {}
        self.operations: dict[OperationKey, tuple[int, Committed]] = {}


class Effects(ABC):
    """What a group writes: the last state of each record and stream, however often it changed."""

    def __init__(self) -> None:
        self.records: dict[str, dict[str, RecordWrite]] = defaultdict(dict)
        self.tips: dict[Place, Tip] = {}
        self.operations: list[tuple[OperationKey, int, Committed]] = []
        self.floors: dict[str, int] = {}
        self.complete = False
        self.gone: Unloading | None = None

    def __bool__(self) -> bool:
        written = self.records or self.tips or self.operations or self.floors
        return bool(written or self.complete or self.gone)

    def add(self, write: Write) -> None:
        if isinstance(write, RecordWrite):
            self.records[write.records.name][write.place] = write
        else:
            self.tips[(write.log.name, write.place)] = write.tip
            self.add_entries(write)

    def take(self, load: Load, layouts: Mapping[str, Layout], present: Present) -> None:
        """What loading rows writes, or unloading them."""
        if load.unload:
            self.gone = decide_unload(load.rows, layouts, present)
            for trimmed in self.gone.trimmed:
                self.add(trimmed)
            return
        loading = decide_load(load.rows, layouts, present)
        for write in loading.writes:
            self.add(write)
        self.operations, self.floors = loading.operations, loading.floors
        self.complete = load.complete

    @abstractmethod
    def add_entries(self, write: LogWrite) -> None:
        """The rows to remove from a stream and to add to it."""


def decide_group(
    group: list[Request], known: Known, effects: Effects, stats: EngineStats
) -> list[Outcome]:
    """What each batch of a group is answered once `effects` are durable."""
    outcomes: list[Outcome] = []
    for request in group:
        try:
            outcomes.append((request.future, _decide(request, known, effects)))
        except PerdureError as error:
            stats.conflicts += isinstance(error, Conflict)
            outcomes.append((request.future, error))
    return outcomes


def _decide(request: Request, known: Known, effects: Effects) -> Committed:
    operation = request.operation
    if operation is not None and operation in known.operations:
        digest, committed = known.operations[operation]
        if digest != request.digest:
            raise Invalid(f"the operation id {operation[0]!r} was used for another batch.")
        return committed
    decision = decide(request.batch, known.facts)
    for write in decision.writes:
        effects.add(write)
    committed = Committed(decision.numbers)
    if operation is not None:
        known.operations[operation] = (request.digest, committed)
        effects.operations.append((operation, request.digest, committed))
    return committed
