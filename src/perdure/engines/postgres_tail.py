"""Whoever waits for the next entry of a stream, and how they learn of it.

A commit of this process wakes them at once. One of another process sends a notification after it,
which is a hint and may be lost; so the streams that are waited for are looked at now and then, all
of them in one question. Whoever is woken by that looks for themselves.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from contextlib import ExitStack
from typing import TYPE_CHECKING

import asyncpg
import xxhash

from perdure.core.deciding import Place
from perdure.core.errors import PerdureError
from perdure.core.values import Tip
from perdure.engines.postgres_driver import DRIVER_ERRORS, SQL, Database

if TYPE_CHECKING:
    from perdure.engines.postgres_driver import Connection, Session


POLL_S = 0.5
_HINTS_MAX = 200
_ALL = "*"

Waiter = asyncio.Future[Tip | None]


class Tails:
    """The waiters of one engine, each with the number it has read up to."""

    def __init__(self, database: Database, store_id: str) -> None:
        self._database = database
        self._channel = f"perdure_{xxhash.xxh3_64_hexdigest(store_id.encode())}"
        self._waiting: dict[Place, dict[Waiter, int]] = defaultdict(dict)
        self._hinted = asyncio.Event()
        self._untold: set[str] = set()
        self._poller: asyncio.Task[None] | None = None
        self._teller: asyncio.Task[None] | None = None
        self._closed = False

    def join(self, place: Place, after: int) -> Waiter:
        """A future that is resolved once there is something behind `after`, to the tip where it is
        known."""
        waiter: Waiter = asyncio.get_running_loop().create_future()
        self._waiting[place][waiter] = after
        if (self._poller is None or self._poller.done()) and not self._closed:
            self._poller = asyncio.create_task(self._poll(), name="perdure-tail")
        return waiter

    def leave(self, place: Place, waiter: Waiter) -> None:
        """Wait no longer."""
        waiting = self._waiting.get(place, {})
        waiting.pop(waiter, None)
        if not waiting:
            self._waiting.pop(place, None)

    def wake(self, tips: dict[Place, Tip]) -> None:
        """Commits of ours moved these tips: wake who waits here, and tell the others."""
        for place, tip in tips.items():
            self._resolve(place, tip.last, tip)
        if tips and not self._closed:
            self._untold.update(map(_hint, tips))
            if self._teller is None or self._teller.done():
                self._teller = asyncio.create_task(self._tell(), name="perdure-tell")

    async def close(self) -> None:
        """Let everybody go, who will find the engine closed."""
        self._closed = True
        for waiting in self._waiting.values():
            for waiter in waiting:
                if not waiter.done():
                    waiter.set_result(None)
        for task in (self._poller, self._teller):
            if task is not None:
                task.cancel()
                await asyncio.wait((task,))

    def _resolve(self, place: Place, last: int, tip: Tip | None) -> None:
        for waiter, after in self._waiting.get(place, {}).items():
            if last > after and not waiter.done():
                waiter.set_result(tip)

    async def _tell(self) -> None:
        """Send what was committed meanwhile as one hint, until nothing is left."""
        while self._untold:
            text = " ".join(self._untold) if len(self._untold) <= _HINTS_MAX else _ALL
            self._untold.clear()

            async def send(session: Session, text: str = text) -> str:
                return await session.execute(SQL["notify"], self._channel, text)

            try:
                await self._database.read(send)
            except PerdureError:
                return  # who waits elsewhere looks now and then

    async def _poll(self) -> None:
        """Look at every stream that is waited for, when a hint comes and every `POLL_S`."""
        session: Connection | None = None
        try:
            while True:
                if session is None or session.is_closed():
                    session = await self._listen()
                await self._look()
                try:
                    await asyncio.wait_for(self._hinted.wait(), POLL_S)
                    self._hinted.clear()
                except TimeoutError:
                    continue
        finally:
            if session is not None:
                session.terminate()

    async def _listen(self) -> Connection | None:
        try:
            session = await self._database.connect()
            with ExitStack() as undo:
                undo.callback(session.terminate)
                await session.add_listener(self._channel, lambda *told: self._heard(str(told[-1])))
                undo.pop_all()
        except DRIVER_ERRORS:
            return None  # looking now and then does without
        return session

    def _heard(self, text: str) -> None:
        hints = set(text.split(" "))
        if _ALL in hints or any(_hint(place) in hints for place in self._waiting):
            self._hinted.set()

    async def _look(self) -> None:
        """Wake who waits for a stream that has moved on."""
        places = [place for place, waiting in self._waiting.items() if waiting]
        if not places:
            return

        async def ask(session: Session) -> list[asyncpg.Record]:
            return await session.fetch(SQL["tips_of"], *map(list, zip(*places, strict=True)))

        try:
            found = await self._database.read(ask)
        except PerdureError:
            return  # who waits looks when their time is over, and says what is wrong
        for log, key, last in found:
            self._resolve((log, key), last, None)


def _hint(place: Place) -> str:
    return xxhash.xxh3_64_hexdigest("\x1e".join(place).encode())
