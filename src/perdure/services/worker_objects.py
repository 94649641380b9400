"""The worker runtime's objects, as they are shown, made of what is stored."""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec

from perdure.core import codec
from perdure.core.keys import Key
from perdure.core.values import Entry, Record
from perdure.surfaces import workers as kept
from perdure.surfaces.retentions import Retention
from perdure.surfaces.workers import HeldState, Said, Worker, WorkerEvent
from perdure.wire import workers as wire


def plain(raw: msgspec.Raw) -> Any:
    """What a value was before it was stored."""
    return msgspec.json.decode(raw)


def fingerprint(value: Any) -> str:
    """What tells a request from others: equal for equal values, in whatever order of fields."""
    codec.check(value)
    return hashlib.sha256(msgspec.json.encode(value, order="deterministic")).hexdigest()


def runtime_object(key: Key, runtime: kept.Runtime) -> wire.RuntimeObject:
    return wire.RuntimeObject(
        id=key[-1],
        created_at=runtime.created_at_s,
        fingerprint=runtime.fingerprint,
        config=plain(runtime.config),
    )


def worker_object(key: Key, worker: Worker) -> wire.WorkerObject:
    return wire.WorkerObject(
        id=key[-1],
        runtime_id=worker.runtime_id,
        created_at=worker.created_at_s,
        fingerprint=worker.fingerprint,
        config=plain(worker.config),
        status=worker.status.value,
        generation=worker.generation,
        ended_by=worker.ended_by,
        reason=worker.reason,
    )


def state_object(held: HeldState) -> wire.StateObject:
    state = held.value
    return wire.StateObject(
        worker_id=held.key[-1],
        version=held.version,
        updated_at=state.updated_at_s,
        value=plain(state.value),
        events=state.events,
        transcript=state.transcript,
        inputs=state.inputs,
        taken=state.taken,
    )


def submission_object(key: Key, id: str, accepted: kept.Submission) -> wire.SubmissionObject:
    return wire.SubmissionObject(
        id=id,
        worker_id=key[-1],
        number=accepted.number,
        event_id=accepted.event_id,
        event=accepted.event,
        transcript=accepted.transcript,
        accepted_at=accepted.at_s,
    )


def event_object(entry: Entry[WorkerEvent]) -> wire.WorkerEventObject:
    event = entry.value
    return wire.WorkerEventObject(
        id=event.id,
        number=entry.seq,
        type=event.type,
        at=event.at_s,
        generation=event.generation,
        submission_id=event.submission_id,
        added=event.added,
        taken=event.taken,
        name=event.name,
        reason=event.reason,
        data=plain(event.data),
        usage=event.usage,
    )


def said_object(entry: Entry[Said]) -> wire.SaidObject:
    said = entry.value
    return wire.SaidObject(
        number=entry.seq, role=said.role, at=said.at_s, content=plain(said.content)
    )


def overview_object(key: Key, view: kept.Overview) -> wire.OverviewObject:
    return wire.OverviewObject(
        worker_id=key[-1],
        events=view.events,
        status=view.status,
        generation=view.generation,
        runs=view.runs,
        interruptions=view.interruptions,
        inputs=view.inputs,
        taken=view.taken,
        transcript=view.transcript,
        created_at=view.created_at_s,
        last_event_at=view.last_event_at_s,
        last_progress=view.last_progress,
        reason=view.reason,
    )


def diagnostic_object(record: Record[kept.Diagnostic]) -> wire.DiagnosticObject:
    found = record.value
    return wire.DiagnosticObject(
        id=record.key[-1],
        type=found.type,
        worker_id=found.worker_id,
        where=found.where,
        why=found.why,
        found_at=found.found_at_s,
    )


def usage_object(key: Key, view: kept.Usage) -> wire.UsageObject:
    return wire.UsageObject(
        worker_id=key[-1],
        events=view.events,
        runs=view.runs,
        steps=view.steps,
        counted=view.counted,
    )


def retention_object(key: Key, retention: Retention) -> wire.RetentionObject:
    return wire.RetentionObject(
        id=key[-1],
        worker_id=retention.worker_id,
        mode=retention.mode,
        asked_at=retention.at_s,
        done=retention.done,
        lines=retention.lines,
        size_bytes=retention.size_bytes,
        digest=retention.digest,
        removed_at=retention.removed_at_s,
    )
