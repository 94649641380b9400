"""Workers: agents at work in a runtime, each with its state, the log of what happened to it, and
its transcript, however many processes die over it.

The authority over a worker is the runtime's id and its own, never a process, a path or a socket.

Invariants
- The state record counts what stands in the worker's logs, and every write of a worker writes it
  at the version it was read at. So state, events and transcript agree at every moment, and writers
  never interleave.
- Every change of status raises the generation, and whoever runs a worker names the one it has been
  given. A run that was stopped or taken over writes nothing more; nor does one of a worker that was
  removed for another of its id: no generation is below the record's version, which outlives that.
"""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Sequence
from typing import Literal, TypeVar

import msgspec

from perdure.core.batch import Batch, append, check, delete, drop, put
from perdure.core.batch import join as joined
from perdure.core.engine import Engine, Survives
from perdure.core.keys import Key, show
from perdure.core.layouts import Index, Log, Records
from perdure.core.paging import Slice, page_of
from perdure.core.promises import Durability, Promise
from perdure.core.values import Entry, Page, Record
from perdure.wire.errors import NotFound
from perdure.wire.workers import (
    NotPossible,
    StaleGeneration,
    WorkerEnded,
    WorkerEventType,
    WorkerStatus,
)

V = TypeVar("V")

NULL = msgspec.Raw(b"null")  # no `Raw | None`, which reads nothing but null


class Status(enum.Enum):
    """Where a worker stands. `retired` ones are being archived or purged."""

    READY = "ready"
    RUNNING = "running"
    STOPPED = "stopped"
    CANCELLED = "cancelled"
    FAILED = "failed"
    RETIRED = "retired"

    @property
    def ended(self) -> bool:
        """Whether it takes no input: nothing but a wish of its own changes that."""
        return self not in (Status.READY, Status.RUNNING)


MOVES: dict[Status, dict[WorkerEventType, Status]] = {
    Status.READY: {
        "started": Status.RUNNING,
        "stopped": Status.STOPPED,
        "cancelled": Status.CANCELLED,
    },
    Status.RUNNING: {
        "released": Status.READY,
        "interrupted": Status.READY,
        "restored": Status.READY,
        "stopped": Status.STOPPED,
        "cancelled": Status.CANCELLED,
        "failed": Status.FAILED,
    },
    Status.STOPPED: {"restored": Status.READY, "retired": Status.RETIRED},
    Status.FAILED: {"restored": Status.READY, "retired": Status.RETIRED},
    Status.CANCELLED: {"retired": Status.RETIRED},
    Status.RETIRED: {},
}
"""Every transition there is, by the event that tells of it. A worker that was stopped starts again
only once it was restored, which somebody has to ask for."""


class Runtime(msgspec.Struct, frozen=True):
    """Where workers live: `config` is a snapshot of what it was made with, `fingerprint` its
    digest."""

    created_at_s: int
    fingerprint: str
    config: msgspec.Raw


class Worker(msgspec.Struct, frozen=True):
    """`config` and `fingerprint` are what it was asked for with; `runner` is the boot that vouches
    for its run, None while it does not run or nobody does; `ended_by` is the id of the event that
    ended it, and `reason` what was said of that. `run_id` is what its run was begun under."""

    runtime_id: str
    created_at_s: int
    fingerprint: str
    config: msgspec.Raw
    status: Status = Status.READY
    generation: int = 0
    runner: str | None = None
    ended_by: str | None = None
    reason: str | None = None
    run_id: str | None = None

    @property
    def stands(self) -> str:
        """The status as indexes hold it."""
        return self.status.value


class WorkerState(msgspec.Struct, frozen=True):
    """What a worker goes on from: `value` is its own; the numbers count the entries of its logs,
    and `taken` the inputs that its runs have dealt with. `step_id` is the id of the last step that
    had one, and `step_digest` identifies its content."""

    updated_at_s: int
    value: msgspec.Raw
    events: int = 0
    transcript: int = 0
    inputs: int = 0
    taken: int = 0
    step_id: str | None = None
    step_digest: str | None = None


class WorkerEvent(msgspec.Struct, frozen=True, omit_defaults=True):
    """One thing that happened: a change of status, an input that was accepted, or progress of a
    run, which says how many inputs it has `taken`, how many entries of the transcript it `added`,
    and what it used."""

    type: WorkerEventType
    id: str
    at_s: int
    generation: int
    submission_id: str | None = None
    added: int = 0
    taken: int = 0
    name: str | None = None
    reason: str | None = None
    data: msgspec.Raw = NULL
    usage: dict[str, int] = {}


class Said(msgspec.Struct, frozen=True):
    """One entry of a transcript. `content` is the writer's own."""

    role: str
    at_s: int
    content: msgspec.Raw


class Queued(msgspec.Struct, frozen=True):
    """An accepted input, in the order of acceptance: where in the transcript it stands."""

    submission_id: str
    transcript: int


class Submission(msgspec.Struct, frozen=True):
    """What was acknowledged to whoever sent an input; `digest` identifies its content."""

    digest: str
    number: int
    event_id: str
    event: int
    transcript: int
    at_s: int


DiagnosticType = Literal["damaged", "interrupted"]


class Diagnostic(msgspec.Struct, frozen=True):
    """What an operator should know of a worker, told once however often it is met."""

    type: DiagnosticType
    where: str
    why: str
    found_at_s: int
    worker_id: str | None = None


class Overview(msgspec.Struct, frozen=True):
    """A projection: what the first `events` events of a worker amount to."""

    events: int = 0
    status: WorkerStatus = "ready"
    generation: int = 0
    runs: int = 0
    interruptions: int = 0
    inputs: int = 0
    taken: int = 0
    transcript: int = 0
    created_at_s: int = 0
    last_event_at_s: int = 0
    last_progress: str | None = None
    reason: str | None = None


class Usage(msgspec.Struct, frozen=True):
    """A projection: what the first `events` events of a worker say was used, by name."""

    events: int = 0
    runs: int = 0
    steps: int = 0
    counted: dict[str, int] = {}


def overviewed(view: Overview, entry: Entry[WorkerEvent]) -> Overview:
    """The overview with one event more."""
    event = entry.value
    before = Status(view.status)
    moved: WorkerStatus = MOVES[before].get(event.type, before).value
    return Overview(
        events=entry.seq,
        status=moved,
        generation=event.generation,
        runs=view.runs + (event.type == "started"),
        interruptions=view.interruptions + (event.type == "interrupted"),
        inputs=view.inputs + (event.type == "accepted"),
        taken=view.taken + event.taken,
        transcript=view.transcript + event.added,
        created_at_s=event.at_s if event.type == "created" else view.created_at_s,
        last_event_at_s=event.at_s,
        last_progress=event.name if event.type == "progressed" else view.last_progress,
        reason=event.reason if moved != view.status else view.reason,
    )


def used(view: Usage, entry: Entry[WorkerEvent]) -> Usage:
    """The usage with one event more."""
    event, counted = entry.value, dict(view.counted)
    for name, count in event.usage.items():
        counted[name] = counted.get(name, 0) + count
    return Usage(
        events=entry.seq,
        runs=view.runs + (event.type == "started"),
        steps=view.steps + (event.type == "progressed"),
        counted=dict(sorted(counted.items())),
    )


def _there(record: Record[V] | None, noun: str, key: Key) -> Record[V]:
    if record is None:
        raise NotFound(noun, key[-1])
    return record


_RUNTIME = ("tenant", "runtime_id")
_WORKER = (*_RUNTIME, "worker_id")
_HOME = "runtimes/*"
_DESK = f"{_HOME}/workers/*"

RUNTIMES = Records(
    "runtimes",
    Runtime,
    key=_RUNTIME,
    indexes=(Index("by_age", ("created_at_s",)),),
    path=f"{_HOME}/runtime",
)
WORKERS = Records(
    "workers",
    Worker,
    key=_WORKER,
    indexes=(
        Index("by_age", ("runtime_id", "created_at_s")),
        Index("by_status", ("runtime_id", "stands", "created_at_s")),
        Index("running", ("runner",), every_tenant=True),
    ),
    path=f"{_DESK}/worker",
)
STATES = Records("worker_states", WorkerState, key=_WORKER, path=f"{_DESK}/state")
SUBMISSIONS = Records(
    "worker_submissions", Submission, key=(*_WORKER, "submission_id"), path=f"{_DESK}/submissions/*"
)
DIAGNOSTICS = Records(
    "worker_diagnostics", Diagnostic, key=(*_RUNTIME, "id"), path=f"{_HOME}/diagnostics/*"
)
OVERVIEWS = Records("worker_overviews", Overview, key=_WORKER, path=f"{_DESK}/overview")
USAGES = Records("worker_usages", Usage, key=_WORKER, path=f"{_DESK}/usage")
WORKER_EVENTS = Log("worker_events", WorkerEvent, key=_WORKER, path=f"{_DESK}/events")
TRANSCRIPTS = Log("worker_transcripts", Said, key=_WORKER, path=f"{_DESK}/transcript")
INPUTS = Log("worker_inputs", Queued, key=_WORKER, path=f"{_DESK}/inputs")

Held = Record[Worker]
HeldState = Record[WorkerState]


class Workers:
    """Reads of runtimes and of their workers, and the batches that write them. Every write of a
    worker is given its record and its state as they were read, and is a `Conflict` if either has
    changed since."""

    promise = Promise(
        surface="workers",
        durability=Durability.RESTART_SAFE,
        acknowledgement="durable: an input's state, event and transcript are one commit",
        survives=Survives(process_crash=True, power_cut=True, failed_sync=True, damage=True),
        owner="the run of the worker's generation; the boot that vouches for it is in the record",
        recovery="a worker that a dead process ran is ready for the next run, and told as such",
        retention="until it is archived or purged",
        layouts=(
            *(RUNTIMES, WORKERS, STATES, SUBMISSIONS, DIAGNOSTICS),
            *(WORKER_EVENTS, TRANSCRIPTS, INPUTS),
        ),
        statements=("C3", "C4", "W1", "W3", "W4", "W5", "W6", "W7", "W8", "W10"),
    )
    views = Promise(
        surface="worker_views",
        durability=Durability.DERIVED,
        acknowledgement="none: overviews and usages are made of a worker's events when asked for",
        survives=Survives(),
        owner="whoever reads",
        recovery="none needed: what is not there is made again, byte for byte",
        retention="as long as the worker",
        layouts=(OVERVIEWS, USAGES),
        statements=("W9",),
    )

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def find_runtime(self, key: Key) -> Record[Runtime] | None:
        """A runtime, if there is one."""
        return await self._engine.get(RUNTIMES, key)

    async def runtime(self, key: Key) -> Record[Runtime]:
        """A runtime. Raises `NotFound`."""
        return _there(await self.find_runtime(key), "Runtime", key)

    async def page_of_runtimes(self, tenant: str, wanted: Slice[Runtime]) -> Page[Record[Runtime]]:
        """Runtimes in the order they were created. Raises `Damaged`, which can resume."""
        return await page_of(self._engine, RUNTIMES, (tenant,), wanted, index="by_age")

    async def find(self, key: Key) -> Held | None:
        """A worker's record, if there is one."""
        return await self._engine.get(WORKERS, key)

    async def get(self, key: Key) -> Held:
        """A worker's record. Raises `NotFound`."""
        return _there(await self.find(key), "Worker", key)

    async def state(self, key: Key) -> HeldState:
        """A worker's state. Raises `NotFound`."""
        return _there(await self._engine.get(STATES, key), "Worker", key)

    async def page(
        self, home: Key, wanted: Slice[Worker], *, status: Status | None = None
    ) -> Page[Held]:
        """A runtime's workers in the order they were created, of one status where it is given.
        Raises `Damaged`, which can resume."""
        tenant, runtime_id = home
        index = "by_age" if status is None else "by_status"
        where = (runtime_id,) if status is None else (runtime_id, status.value)
        return await page_of(self._engine, WORKERS, (tenant,), wanted, index=index, where=where)

    async def vouched_for(self, *, limit: int, cursor: str | None = None) -> Page[Held]:
        """Workers of every tenant that some boot runs. Raises `Damaged`, which can resume."""
        return await self._engine.scan(WORKERS, (), index="running", limit=limit, cursor=cursor)

    async def submission(self, key: Key, submission_id: str) -> Record[Submission] | None:
        """What was acknowledged of an input."""
        return await self._engine.get(SUBMISSIONS, (*key, submission_id))

    async def waiting(
        self, held: HeldState, *, limit: int
    ) -> list[tuple[Entry[Queued], Entry[Said]]]:
        """Inputs that no run has taken yet, the oldest first."""
        queued = await self._engine.read(INPUTS, held.key, after=held.value.taken, limit=limit)
        found = []
        for one in queued:
            at = one.value.transcript
            (said,) = await self._engine.read(TRANSCRIPTS, held.key, after=at - 1, limit=1)
            found.append((one, said))
        return found

    async def diagnostic(self, key: Key) -> Record[Diagnostic]:
        """One of them. Raises `NotFound`."""
        return _there(await self._engine.get(DIAGNOSTICS, key), "Diagnostic", key)

    async def diagnostics(self, home: Key, wanted: Slice[Diagnostic]) -> Page[Record[Diagnostic]]:
        """What operators should know of a runtime's workers, by id."""
        return await page_of(self._engine, DIAGNOSTICS, home, wanted)

    async def submissions(self, key: Key, *, limit: int) -> list[Key]:
        """Keys of what was acknowledged of a worker's inputs."""
        page = await self._engine.scan(SUBMISSIONS, key, limit=limit)
        return [record.key for record in page.items]

    def forget(self, submission: Key) -> Batch:
        """Forget what was acknowledged of an input."""
        return delete(SUBMISSIONS, submission)

    def remove(self, held: Held) -> Batch:
        """Remove a worker and all that is its own but for its submissions."""
        records, logs = (STATES, OVERVIEWS, USAGES), (WORKER_EVENTS, TRANSCRIPTS, INPUTS)
        removed = [delete(one, held.key) for one in records] + [drop(it, held.key) for it in logs]
        return joined((delete(WORKERS, held.key, expect=held.version), *removed))

    def establish(self, key: Key, runtime: Runtime) -> Batch:
        """A new runtime."""
        return put(RUNTIMES, key, runtime, expect=0)

    def create(self, key: Key, worker: Worker, event_id: str, home: Record[Runtime]) -> Batch:
        """A new worker in a runtime that is there."""
        event = WorkerEvent("created", event_id, worker.created_at_s, worker.generation)
        state = WorkerState(worker.created_at_s, NULL, events=1)
        return (
            check(RUNTIMES, home.key, home.version)
            + put(WORKERS, key, worker, expect=0)
            + put(STATES, key, state, expect=0)
            + append(WORKER_EVENTS, key, [event], after=0)
        )

    def move(
        self,
        held: Held,
        state: HeldState,
        type: WorkerEventType,
        event_id: str,
        *,
        at_s: int,
        runner: str | None = None,
        reason: str | None = None,
        run_id: str | None = None,
    ) -> tuple[Batch, Worker]:
        """Change a worker's status; also the worker as it then is. Raises `NotPossible` for a
        transition that is not in the table."""
        status = MOVES[held.value.status].get(type)
        if status is None:
            allowed = [one.value for one, moves in MOVES.items() if type in moves]
            where = f"worker {show(held.key)}, to be {type}"
            raise NotPossible(where, " or ".join(allowed), held.value.status.value)
        ended = status in (Status.STOPPED, Status.CANCELLED, Status.FAILED)
        moved = msgspec.structs.replace(
            held.value,
            status=status,
            generation=max(held.value.generation + 1, held.version),
            runner=runner,
            ended_by=event_id if ended else held.value.ended_by if status.ended else None,
            reason=reason,
            run_id=run_id,
        )
        event = WorkerEvent(type, event_id, at_s, moved.generation, reason=reason)
        write = put(WORKERS, held.key, moved, expect=held.version)
        counted, _ = self._write(state, event)
        return write + counted, moved

    def accept(
        self,
        held: Held,
        state: HeldState,
        submission_id: str,
        said: Said,
        digest: str,
        event_id: str,
    ) -> tuple[Batch, Submission]:
        """Accept an input: state, event, transcript and queue in one commit, with what is
        acknowledged. Raises `WorkerEnded`."""
        if held.value.status.ended:
            where = f"worker {show(held.key)}"
            raise WorkerEnded(where, "one that takes input", held.value.status.value)
        now, generation = state.value, held.value.generation
        event = WorkerEvent("accepted", event_id, said.at_s, generation, submission_id, added=1)
        accepted = Submission(
            digest, now.inputs + 1, event_id, now.events + 1, now.transcript + 1, said.at_s
        )
        counted, _ = self._write(state, event, said=[said], inputs=now.inputs + 1)
        batch = (
            self._unmoved(held)
            + counted
            + append(INPUTS, held.key, [Queued(submission_id, accepted.transcript)])
            + put(SUBMISSIONS, (*held.key, submission_id), accepted, expect=0)
        )
        return batch, accepted

    def progress(
        self,
        held: Held,
        state: HeldState,
        event: WorkerEvent,
        said: Sequence[Said],
        value: msgspec.Raw | None,
        step: tuple[str, str] | None = None,
    ) -> tuple[Batch, HeldState]:
        """What a run has done, in one commit, under the id and with the digest in `step` where it
        has one; also the state as it then is. Raises `StaleGeneration` unless `event` is of the
        generation that runs, and `NotPossible` where it takes more inputs than wait."""
        self.require_run(held, event.generation)
        taken = state.value.taken + event.taken
        if taken > state.value.inputs:
            where = f"worker {show(held.key)}, inputs taken"
            raise NotPossible(where, f"at most {state.value.inputs}", taken)
        changes: dict[str, object] = {"taken": taken}
        if value is not None:
            changes["value"] = value
        if step is not None:
            changes["step_id"], changes["step_digest"] = step
        batch, now = self._write(state, event, said=said, **changes)
        return self._unmoved(held) + batch, now

    def require_run(self, held: Held, generation: int) -> None:
        """Raises `StaleGeneration` unless the worker runs, in this generation."""
        worker = held.value
        if worker.status is not Status.RUNNING or worker.generation != generation:
            raise StaleGeneration(
                f"worker {show(held.key)}, its run",
                f"generation {generation}",
                f"generation {worker.generation}, {worker.status.value}",
            )

    def keep(self, view: Records[V], held: Held, value: V, version: int | None) -> Batch:
        """Keep what was made of a worker's events, as long as the worker is there."""
        return self._unmoved(held) + put(view, held.key, value, expect=version)

    def diagnose(
        self, tenant: str, runtime_id: str, found: Diagnostic, *, expect: int | None = 0
    ) -> Batch:
        """Tell of something: a `Conflict` where that was told before, unless `expect` is None."""
        told = hashlib.sha256(f"{found.type}\0{found.where}".encode()).hexdigest()
        return put(DIAGNOSTICS, (tenant, runtime_id, f"diag_{told[:32]}"), found, expect=expect)

    def _unmoved(self, held: Held) -> Batch:
        return check(WORKERS, held.key, held.version)

    def _write(
        self, state: HeldState, event: WorkerEvent, said: Sequence[Said] = (), **changes: object
    ) -> tuple[Batch, HeldState]:
        """One event, and what was said with it, with the state that counts them."""
        now = state.value
        counts = {"events": now.events + 1, "transcript": now.transcript + len(said)}
        changed = msgspec.structs.replace(now, updated_at_s=event.at_s, **counts, **changes)
        batch = put(STATES, state.key, changed, expect=state.version)
        batch += append(WORKER_EVENTS, state.key, [event], after=now.events)
        if said:
            batch += append(TRANSCRIPTS, state.key, said, after=now.transcript)
        return batch, Record(state.key, state.version + 1, changed)
