"""Routes for operators: health, startup, promises, fleet, metrics, and what this server is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from perdure import __version__
from perdure.core.engine import Resharded
from perdure.core.errors import Invalid
from perdure.frontends.http.call import Answer, Call, EventStream
from perdure.frontends.http.metrics import MEDIA
from perdure.frontends.http.queries import PageQuery, query_of
from perdure.frontends.http.routes import Route
from perdure.frontends.http.service import Service, shown
from perdure.services import verification
from perdure.services.backups import Manifest, Progress
from perdure.services.jobs import JobCounts
from perdure.services.reports import (
    BootState,
    InstanceState,
    StartupReport,
    StateReport,
    boot_state,
    instance_state,
    startup_report,
    state_report,
)
from perdure.services.retention import Pruned
from perdure.services.startup import Readiness
from perdure.services.usage import DiskUse
from perdure.services.verification import Verified
from perdure.wire.errors import typed


class Alive(msgspec.Struct, frozen=True):
    """The event loop turns."""

    alive: Literal[True] = True


class Welcome(msgspec.Struct, frozen=True, kw_only=True):
    """What answers here, and where to go on."""

    name: Literal["perdure"] = "perdure"
    version: str = __version__
    ready: bool
    openai_base_url: str = "/v1"
    see: tuple[str, ...] = ("/openapi.json", "/readyz", "/v1/startup", "/v1/state", "/metrics")


class InstanceList(msgspec.Struct, frozen=True, kw_only=True):
    """Every instance that ever booted on this store."""

    object: Literal["list"] = "list"
    data: list[InstanceState]
    next: str | None


class BootList(msgspec.Struct, frozen=True, kw_only=True):
    """Boots of this instance, the newest first."""

    object: Literal["list"] = "list"
    data: list[BootState]
    next: str | None


async def welcome(service: Service, call: Call) -> Answer:
    return shown(Welcome(ready=service.node.readiness().ready))


async def livez(service: Service, call: Call) -> Answer:
    return shown(Alive())


async def readyz(service: Service, call: Call) -> Answer:
    readiness = service.node.readiness()
    return Answer(msgspec.json.encode(readiness), 200 if readiness.ready else 503)


async def startup(service: Service, call: Call) -> Answer:
    return shown(startup_report(service.node))


async def state(service: Service, call: Call) -> Answer:
    node = service.node
    return shown(
        state_report(
            node.state.engine.url,
            node.config.profile,
            node.startup.recovery,
            node.warnings,
            shards=node.sharding,
        )
    )


async def instances(service: Service, call: Call) -> Answer:
    query = query_of(call, PageQuery)
    node = service.node
    page = await node.state.boots.instances(limit=query.limit, cursor=query.after)
    rows = [instance_state(item.value, node.state, node.clock, node.boot_id) for item in page.items]
    return shown(InstanceList(data=rows, next=page.cursor))


async def boots(service: Service, call: Call) -> Answer:
    query = query_of(call, PageQuery)
    node = service.node
    page = await node.state.boots.history(
        node.boot.instance_id, limit=query.limit, cursor=query.after
    )
    rows = [boot_state(item.value) for item in page.items]
    return shown(BootList(data=rows, next=page.cursor))


async def metrics(service: Service, call: Call) -> Answer:
    return Answer(service.exposition.render(), media=MEDIA)


async def openapi(service: Service, call: Call) -> Answer:
    return Answer(service.openapi)


async def verify(service: Service, call: Call) -> Answer:
    return shown(await verification.verify(service.node.state.engine, service.node.blobs))


class WithinQuery(msgspec.Struct, frozen=True):
    """A runtime, or one worker of it; everything without."""

    runtime_id: str | None = None
    worker_id: str | None = None


async def verify_workers(service: Service, call: Call) -> Answer:
    asked = query_of(call, WithinQuery)
    within = filter(None, (call.tenant, asked.runtime_id, asked.worker_id))
    return shown(await verification.verify_workers(service.node.state, tuple(within)))


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """The jobs under way, and what was measured last: None before it was the first time."""

    object: Literal["perdure.usage"] = "perdure.usage"
    last: DiskUse | None
    jobs: JobCounts


async def usage(service: Service, call: Call) -> Answer:
    return shown(Usage(last=service.node.measuring.last, jobs=service.node.jobs.counts()))


class BackUp(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where to: a directory that does not exist yet, by its absolute path on this machine."""

    target: str


class WorkProgress(msgspec.Struct, frozen=True, kw_only=True, tag="perdure.progress"):
    """How far long work is."""

    sequence_number: int
    what: str
    done: int
    total: int


class WorkDone(msgspec.Struct, frozen=True, kw_only=True, tag="perdure.done"):
    """Long work is done; `result` is what came of it."""

    sequence_number: int
    result: Any


async def back_up(service: Service, call: Call) -> EventStream:
    sent = await call.body(service.limits.body_bytes_max)
    target = Path(typed(await call.parse(sent), BackUp).target)
    if not target.is_absolute():
        raise Invalid(f"the target {target} is relative, and to what, this server cannot know.")
    return EventStream(_working(lambda progress: service.node.back_up(target, progress)))


class Prune(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Older than how many days, by default what is configured; or only say what would go."""

    days: Annotated[float, msgspec.Meta(gt=0, le=36_500)] | None = None
    dry_run: bool = False


async def prune(service: Service, call: Call) -> EventStream:
    asked = typed(await call.parse(await call.body(service.limits.body_bytes_max)), Prune)
    retention = service.node.retention
    return EventStream(
        _working(lambda progress: retention.prune(asked.days, progress, dry_run=asked.dry_run))
    )


class Reshard(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Shards to move everything away from, by id or URL; all others given at the start are used."""

    drain: tuple[str, ...] = ()


async def reshard(service: Service, call: Call) -> EventStream:
    asked = typed(await call.parse(await call.body(service.limits.body_bytes_max)), Reshard)
    return EventStream(_working(lambda progress: service.node.reshard(asked.drain, progress)))


async def _working(
    work: Callable[[Progress], Coroutine[Any, Any, Manifest | Pruned | Resharded]],
) -> AsyncGenerator[list[bytes], None]:
    """Events of long work: how far it is, as often as somebody takes them, and its result. It is
    given up when nobody listens any more."""
    told = asyncio.Event()
    far: list[tuple[str, int, int]] = []

    def note(what: str, done: int, total: int) -> None:
        far[:] = [(what, done, total)]
        told.set()

    working = asyncio.create_task(work(note))
    working.add_done_callback(lambda task: told.set())
    number = 0
    try:
        while not working.done():
            await told.wait()
            told.clear()
            for what, done, total in far:
                event = WorkProgress(sequence_number=number, what=what, done=done, total=total)
                yield [msgspec.json.encode(event)]
                number += 1
        yield [msgspec.json.encode(WorkDone(sequence_number=number, result=await working))]
    finally:
        working.cancel()
        await asyncio.wait((working,))


def _route(path: str, name: str, summary: str, handler: Any, answer: Any, **more: Any) -> Route:
    return Route(
        method="GET",
        path=path,
        name=name,
        summary=summary,
        handler=handler,
        answer=answer,
        **more,
    )


ROUTES = (
    _route(
        "/livez",
        "livez",
        "The process lives.",
        livez,
        Alive,
        access="open",
        needs_ready=False,
    ),
    _route(
        "/readyz",
        "readyz",
        "Whether traffic is welcome, check by check.",
        readyz,
        Readiness,
        access="open",
        needs_ready=False,
        refusal=Readiness,
    ),
    _route(
        "/metrics",
        "metrics",
        "Metrics in Prometheus' text format.",
        metrics,
        None,
        needs_ready=False,
        media="text/plain",
    ),
    _route(
        "/v1/startup",
        "startup",
        "How this start goes, or went: phases, what was recovered, readiness.",
        startup,
        StartupReport,
        needs_ready=False,
    ),
    _route(
        "/v1/state",
        "state",
        "Every surface and its promise, with the tests that prove it.",
        state,
        StateReport,
    ),
    _route(
        "/v1/instances",
        "instances",
        "Every instance and its last sign of life.",
        instances,
        InstanceList,
        query=PageQuery,
    ),
    _route(
        "/v1/boots",
        "boots",
        "Every start of this instance, and whether it ended clean.",
        boots,
        BootList,
        query=PageQuery,
    ),
    _route(
        "/v1/usage",
        "usage",
        "The jobs under way, what each surface takes on the disk, and when that was measured.",
        usage,
        Usage,
    ),
    _route(
        "/openapi.json",
        "openapi",
        "This document.",
        openapi,
        dict[str, Any],
        access="open",
        needs_ready=False,
    ),
    _route(
        "/",
        "welcome",
        "What answers here.",
        welcome,
        Welcome,
        access="open",
        needs_ready=False,
    ),
)

CONTROL_ROUTES = (
    _route(
        "/control/verify",
        "verify",
        "Walk everything stored and list what is not as it was written.",
        verify,
        Verified,
        access="operator",
    ),
    _route(
        "/control/workers/verify",
        "verifyWorkers",
        "Hold what is stored of workers against each other.",
        verify_workers,
        Verified,
        access="operator",
        query=WithinQuery,
    ),
    Route(
        method="POST",
        path="/control/backup",
        name="backup",
        summary="Copy everything as it is now to a new directory; progress as events.",
        handler=back_up,
        body=BackUp,
        answer=WorkDone,
        access="operator",
        streams=True,
    ),
    Route(
        method="POST",
        path="/control/prune",
        name="prune",
        summary="Remove what is older than it is to be kept, or say what that would be.",
        handler=prune,
        body=Prune,
        answer=WorkDone,
        access="operator",
        streams=True,
    ),
    Route(
        method="POST",
        path="/control/reshard",
        name="reshard",
        summary="Spread what is partitioned over the shards, while everything goes on.",
        handler=reshard,
        body=Reshard,
        answer=WorkDone,
        access="operator",
        streams=True,
    ),
)
