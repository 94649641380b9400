"""Jobs: durable work, from the moment it was accepted until it ended, however many processes die
over it.

The record is the fence. Whoever runs a job adds `owned` to everything it writes on its behalf, so
once another writer has changed the record (to cancel the job, to take it over), what the earlier
owner still writes is refused whole. Each attempt has a number, which is its owner's epoch; a log
tells what became of each.

What a job needs that others may delete before it has run is kept with it: a copy of its input, and
references to the blobs named in it. Both end with the job.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Literal

import msgspec

from perdure.core.batch import Batch, append, check, delete, drop, put
from perdure.core.blobs import Blob
from perdure.core.engine import Engine, Survives
from perdure.core.errors import Conflict
from perdure.core.keys import Key
from perdure.core.layouts import Index, Log, Records
from perdure.core.limits import PAGE_MAX
from perdure.core.paging import Slice, page_of
from perdure.core.promises import Durability, Promise
from perdure.core.values import Page, Record
from perdure.wire.errors import NotFound


class Status(enum.Enum):
    """Where a job stands."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


MOVES: dict[Status, frozenset[Status]] = {
    Status.QUEUED: frozenset({Status.RUNNING, Status.FAILED, Status.CANCELLED}),
    Status.RUNNING: frozenset({Status.QUEUED, Status.SUCCEEDED, Status.FAILED, Status.CANCELLED}),
    Status.SUCCEEDED: frozenset(),
    Status.FAILED: frozenset(),
    Status.CANCELLED: frozenset(),
}
"""Every transition there is. `RUNNING` to `QUEUED` is an attempt that ended before the job did."""


class Job(msgspec.Struct, frozen=True):
    """What is to be done is told by `kind`, by `subject` (the id it is done to) and by the
    attachment, its parameters.

    `owed` is what is still to be done: `run`, or `cancel` once that was asked for, None once it has
    ended; by its index a boot finds exactly what is unfinished, cancellations first, then the
    oldest. `runner` is the boot that runs attempt number `attempt`, None while nobody does.
    `blobs` are what the job refers to until it ends.
    """

    kind: str
    subject: str
    created_at_s: int
    attempts_max: int
    status: Status = Status.QUEUED
    owed: Literal["cancel", "run"] | None = "run"
    attempt: int = 0
    runner: str | None = None
    blobs: tuple[Blob, ...] = ()

    @property
    def state(self) -> str:
        """The status as indexes hold it."""
        return self.status.value


class JobEvent(msgspec.Struct, frozen=True, omit_defaults=True):
    """An attempt began, finished a step, or ended. `continued` says that it began by going on with
    what the one before had open, `reason` why it ended before the job did; `name` and `subject` say
    what kind of step it was and the id of what it made."""

    type: Literal["began", "step", "ended"]
    attempt: int
    at_s: int
    runner: str
    reason: str | None = None
    continued: bool = False
    name: str | None = None
    subject: str | None = None


class Attempt(msgspec.Struct, frozen=True, omit_defaults=True):
    """One attempt as it is told to people."""

    attempt: int
    began_at: int
    ended_at: int | None = None
    reason: str | None = None
    continued: bool = False


class Step(msgspec.Struct, frozen=True):
    """A part of a job that is done: an attempt that goes on does not do it again. It is `abandoned`
    once an attempt had to begin anew."""

    name: str
    subject: str
    attempt: int
    finished_at: int
    abandoned: bool = False


JOBS = Records(
    "jobs",
    Job,
    key=("tenant", "job_id"),
    indexes=(
        Index("unfinished", ("owed", "created_at_s"), every_tenant=True),
        Index("by_age", ("created_at_s",)),
        Index("by_state", ("state", "created_at_s")),
        Index("by_kind", ("kind", "created_at_s")),
        Index("by_kind_and_state", ("kind", "state", "created_at_s")),
    ),
)


class JobInput(msgspec.Struct, frozen=True):
    """How much a job keeps of what it was accepted with; the attachment is that."""

    items: int
    files: int


JOB_INPUTS = Records("job_inputs", JobInput, key=("tenant", "job_id"))
JOB_EVENTS = Log("job_events", JobEvent, key=("tenant", "job_id"))

Held = Record[Job]


class Jobs:
    """Reads of jobs, and the batches that write them."""

    promise = Promise(
        surface="jobs",
        durability=Durability.SHARED,
        acknowledgement="durable in the same commit as what it is to work on",
        survives=Survives(process_crash=True, power_cut=True, failed_sync=True, damage=True),
        owner="the boot that runs its current attempt, named in the record and fenced by it",
        recovery="what a dead process ran is queued again; what was to be cancelled is, first",
        retention="as long as the response it makes; what it needs of others, until it ends",
        layouts=(JOBS, JOB_INPUTS, JOB_EVENTS),
        statements=("C3", "C4", "C23", "R5", "R13"),
    )

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def find(self, key: Key) -> Held | None:
        """The job's record; its attachment is the parameters."""
        return await self._engine.get(JOBS, key)

    async def get(self, tenant: str, job_id: str) -> Held:
        """The same. Raises `NotFound`."""
        record = await self.find((tenant, job_id))
        if record is None:
            raise NotFound("Job", job_id)
        return record

    async def page(
        self,
        tenant: str,
        wanted: Slice[Job],
        *,
        status: Status | None = None,
        kind: str | None = None,
    ) -> Page[Held]:
        """Jobs in the order they were created, of one status and one kind where these are given.
        Raises `Damaged`, which can resume."""
        state = None if status is None else status.value
        index = {
            (False, False): "by_age",
            (False, True): "by_state",
            (True, False): "by_kind",
            (True, True): "by_kind_and_state",
        }[kind is not None, state is not None]
        where = tuple(value for value in (kind, state) if value is not None)
        return await page_of(self._engine, JOBS, (tenant,), wanted, index=index, where=where)

    async def events(self, key: Key) -> list[JobEvent]:
        """What became of each attempt, in order. They are not many: attempts are bounded, and so
        are the steps of one."""
        events: list[JobEvent] = []
        while True:
            entries = await self._engine.read(JOB_EVENTS, key, after=len(events), limit=PAGE_MAX)
            events += [entry.value for entry in entries]
            if len(entries) < PAGE_MAX:
                return events

    async def attempts(self, key: Key) -> list[Attempt]:
        """Every attempt so far, in order."""
        return self.told(await self.events(key))

    def told(self, events: list[JobEvent]) -> list[Attempt]:
        """The attempts that these events are of."""
        told: list[Attempt] = []
        for event in events:
            if event.type == "began":
                told.append(Attempt(event.attempt, event.at_s, continued=event.continued))
            elif event.type == "ended":
                told[-1] = msgspec.structs.replace(
                    told[-1], ended_at=event.at_s, reason=event.reason
                )
        return told

    def steps(self, events: list[JobEvent]) -> list[Step]:
        """The steps that these events are of."""
        fresh = [event.attempt for event in events if event.type == "began" and not event.continued]
        return [
            Step(event.name, event.subject, event.attempt, event.at_s, event.attempt < fresh[-1])
            for event in events
            if event.type == "step" and event.name is not None and event.subject is not None
        ]

    async def kept(self, key: Key) -> Record[JobInput] | None:
        """What a job keeps of what it was accepted with."""
        return await self._engine.get(JOB_INPUTS, key)

    async def unfinished(self, *, limit: int, cursor: str | None = None) -> Page[Held]:
        """Jobs of every tenant that have not ended, cancellations first. Raises `Damaged`, which
        can resume."""
        return await self._engine.scan(JOBS, (), index="unfinished", limit=limit, cursor=cursor)

    def create(self, key: Key, job: Job, parameters: bytes) -> Batch:
        """A new job, to be committed with what it is to work on."""
        return put(JOBS, key, job, attachment=parameters, expect=0)

    def keep(self, key: Key, what: JobInput, data: bytes) -> Batch:
        """Keep what a new job was accepted with, until it ends."""
        return put(JOB_INPUTS, key, what, attachment=data, expect=0)

    def begin(
        self, held: Held, runner: str, *, at_s: int, continued: bool = False
    ) -> tuple[Batch, Held]:
        """Make `runner` the owner of the next attempt; also returns the record as it then stands.

        Raises `Conflict` for a job that is not waiting, or that is to be cancelled.
        """
        if held.value.owed != "run":
            raise Conflict(f"job {held.key[-1]}", "one to be run", f"to {held.value.owed}")
        attempt = held.value.attempt + 1
        began = JobEvent("began", attempt, at_s, runner, continued=continued)
        write, begun = self._move(held, Status.RUNNING, runner=runner, attempt=attempt)
        return write + append(JOB_EVENTS, held.key, [began]), begun

    def owned(self, held: Held) -> Batch:
        """What an owner adds to each of its writes: a `Conflict` once it was replaced."""
        return check(JOBS, held.key, held.version)

    def finish(self, held: Held, steps: Sequence[tuple[str, str]], *, at_s: int) -> Batch:
        """Note the name and the subject of each step that the attempt under way has finished, to be
        committed with what they made and with `owned`."""
        job = held.value
        assert job.runner is not None, f"nobody runs job {held.key[-1]}"
        done = [
            JobEvent("step", job.attempt, at_s, job.runner, name=name, subject=subject)
            for name, subject in steps
        ]
        return append(JOB_EVENTS, held.key, done) if done else Batch()

    def requeue(self, held: Held, reason: str, *, at_s: int, free: bool = False) -> Batch:
        """End an attempt, its runner being dead or stopping; the job waits for another. `free`:
        a stop in good order was not its fault, and costs it none of its attempts."""
        attempts_max = held.value.attempts_max + free
        write, _ = self._move(held, Status.QUEUED, runner=None, attempts_max=attempts_max)
        return write + self._ended(held, reason, at_s)

    def cancel(self, held: Held) -> Batch:
        """The lasting wish that a job be cancelled. It fences the runner: only the end is left."""
        return put(
            JOBS,
            held.key,
            msgspec.structs.replace(held.value, owed="cancel"),
            attachment=held.attachment,
            expect=held.version,
        )

    def end(self, held: Held, status: Status, *, at_s: int, reason: str | None = None) -> Batch:
        """End a job, and the attempt that is under way if there is one. Commit it with the end of
        its references to blobs."""
        write, _ = self._move(held, status, owed=None, runner=None, blobs=())
        return write + delete(JOB_INPUTS, held.key) + self._ended(held, reason, at_s)

    def delete(self, held: Held) -> Batch:
        """Delete a job and its events."""
        return delete(JOBS, held.key, expect=held.version) + drop(JOB_EVENTS, held.key)

    def remove(self, key: Key) -> Batch:
        """Delete whatever is stored of a job whose record cannot be read."""
        return delete(JOBS, key) + delete(JOB_INPUTS, key) + drop(JOB_EVENTS, key)

    def _move(self, held: Held, status: Status, **changes: object) -> tuple[Batch, Held]:
        if status not in MOVES[held.value.status]:
            raise Conflict(f"job {held.key[-1]}", status.value, held.value.status.value)
        changed = msgspec.structs.replace(held.value, status=status, **changes)
        write = put(JOBS, held.key, changed, attachment=held.attachment, expect=held.version)
        return write, Record(held.key, held.version + 1, changed, held.attachment)

    def _ended(self, held: Held, reason: str | None, at_s: int) -> Batch:
        job = held.value
        if job.runner is None:
            return Batch()
        event = JobEvent("ended", job.attempt, at_s, job.runner, reason)
        return append(JOB_EVENTS, held.key, [event])
