"""A network that fails, between a client and a PostgreSQL: it cuts, delays, falls silent, and loses
the one answer that matters.

Faults that an engine must survive, each at a COMMIT or at any moment:
- the connection is cut before the server has the COMMIT: it never happened, and is tried again;
- it is cut after the server committed and before the client hears of it: it happened once;
- both sides stay connected and nothing arrives any more, so that only time tells; or it arrives
  when the network is back;
- everything is late;
- it is a pooler, and forgets what a client says of its session as it begins.

It understands no more of the protocol than that a COMMIT is a message which holds that word.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Literal

At = Literal["before", "after", "silence"]
"""What happens to a COMMIT: cut before it reaches the server, cut instead of its answer, or its
answer is held back, and everything after it, on a connection that stays."""

_PIECE_BYTES = 65_536
_STARTUP = (3 << 16).to_bytes(4, "big")


class Proxy:
    """Counts COMMITs, and does to the next of them what `faults` says, one after another. While it
    is `refusing`, nobody gets through; it begins to with a fault where `then_refuse`."""

    def __init__(self, target: Path) -> None:
        self.port = 0
        self.commits = 0
        self.faults: list[At | None] = []
        self.delay_s = 0.0
        self.refusing = False
        self.then_refuse = False
        self.forgetful = False
        self.passing = asyncio.Event()
        """Unset, everything is held back, and who connects hears nothing."""

        self.passing.set()
        self.target = target
        self._open: set[asyncio.StreamWriter] = set()

    def cut(self) -> None:
        """End every connection now, in both directions."""
        for writer in self._open:
            writer.transport.abort()

    async def serve(self, client: asyncio.StreamReader, answers: asyncio.StreamWriter) -> None:
        """Carry one connection until an end of it is gone."""
        if self.refusing:
            answers.transport.abort()
            return
        await self.passing.wait()
        server, asks = await asyncio.open_unix_connection(str(self.target))
        self._open |= {answers, asks}
        struck: list[At] = []
        carried = (
            asyncio.create_task(self._carry_questions(client, asks, struck)),
            asyncio.create_task(self._carry_answers(server, answers, struck)),
        )
        try:
            await asyncio.wait(carried, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in carried:
                task.cancel()
            await asyncio.wait(carried)
            for writer in (answers, asks):
                self._open.discard(writer)
                writer.transport.abort()

    async def _carry_questions(
        self, client: asyncio.StreamReader, asks: asyncio.StreamWriter, struck: list[At]
    ) -> None:
        with suppress(OSError):
            while piece := await client.read(_PIECE_BYTES):
                await asyncio.sleep(self.delay_s)
                await self.passing.wait()
                if self.forgetful and piece[4:8] == _STARTUP:
                    piece = _forgetting(piece)
                if b"COMMIT\0" in piece and (fault := self._fault()) is not None:
                    struck.append(fault)
                    if fault == "before":
                        return
                asks.write(piece)
                await asks.drain()

    def _fault(self) -> At | None:
        self.commits += 1
        if not self.faults:
            return None
        self.refusing |= self.then_refuse
        return self.faults.pop(0)

    async def _carry_answers(
        self, server: asyncio.StreamReader, answers: asyncio.StreamWriter, struck: list[At]
    ) -> None:
        with suppress(OSError):
            while piece := await server.read(_PIECE_BYTES):
                if "silence" in struck:
                    continue
                if struck:
                    return
                await self.passing.wait()
                answers.write(piece)
                await answers.drain()


def _forgetting(startup: bytes) -> bytes:
    """A startup message that says who wants what database, and nothing else."""
    words = startup[8:].split(b"\0")
    said = dict(zip(words[::2], words[1::2], strict=False))
    kept = b"".join(b"%s\0%s\0" % (name, said[name]) for name in (b"user", b"database"))
    return (len(kept) + 9).to_bytes(4, "big") + _STARTUP + kept + b"\0"


@asynccontextmanager
async def proxied(target: Path) -> AsyncIterator[Proxy]:
    """A proxy on a port of 127.0.0.1 to a server's socket."""
    proxy = Proxy(target)
    listener = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
    proxy.port = listener.sockets[0].getsockname()[1]
    try:
        yield proxy
    finally:
        proxy.cut()
        listener.close()
