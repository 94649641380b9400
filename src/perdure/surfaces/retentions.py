"""Retentions: operations that archive or purge a worker that has ended, and the archives.

Invariant: an operation is found by the index `waiting` for as long as something of it is left to be
done, so whoever comes next can go on with it; every step checks the version that it goes on from.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import msgspec

from perdure.core.batch import Batch, check, delete, put
from perdure.core.batch import join as joined
from perdure.core.engine import Engine, Survives
from perdure.core.errors import Damaged
from perdure.core.keys import Key, show
from perdure.core.layouts import Index, Records
from perdure.core.promises import Durability, Promise
from perdure.core.values import Page, Record
from perdure.wire.errors import NotFound


class Retention(msgspec.Struct, frozen=True):
    """An operation that archives or purges a worker. An archive has `parts`, whose bytes together
    have the `digest`; one that was removed has none once all of it is gone."""

    worker_id: str
    mode: Literal["archive", "purge"]
    at_s: int
    done: bool = False
    parts: int = 0
    lines: int = 0
    size_bytes: int = 0
    digest: str | None = None
    removed_at_s: int | None = None

    @property
    def waits(self) -> int | None:
        """When it was asked for, while something is left to be done."""
        over = self.done and (self.removed_at_s is None or not self.parts)
        return None if over else self.at_s


class ArchivePart(msgspec.Struct, frozen=True):
    """A part of an archive; the attachment is its bytes, lines of JSON."""

    size_bytes: int


_KEY = ("tenant", "runtime_id", "id")
_HOME = "runtimes/*/retentions/*"

RETENTIONS = Records(
    "worker_retentions",
    Retention,
    key=_KEY,
    indexes=(Index("waiting", ("waits",), every_tenant=True),),
    path=f"{_HOME}/retention",
)
ARCHIVES = Records("worker_archives", ArchivePart, key=(*_KEY, "part"), path=f"{_HOME}/parts/*")

Held = Record[Retention]


def _part(operation: Key, number: int) -> Key:
    return (*operation, f"{number:08}")


class Retentions:
    """Reads of operations and of archives, and the batches that write them."""

    promise = Promise(
        surface="worker_retentions",
        durability=Durability.RESTART_SAFE,
        acknowledgement="durable: a worker is removed in the commit that says its archive is whole",
        survives=Survives(process_crash=True, power_cut=True, failed_sync=True, damage=True),
        owner="whoever goes on with it: a step is a commit that fails once another has come first",
        recovery="an operation that was interrupted is gone on with",
        retention="operations for ever; archives until they are removed",
        layouts=(RETENTIONS, ARCHIVES),
        statements=("W1", "C3", "C4"),
    )

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def find(self, key: Key) -> Held | None:
        """An operation on a worker of a runtime, if it was asked for."""
        return await self._engine.get(RETENTIONS, key)

    async def get(self, key: Key) -> Held:
        """The same. Raises `NotFound`."""
        held = await self.find(key)
        if held is None:
            raise NotFound("Retention", key[-1])
        return held

    async def waiting(self, *, limit: int, cursor: str | None = None) -> Page[Held]:
        """Operations of every tenant of which something is left. Raises `Damaged`, which can
        resume."""
        found = self._engine.scan(RETENTIONS, (), index="waiting", limit=limit, cursor=cursor)
        return await found

    async def part(self, operation: Key, number: int) -> bytes:
        """A part of an archive. Raises `Damaged` where it is gone."""
        record = await self._engine.get(ARCHIVES, _part(operation, number))
        if record is None or record.attachment is None:
            raise Damaged(f"the archive {show(operation)}", f"part {number} is gone")
        return record.attachment

    def keep(self, key: Key, retention: Retention, *, expect: int) -> Batch:
        """Begin an operation, or note how far it is."""
        return put(RETENTIONS, key, retention, expect=expect)

    def unchanged(self, held: Held) -> Batch:
        """What goes with every step of an operation: a `Conflict` once another went on."""
        return check(RETENTIONS, held.key, held.version)

    def add_part(self, operation: Key, number: int, data: bytes) -> Batch:
        """Write a part of an archive, again if need be."""
        return put(ARCHIVES, _part(operation, number), ArchivePart(len(data)), attachment=data)

    def remove_parts(self, operation: Key, numbers: Iterable[int]) -> Batch:
        """Remove parts of an archive, those that are gone already among them."""
        return joined(delete(ARCHIVES, _part(operation, number)) for number in numbers)
