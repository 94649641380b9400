"""The server: one process, one event loop, two listeners (a TCP port and a control socket). Where
it is one of several behind a port (see `crew`), it inherits that port and knows its parent.

It listens before the store is open, so that `/livez` and `/v1/startup` are true from the first
moment. It stops in this order: stop accepting, let requests and runs end within a bound, end the
streams, close the node, which marks the boot clean. A second signal skips what is left to wait for.
"""

from __future__ import annotations

import asyncio
import errno
import gc
import math
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from pathlib import Path

import structlog
import uvicorn
from starlette.types import ASGIApp

from perdure.core.clock import Clock, SystemClock
from perdure.core.disk import Disk, translated
from perdure.core.engine import Engine
from perdure.core.errors import Unavailable
from perdure.core.offload import off_loop_to_write
from perdure.frontends.http import (
    chat,
    conversations,
    files,
    jobs,
    models,
    operations,
    responses,
    uploads,
    workers,
)
from perdure.frontends.http.app import Context, Gate, Perimeter, routed
from perdure.frontends.http.exposed import exposition
from perdure.frontends.http.journal import AccessLog
from perdure.frontends.http.limits import Admission, Trusted
from perdure.frontends.http.openapi import document
from perdure.frontends.http.protocol import bounded
from perdure.frontends.http.routes import Route
from perdure.frontends.http.service import Service
from perdure.library import open as open_store
from perdure.services.config import Config, api_keys
from perdure.services.fleet import taken_for_dead
from perdure.services.lifecycle import Control, Node

ROUTES = (
    *conversations.ROUTES,
    *responses.ROUTES,
    *files.ROUTES,
    *uploads.ROUTES,
    *chat.ROUTES,
    *models.ROUTES,
    *jobs.ROUTES,
    *workers.ROUTES,
    *operations.ROUTES,
)
"""The table, hot paths first."""

LAST_EVENTS_S = 1.0
"""How long streams may take, at a stop, to send what the drain has just written."""

CONTROL_SOCKET = "control.sock"
_SOCKET_PATH_BYTES_MAX = 100
_BACKLOG = 2048
_SIGNALS = (signal.SIGTERM, signal.SIGINT)

_log = structlog.get_logger("perdure.http")


class PortTaken(Unavailable):
    """Something else listens where this server was told to."""

    code = "port_taken"


class Application:
    """A service and the ASGI applications over it: the public one and the operator's."""

    def __init__(
        self, node: Node, environment: Mapping[str, str], clock: Clock, log: AccessLog
    ) -> None:
        self.service = Service(node)
        self.log = log
        limits = node.config.limits
        admission = Admission(
            api_keys(node.config, environment),
            per_minute=limits.requests_per_minute,
            burst=limits.burst,
            clock=clock,
            stored_keys=node.config.access.stored_keys(environment),
            store_always=node.config.access.store == "always",
        )
        self.service.exposition = exposition(self.service)
        self.service.openapi = document(ROUTES, keyed=admission.keyed)
        self._clock = clock
        self.public = self._over(admission, ROUTES)
        self.control = self._over(Trusted(), (*operations.CONTROL_ROUTES, *ROUTES))

    def _over(self, gate: Gate, routes: tuple[Route, ...]) -> ASGIApp:
        service = self.service
        context = Context(service, gate, service.streams, self._clock, service.not_ready)
        return Perimeter(routed(routes, context), service.requests, self.log, self._clock)


class Listener(uvicorn.Server):
    """uvicorn's server without its signal handling, which says when it listens."""

    def __init__(self, app: ASGIApp, service: Service, log: AccessLog) -> None:
        limits = service.limits
        super().__init__(
            uvicorn.Config(
                app,
                http=bounded(limits, service.connections, log),
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,  # nobody here asks where a request says it came from
                backlog=_BACKLOG,
                timeout_keep_alive=max(1, int(limits.idle_timeout_s)),
                timeout_graceful_shutdown=math.ceil(limits.drain_s + LAST_EVENTS_S) + 1,
            )
        )
        self.listening = asyncio.Event()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()


class Stop:
    """The signals that end a server: the first asks, the second hurries, the third kills. The end
    of its `parent` asks too."""

    def __init__(self, parent: socket.socket | None = None) -> None:
        self.asked = asyncio.Event()
        self.hurried = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            self._loop.add_signal_handler(number, self._take)
        if parent is not None:
            self._loop.add_reader(parent, self._orphaned, parent)

    def _orphaned(self, parent: socket.socket) -> None:
        """Nothing is ever sent by it: this is the end of what it was to be sent on."""
        self._loop.remove_reader(parent)
        _log.warning("the parent process is gone, and this one follows")
        self.asked.set()

    def _take(self) -> None:
        if not self.asked.is_set():
            self.asked.set()
            return
        self.hurried.set()
        for number in _SIGNALS:
            self._loop.remove_signal_handler(number)


async def _say_nothing(node: Node, url: str) -> None:
    pass


async def serve(
    config: Config,
    *,
    environment: Mapping[str, str] = os.environ,
    ready: Callable[[Node, str], Coroutine[None, None, None]] = _say_nothing,
    wrap: Callable[[Engine], Engine] = lambda engine: engine,
    around: Callable[[ASGIApp], ASGIApp] = lambda app: app,
    disk: Disk | None = None,
    clock: Clock | None = None,
    inherited: tuple[socket.socket, socket.socket] | None = None,
) -> None:
    """Serve until a signal asks to stop. `ready` runs once, with the node and its URL. A test
    may put a wrapper around the engine (`wrap`) and the public application (`around`). What is
    `inherited` is the socket to listen on and the one that ends with the parent: then the port is
    answered by others until this server is ready.

    Raises what makes serving impossible, in the six kinds; then nothing is left behind.
    """
    stop = Stop(inherited[1] if inherited else None)
    clock, disk = clock or SystemClock(), disk or Disk()
    listening = inherited[0] if inherited else await bind(config)
    url = url_of(config, listening)
    node = Node(config, environment=environment, clock=clock, disk=disk, wrap=wrap, url=url)
    log = AccessLog(sys.stderr.buffer if config.log_requests else None, clock)
    application = Application(node, environment, clock, log)
    public = Listener(around(application.public), application.service, log)
    welcome = asyncio.Event()
    if inherited is None:
        welcome.set()
    serving = asyncio.create_task(_listen(public, listening, welcome))
    control = ControlSocket(config, disk)
    try:
        if welcome.is_set():
            await public.listening.wait()
        await _open(node, partial(control.answering, application), stop)
        if node.opened:
            welcome.set()
            await public.listening.wait()
            gc.freeze()  # what starting made stays: collections look at requests alone
            telling = asyncio.create_task(ready(node, url))
            asked = asyncio.create_task(stop.asked.wait())
            lost = asyncio.create_task(node.fleet.lost.wait())
            await asyncio.wait((asked, serving, lost), return_when=asyncio.FIRST_COMPLETED)
            for task in (telling, asked, lost):
                task.cancel()
            if node.fleet.lost.is_set():
                stop.hurried.set()
                raise taken_for_dead()
    finally:
        await _wind_down(node, public, application.service, stop)
        welcome.set()
        await serving
        await node.close()
        log.flush()


async def _listen(public: Listener, listening: socket.socket, welcome: asyncio.Event) -> None:
    await welcome.wait()
    if not public.should_exit:
        await public.serve(sockets=[listening])


async def _open(node: Node, control: Control, stop: Stop) -> None:
    """Open the node; a signal gives up on it."""
    opening = asyncio.create_task(node.open(control))
    asked = asyncio.create_task(stop.asked.wait())
    try:
        await asyncio.wait((opening, asked), return_when=asyncio.FIRST_COMPLETED)
        if not opening.done():
            opening.cancel()
        with suppress(asyncio.CancelledError):
            await opening
    finally:
        asked.cancel()


async def _wind_down(node: Node, public: Listener, service: Service, stop: Stop) -> None:
    """Stop accepting; give what is under way its time, or until somebody hurries."""
    public.should_exit = True
    draining = asyncio.create_task(node.drain(node.config.limits.drain_s))
    hurried = asyncio.create_task(stop.hurried.wait())
    await asyncio.wait((draining, hurried), return_when=asyncio.FIRST_COMPLETED)
    public.force_exit = stop.hurried.is_set()
    draining.cancel()
    hurried.cancel()
    await asyncio.wait((draining, hurried))
    await service.streams.end(0 if stop.hurried.is_set() else LAST_EVENTS_S)
    if not draining.cancelled():
        draining.result()


@asynccontextmanager
async def _served(application: Application, listening: socket.socket) -> AsyncIterator[None]:
    listener = Listener(application.control, application.service, application.log)
    serving = asyncio.create_task(listener.serve(sockets=[listening]))
    try:
        await listener.listening.wait()
        yield
    finally:
        listener.should_exit = listener.force_exit = True
        await serving


class ControlSocket:
    """The operator's listener: a Unix socket that only this user can open, beside the data, or in
    a private temporary directory where that path would be too long for a socket."""

    def __init__(self, config: Config, disk: Disk) -> None:
        self._directory = config.data_path.absolute()
        self._disk = disk
        self._exists = not config.engine_url.startswith("memory:")

    @asynccontextmanager
    async def answering(self, application: Application, apart: str) -> AsyncIterator[str]:
        """Listen, and leave nothing behind. A lock is held all the while, the store's or the one of
        this process's place beside others, so what lies at the path before is a dead server's.
        Raises `Unavailable`."""
        if not self._exists:
            yield ""
            return
        path, private = self._directory / f"{CONTROL_SOCKET}{apart}", None
        if len(os.fsencode(path)) > _SOCKET_PATH_BYTES_MAX:
            with translated(path):
                private = self._disk.private_directory()
            path = private / CONTROL_SOCKET
        try:
            await off_loop_to_write(self._make_room, path)
            async with _served(application, self._bound(path)):
                yield str(path)
        finally:
            self._remove(path, private)

    def _make_room(self, path: Path) -> None:
        with translated(path):
            self._disk.make_directory(path.parent)
            self._disk.remove(path)

    def _bound(self, path: Path) -> socket.socket:
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        before = os.umask(0o177)
        try:
            with translated(path):
                listening.bind(str(path))
        except Unavailable:
            listening.close()
            raise
        finally:
            os.umask(before)
        return listening

    def _remove(self, path: Path, private: Path | None) -> None:
        """What cannot be removed is by the next server, and keeps this one from nothing."""
        try:
            with translated(path):
                self._disk.remove(path)
                if private is not None:
                    self._disk.remove_directory(private)
        except Unavailable as error:
            _log.error("the control socket could not be removed", error=str(error))


async def bind(config: Config) -> socket.socket:
    """A socket bound to the configured address. Where the port is taken by a server of the same
    data, that is what the error says."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise Unavailable(f"the host {config.host} is not an address here: {error}.") from None
    listening = socket.socket(family, kind, protocol)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind(address)
    except OSError as error:
        listening.close()
        if error.errno == errno.EADDRINUSE and config.engine_url.startswith("sqlite:"):
            await _say_if_locked(config)
        raise PortTaken(
            f"cannot listen on {config.host}:{config.port}: {error.strerror}. "
            "Choose another with --port, or stop what uses it."
        ) from None
    return listening


async def _say_if_locked(config: Config) -> None:
    """Raises `StoreLocked` where another process holds the store."""
    if config.data_path.is_dir():
        async with open_store(config.engine_url, read_only=True):
            pass


def url_of(config: Config, listening: socket.socket) -> str:
    """How a server is reached that listens there."""
    host, port = config.host, listening.getsockname()[1]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
