"""An engine whose commits fail as planned.

Every durable edge above an engine is a commit (moving rows is one too), so counting commits
enumerates them all: run once without faults, read `commits`, then run again with a fault before
and after each number. What an action does is up to it: kill the process, raise, hang, or call back
and let the commit go on.

Unknown outcomes are the same two edges: the error comes after the commit was done, or instead.
"""

from __future__ import annotations

import asyncio
import enum
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

import msgspec

from perdure.core.batch import NOTHING, Batch
from perdure.core.engine import Engine
from perdure.core.errors import CommitUnknown, PerdureError
from perdure.core.rows import Row
from perdure.core.values import Committed
from perdure.engines.wrapping import Wrapping

Action = Callable[[], Awaitable[None]]


class Edge(enum.Enum):
    """Which side of a commit: before it was handed on, or after it was done and unanswered."""

    BEFORE = "before"
    AFTER = "after"


class Fault(msgspec.Struct, frozen=True):
    """Run `action` at one edge of commit number `at`, counted from 1; of every commit if None."""

    edge: Edge
    action: Action
    at: int | None = None


class Failing(Wrapping):
    """Counts commits that are not empty, in the order they arrive, and runs the faults planned."""

    def __init__(self, engine: Engine, faults: Sequence[Fault] = ()) -> None:
        super().__init__(engine)
        self.faults = list(faults)
        self.commits = 0

    async def commit(self, batch: Batch) -> Committed:
        if not batch:
            return await super().commit(batch)
        async with self._edges():
            return await super().commit(batch)

    async def load(
        self, rows: Sequence[Row], *, complete: bool = False, under: Batch = NOTHING
    ) -> None:
        async with self._edges():
            await super().load(rows, complete=complete, under=under)

    async def unload(self, rows: Sequence[Row], *, under: Batch = NOTHING) -> None:
        async with self._edges():
            await super().unload(rows, under=under)

    @asynccontextmanager
    async def _edges(self) -> AsyncIterator[None]:
        self.commits += 1
        number = self.commits
        await self._reach(Edge.BEFORE, number)
        yield
        await self._reach(Edge.AFTER, number)

    async def _reach(self, edge: Edge, number: int) -> None:
        for fault in tuple(self.faults):
            if fault.edge is edge and fault.at in (None, number):
                await fault.action()


def raising(error: PerdureError) -> Action:
    """Raise `error`."""

    async def act() -> None:
        raise error

    return act


def killing() -> Action:
    """Kill this process as the operating system would: nothing is flushed, nobody is told."""

    async def act() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    return act


def hanging() -> Action:
    """Never go on."""

    async def act() -> None:
        await asyncio.Event().wait()

    return act


def unknown_committed(at: int | None = None) -> Fault:
    """The answer of a commit is lost: it is there."""
    return Fault(Edge.AFTER, raising(CommitUnknown("the answer to the commit was lost.")), at)


def unknown_lost(at: int | None = None) -> Fault:
    """The commit itself is lost on the way: it is not there."""
    return Fault(Edge.BEFORE, raising(CommitUnknown("the answer to the commit was lost.")), at)
