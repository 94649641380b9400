"""Who is asked: the server that holds the store, over its control socket, else the store itself.

A store that a server holds is never opened beside it; one that nobody holds is opened to look
only: nothing is recovered, cut or recorded.
"""

from __future__ import annotations

from typing import TypeVar

import httpx
import msgspec

from perdure.core.errors import Missing, StoreLocked, Unavailable
from perdure.library import open as open_store
from perdure.services.config import Config

T = TypeVar("T")

_TIMEOUT_S = 5.0


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
    if config.engine_url.startswith("sqlite:") and not config.data_path.is_dir():
        raise Missing(
            f"there is no store in {config.data_path}. Name its directory with --data, "
            "or make one with `perdure serve`."
        )
    try:
        async with open_store(config.engine_url, read_only=True):
            return None
    except StoreLocked as locked:
        if not locked.control_socket:
            raise
        return Held(locked.holder, locked.control_socket)


async def ask(held: Held, path: str, type: type[T], *, timeout_s: float | None = _TIMEOUT_S) -> T:
    """One GET over the control socket. Raises `Unavailable` where the holder does not answer."""
    transport = httpx.AsyncHTTPTransport(uds=held.control_socket)
    async with httpx.AsyncClient(
        transport=transport, base_url="http://control", timeout=timeout_s
    ) as client:
        try:
            answer = await client.get(path)
        except httpx.HTTPError as error:
            raise Unavailable(
                f"process {held.pid} holds the store and does not answer at "
                f"{held.control_socket}: {error or error.__class__.__name__}. It may be starting "
                "or stopping; try again."
            ) from None
    if answer.status_code != 200:
        raise Unavailable(f"process {held.pid} answered {answer.status_code}: {answer.text[:500]}")
    try:
        return msgspec.json.decode(answer.content, type=type)
    except msgspec.MsgspecError as error:
        raise Unavailable(
            f"process {held.pid} answered what this version of perdure does not read: {error}. "
            "Ask it with the version it runs."
        ) from None
