"""Who is asked: the server that holds the store, over its control socket, else the store itself.

A store that a server holds is never opened beside it; one that nobody holds is opened to look
only: nothing is recovered, cut or recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import httpx
import msgspec

from perdure.core import errors
from perdure.core.disk import Disk
from perdure.core.errors import Missing, PerdureError, StoreLocked, Unavailable
from perdure.library import open as open_store
from perdure.services.config import Config

T = TypeVar("T")

_TIMEOUT_S = 5.0
_BY_STATUS: dict[int, type[PerdureError]] = {
    400: errors.Invalid,
    404: errors.Missing,
    409: errors.Conflict,
}


class Held(msgspec.Struct, frozen=True):
    """The server that holds the store."""

    pid: int
    control_socket: str


async def holder(config: Config) -> Held | None:
    """Who holds the configured store, None where nobody does. Raises `Missing` without a store."""
    if config.engine_url.startswith("memory:"):
        raise Missing(
            "memory:// keeps nothing outside the process that serves it. "
            "Ask that one over HTTP: /readyz, /v1/startup, /v1/state."
        )
    if config.engine_url.startswith("sqlite:///"):
        home = Path(config.engine_url.removeprefix("sqlite:///")).parent
        if not home.is_dir():
            raise Missing(
                f"there is no store in {home}. Name its directory with --data, "
                "or make one with `perdure serve`."
            )
    try:
        if config.shares_engine:
            _look_for_processes(config)
            return None
        async with open_store(config.engine_url, read_only=True):
            return None
    except StoreLocked as locked:
        if not locked.control_socket:
            raise
        return Held(locked.holder, locked.control_socket)


def _look_for_processes(config: Config) -> None:
    """Raises `StoreLocked` naming the first of the processes over this data directory."""
    number = 1
    while (lock := config.process_lock(number)).exists():
        Disk().lock(lock, shared=True).release()
        number += 1


async def server(config: Config) -> Held:
    """The server that holds the configured store. Raises `Unavailable` where none does."""
    held = await holder(config)
    if held is None:
        raise Unavailable(
            f"no server runs on {config.engine_shown}, and this is asked of a running one. "
            "Start it with `perdure serve`."
        )
    return held


async def ask(
    held: Held,
    path: str,
    type: type[T],
    *,
    method: str = "GET",
    timeout_s: float | None = _TIMEOUT_S,
) -> T:
    """One request over the control socket. Raises `Unavailable` where the holder does not answer,
    and what it refuses with."""
    transport = httpx.AsyncHTTPTransport(uds=held.control_socket, verify=False)
    async with httpx.AsyncClient(
        transport=transport, base_url="http://control", timeout=timeout_s
    ) as client:
        try:
            answer = await client.request(method, path)
        except httpx.HTTPError as error:
            raise Unavailable(
                f"process {held.pid} holds the store and does not answer at "
                f"{held.control_socket}: {error or error.__class__.__name__}. It may be starting "
                "or stopping; try again."
            ) from None
    if answer.status_code != 200:
        raise refused(held, answer.content, answer.status_code)
    found: T = _decode(held, answer.content, type)
    return found


class Progress(msgspec.Struct, tag="perdure.progress"):
    """How far long work is; see `frontends.http.operations`."""

    what: str
    done: int
    total: int


class _Done(msgspec.Struct, tag="perdure.done"):
    result: msgspec.Raw


class _Error(msgspec.Struct, tag="error"):
    message: str
    code: str | None


class _Refusal(msgspec.Struct):
    error: _Detail


class _Detail(msgspec.Struct):
    message: str
    code: str | None


async def work(
    held: Held, path: str, body: Any, type: type[T], progress: Callable[[str, int, int], None]
) -> T:
    """Have the server do long work: one POST over the control socket, answered by events. Raises
    what the server raised."""
    transport = httpx.AsyncHTTPTransport(uds=held.control_socket, verify=False)
    client = httpx.AsyncClient(transport=transport, base_url="http://control", timeout=None)
    try:
        async with client, client.stream("POST", path, content=msgspec.json.encode(body)) as answer:
            if answer.status_code != 200:
                raise refused(held, await answer.aread(), answer.status_code)
            async for line in answer.aiter_lines():
                if not line.startswith("data: "):
                    continue
                event = _decode(held, line[6:].encode(), Progress | _Done | _Error)
                if isinstance(event, Progress):
                    progress(event.what, event.done, event.total)
                elif isinstance(event, _Done):
                    result: T = _decode(held, bytes(event.result), type)
                    return result
                else:
                    raise _raised(event.code, event.message)
    except httpx.HTTPError as error:
        raise Unavailable(f"process {held.pid} stopped answering ({error}).") from None
    raise Unavailable(f"process {held.pid} stopped before it was done. Nothing was kept of it.")


def refused(held: Held, body: bytes, status: int) -> PerdureError:
    """What the server refused with."""
    refusal = _decode(held, body, _Refusal).error
    return _raised(refusal.code, refusal.message, status)


def _raised(code: str | None, message: str, status: int = 503) -> PerdureError:
    """The error that the server raised, as far as its code, or else the status of its answer,
    tells: the exit code follows from it."""
    known: dict[str, type[PerdureError]] = {
        kind.code: kind
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, PerdureError)
    }
    kind = known.get(code or "") or _BY_STATUS.get(status, Unavailable)
    error = kind.__new__(kind, message)
    error.args = (message,)
    return error


def _decode(held: Held, data: bytes, type: Any) -> Any:
    """What the server said, as `type`."""
    try:
        return msgspec.json.decode(data, type=type)
    except msgspec.MsgspecError as error:
        raise Unavailable(
            f"process {held.pid} answered what this version of perdure does not read: {error}. "
            "Ask it with the version it runs."
        ) from None
