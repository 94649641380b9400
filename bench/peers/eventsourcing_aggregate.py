"""The eventsourcing library on its SQLite recorder: one event of an aggregate a save, an aggregate
a writer, each save in a thread; and reads of an aggregate's newest 20 events, or of 100 anywhere.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from uuid import UUID

from eventsourcing.application import Application
from eventsourcing.domain import Aggregate, event

from bench.load import (
    DOCUMENT,
    LONG_ENTRIES,
    LONG_READ,
    SESSION_ITEMS,
    SESSION_LAST,
    closed_loop,
    main,
    read_places,
)

_TOGETHER = 2_000


class Session(Aggregate):
    """A sequence of items, the last of which is kept."""

    @event("Appended")
    def append(self, item: dict[str, object]) -> None:
        self.last = item


def opened(directory: Path) -> Application[UUID]:
    return Application(
        {
            "PERSISTENCE_MODULE": "eventsourcing.sqlite",
            "SQLITE_DBNAME": str(directory / "events.db"),
        }
    )


def append(directory: Path, writers: int, duration_s: float) -> dict[str, float]:
    application = opened(directory)
    sessions = [Session() for _ in range(writers)]
    application.save(*sessions)

    def save(session: Session) -> None:
        session.append(DOCUMENT)
        application.save(session)

    async def within() -> dict[str, float]:
        return await closed_loop(
            lambda writer, n: asyncio.to_thread(save, sessions[writer]), writers, duration_s
        )

    try:
        return asyncio.run(within())
    finally:
        application.close()


def filled(application: Application[UUID], items: int) -> UUID:
    """An aggregate with so many events behind its first."""
    session = Session()
    for n in range(1, items + 1):
        session.append(DOCUMENT)
        if n % _TOGETHER == 0 or n == items:
            application.save(session)
    return session.id


def read(directory: Path, writers: int, duration_s: float) -> dict[str, float]:
    application = opened(directory)
    session = filled(application, SESSION_ITEMS)

    async def one(_writer: int, _n: int) -> None:
        newest = list(application.events.get(session, desc=True, limit=SESSION_LAST))
        assert len(newest) == SESSION_LAST

    try:
        return asyncio.run(closed_loop(one, writers, duration_s))
    finally:
        application.close()


def long(directory: Path, writers: int, duration_s: float) -> dict[str, float]:
    began_s = time.perf_counter()
    application = opened(directory)
    session = filled(application, LONG_ENTRIES)
    built_s = time.perf_counter() - began_s

    async def one(after: int) -> int:
        return len(list(application.events.get(session, gt=after, limit=LONG_READ)))

    try:
        return asyncio.run(read_places(one)) | {"built_s": built_s}
    finally:
        application.close()


if __name__ == "__main__":
    main({"append": append, "read": read, "long": long})
