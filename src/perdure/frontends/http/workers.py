"""Routes of the worker runtime: an extension, with the conventions of the rest."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import msgspec

from perdure.frontends.http.call import Answer, Call, Download, EventStream
from perdure.frontends.http.queries import (
    InputsQuery,
    ListedQuery,
    LogQuery,
    TranscriptQuery,
    WorkersQuery,
    list_query,
    query_of,
)
from perdure.frontends.http.routes import Route
from perdure.frontends.http.service import ObjectList, Service, encode, shown
from perdure.services.workers import Shown, Told, Workers
from perdure.surfaces.workers import Status
from perdure.wire import workers as wire
from perdure.wire.errors import NotFound

FAREWELL = b": the server is stopping; resume with last-event-id\n\n"


async def create_runtime(service: Service, call: Call) -> Answer:
    return shown(await _workers(service, call).create_runtime(await _sent(service, call)))


async def list_runtimes(service: Service, call: Call) -> Answer:
    return _page(await _workers(service, call).runtimes(list_query(call, ListedQuery)))


async def retrieve_runtime(service: Service, call: Call) -> Answer:
    return shown(await _workers(service, call).runtime(call.param("runtime_id")))


async def create(service: Service, call: Call) -> Answer:
    asked = await _sent(service, call)
    return shown(await _workers(service, call).create(call.param("runtime_id"), asked))


async def list_all(service: Service, call: Call) -> Answer:
    page, asked = list_query(call, WorkersQuery), query_of(call, WorkersQuery)
    status = Status(asked.status) if asked.status else None
    return _page(await _workers(service, call).page(call.param("runtime_id"), page, status))


async def diagnostics(service: Service, call: Call) -> Answer:
    page = list_query(call, ListedQuery)
    return _page(await _workers(service, call).diagnostics(call.param("runtime_id"), page))


async def retrieve(service: Service, call: Call) -> Answer:
    return shown(await _workers(service, call).get(*_worker(call)))


async def state(service: Service, call: Call) -> Answer:
    return shown(await _workers(service, call).state(*_worker(call)))


async def overview(service: Service, call: Call) -> Answer:
    return shown(await _workers(service, call).overview(*_worker(call)))


async def usage(service: Service, call: Call) -> Answer:
    return shown(await _workers(service, call).usage(*_worker(call)))


async def add_input(service: Service, call: Call) -> Answer:
    asked = await _sent(service, call)
    return shown(await _workers(service, call).input(*_worker(call), asked))


async def inputs(service: Service, call: Call) -> Answer:
    limit = query_of(call, InputsQuery).limit
    return shown(await _workers(service, call).inputs(*_worker(call), limit))


async def start(service: Service, call: Call) -> Answer:
    asked = await _sent(service, call)
    return shown(await _workers(service, call).start(*_worker(call), asked))


async def progress(service: Service, call: Call) -> Answer:
    asked = await _sent(service, call)
    return shown(await _workers(service, call).progress(*_worker(call), asked))


async def release(service: Service, call: Call) -> Answer:
    asked = await _sent(service, call)
    return shown(await _workers(service, call).release(*_worker(call), asked))


async def fail(service: Service, call: Call) -> Answer:
    asked = await _sent(service, call)
    return shown(await _workers(service, call).fail(*_worker(call), asked))


async def stop(service: Service, call: Call) -> Answer:
    asked = await _sent(service, call)
    return shown(await _workers(service, call).stop(*_worker(call), asked))


async def cancel(service: Service, call: Call) -> Answer:
    asked = await _sent(service, call)
    return shown(await _workers(service, call).cancel(*_worker(call), asked))


async def restore(service: Service, call: Call) -> Answer:
    return shown(await _workers(service, call).restore(*_worker(call)))


async def retain(service: Service, call: Call) -> Answer:
    asked = await _sent(service, call)
    return shown(await _workers(service, call).retain(*_worker(call), asked))


async def retention(service: Service, call: Call) -> Answer:
    return shown(await _workers(service, call).retention(*_operation(call)))


async def archive(service: Service, call: Call) -> Download:
    workers, operation = _workers(service, call), _operation(call)
    made = await workers.retention(*operation)
    if made.digest is None or made.removed_at is not None:
        raise NotFound("Archive", made.id)
    return Download(workers.archive(*operation), made.size_bytes, media=b"application/jsonl")


async def remove_archive(service: Service, call: Call) -> Answer:
    return shown(await _workers(service, call).remove_archive(*_operation(call)))


async def transcript(service: Service, call: Call) -> Answer:
    asked = query_of(call, TranscriptQuery)
    found = _workers(service, call).transcript(
        *_worker(call), after=asked.after or None, limit=asked.limit
    )
    return shown(await found)


async def events(service: Service, call: Call) -> Answer | EventStream:
    """A list; or, as a stream, a snapshot and then what comes, or what comes behind a cursor."""
    asked, workers = query_of(call, LogQuery), _workers(service, call)
    if not asked.stream:
        found = workers.events(*_worker(call), after=asked.after or None, limit=asked.limit)
        return shown(await found)
    after = call.text_header(b"last-event-id") or asked.after or None
    await workers.events(*_worker(call), after=after, limit=0)  # refused now, or not at all
    return EventStream(
        _framed(workers.follow(*_worker(call), after=after)), framed=True, farewell=FAREWELL
    )


async def _framed(told: AsyncGenerator[list[Told], None]) -> AsyncGenerator[list[bytes], None]:
    """Server-sent events whose ids are the cursors behind them."""
    async with aclosing(told) as groups:
        async for group in groups:
            yield [
                b"id: %b\nevent: %b\ndata: %b\n\n"
                % (
                    cursor.encode(),
                    b"snapshot" if isinstance(what, wire.Snapshot) else what.type.encode(),
                    encode(what),
                )
                for cursor, what in group
            ]


def _workers(service: Service, call: Call) -> Workers:
    return service.node.workers_of(call.tenant)


def _worker(call: Call) -> tuple[str, str]:
    return call.param("runtime_id"), call.param("worker_id")


def _operation(call: Call) -> tuple[str, str]:
    return call.param("runtime_id"), call.param("operation_id")


async def _sent(service: Service, call: Call) -> Any:
    return await call.parse(await call.body(service.limits.body_bytes_max))


def _page(found: Shown[Any]) -> Answer:
    ids = [one.id for one in found.items]
    return shown(
        ObjectList(
            data=[msgspec.Raw(encode(one)) for one in found.items],
            first_id=ids[0] if ids else None,
            last_id=ids[-1] if ids else None,
            has_more=found.more,
            damaged=found.damaged,
        )
    )


_HOME = "/v1/runtimes/{runtime_id}"
_ONE = "/v1/runtimes/{runtime_id}/workers/{worker_id}"

ROUTES = (
    Route(
        method="POST",
        path=f"{_ONE}/input",
        name="add_worker_input",
        summary="Give a worker an input. Under the same `submission_id` it is accepted once.",
        handler=add_input,
        body=wire.InputBody,
        answer=wire.SubmissionObject,
        statuses=(404,),
    ),
    Route(
        method="POST",
        path=f"{_ONE}/progress",
        name="progress_worker",
        summary="Commit a step of a run: state, transcript, inputs taken, usage.",
        handler=progress,
        body=wire.ProgressBody,
        answer=wire.StateObject,
        statuses=(404,),
    ),
    Route(
        method="GET",
        path=f"{_ONE}/inputs",
        name="list_worker_inputs",
        summary="Inputs that no run has taken yet, the oldest first.",
        handler=inputs,
        query=InputsQuery,
        answer=wire.Inputs,
        statuses=(404,),
    ),
    Route(
        method="GET",
        path=f"{_ONE}/state",
        name="retrieve_worker_state",
        summary="What a worker goes on from.",
        handler=state,
        answer=wire.StateObject,
        statuses=(404,),
    ),
    Route(
        method="GET",
        path=f"{_ONE}/events",
        name="list_worker_events",
        summary="What happened to a worker, in order; with `stream`, a snapshot and then live. "
        "The id of each event of a stream is the cursor (or `Last-Event-ID`) that resumes it.",
        handler=events,
        query=LogQuery,
        answer=wire.WorkerEvents,
        statuses=(404, 409),
        streams=True,
    ),
    Route(
        method="GET",
        path=f"{_ONE}/transcript",
        name="list_worker_transcript",
        summary="What was said to a worker and by it, in order.",
        handler=transcript,
        query=TranscriptQuery,
        answer=wire.Transcript,
        statuses=(404,),
    ),
    Route(
        method="GET",
        path=f"{_ONE}/overview",
        name="retrieve_worker_overview",
        summary="A worker at a glance.",
        handler=overview,
        answer=wire.OverviewObject,
        statuses=(404,),
    ),
    Route(
        method="GET",
        path=f"{_ONE}/usage",
        name="retrieve_worker_usage",
        summary="What a worker used, by name.",
        handler=usage,
        answer=wire.UsageObject,
        statuses=(404,),
    ),
    Route(
        method="POST",
        path=f"{_ONE}/start",
        name="start_worker",
        summary="Begin a run: who holds the generation of the answer may write for the worker.",
        handler=start,
        body=wire.StartBody | None,
        body_required=False,
        answer=wire.WorkerObject,
        statuses=(404,),
    ),
    Route(
        method="POST",
        path=f"{_ONE}/release",
        name="release_worker",
        summary="End a run; the worker is ready for another.",
        handler=release,
        body=wire.RunBody,
        answer=wire.WorkerObject,
        statuses=(404,),
    ),
    Route(
        method="POST",
        path=f"{_ONE}/fail",
        name="fail_worker",
        summary="End a run, and the worker with it.",
        handler=fail,
        body=wire.RunBody,
        answer=wire.WorkerObject,
        statuses=(404,),
    ),
    Route(
        method="POST",
        path=f"{_ONE}/stop",
        name="stop_worker",
        summary="Stop a worker, whoever runs it. One that has ended stays as it ended.",
        handler=stop,
        body=wire.EndBody | None,
        body_required=False,
        answer=wire.WorkerObject,
        statuses=(404,),
    ),
    Route(
        method="POST",
        path=f"{_ONE}/cancel",
        name="cancel_worker",
        summary="Cancel a worker for good. One that has ended stays as it ended.",
        handler=cancel,
        body=wire.EndBody | None,
        body_required=False,
        answer=wire.WorkerObject,
        statuses=(404,),
    ),
    Route(
        method="POST",
        path=f"{_ONE}/restore",
        name="restore_worker",
        summary="Make a worker ready again that was stopped, has failed, or does not answer.",
        handler=restore,
        answer=wire.WorkerObject,
        statuses=(404,),
    ),
    Route(
        method="POST",
        path=f"{_ONE}/retain",
        name="retain_worker",
        summary="Archive or purge a worker that has ended, once however often it is asked for.",
        handler=retain,
        body=wire.RetainBody,
        answer=wire.RetentionObject,
        statuses=(404,),
    ),
    Route(
        method="GET",
        path=f"{_HOME}/retentions/{{operation_id}}",
        name="retrieve_worker_retention",
        summary="What an operation that archives or purges a worker has done.",
        handler=retention,
        answer=wire.RetentionObject,
        statuses=(404,),
    ),
    Route(
        method="GET",
        path=f"{_HOME}/retentions/{{operation_id}}/content",
        name="download_worker_archive",
        summary="What an operation archived: the worker, its state, its events and its transcript, "
        "a line of JSON each.",
        handler=archive,
        answer=None,
        media="application/jsonl",
        statuses=(404,),
    ),
    Route(
        method="DELETE",
        path=f"{_HOME}/retentions/{{operation_id}}/content",
        name="remove_worker_archive",
        summary="Remove what an operation archived, for good; the operation stays.",
        handler=remove_archive,
        answer=wire.RetentionObject,
        statuses=(404, 409),
    ),
    Route(
        method="GET",
        path=_ONE,
        name="retrieve_worker",
        summary="A worker.",
        handler=retrieve,
        answer=wire.WorkerObject,
        statuses=(404,),
    ),
    Route(
        method="POST",
        path=f"{_HOME}/workers",
        name="create_worker",
        summary="Make a worker, or find the one of this id that was asked for in the same words.",
        handler=create,
        body=wire.CreateBody,
        answer=wire.WorkerObject,
        statuses=(404,),
    ),
    Route(
        method="GET",
        path=f"{_HOME}/workers",
        name="list_workers",
        summary="A runtime's workers, the newest first unless asked otherwise.",
        handler=list_all,
        query=WorkersQuery,
        answer=wire.WorkerList,
        statuses=(404,),
    ),
    Route(
        method="GET",
        path=f"{_HOME}/diagnostics",
        name="list_worker_diagnostics",
        summary="What an operator should know of a runtime's workers, each once.",
        handler=diagnostics,
        query=ListedQuery,
        answer=wire.DiagnosticList,
        statuses=(404,),
    ),
    Route(
        method="GET",
        path=_HOME,
        name="retrieve_runtime",
        summary="A runtime with the configuration it was made with.",
        handler=retrieve_runtime,
        answer=wire.RuntimeObject,
        statuses=(404,),
    ),
    Route(
        method="POST",
        path="/v1/runtimes",
        name="create_runtime",
        summary="Make a runtime, or find the one of this id that was asked for in the same words.",
        handler=create_runtime,
        body=wire.CreateBody,
        answer=wire.RuntimeObject,
    ),
    Route(
        method="GET",
        path="/v1/runtimes",
        name="list_runtimes",
        summary="Runtimes, the newest first unless asked otherwise.",
        handler=list_runtimes,
        query=ListedQuery,
        answer=wire.RuntimeList,
    ),
)
