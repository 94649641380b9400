"""Reads of single records, which share statements.

An answer takes longer to travel than to be worked out. So whoever asks while others wait for their
answers is asked for together with everybody who does, and an idle store is asked at once.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from perdure.core.errors import Damaged
from perdure.core.keys import show, split
from perdure.engines.postgres_driver import Database, damage_at
from perdure.engines.postgres_schema import Table

if TYPE_CHECKING:
    import asyncpg

    from perdure.engines.postgres_driver import Session

_AT_ONCE = 4
"""Statements under way; scans and streams have the rest of the sessions to themselves."""
_TOGETHER = 128


class _Group:
    """Places of one table that are asked for together; open until its turn comes, so every read in
    it begins after it was wanted."""

    def __init__(self) -> None:
        self.places: list[str] = []
        self.rows: asyncio.Task[dict[str, asyncpg.Record]]


class Points:
    """One for an engine."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._turns = asyncio.Semaphore(_AT_ONCE)
        self._open: dict[Table, _Group] = {}

    async def get(self, table: Table, place: str) -> asyncpg.Record | None:
        """Key, version, checksum, value and attachment; None if absent. Raises `Damaged`."""
        group = self._open.get(table)
        if group is None or len(group.places) == _TOGETHER:
            group = self._open[table] = _Group()
            group.rows = asyncio.create_task(self._take_turn(table, group), name="perdure-points")
            group.rows.add_done_callback(_heard)
        group.places.append(place)
        try:
            rows = await asyncio.shield(group.rows)
        except Damaged:
            if len(group.places) == 1:
                raise
            rows = await self._read(table, [place])  # so that nobody else is told of it
        return rows.get(place)

    async def _take_turn(self, table: Table, group: _Group) -> dict[str, asyncpg.Record]:
        async with self._turns:
            if self._open.get(table) is group:
                del self._open[table]
            return await self._read(table, group.places)

    async def _read(self, table: Table, places: list[str]) -> dict[str, asyncpg.Record]:
        where = f"{table.records.name} {show(split(places[0]))}"

        async def ask(session: Session) -> list[asyncpg.Record]:
            with damage_at(where):
                return await session.fetch(table.get, places)

        return {row[0]: row for row in await self._database.read(ask)}


def _heard(rows: asyncio.Task[dict[str, asyncpg.Record]]) -> None:
    """Whoever asked may be gone; then nobody is to be told of an error."""
    if not rows.cancelled():
        rows.exception()
