"""Planted bugs: mistakes that storage software really makes, each of which the crash runner must
catch. A runner that has not been seen to fail proves nothing.

They are wrappers around the engine or the application, or replacements made in the process of a
launched server; product code has no switch for any of them. The wrapper of counted edges stands
below them, so a death can fall between what a bug does and what it should have done.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar
from weakref import WeakSet

import apsw
import msgspec
from starlette.types import ASGIApp, Receive, Scope, Send

from perdure.core import disk
from perdure.core.batch import Append, Batch, Op, Put, RecordOp, layout_of, put
from perdure.core.batch import Check as BatchCheck
from perdure.core.disk import Lock, Writer
from perdure.core.engine import Engine
from perdure.core.errors import Conflict, Damaged, Latched, Unavailable
from perdure.core.keys import Key
from perdure.core.layouts import Column, Log, Records
from perdure.core.offload import off_loop
from perdure.core.values import Committed, Entry, Page, Record, Tip
from perdure.engines import blobs_local, sqlite, sqlite_commit, sqlite_recovery, sqlite_schema
from perdure.engines.sqlite_driver import connect
from perdure.engines.sqlite_wal import stamp
from perdure.engines.wrapping import Wrapping
from perdure.services import background, gateway, lifecycle, sweeper
from perdure.services.continuing import Continuation
from perdure.services.fleet import Fleet
from perdure.surfaces.blobs import BlobUses, Claim
from perdure.surfaces.boots import BOOTS
from perdure.surfaces.conversations import CONVERSATIONS, Conversation, Conversations
from perdure.surfaces.files import FILES
from perdure.surfaces.idempotency import IDEMPOTENCY
from perdure.surfaces.jobs import JOB_EVENTS, JOBS, Job, Jobs
from perdure.surfaces.workers import TRANSCRIPTS, Workers

T = TypeVar("T")

_HOLD_S = 0.02
"""How long a bug keeps its window open."""


class AcknowledgesEarly(Wrapping):
    """Answers a commit at once and makes it a moment later. Reads wait for it, so that nothing but
    a death shows the difference."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self._behind: asyncio.Task[None] | None = None

    async def commit(self, batch: Batch) -> Committed:
        before = self._behind
        self._behind = asyncio.create_task(self._later(before, batch))
        return Committed(tuple(1 for _ in batch.ops))

    async def _later(self, before: asyncio.Task[None] | None, batch: Batch) -> None:
        if before is not None:
            await before
        await asyncio.sleep(_HOLD_S)
        try:
            await super().commit(batch)
        except Conflict:
            return

    async def _caught_up(self) -> None:
        if self._behind is not None:
            await self._behind

    async def get(self, records: Records[T], key: Key) -> Record[T] | None:
        await self._caught_up()
        return await super().get(records, key)

    async def scan(
        self,
        records: Records[T],
        prefix: Key,
        *,
        index: str | None = None,
        where: Sequence[Column] = (),
        limit: int,
        cursor: str | None = None,
        descending: bool = False,
        partial: bool = False,
    ) -> Page[Record[T]]:
        await self._caught_up()
        return await super().scan(
            records,
            prefix,
            index=index,
            where=where,
            limit=limit,
            cursor=cursor,
            descending=descending,
            partial=partial,
        )

    async def tip(self, log: Log[Any], stream: Key) -> Tip:
        await self._caught_up()
        return await super().tip(log, stream)


class ShowsEarly(Wrapping):
    """Lets followers of a log read entries whose commit is still under way."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self._early: dict[tuple[str, Key], list[Any]] = {}

    async def commit(self, batch: Batch) -> Committed:
        shown = [op for op in batch.ops if isinstance(op, Append)]
        for op in shown:
            values = [op.log.decode(op.key, text) for text in op.entries]
            self._early[(op.log.name, op.key)] = values
        await asyncio.sleep(_HOLD_S)
        try:
            return await super().commit(batch)
        finally:
            for op in shown:
                del self._early[(op.log.name, op.key)]

    async def tip(self, log: Log[Any], stream: Key) -> Tip:
        tip = await super().tip(log, stream)
        early = self._early.get((log.name, stream), [])
        return msgspec.structs.replace(tip, last=tip.last + len(early))

    async def wait(self, log: Log[Any], stream: Key, after: int, *, timeout_s: float) -> Tip:
        deadline_s = asyncio.get_running_loop().time() + timeout_s
        while (tip := await self.tip(log, stream)).last <= after:
            if asyncio.get_running_loop().time() > deadline_s:
                break
            await asyncio.sleep(_HOLD_S / 10)
        return tip

    async def read(
        self,
        log: Log[T],
        stream: Key,
        *,
        after: int = 0,
        incarnation: int | None = None,
        limit: int,
    ) -> list[Entry[T]]:
        tip = await super().tip(log, stream)
        entries = await super().read(
            log, stream, after=min(after, tip.last), incarnation=incarnation, limit=limit
        )
        early = enumerate(self._early.get((log.name, stream), ()), tip.last + 1)
        shown = entries + [Entry(seq, value) for seq, value in early]
        return [entry for entry in shown if entry.seq > after][:limit]


class Splits(Wrapping):
    """Commits a batch in two: first the operations that `first` picks, then the others."""

    def __init__(self, engine: Engine, first: Callable[[Op], bool]) -> None:
        super().__init__(engine)
        self._first = first

    async def commit(self, batch: Batch) -> Committed:
        first = Batch(tuple(op for op in batch.ops if self._first(op)))
        rest = Batch(tuple(op for op in batch.ops if not self._first(op)))
        numbers = (await super().commit(first)).numbers
        return Committed(numbers + (await super().commit(rest)).numbers)


class ChangesRecovery(Wrapping):
    """Commits something else than it was asked to until the boot is recorded as ready."""

    def __init__(self, engine: Engine, change: Callable[[Op], Op | None]) -> None:
        super().__init__(engine)
        self._change = change
        self._boots = 0

    async def commit(self, batch: Batch) -> Committed:
        self._boots += any(layout_of(op) is BOOTS for op in batch.ops)
        if self._boots == 1:
            changed = (self._change(op) for op in batch.ops)
            batch = Batch(tuple(op for op in changed if op is not None), batch.operation_id)
        return await super().commit(batch)


class Changes(Wrapping):
    """Commits something else than it was asked to."""

    def __init__(self, engine: Engine, change: Callable[[Op], Op]) -> None:
        super().__init__(engine)
        self._change = change

    async def commit(self, batch: Batch) -> Committed:
        return await super().commit(Batch(tuple(map(self._change, batch.ops)), batch.operation_id))


class WritesOn(Wrapping):
    """Looks at nothing that a commit is made on condition of, its own lease included."""

    async def commit(self, batch: Batch) -> Committed:
        ops = tuple(_without_precondition(op) for op in batch.ops if not isinstance(op, BatchCheck))
        return await super().commit(Batch(ops, batch.operation_id))


class HidesFailures(Wrapping):
    """Answers a commit that could not be made as if it had been."""

    async def commit(self, batch: Batch) -> Committed:
        try:
            return await super().commit(batch)
        except Unavailable:
            return Committed(tuple(1 for _ in batch.ops))


class StopsReading(Wrapping):
    """Refuses reads too where a write failed."""

    async def get(self, records: Records[T], key: Key) -> Record[T] | None:
        if self.latched:
            raise Latched(f"{self.url}: {self.latched}")
        return await super().get(records, key)


class HidesDamage(Wrapping):
    """Answers for a record that cannot be read as if there were none."""

    async def get(self, records: Records[T], key: Key) -> Record[T] | None:
        try:
            return await super().get(records, key)
        except Damaged:
            return None


class ReadyTooSoon:
    """Answers every question for readiness with yes."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] != "/readyz":
            await self._app(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})


def _without_precondition(op: Op) -> Op:
    if isinstance(op, Put):
        return msgspec.structs.replace(op, expect=None)
    if isinstance(op, Append):
        return msgspec.structs.replace(op, after=None)
    return op


def _always_clean(op: Op) -> Op:
    if isinstance(op, Put) and op.records is BOOTS:
        text = op.value.replace(b'"ended_clean":false', b'"ended_clean":true')
        return msgspec.structs.replace(op, value=text)
    return op


def _twice(op: Op) -> Op:
    return msgspec.structs.replace(op, entries=op.entries * 2) if isinstance(op, Append) else op


def _without_release(op: Op) -> Op | None:
    return None if layout_of(op) is CONVERSATIONS else op


def _is_step(op: Op) -> bool:
    return isinstance(op, Append) and op.log is JOB_EVENTS and b'"type":"step"' in op.entries[0]


def _without_requeue(op: Op) -> Op | None:
    return None if layout_of(op) in (JOBS, JOB_EVENTS) else op


def _sync_less() -> None:
    """SQLite's own default advice for WAL: sync at checkpoints only."""

    def lax(
        path: str, *, vfs: str | None = None, read_only: bool = False, create: bool = False
    ) -> apsw.Connection:
        connection = connect(path, vfs=vfs, read_only=read_only, create=create)
        connection.pragma("synchronous", 1)
        return connection

    _replace("connect", lax, sqlite_recovery)


def _leave_open() -> None:
    """Begin an attempt as if the one before had said nothing."""
    _replace("close_open", lambda view: [], background)


def _take_it_for_more() -> None:
    """Have the answer begun anew, and add all of it to the message that was open."""
    _replace("asked_to_go_on", lambda asked, partial, way: asked, gateway)
    _replace("new", lambda self, said: said, Continuation)


def unchecked_record(
    records: Records[Any], key: Key, place: str, row: tuple[int, int, bytes, bytes | None]
) -> Record[Any]:
    """Decode what stands in a row, whatever its checksum."""
    version, _, value, attachment = row
    return Record(key, version, records.decode(key, value), attachment)


def _trust_rows() -> None:
    _replace("checked_record", unchecked_record, sqlite, sqlite_schema)


def _names_before_bytes() -> None:
    """The file's name is given, and the bytes follow when they are written."""

    def hasty(self: Writer, path: Path) -> None:
        self._disk.replace(self._temporary, path)
        self._disk.sync_directory(path.parent)

    _replace("publish", hasty, Writer)


def _trust_clock() -> None:
    """Believe that no clock jumps."""
    _replace("CLOCK_OFF_S", 0, sweeper)


def _keeps_no_claim() -> None:
    """A reference ends, and the bytes go when somebody gets round to it."""

    def forgets(self: BlobUses, claim: Record[Claim], owner: str) -> Batch:
        tenant, digest, _ = claim.key
        return self.release(tenant, digest, owner)

    _replace("let_go", forgets, BlobUses)


def _write_beside() -> None:
    """Write the next commit number over whatever number is there."""

    def unfenced(connection: apsw.Connection, number: int) -> bool:
        connection.execute("UPDATE commits SET stamp = ?", (stamp(number),))
        return True

    _replace("advance", unfenced, sqlite_commit, sqlite_recovery)


async def _on_loop(function: Callable[..., T], *args: object) -> T:
    return function(*args)


class _Forgetful(WeakSet[Lock]):
    def add(self, item: Lock) -> None:
        pass


async def _never(*args: object) -> bool:
    return False


def _keep_epoch() -> None:
    """Take a job over under the number that its last owner had."""
    begin = Jobs.begin

    def begins(
        self: Jobs, held: Record[Job], runner: str, *, at_s: int, continued: bool = False
    ) -> tuple[Batch, Record[Job]]:
        job = held.value
        again = msgspec.structs.replace(job, attempt=max(job.attempt - 1, 0))
        had = msgspec.structs.replace(held, value=again)
        return begin(self, had, runner, at_s=at_s, continued=continued)

    _replace("begin", begins, Jobs)


def _write_over() -> None:
    """A conversation is read, changed and written, whatever was written to it meanwhile."""

    def careless(self: Conversations, held: Record[Conversation], changed: Conversation) -> Batch:
        return put(CONVERSATIONS, held.key, changed)

    _replace("_write", careless, Conversations)


def _replace(name: str, by: object, *modules: ModuleType | type) -> None:
    for module in modules:
        assert hasattr(module, name), f"{module.__name__} has no {name} any more"
        setattr(module, name, by)


def _without_workers(op: Op) -> Op | None:
    return None if layout_of(op) in Workers.promise.layouts else op


class Plant(msgspec.Struct, frozen=True):
    """One bug: what it is, and what puts it in."""

    says: str
    engine: Callable[[Engine], Engine] = lambda engine: engine
    app: Callable[[ASGIApp], ASGIApp] = lambda app: app
    patch: Callable[[], None] = lambda: None


PLANTS: dict[str, Plant] = {
    "acknowledges-early": Plant(
        "a write is acknowledged before it is committed", engine=AcknowledgesEarly
    ),
    "syncs-less": Plant("SQLite runs with synchronous=NORMAL", patch=_sync_less),
    "splits-batches": Plant(
        "a batch is committed in two transactions, records before logs",
        engine=lambda engine: Splits(engine, lambda op: isinstance(op, RecordOp)),
    ),
    "remembers-later": Plant(
        "an idempotency key is remembered in another commit than its effect",
        engine=lambda engine: Splits(engine, lambda op: layout_of(op) is not IDEMPOTENCY),
    ),
    "shows-early": Plant("an event is shown before it is durable", engine=ShowsEarly),
    "trusts-rows": Plant("a row's checksum is not looked at", patch=_trust_rows),
    "ignores-preconditions": Plant(
        "the version a write expects is not looked at",
        engine=lambda engine: Changes(engine, _without_precondition),
    ),
    "recovers-twice": Plant(
        "recovery writes its events twice",
        engine=lambda engine: ChangesRecovery(engine, _twice),
    ),
    "keeps-locks": Plant(
        "recovery does not release what dead processes held",
        engine=lambda engine: ChangesRecovery(engine, _without_release),
    ),
    "keeps-jobs": Plant(
        "recovery leaves jobs to the dead processes that ran them",
        engine=lambda engine: ChangesRecovery(engine, _without_requeue),
    ),
    "accepts-jobs-later": Plant(
        "a job is made in another commit than the response it is to make",
        engine=lambda engine: Splits(engine, lambda op: layout_of(op) not in (JOBS, JOB_EVENTS)),
    ),
    "notes-steps-later": Plant(
        "a step of a job is noted in another commit than what it made",
        engine=lambda engine: Splits(engine, lambda op: not _is_step(op)),
    ),
    "says-inputs-later": Plant(
        "an input joins the transcript in another commit than the state that counts it",
        engine=lambda engine: Splits(engine, lambda op: layout_of(op) is not TRANSCRIPTS),
    ),
    "keeps-runs": Plant(
        "recovery leaves workers to the runs of dead processes",
        engine=lambda engine: ChangesRecovery(engine, _without_workers),
    ),
    "leaves-open": Plant(
        "a takeover leaves open what the attempt before had open", patch=_leave_open
    ),
    "takes-it-for-more": Plant(
        "an answer from the beginning is added to what was said before", patch=_take_it_for_more
    ),
    "always-clean": Plant(
        "every boot is recorded as one that ended clean",
        engine=lambda engine: Changes(engine, _always_clean),
    ),
    "refers-later": Plant(
        "a file is committed before the references to its bytes",
        engine=lambda engine: Splits(engine, lambda op: layout_of(op) is FILES),
    ),
    "names-before-bytes": Plant(
        "a blob gets its name before its bytes are synced", patch=_names_before_bytes
    ),
    "keeps-no-claim": Plant(
        "a deleted file leaves bytes that nothing leads to", patch=_keeps_no_claim
    ),
    "hides-failures": Plant(
        "a write that failed is answered as if it were done", engine=HidesFailures
    ),
    "stops-reading": Plant("what is latched cannot be read either", engine=StopsReading),
    "hides-damage": Plant("what is damaged is answered as if it were absent", engine=HidesDamage),
    "trusts-clock": Plant(
        "request keys are forgotten by the time of day alone", patch=_trust_clock
    ),
    "writes-beside": Plant("an owner that was replaced writes on", patch=_write_beside),
    "keeps-lock": Plant(
        "a child that was forked keeps the lock of its parent",
        patch=lambda: _replace("_held", _Forgetful(), disk),
    ),
    "writes-over": Plant(
        "a conversation is written whatever was written to it since it was read",
        patch=_write_over,
    ),
    "starts-in-line": Plant(
        "the event loop waits for the syncs of a start",
        patch=lambda: _replace("off_loop_to_write", _on_loop, lifecycle),
    ),
    "reads-behind": Plant(
        "who reads waits behind those whose uploads are synced",
        patch=lambda: _replace("off_loop_to_write", off_loop, blobs_local),
    ),
    "writes-on": Plant("who was taken for dead writes on", engine=WritesOn),
    "keeps-epoch": Plant("a takeover does not raise the epoch", patch=_keep_epoch),
    "leaves-the-dead": Plant(
        "nobody ends the lease of a process that is dead",
        patch=lambda: _replace("_end", _never, Fleet),
    ),
    "ready-too-soon": Plant("readiness does not wait for recovery", app=ReadyTooSoon),
}
