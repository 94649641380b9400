"""The worker runtime as it is asked for and shown: an extension of Perdure's own, with the
conventions of the rest. A program that embeds the library is given the same objects.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from perdure.core.errors import Conflict
from perdure.core.values import Finding

SAID_MAX = 1_000
"""Most entries of a transcript that one step of a run adds."""

USED_MAX = 64
"""Most names under which one step says what it used."""

EVENT_DATA_BYTES_MAX = 64 * 1024
"""Of the data of one event. Whoever follows is sent events by the page, and the latest are kept in
memory for them; what is larger belongs into the state or the transcript."""

WorkerStatus = Literal["ready", "running", "stopped", "cancelled", "failed", "retired"]
WorkerEventType = Literal[
    "created",
    "accepted",
    "started",
    "progressed",
    "released",
    "interrupted",
    "stopped",
    "cancelled",
    "failed",
    "restored",
    "retired",
]

Id = Annotated[str, Meta(pattern="^[A-Za-z0-9_-]{1,128}$")]
"""What a path of the API can name."""

Name = Annotated[str, Meta(max_length=255)]
Role = Annotated[str, Meta(min_length=1, max_length=64)]
Count = Annotated[int, Meta(ge=0, le=2**40)]
Generation = Annotated[int, Meta(ge=0, le=2**53)]
Object = dict[str, Any]
Used = Annotated[
    dict[Annotated[str, Meta(min_length=1, max_length=64)], Count], Meta(max_length=USED_MAX)
]


class StaleGeneration(Conflict):
    """The run that writes is not the worker's any more: it was stopped, or taken over."""

    code = "stale_generation"
    should_retry = False


class WorkerEnded(Conflict):
    """A worker that has ended takes no input, and nobody runs it."""

    code = "worker_ended"
    should_retry = False


class NotPossible(Conflict):
    """What is asked for cannot be done to a worker as it stands."""

    code = "not_possible"
    should_retry = False


class OtherFingerprint(Conflict):
    """The id stands for something else that was asked for before."""

    code = "other_fingerprint"
    should_retry = False


class RuntimeObject(msgspec.Struct, frozen=True, kw_only=True):
    """A runtime, with the configuration it was made with."""

    id: str
    object: Literal["perdure.runtime"] = "perdure.runtime"
    created_at: int
    fingerprint: str
    config: Object


class WorkerObject(msgspec.Struct, frozen=True, kw_only=True):
    """A worker. `generation` rises with every change of status; `ended_by` is the id of the event
    that ended it, which asking for the same again does not change."""

    id: str
    object: Literal["perdure.worker"] = "perdure.worker"
    runtime_id: str
    created_at: int
    fingerprint: str
    config: Object
    status: WorkerStatus
    generation: int
    ended_by: str | None
    reason: str | None


class StateObject(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker goes on from: its own value, and how many entries its logs have, which the
    same commits count. `version` rises with every one of them."""

    object: Literal["perdure.worker.state"] = "perdure.worker.state"
    worker_id: str
    version: int
    updated_at: int
    value: Any
    events: int
    transcript: int
    inputs: int
    taken: int


class SubmissionObject(msgspec.Struct, frozen=True, kw_only=True):
    """An accepted input, as it is acknowledged once it is durable: its number among the worker's
    inputs, and where its event and its entry of the transcript stand."""

    id: str
    object: Literal["perdure.worker.submission"] = "perdure.worker.submission"
    worker_id: str
    number: int
    event_id: str
    event: int
    transcript: int
    accepted_at: int


class InputObject(msgspec.Struct, frozen=True, kw_only=True):
    """An input that waits for a run."""

    submission_id: str
    number: int
    transcript: int
    role: str
    content: Any


class WorkerEventObject(msgspec.Struct, frozen=True, kw_only=True):
    """An entry of a worker's log. `number` counts from 1."""

    id: str
    number: int
    type: WorkerEventType
    at: int
    generation: int
    submission_id: str | None
    added: int
    taken: int
    name: str | None
    reason: str | None
    data: Any
    usage: dict[str, int]


class SaidObject(msgspec.Struct, frozen=True, kw_only=True):
    """An entry of a transcript. `number` counts from 1."""

    number: int
    role: str
    at: int
    content: Any


class WorkerEvents(msgspec.Struct, frozen=True, kw_only=True):
    """Events in order. `cursor` goes on behind the last, also once there are more than now."""

    object: Literal["list"] = "list"
    data: list[WorkerEventObject]
    cursor: str
    has_more: bool


class Transcript(msgspec.Struct, frozen=True, kw_only=True):
    """Entries of a transcript in order. `cursor` goes on behind the last, also once there are more
    than now."""

    object: Literal["list"] = "list"
    data: list[SaidObject]
    cursor: str
    has_more: bool


class Inputs(msgspec.Struct, frozen=True, kw_only=True):
    """Inputs that wait for a run, the oldest first."""

    object: Literal["list"] = "list"
    data: list[InputObject]


class DiagnosticObject(msgspec.Struct, frozen=True, kw_only=True):
    """What an operator should know of a worker, told once."""

    id: str
    object: Literal["perdure.worker.diagnostic"] = "perdure.worker.diagnostic"
    type: Literal["damaged", "interrupted"]
    worker_id: str | None
    where: str
    why: str
    found_at: int


class _List(msgspec.Struct, frozen=True, kw_only=True):
    """A page; `damaged` names what could not be read on the way."""

    object: Literal["list"] = "list"
    first_id: str | None
    last_id: str | None
    has_more: bool
    damaged: list[Finding]


class RuntimeList(_List, frozen=True, kw_only=True):
    """Runtimes."""

    data: list[RuntimeObject]


class WorkerList(_List, frozen=True, kw_only=True):
    """Workers of a runtime."""

    data: list[WorkerObject]


class DiagnosticList(_List, frozen=True, kw_only=True):
    """What there is to know of a runtime's workers."""

    data: list[DiagnosticObject]


class OverviewObject(msgspec.Struct, frozen=True, kw_only=True):
    """A worker at a glance, made of its first `events` events."""

    object: Literal["perdure.worker.overview"] = "perdure.worker.overview"
    worker_id: str
    events: int
    status: WorkerStatus
    generation: int
    runs: int
    interruptions: int
    inputs: int
    taken: int
    transcript: int
    created_at: int
    last_event_at: int
    last_progress: str | None
    reason: str | None


class UsageObject(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker used, by name, made of its first `events` events."""

    object: Literal["perdure.worker.usage"] = "perdure.worker.usage"
    worker_id: str
    events: int
    runs: int
    steps: int
    counted: dict[str, int]


class RetentionObject(msgspec.Struct, frozen=True, kw_only=True):
    """A worker that was archived or purged. `digest` is the SHA-256 of the archive's bytes, which
    are there unless it was removed."""

    id: str
    object: Literal["perdure.worker.retention"] = "perdure.worker.retention"
    worker_id: str
    mode: Literal["archive", "purge"]
    asked_at: int
    done: bool
    lines: int
    size_bytes: int
    digest: str | None
    removed_at: int | None


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """What the stream of a worker's events begins with: all that stood before the first of them."""

    object: Literal["perdure.worker.snapshot"] = "perdure.worker.snapshot"
    worker: WorkerObject
    state: StateObject
    overview: OverviewObject


class SaidBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a run adds to a transcript."""

    role: Role
    content: Any


class CreateBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A runtime or a worker to be: asking for the same again gives what is there."""

    id: Id
    config: Object = {}


class InputBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An input. One sent again under its `submission_id` is accepted once."""

    content: Any
    role: Role = "user"
    submission_id: Id | None = None


class EndBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Why a worker is to end."""

    reason: Name | None = None


class RetainBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is to become of a worker that has ended. The operation sent again goes on, or finds what
    was done."""

    operation_id: Id
    mode: Literal["archive", "purge"]


class RunBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which run it is that lets go, or has failed and why."""

    generation: Generation
    reason: Name | None = None


class StartBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Under what a run begins. Sent again while that run goes on, it finds it, with its generation;
    so a lost answer loses no run."""

    operation_id: Id | None = None


class ProgressBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A step of a run: all of it is one commit. Without `state` the worker keeps the one it has.
    `data` goes with the event, in at most 64 KiB. The last step sent again under its `operation_id`
    is taken once."""

    generation: Generation
    operation_id: Id | None = None
    state: Any = msgspec.UNSET
    transcript: Annotated[list[SaidBody], Meta(max_length=SAID_MAX)] = []
    taken: Annotated[int, Meta(ge=0, le=SAID_MAX)] = 0
    name: Name | None = None
    data: Any = None
    usage: Used = {}
