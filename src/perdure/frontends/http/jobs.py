"""Routes of the work in the background: an extension, for operators."""

from __future__ import annotations

from typing import Any

import msgspec

from perdure.frontends.http.call import Answer, Call
from perdure.frontends.http.queries import JobsQuery, list_query, query_of
from perdure.frontends.http.routes import Route
from perdure.frontends.http.schemas import JobList
from perdure.frontends.http.service import Service, encode, listed_objects, shown
from perdure.services import listing
from perdure.surfaces.jobs import Held, Status
from perdure.wire.jobs import JobAttempt, JobDetails, JobEventObject, JobLease, JobObject, JobStep


async def list_all(service: Service, call: Call) -> Answer:
    page = list_query(call, JobsQuery)
    asked = query_of(call, JobsQuery)
    found = await listing.jobs(
        service.node.state,
        call.tenant,
        page,
        status=Status(asked.status) if asked.status else None,
        kind=asked.kind or None,
    )
    return listed_objects(found, [msgspec.Raw(encode(_job(held))) for held in found.items])


async def retrieve(service: Service, call: Call) -> Answer:
    jobs = service.node.state.jobs
    held = await jobs.get(call.tenant, call.param("job_id"))
    events = await jobs.events(held.key)
    return shown(
        JobDetails(
            **_fields(held),
            attempts=[
                JobAttempt(
                    attempt=one.attempt,
                    began_at=one.began_at,
                    ended_at=one.ended_at,
                    reason=one.reason,
                    continued=one.continued,
                )
                for one in jobs.told(events)
            ],
            steps=[JobStep(**msgspec.structs.asdict(one)) for one in jobs.steps(events)],
            events=[
                JobEventObject(
                    sequence_number=number,
                    type=event.type,
                    attempt=event.attempt,
                    at=event.at_s,
                    owner=event.runner,
                    reason=event.reason,
                    continued=event.continued,
                    name=event.name,
                    subject=event.subject,
                )
                for number, event in enumerate(events)
            ],
        )
    )


async def cancel(service: Service, call: Call) -> Answer:
    """One that has ended is answered as it is."""
    state = service.node.state
    held = await state.jobs.get(call.tenant, call.param("job_id"))
    await service.node.jobs.cancel(held.key)
    return shown(_job(await state.jobs.get(*held.key)))


def _job(held: Held) -> JobObject:
    return JobObject(**_fields(held))


def _fields(held: Held) -> dict[str, Any]:
    job = held.value
    owner = job.runner
    return {
        "id": held.key[-1],
        "kind": job.kind,
        "subject": job.subject,
        "status": job.status.value,
        "owed": job.owed,
        "created_at": job.created_at_s,
        "attempt": job.attempt,
        "attempts_max": job.attempts_max,
        "lease": None if owner is None else JobLease(owner=owner, epoch=job.attempt),
    }


ROUTES = (
    Route(
        method="GET",
        path="/v1/jobs",
        name="list_jobs",
        summary="Jobs, the newest first unless asked otherwise (an extension).",
        handler=list_all,
        query=JobsQuery,
        answer=JobList,
    ),
    Route(
        method="GET",
        path="/v1/jobs/{job_id}",
        name="retrieve_job",
        summary="A job with who runs it, its attempts, its steps and its events.",
        handler=retrieve,
        answer=JobDetails,
        statuses=(404,),
    ),
    Route(
        method="POST",
        path="/v1/jobs/{job_id}/cancel",
        name="cancel_job",
        summary="Cancel a job, and with it what it makes. One that has ended stays as it is.",
        handler=cancel,
        answer=JobObject,
        statuses=(404,),
    ),
)
