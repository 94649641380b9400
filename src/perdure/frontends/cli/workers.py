"""`perdure workers`: look at the workers of a runtime, and follow one.

A running server is asked over its control socket; a store that nobody holds is opened to look only.
Following goes on with the next server where one stops, and waits where there is none.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Annotated, Any, TypeVar
from urllib.parse import quote, urlencode

import msgspec
import typer
from rich.markup import escape

from perdure import library
from perdure.core.errors import Invalid
from perdure.core.keys import DEFAULT_TENANT
from perdure.frontends.cli import following
from perdure.frontends.cli.following import Message
from perdure.frontends.cli.options import AsJson, ConfigFile, Data, Engine, configured
from perdure.frontends.cli.output import console, moment, say_json, table, wide
from perdure.frontends.cli.store import ask, holder
from perdure.frontends.cli.verify import tell
from perdure.services.config import Config
from perdure.services.verification import Verified
from perdure.services.workers import Workers
from perdure.surfaces.workers import Status
from perdure.wire.lists import ListQuery
from perdure.wire.workers import (
    OverviewObject,
    SaidObject,
    StateObject,
    Transcript,
    WorkerEventObject,
    WorkerEvents,
    WorkerObject,
)

T = TypeVar("T")

Named = Annotated[str, typer.Argument(metavar="RUNTIME/WORKER", help="The worker.")]
Limit = Annotated[int, typer.Option(min=1, max=100, help="Most to show at once.")]
Behind = Annotated[str | None, typer.Option("--after", help="Begin behind this cursor.")]
Follow = Annotated[bool, typer.Option("--follow", help="Go on with what comes.")]

workers = typer.Typer(name="workers", help="Workers of a runtime.", no_args_is_help=True)


class Page(msgspec.Struct):
    """A page of workers. What cannot be read is in `damaged`."""

    data: list[WorkerObject]
    has_more: bool
    damaged: list[dict[str, Any]] = []


@workers.command("ls")
def list_workers(
    runtime: Annotated[str, typer.Argument(help="The runtime.")],
    status: Annotated[Status | None, typer.Option(help="Only those in this status.")] = None,
    limit: Limit = 20,
    after: Annotated[str | None, typer.Option(help="List after this id, the last seen.")] = None,
    data: Data = None,
    engine: Engine = None,
    config: ConfigFile = None,
    json: AsJson = False,
) -> None:
    """List the workers of a runtime, the newest first."""
    asked = {"limit": limit, "after": after, "status": status.value if status else None}

    async def look(workers: Workers) -> Page:
        found = await workers.page(runtime, ListQuery(limit, after=after), status)
        return Page(found.items, found.more, [msgspec.to_builtins(one) for one in found.damaged])

    path = _path(f"/v1/runtimes/{quote(runtime, safe='')}/workers", asked)
    settings = configured(config, data=data, engine=engine)
    page = asyncio.run(_told(settings, path, Page, look))
    if json:
        say_json(page)
        return
    rows = table("id", "status", "generation", "created (UTC)", "reason")
    for one in page.data:
        made, reason = moment(one.created_at), escape(one.reason or "")
        rows.add_row(one.id, one.status, str(one.generation), made, reason)
    wide.print(rows)
    for finding in page.damaged:
        told = escape(f"{finding['where']}: {finding['why']}")
        console.print(f"[red]{finding['kind']}[/] {told}")
    if page.has_more:
        console.print(f"more: --after {page.data[-1].id}", markup=False)


@workers.command()
def show(
    worker: Named, data: Data = None, engine: Engine = None, config: ConfigFile = None
) -> None:
    """Show a worker, its state and its overview."""
    settings, one, at = configured(config, data=data, engine=engine), _split(worker), _at(worker)

    async def told() -> dict[str, Any]:
        return {
            "worker": await _told(settings, at, WorkerObject, lambda them: them.get(*one)),
            "state": await _told(
                settings, f"{at}/state", StateObject, lambda them: them.state(*one)
            ),
            "overview": await _told(
                settings, f"{at}/overview", OverviewObject, lambda them: them.overview(*one)
            ),
        }

    say_json(asyncio.run(told()))


@workers.command()
def events(
    worker: Named,
    limit: Limit = 100,
    after: Behind = None,
    follow: Follow = False,
    data: Data = None,
    engine: Engine = None,
    config: ConfigFile = None,
    json: AsJson = False,
) -> None:
    """Show what happened to a worker."""
    settings, one = configured(config, data=data, engine=engine), _split(worker)

    async def read(cursor: str | None) -> WorkerEvents:
        return await _told(
            settings,
            _path(f"{_at(worker)}/events", {"limit": limit, "after": cursor}),
            WorkerEvents,
            lambda them: them.events(*one, after=cursor, limit=limit),
        )

    cursor = after

    async def look() -> None:
        nonlocal cursor
        more = True
        while more:
            page = await read(cursor)
            for event in page.data:
                _say(event, json, event.type, _about(event))
            cursor, more = page.cursor, page.has_more and follow
            if page.has_more and not follow and not json:
                console.print(f"more: --after {cursor}", markup=False)

    async def hear(message: Message) -> bool:
        nonlocal cursor
        cursor, _, data = message
        event = msgspec.json.decode(data, type=WorkerEventObject)
        _say(event, json, event.type, _about(event))
        return event.type != "retired"

    if not follow:
        asyncio.run(look())
        return
    at = f"{_at(worker)}/events"
    asyncio.run(
        following.follow(
            settings, look, lambda: _path(at, {"stream": "true", "after": cursor}), hear
        )
    )


@workers.command()
def transcript(
    worker: Named,
    limit: Limit = 100,
    after: Behind = None,
    follow: Follow = False,
    data: Data = None,
    engine: Engine = None,
    config: ConfigFile = None,
    json: AsJson = False,
) -> None:
    """Show what was said to a worker and by it."""
    settings, one = configured(config, data=data, engine=engine), _split(worker)

    async def read(cursor: str | None) -> Transcript:
        return await _told(
            settings,
            _path(f"{_at(worker)}/transcript", {"limit": limit, "after": cursor}),
            Transcript,
            lambda them: them.transcript(*one, after=cursor, limit=limit),
        )

    cursor = after

    async def look() -> None:
        nonlocal cursor
        more = True
        while more:
            page = await read(cursor)
            for entry in page.data:
                _say(entry, json, entry.role, _text(entry.content))
            cursor, more = page.cursor, page.has_more and follow
            if page.has_more and not follow and not json:
                console.print(f"more: --after {cursor}", markup=False)

    async def hear(message: Message) -> bool:
        _, name, data = message
        if name == "retired":
            return False
        if name == "snapshot" or msgspec.json.decode(data, type=WorkerEventObject).added:
            await look()
        return True

    if not follow:
        asyncio.run(look())
        return
    at = _path(f"{_at(worker)}/events", {"stream": "true"})
    asyncio.run(following.follow(settings, look, lambda: at, hear))


@workers.command()
def verify(
    within: Annotated[
        str, typer.Argument(metavar="[RUNTIME[/WORKER]]", help="The runtime, or one worker.")
    ] = "",
    data: Data = None,
    engine: Engine = None,
    config: ConfigFile = None,
    json: AsJson = False,
) -> None:
    """Hold what is stored of workers against each other: counts, logs, projections, inputs,
    archives.

    Exits with 0 when all of it agrees and with 6 when it does not.
    """
    settings = configured(config, data=data, engine=engine)
    one = _split(within) if "/" in within else tuple(filter(None, (within,)))

    async def look() -> Verified:
        held = await holder(settings)
        if held is None:
            return await library.verify_workers(settings.engine_url, (DEFAULT_TENANT, *one))
        asked = dict(zip(("runtime_id", "worker_id"), one, strict=False))
        return await ask(held, _path("/control/workers/verify", asked), Verified, timeout_s=None)

    tell(asyncio.run(look()), json)


async def _told(
    settings: Config, path: str, type: type[T], look: Callable[[Workers], Awaitable[T]]
) -> T:
    """What the server that holds the store says, or else what is in it."""
    held = await holder(settings)
    if held is not None:
        return await ask(held, path, type)
    async with library.open(settings.engine_url, read_only=True) as state:
        return await look(state.workers)


def _say(one: WorkerEventObject | SaidObject, json: bool, what: str, about: str) -> None:
    """A line, at once, also into a pipe."""
    if json:
        typer.echo(msgspec.json.encode(one))
    else:
        typer.echo(f"{one.number:6}  {moment(one.at)}  {what:12}{about}".rstrip())


def _about(event: WorkerEventObject) -> str:
    said = (event.name, event.submission_id, event.reason)
    return "  ".join(("", *filter(None, said)))


def _text(content: Any) -> str:
    return f"  {content if isinstance(content, str) else msgspec.json.encode(content).decode()}"


def _split(worker: str) -> tuple[str, str]:
    runtime, slash, name = worker.partition("/")
    if not (runtime and slash and name):
        raise Invalid(f"{worker!r} names no worker. Say RUNTIME/WORKER, as `perdure workers ls`.")
    return runtime, name


def _at(worker: str) -> str:
    runtime, name = (quote(part, safe="") for part in _split(worker))
    return f"/v1/runtimes/{runtime}/workers/{name}"


def _path(path: str, asked: dict[str, Any]) -> str:
    return f"{path}?{urlencode({name: one for name, one in asked.items() if one is not None})}"
