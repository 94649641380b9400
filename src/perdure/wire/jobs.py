"""Jobs as operators see them: an extension of Perdure's own, with the conventions of the rest."""

from __future__ import annotations

from typing import Literal

import msgspec

JobStatus = Literal["queued", "running", "succeeded", "failed", "cancelled"]


class JobLease(msgspec.Struct, frozen=True, kw_only=True):
    """Who runs a job now. Of two owners only the one with the newer epoch can still write."""

    owner: str
    epoch: int


class JobObject(msgspec.Struct, frozen=True, kw_only=True):
    """A job. `subject` is the id of what is done; `owed` is what is still to be done: to run it, or
    to end it because that was asked for."""

    id: str
    object: Literal["perdure.job"] = "perdure.job"
    kind: str
    subject: str
    status: JobStatus
    owed: Literal["run", "cancel"] | None
    created_at: int
    attempt: int
    attempts_max: int
    lease: JobLease | None


class JobAttempt(msgspec.Struct, frozen=True, kw_only=True):
    """One attempt; `reason` says why it ended before the job did, `continued` that it began by
    going on with what the one before had open."""

    attempt: int
    began_at: int
    ended_at: int | None
    reason: str | None
    continued: bool


class JobStep(msgspec.Struct, frozen=True, kw_only=True):
    """A part of the job that is done: `name` is its kind, `subject` the id of what it made. Of a
    background response each finished output item is one. It is `abandoned` once an attempt had to
    begin anew."""

    name: str
    subject: str
    attempt: int
    finished_at: int
    abandoned: bool


class JobEventObject(msgspec.Struct, frozen=True, kw_only=True):
    """An entry of the job's log: an attempt began, finished a step or ended, at `owner`."""

    sequence_number: int
    type: Literal["began", "step", "ended"]
    attempt: int
    at: int
    owner: str
    reason: str | None
    continued: bool
    name: str | None
    subject: str | None


class JobDetails(JobObject, frozen=True, kw_only=True):
    """A job with its whole history."""

    attempts: list[JobAttempt]
    steps: list[JobStep]
    events: list[JobEventObject]
