"""An engine around an engine: every call is handed on. Wrappers override what they change."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from perdure.core.batch import NOTHING, Batch
from perdure.core.engine import Engine, EngineStats, Progress, Snapshot, Usage
from perdure.core.keys import Key
from perdure.core.layouts import Column, Log, Records
from perdure.core.rows import At, Row, Rows
from perdure.core.values import Committed, Entry, Finding, Page, Record, Tip

T = TypeVar("T")


class Wrapping:
    """See `core.engine.Engine`. `engine` is the one that does the work."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.url = engine.url
        self.store_id = engine.store_id
        self.survives = engine.survives
        self.shared = engine.shared
        self.places_max = engine.places_max
        self.recovered = engine.recovered
        self.written = engine.written

    @property
    def stats(self) -> EngineStats:
        return self.engine.stats

    @property
    def latched(self) -> str | None:
        return self.engine.latched

    def latched_for(self, log: Log[Any], stream: Key) -> str | None:
        return self.engine.latched_for(log, stream)

    async def commit(self, batch: Batch) -> Committed:
        return await self.engine.commit(batch)

    async def get(self, records: Records[T], key: Key) -> Record[T] | None:
        return await self.engine.get(records, key)

    async def get_many(self, records: Records[T], keys: Sequence[Key]) -> list[Record[T] | None]:
        return await self.engine.get_many(records, keys)

    async def scan(
        self,
        records: Records[T],
        prefix: Key,
        *,
        index: str | None = None,
        where: Sequence[Column] = (),
        limit: int,
        cursor: str | None = None,
        descending: bool = False,
        partial: bool = False,
    ) -> Page[Record[T]]:
        return await self.engine.scan(
            records,
            prefix,
            index=index,
            where=where,
            limit=limit,
            cursor=cursor,
            descending=descending,
            partial=partial,
        )

    async def count(
        self, records: Records[Any], prefix: Key, *, index: str | None = None, group: int = 0
    ) -> dict[tuple[Column | None, ...], int]:
        return await self.engine.count(records, prefix, index=index, group=group)

    async def read(
        self,
        log: Log[T],
        stream: Key,
        *,
        after: int = 0,
        incarnation: int | None = None,
        limit: int,
    ) -> list[Entry[T]]:
        return await self.engine.read(
            log, stream, after=after, incarnation=incarnation, limit=limit
        )

    async def tip(self, log: Log[Any], stream: Key) -> Tip:
        return await self.engine.tip(log, stream)

    async def wait(self, log: Log[Any], stream: Key, after: int, *, timeout_s: float) -> Tip:
        return await self.engine.wait(log, stream, after, timeout_s=timeout_s)

    async def streams(
        self,
        log: Log[Any],
        prefix: Key,
        *,
        limit: int,
        cursor: str | None = None,
        partial: bool = False,
    ) -> Page[Key]:
        return await self.engine.streams(log, prefix, limit=limit, cursor=cursor, partial=partial)

    def verify(self) -> AsyncIterator[Finding]:
        return self.engine.verify()

    async def usage(self) -> Usage:
        return await self.engine.usage()

    async def backup(self, into: Path, progress: Progress) -> Snapshot:
        return await self.engine.backup(into, progress)

    async def rows(self, *, after: At | None = None, partition: str | None = None) -> Rows:
        return await self.engine.rows(after=after, partition=partition)

    async def load(
        self, rows: Sequence[Row], *, complete: bool = False, under: Batch = NOTHING
    ) -> None:
        await self.engine.load(rows, complete=complete, under=under)

    async def unload(self, rows: Sequence[Row], *, under: Batch = NOTHING) -> None:
        await self.engine.unload(rows, under=under)

    def announce(self, note: str) -> None:
        self.engine.announce(note)

    async def close(self) -> None:
        await self.engine.close()
