"""The threads of a SQLite engine one at a time, so that what they do has one order in every run.

Its committer takes what waits in a queue, and which batches share a group is decided by who is
faster; so is what a checkpoint in the background falls between. Here both are decided by whoever
asks for a `turn`, and nothing else of the engine is changed.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

from perdure.engines import sqlite_checkpoint, sqlite_commit
from perdure.proving.waiting import TooLate

_TURN_S = 60.0


class Paced(queue.SimpleQueue[Any]):
    """The queue that a thread waits at. What is put there is held back until it has a turn."""

    def __init__(self) -> None:
        self.held: list[Any] = []
        self._paced = True
        self._idle = threading.Event()

    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        if self._paced:
            self.held.append(item)
        else:
            super().put(item)

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        if self.empty():
            self._idle.set()
        return super().get(block, timeout)

    async def turn(self) -> None:
        """Let the thread take what is held back, all at once, and wait until it wants more."""
        await self._rest()
        self._idle.clear()
        self._give()
        await self._rest()

    def let_go(self) -> None:
        """From now on the thread takes what comes when it comes."""
        self._paced = False
        self._give()

    def _give(self) -> None:
        held, self.held = self.held, []
        for item in held:
            super().put(item)

    async def _rest(self) -> None:
        if not await asyncio.to_thread(self._idle.wait, _TURN_S):
            raise TooLate(f"a thread of the engine was not done within {_TURN_S:g} s")


@contextmanager
def paced() -> Iterator[tuple[Paced, Paced]]:
    """An engine opened in here waits for turns: the queues of its committer and checkpointer."""
    requests, steps = Paced(), Paced()
    with _queue_of(sqlite_commit, requests), _queue_of(sqlite_checkpoint, steps):
        yield requests, steps


@contextmanager
def _queue_of(module: ModuleType, paced: Paced) -> Iterator[None]:
    names = vars(module)
    names["queue"] = SimpleNamespace(SimpleQueue=lambda: paced, Empty=queue.Empty)
    try:
        yield
    finally:
        names["queue"] = queue
