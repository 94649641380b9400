"""Following what a store is told, through one process that holds it after another.

Invariant: what is told comes behind a cursor, from a server's stream or from the store itself, and
the cursor goes on only with what was told. So nothing is told twice or left out, whoever
stops, dies or comes meanwhile.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing

import httpx
from rich.markup import escape

from perdure.core.clock import SystemClock
from perdure.core.errors import Unavailable
from perdure.frontends.cli.output import complaints
from perdure.frontends.cli.store import Held, holder, refused
from perdure.library import lock_file
from perdure.services.config import Config

_LOOKS_APART_S = 0.5

Message = tuple[str, str, bytes]
"""The cursor behind it, its name, and its data."""


async def follow(
    config: Config,
    look: Callable[[], Awaitable[None]],
    path: Callable[[], str],
    hear: Callable[[Message], Awaitable[bool]],
) -> None:
    """Have `look` tell what there is, then let `hear` what the stream at `path` brings, until that
    returns False; and so again with whoever holds the store next. A store that nobody holds is
    looked at once."""
    clock, seen, said = SystemClock(), "", ""
    while True:
        owner = _owner(config)
        try:
            if owner != seen or not owner:
                await look()
                held = await holder(config)
                seen = "" if held else owner
                if held is not None:
                    async with aclosing(_stream(held, path())) as messages:
                        async for message in messages:
                            if not await hear(message):
                                return
            why = f"no server runs on {config.engine_shown}; waiting for one."
        except Unavailable as gone:
            why = f"{gone} Waiting for the next."
        if why != said:
            complaints.print(f"[dim]{escape(why)}[/]")
            said = why
        await clock.sleep(_LOOKS_APART_S)


def _owner(config: Config) -> str:
    """What changes whenever another process takes a local store; nothing for one that others may
    write to whom this host does not see."""
    lock = lock_file(config.engine_url)
    return f"{lock.stat().st_mtime_ns} {lock.read_text()}" if lock and lock.exists() else ""


async def _stream(held: Held, path: str) -> AsyncGenerator[Message, None]:
    """What a stream of the server tells, as it comes. Raises what it refuses with, and
    `Unavailable` where it stops."""
    transport = httpx.AsyncHTTPTransport(uds=held.control_socket, verify=False)
    client = httpx.AsyncClient(transport=transport, base_url="http://control", timeout=None)
    try:
        async with client, client.stream("GET", path) as answer:
            if answer.status_code != 200:
                raise refused(held, await answer.aread(), answer.status_code)
            fields: dict[str, str] = {}
            async for line in answer.aiter_lines():
                name, _, value = line.partition(": ")
                if name in ("id", "event", "data"):
                    fields[name] = value
                elif not line and fields:
                    if "id" not in fields:
                        raise refused(held, fields["data"].encode(), 503)
                    yield fields["id"], fields["event"], fields["data"].encode()
                    fields = {}
    except httpx.HTTPError as error:
        raise Unavailable(f"process {held.pid} stopped answering ({error}).") from None
    raise Unavailable(f"process {held.pid} ended the stream.")
