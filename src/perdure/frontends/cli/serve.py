"""`perdure serve`: run the server, or several behind one port, until they are told to stop."""

from __future__ import annotations

import asyncio
import logging
import resource
import socket
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import msgspec
import structlog
import typer
import uvloop
from structlog.typing import EventDict

from perdure import __version__
from perdure.frontends.cli.options import ConfigFile, Data, Engine, configured
from perdure.frontends.cli.output import complaints, console, recovered, seconds
from perdure.frontends.http.crew import READY, Crew
from perdure.frontends.http.errors import places
from perdure.frontends.http.server import bind, url_of
from perdure.frontends.http.server import serve as run_server
from perdure.services.config import Config
from perdure.services.lifecycle import Node
from perdure.services.neighbours import neighbours

_FILES_BESIDE = 256
"""Files open beside those of connections: the store's, the log's, the upstream's."""


def serve(
    data: Data = None,
    engine: Engine = None,
    host: Annotated[
        str | None, typer.Option(help="Address to listen on. [default: 127.0.0.1]")
    ] = None,
    port: Annotated[
        int | None, typer.Option(help="Port to listen on, 0 for any. [default: 8420]")
    ] = None,
    upstream: Annotated[
        str | None, typer.Option(help="OpenAI-compatible server that generates, up to /v1.")
    ] = None,
    upstream_key_env: Annotated[
        str | None, typer.Option(help="Environment variable that holds the upstream's key.")
    ] = None,
    upstream_continues: Annotated[
        str | None, typer.Option(help="How the upstream goes on with half a message. [default: no]")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Processes behind the port, on a shared engine. [default: 1]")
    ] = None,
    config: ConfigFile = None,
    inherited: Annotated[tuple[int, int] | None, typer.Option(hidden=True)] = None,
) -> None:
    """Serve the OpenAI-compatible API, durably."""
    settings = configured(
        config,
        data=data,
        engine=engine,
        host=host,
        port=port,
        workers=workers,
        upstream__url=upstream,
        upstream__key_env=upstream_key_env,
        upstream__continues=upstream_continues,
    )
    _configure_logs()
    if inherited is None and settings.workers > 1:
        if code := asyncio.run(_lead(settings)):
            raise typer.Exit(code)
        console.print("stopped")
        return
    settings = _within_files(settings)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        if inherited is not None:
            runner.run(_work(settings, *map(_owned, inherited)))
            return
        runner.run(run_server(settings, ready=_say_ready))
    console.print("stopped")


async def _lead(settings: Config) -> int:
    """Be the parent of workers; the code to end with."""
    listening = await bind(settings)
    url = url_of(settings, listening)
    command = (sys.executable, "-m", "perdure.frontends.cli.main", *sys.argv[1:])

    async def ready(pids: Sequence[int]) -> None:
        _say_where(settings, url)
        console.print(f"  workers   {len(pids)}: processes {', '.join(map(str, pids))}")
        await _say_try(settings, url)

    with listening:
        return await Crew(command, listening, settings.workers, ready).run()


async def _work(settings: Config, listening: socket.socket, parent: socket.socket) -> None:
    """Be one of several servers, and tell the parent once it is ready."""

    async def ready(node: Node, url: str) -> None:
        _say_boot(node, f"worker    {node.boot.pid}, boot")
        parent.sendall(READY)

    with parent:
        await run_server(settings, ready=ready, inherited=(listening, parent))


def _owned(descriptor: int) -> socket.socket:
    """An inherited socket, which goes no further: what this process starts does not get it."""
    owned = socket.socket(fileno=descriptor)
    owned.set_inheritable(False)
    return owned


def _within_files(settings: Config) -> Config:
    """Let this process open a file for every connection it may have, as far as the system does.
    Where that is not far enough, connections are capped below it: they are refused by name while
    the store can still open what it needs."""
    allowed = settings.limits.connections_max
    wanted = allowed + _FILES_BESIDE
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    if most == wanted:
        return settings
    cap = max(most // 2, most - _FILES_BESIDE)
    complaints.print(
        f"[yellow]warning[/] this process may open {most} files, and limits.connections_max = "
        f"{allowed} needs {wanted}: connections beyond {cap} are refused. Raise `ulimit -n`."
    )
    limits = msgspec.structs.replace(settings.limits, connections_max=cap)
    return msgspec.structs.replace(settings, limits=limits)


class _JsonLines(logging.Formatter):
    """Lines of libraries in the form of our own; without tracebacks, which may quote a user."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "event": record.getMessage(),
            "level": record.levelname.lower(),
            "logger": record.name,
        }
        return msgspec.json.encode(line).decode()


def _without_words(logger: Any, method: str, event: EventDict) -> EventDict:
    """An exception as its type and places: its message may quote what a user wrote."""
    if event.pop("exc_info", None) and (error := sys.exc_info()[1]) is not None:
        event["error"], event["at"] = type(error).__name__, places(error)
    return event


def _configure_logs() -> None:
    """Everything the server has to say goes to standard error, a JSON line each."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonLines())
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            _without_words,
            structlog.processors.JSONRenderer(),
        ],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )


async def _say_ready(node: Node, url: str) -> None:
    """Where it listens, where its data is, what was recovered, and what to try."""
    _say_where(node.config, url)
    _say_boot(node, "boot     ")
    await _say_try(node.config, url)


def _say_where(config: Config, url: str) -> None:
    console.print(f"[bold]perdure {__version__}[/] listening on [bold]{url}[/]")
    console.print(f"  data      {config.engine_shown}")
    if not config.engine_url.startswith("memory:"):
        console.print(f"            in {config.data_path.absolute()}")


def _say_boot(node: Node, what: str) -> None:
    boot = node.boot
    before = {None: "first start here", True: "the last one ended clean"}.get(
        boot.previous_ended_clean, "the last one did not end clean"
    )
    console.print(f"  {what} {boot.number} ({before}), ready in {seconds(node.startup.duration_s)}")
    for found in node.startup.recovery:
        if told := recovered(found):
            console.print(f"  recovered {found.surface}: {told}")
    for warning in node.warnings:
        console.print(f"  [yellow]warning[/]   {warning}")


async def _say_try(config: Config, url: str) -> None:
    upstreams = config.every_upstream
    for one in upstreams:
        console.print(f"  upstream  {one.url}" + (f" ({one.name})" if len(upstreams) > 1 else ""))
    if not upstreams:
        console.print("  upstream  none; the built-in perdure-extract quotes, see --upstream")
    model = "MODEL" if upstreams else "perdure-extract"
    console.print(
        f"""  try       curl {url}/v1/responses -H 'content-type: application/json' \\
              -d '{{"model": "{model}", "input": "Hello"}}'""",
        markup=False,
    )
    if not upstreams:
        for server in await neighbours():
            models = f"{server.models} models, perhaps {server.usually}"
            console.print(f"  found     a model server ({models}): --upstream {server.url}")
