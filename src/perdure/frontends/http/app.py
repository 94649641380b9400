"""The ASGI application: plain wrappers around a table of endpoints.

`Perimeter` numbers, times and records every request; `errors.Answered` turns errors into answers;
`Table` finds the path; `Endpoint` admits the caller, runs the handler of the method and sends what
it gives.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from starlette.routing import compile_path
from starlette.types import ASGIApp, Receive, Scope, Send

from perdure.core.clock import Clock
from perdure.frontends.http.call import CALL, Call, Download, EventStream, Principal
from perdure.frontends.http.errors import Answered, Forbidden, NoRoute, NotReady, WrongMethod
from perdure.frontends.http.journal import AccessLog
from perdure.frontends.http.metrics import RequestStats
from perdure.frontends.http.routes import Route, template
from perdure.frontends.http.sse import Streams

Match = Callable[[str], re.Match[str] | None]


class Gate(Protocol):
    """Decides who may call (see `limits`)."""

    @property
    def keyed(self) -> bool: ...

    def admit(self, call: Call) -> Principal: ...


class Context:
    """What endpoints share. `target` is handed to every handler; `not_ready` gives the reason why
    routes that need a ready server are refused now, or None."""

    def __init__(
        self,
        target: Any,
        gate: Gate,
        streams: Streams,
        clock: Clock,
        not_ready: Callable[[], str | None],
    ) -> None:
        self.target = target
        self.gate = gate
        self.streams = streams
        self.clock = clock
        self.not_ready = not_ready


class Perimeter:
    """The outermost layer: every request gets a number, is timed and is recorded."""

    def __init__(self, app: ASGIApp, stats: RequestStats, log: AccessLog, clock: Clock) -> None:
        self._app = app
        self._stats = stats
        self._log = log
        self._clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        began_s = self._clock.monotonic_s()
        call = scope[CALL] = Call(scope, receive, send, self._clock.new_id("req"))
        self._stats.active += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._stats.active -= 1
            duration_s = (call.answered_s or self._clock.monotonic_s()) - began_s
            self._stats.observe(scope["method"], call.template, call.status, duration_s)
            self._log.add(call, duration_s)


class Endpoint:
    """One path: its operations by method."""

    def __init__(self, template: str, routes: Sequence[Route], context: Context) -> None:
        self._template = template
        self._routes: dict[str, Route] = {route.method: route for route in routes}
        if "GET" in self._routes:
            self._routes["HEAD"] = self._routes["GET"]
        self._context = context

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        call: Call = scope[CALL]
        call.template = self._template
        route = self._routes.get(scope["method"])
        if route is None:
            raise WrongMethod(scope["method"], self._template, sorted(self._routes))
        context = self._context
        if route.access != "open":
            call.principal = context.gate.admit(call)
            if route.access == "operator" and not call.principal.operator:
                raise Forbidden("this is answered on the control socket only.")
        if route.needs_ready and (why := context.not_ready()) is not None:
            raise NotReady(why)
        given = await route.handler(context.target, call)
        if isinstance(given, EventStream):
            call.answered_s = context.clock.monotonic_s()
            await context.streams.serve(call, given)
        elif isinstance(given, Download):
            call.answered_s = context.clock.monotonic_s()
            await call.download(given)
        else:
            await call.reply(given)


class Table:
    """Finds the endpoint of a path: by its first two segments, then by Starlette's patterns. A
    router that tries every route in turn would be the dearest part of a small request."""

    def __init__(self, routes: Sequence[Route], context: Context) -> None:
        paths: dict[str, list[Route]] = {}
        for route in routes:
            paths.setdefault(route.path, []).append(route)
        self._groups: dict[tuple[str, ...], list[tuple[Match, Endpoint]]] = {}
        for path, own in paths.items():
            endpoint = Endpoint(template(path), own, context)
            group = self._groups.setdefault(_group(path), [])
            group.append((compile_path(path)[0].match, endpoint))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path: str = scope["path"]
        for match, endpoint in self._groups.get(_group(path), ()):
            if (found := match(path)) is not None:
                scope["path_params"] = found.groupdict()
                return await endpoint(scope, receive, send)
        raise NoRoute(f"Invalid URL ({scope['method']} {path[:200]}).")


def _group(path: str) -> tuple[str, ...]:
    return tuple(path.split("/", 3)[1:3])


def routed(routes: Sequence[Route], context: Context) -> ASGIApp:
    """The application over a table of routes; of two that fit a path the first counts."""
    return Answered(Table(routes, context))
