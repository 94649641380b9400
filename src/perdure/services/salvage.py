"""Completing a salvage: the bytes of files, and rows that agree with each other and with the bytes.

The engine has brought over each row that is sound by itself. Together they may not be: a file whose
bytes are gone, bytes that a file needs and whose reference is gone, a reference of what is gone.
A file is whole or it is not brought over. What a reader meets in what is left is then right, and
what is not there is named in the report.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import msgspec

from perdure.core.batch import Batch, delete
from perdure.core.blobs import Blob, Blobs
from perdure.core.engine import Salvaged
from perdure.core.errors import Damaged, Missing
from perdure.core.keys import Key, show
from perdure.core.layouts import Records
from perdure.core.paging import every
from perdure.core.values import Lost, Record
from perdure.services.backups import Progress
from perdure.services.blobs import BlobKeeper
from perdure.services.holds import owner_of_job
from perdure.services.verification import verify
from perdure.surfaces.blobs import REFERENCES, Reference
from perdure.surfaces.files import FILES, PARTS, owner_of, owner_of_part
from perdure.surfaces.jobs import JOBS
from perdure.surfaces.state import State

BLOBS = "blobs"


class Salvaging(msgspec.Struct, frozen=True, kw_only=True):
    """What a salvage brought over, counted by collection, and each thing that it could not."""

    object: Literal["perdure.salvage"] = "perdure.salvage"
    ok: bool
    kept: dict[str, int]
    lost: list[Lost]


async def complete_salvage(
    state: State, keeper: BlobKeeper, source: Blobs, rows: Salvaged, progress: Progress
) -> Salvaging:
    """Bring the bytes over, settle what depends on them, and verify all of it. Raises `Damaged`
    where what came out is not sound."""
    lost = list(rows.lost)
    kept = dict(rows.kept)
    gone = await _copy_blobs(source, keeper.blobs, progress)
    settling = _Settling(state, keeper, gone, lost, kept)
    await settling.run()
    lost += [Lost(BLOBS, why, digest) for digest, why in gone.items()]
    kept[BLOBS] = len([blob async for blob in keeper.blobs.list()])
    progress("verifying", 0, 0)
    verified = await verify(state.engine, keeper, workers=False)  # what they lack is told above
    if not verified.ok:
        first = verified.findings[0]
        raise Damaged(first.where, f"the salvaged store is not sound: {first.why}")
    return Salvaging(ok=not lost, kept=kept, lost=lost)


async def _copy_blobs(source: Blobs, target: Blobs, progress: Progress) -> dict[str, str]:
    """Bring over every blob that is what its name says; those that are not, and why."""
    listed = [blob async for blob in source.list()]
    total, done = sum(blob.size_bytes for blob in listed), 0
    gone: dict[str, str] = {}
    for blob in listed:
        try:
            await target.put(source.read(blob.digest), size_bytes_max=blob.size_bytes)
        except (Damaged, Missing, OSError) as error:
            gone[blob.digest] = error.why if isinstance(error, Damaged) else str(error)
        done += blob.size_bytes
        progress("salvaging blobs", done, total)
    return gone


class _Settling:
    """Rows against bytes, and references against those they are of."""

    def __init__(
        self,
        state: State,
        keeper: BlobKeeper,
        gone: dict[str, str],
        lost: list[Lost],
        kept: dict[str, int],
    ) -> None:
        self._state = state
        self._keeper = keeper
        self._gone = gone
        self._lost = lost
        self._kept = kept
        self._owners: set[tuple[str, str]] = set()
        """By tenant, under the name by which they refer to blobs."""

    async def run(self) -> None:
        """Files and parts are whole or go; a job keeps what it has, and its attempt says what it
        lacks. Then no reference is left that nobody has, or whose bytes are gone."""
        async for file in every(self._state.engine, FILES, ()):
            blobs = [Blob(piece.digest, piece.size_bytes) for piece in file.value.pieces]
            await self._owner(FILES, file, blobs, owner_of(file.key[-1]))
        async for part in every(self._state.engine, PARTS, ()):
            piece = part.value.piece
            blobs = [Blob(piece.digest, piece.size_bytes)]
            await self._owner(PARTS, part, blobs, owner_of_part(part.key[-1]))
        async for job in every(self._state.engine, JOBS, ()):
            there = [blob for blob in job.value.blobs if await self._there(blob)]
            await self._refer(job.key[0], there, owner_of_job(job.key))
        async for reference in every(self._state.engine, REFERENCES, ()):
            await self._check_reference(reference)

    async def _owner(
        self, records: Records[Any], record: Record[Any], blobs: list[Blob], owner: str
    ) -> None:
        lacking = [blob.digest for blob in blobs if not await self._there(blob)]
        if not lacking:
            await self._refer(record.key[0], blobs, owner)
            return
        why = f"its bytes are damaged or gone: the blob {lacking[0]}"
        await self._remove(records, record.key, why)

    async def _refer(self, tenant: str, blobs: Iterable[Blob], owner: str) -> None:
        """The references that an owner should have, made again where one is lost."""
        self._owners.add((tenant, owner))
        batch = Batch()
        for blob in dict.fromkeys(blobs):
            if await self._state.engine.get(REFERENCES, (tenant, blob.digest, owner)) is None:
                batch += self._keeper.uses.hold(tenant, [blob], owner)
                self._kept[REFERENCES.name] += 1
        await self._state.commit(batch)

    async def _check_reference(self, reference: Record[Reference]) -> None:
        tenant, digest, owner = reference.key
        if (tenant, owner) not in self._owners:
            await self._remove(REFERENCES, reference.key, "")
        elif not await self._there(Blob(digest, reference.value.size_bytes)):
            await self._remove(REFERENCES, reference.key, "its bytes are damaged or gone")

    async def _there(self, blob: Blob) -> bool:
        return await self._keeper.blobs.size(blob.digest) == blob.size_bytes

    async def _remove(self, records: Records[Any], key: Key, why: str) -> None:
        await self._state.commit(delete(records, key))
        self._kept[records.name] -= 1
        self._kept["tombstones"] += 1
        if why:
            self._lost.append(Lost(records.name, why, show(key)))
