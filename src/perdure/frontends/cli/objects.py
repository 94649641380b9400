"""`perdure responses|conversations|files|jobs`: find, look at, stop and remove what is stored.

They ask the running server over its control socket, so they see what its clients see.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Annotated, Any
from urllib.parse import quote, urlencode

import msgspec
import typer
from rich.filesize import decimal
from rich.markup import escape

from perdure.frontends.cli.options import AsJson, ConfigFile, Data, Engine, configured
from perdure.frontends.cli.output import console, moment, say_json, table, wide
from perdure.frontends.cli.store import ask, server

Id = Annotated[str, typer.Argument(help="Its id.")]
Limit = Annotated[int, typer.Option(min=1, max=100, help="Most to list.")]
After = Annotated[str | None, typer.Option(help="List after this id, the last one seen.")]

responses = typer.Typer(name="responses", help="Stored responses.", no_args_is_help=True)
conversations = typer.Typer(name="conversations", help="Conversations.", no_args_is_help=True)
files = typer.Typer(name="files", help="Files.", no_args_is_help=True)
jobs = typer.Typer(name="jobs", help="Work in the background.", no_args_is_help=True)


class Page(msgspec.Struct):
    """A page of the server's list. What cannot be read is in `damaged`."""

    data: list[dict[str, Any]]
    has_more: bool
    last_id: str | None
    damaged: list[dict[str, Any]] = []


@responses.command("ls")
def list_responses(
    status: Annotated[str | None, typer.Option(help="Only those in this status.")] = None,
    limit: Limit = 20,
    after: After = None,
    data: Data = None,
    engine: Engine = None,
    config: ConfigFile = None,
    json: AsJson = False,
) -> None:
    """List responses, the newest first."""
    path = _list("/v1/responses", limit=limit, after=after, status=status)
    found = _asked(path, Page, data=data, engine=engine, config=config)
    _show(
        found,
        json,
        ("id", "status", "created (UTC)", "model", "continues"),
        lambda one: (
            one["id"],
            one["status"],
            moment(one["created_at"]),
            one["model"],
            one.get("previous_response_id") or (one.get("conversation") or {}).get("id", ""),
        ),
    )


@conversations.command("ls")
def list_conversations(
    limit: Limit = 20,
    after: After = None,
    data: Data = None,
    engine: Engine = None,
    config: ConfigFile = None,
    json: AsJson = False,
) -> None:
    """List conversations, the newest first."""
    path = _list("/v1/conversations", limit=limit, after=after)
    found = _asked(path, Page, data=data, engine=engine, config=config)
    _show(
        found,
        json,
        ("id", "created (UTC)", "metadata"),
        lambda one: (
            one["id"],
            moment(one["created_at"]),
            ", ".join(f"{name}={value}" for name, value in one["metadata"].items()),
        ),
    )


@files.command("ls")
def list_files(
    purpose: Annotated[str | None, typer.Option(help="Only those of this purpose.")] = None,
    limit: Limit = 20,
    after: After = None,
    data: Data = None,
    engine: Engine = None,
    config: ConfigFile = None,
    json: AsJson = False,
) -> None:
    """List files, the newest first."""
    path = _list("/v1/files", limit=limit, after=after, purpose=purpose)
    found = _asked(path, Page, data=data, engine=engine, config=config)
    _show(
        found,
        json,
        ("id", "created (UTC)", "size", "purpose", "status", "name"),
        lambda one: (
            one["id"],
            moment(one["created_at"]),
            decimal(one["bytes"]),
            one["purpose"],
            one["status"],
            one["filename"],
        ),
    )


@jobs.command("ls")
def list_jobs(
    status: Annotated[str | None, typer.Option(help="Only those in this status.")] = None,
    kind: Annotated[str | None, typer.Option(help="Only those of this kind.")] = None,
    limit: Limit = 20,
    after: After = None,
    data: Data = None,
    engine: Engine = None,
    config: ConfigFile = None,
    json: AsJson = False,
) -> None:
    """List jobs, the newest first."""
    path = _list("/v1/jobs", limit=limit, after=after, status=status, kind=kind)
    found = _asked(path, Page, data=data, engine=engine, config=config)
    _show(
        found,
        json,
        ("id", "status", "created (UTC)", "attempt", "kind", "subject"),
        lambda one: (
            one["id"],
            one["status"],
            moment(one["created_at"]),
            f"{one['attempt']} of {one['attempts_max']}",
            one["kind"],
            one["subject"],
        ),
    )


def _verb(
    group: typer.Typer, verb: str, path: str, text: str, *, method: str = "GET", suffix: str = ""
) -> None:
    """A command about one object, which prints what the server answers."""

    def command(
        id: Id,
        data: Data = None,
        engine: Engine = None,
        config: ConfigFile = None,
        json: AsJson = False,
    ) -> None:
        target = f"{path}/{quote(id, safe='')}{suffix}"
        found: Any = _asked(target, Any, method=method, data=data, engine=engine, config=config)
        if json or method == "GET":
            say_json(found)
        else:
            console.print(f"{found['id']}: {found.get('status') or 'deleted'}", markup=False)

    command.__doc__ = text
    group.command(verb)(command)


_verb(responses, "show", "/v1/responses", "Show a response as it is stored.")
_verb(
    responses,
    "cancel",
    "/v1/responses",
    "Cancel a response that runs in the background.",
    method="POST",
    suffix="/cancel",
)
_verb(
    responses,
    "rm",
    "/v1/responses",
    "Delete a response, its input items and its events.",
    method="DELETE",
)
_verb(conversations, "show", "/v1/conversations", "Show a conversation.")
_verb(
    conversations,
    "rm",
    "/v1/conversations",
    "Delete a conversation; its responses stay.",
    method="DELETE",
)
_verb(files, "show", "/v1/files", "Show what is known of a file.")
_verb(files, "rm", "/v1/files", "Delete a file.", method="DELETE")
_verb(jobs, "show", "/v1/jobs", "Show a job with its attempts and events.")
_verb(
    jobs,
    "cancel",
    "/v1/jobs",
    "Cancel a job, and with it what it makes.",
    method="POST",
    suffix="/cancel",
)


def _list(path: str, **query: Any) -> str:
    asked = {name: value for name, value in query.items() if value is not None}
    return f"{path}?{urlencode(asked)}"


def _asked(path: str, type: Any, *, method: str = "GET", config: Any, **flags: Any) -> Any:
    settings = configured(config, **flags)

    async def asked() -> Any:
        return await ask(await server(settings), path, type, method=method)

    return asyncio.run(asked())


def _show(
    found: Page,
    json: bool,
    heads: tuple[str, ...],
    row: Callable[[dict[str, Any]], tuple[str, ...]],
) -> None:
    if json:
        say_json(found)
        return
    rows = table(*heads)
    for one in found.data:
        rows.add_row(*map(escape, row(one)))
    wide.print(rows)
    for finding in found.damaged:
        told = escape(f"{finding['where']}: {finding['why']}")
        console.print(f"[red]{finding['kind']}[/] {told}")
    if found.has_more:
        console.print(f"more: --after {found.last_id}", markup=False)
