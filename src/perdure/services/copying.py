"""Copying a whole store to another place and another engine, by rows.

Invariants
- Until it is complete nobody but a copy opens the target; it is complete only when both sides, read
  once more from their beginnings, have the same digest, the target verifies, and the bytes that its
  records name are there.
- What is loaded is loaded whole, page by page, and what is there already is left alone. So a copy
  that was cut off anywhere is completed by running it again, and refused where the target holds
  anything that the source does not.
- The source is not changed. Nobody may write to it meanwhile: one who does is found by the digest.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from collections.abc import AsyncIterator
from typing import Literal

import msgspec

from perdure.core.blobs import Blobs
from perdure.core.engine import Engine
from perdure.core.errors import Conflict, Damaged, LimitExceeded, Unavailable
from perdure.core.rows import FloorRow, OperationRow, RecordRow, Row, Rows, StreamRow
from perdure.services.backups import Progress
from perdure.services.blobs import BlobKeeper

_encode = msgspec.msgpack.Encoder().encode


class Copied(msgspec.Struct, frozen=True, kw_only=True):
    """What a copy holds: records and entries of each collection, tombstones, operation ids, and
    the SHA-256 of all of them in their order, which is that of the source."""

    object: Literal["perdure.copy"] = "perdure.copy"
    source: str
    target: str
    counts: dict[str, int]
    sha256: str
    blobs: int
    blobs_size_bytes: int
    blobs_at: str


class _Tally:
    """Counts and a digest of rows; where a page or a stretch ended does not show in it."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._digests: dict[str, hashlib._Hash] = {}

    def add(self, row: Row) -> None:
        name = _name_of(row)
        seen = self._digests.setdefault(name, hashlib.sha256())
        if not isinstance(row, StreamRow):
            self.counts[name] += not isinstance(row, FloorRow)
            seen.update(_encode(row))
            return
        if row.after == row.first - 1:
            seen.update(_encode((row.place, row.incarnation, row.first)))
        self.counts[name] += len(row.values)
        for value in row.values:
            seen.update(_encode(value))

    def add_page(self, page: Rows) -> None:
        for row in page.items:
            self.add(row)

    @property
    def parts(self) -> dict[str, str]:
        return {name: seen.hexdigest() for name, seen in self._digests.items()}

    @property
    def sha256(self) -> str:
        return hashlib.sha256(_encode(sorted(self.parts.items()))).hexdigest()


async def copy(
    source: Engine, target: Engine, blobs: Blobs, keeper: BlobKeeper, progress: Progress
) -> Copied:
    """Copy `source` into `target`, which was opened as a copy of it, and the blobs to those of the
    keeper, unless they are the same.

    Raises `Unavailable` where the source was written to meanwhile or since an earlier attempt,
    `Damaged` for what is not sound on either side, and `LimitExceeded`, before anything is copied,
    for more than the target keeps.
    """
    if target.places_max is not None:
        await _require_room(source, target, target.places_max)
    done = 0
    try:
        async for page in _pages(source):
            await target.load(page.items)
            done += len(page.items)
            progress("copying rows", done, 0)
    except Conflict as conflict:
        raise _changed(source, target, str(conflict)) from conflict
    moved, size_bytes = await _copy_blobs(blobs, keeper.blobs, progress)
    ours, theirs = await asyncio.gather(_tally(source, progress), _tally(target, lambda *_: None))
    if ours.parts != theirs.parts:
        unlike = sorted(dict(ours.parts.items() ^ theirs.parts.items()))
        raise _changed(source, target, f"{', '.join(unlike)} differ.")
    progress("verifying", 0, 0)
    async for finding in target.verify():
        raise Damaged(finding.where, finding.why)
    await keeper.require_bytes()
    await target.load((), complete=True)
    return Copied(
        source=source.url,
        target=target.url,
        counts={name: count for name, count in sorted(ours.counts.items()) if count},
        sha256=ours.sha256,
        blobs=moved,
        blobs_size_bytes=size_bytes,
        blobs_at=keeper.blobs.url,
    )


async def _require_room(source: Engine, target: Engine, places_max: int) -> None:
    places = 0
    async for page in _pages(source):
        places += sum(map(_takes_place, page.items))
        if places > places_max:
            what = f"the number of records, streams and operation ids to be kept in {target.url}"
            raise LimitExceeded(what, places, places_max)


def _takes_place(row: Row) -> bool:
    """Whether a place begins with it: not with what goes on with a stream."""
    match row:
        case FloorRow():
            return False
        case StreamRow():
            return row.after == row.first - 1
        case _:
            return True


def _changed(source: Engine, target: Engine, why: str) -> Unavailable:
    return Unavailable(
        f"{target.url} does not become what {source.url} is now: {why} The source was written to "
        "since the copy began. Stop whatever writes to it, remove the unfinished copy, and copy "
        "again. The source was not changed, and nobody is served from the copy."
    )


async def _pages(engine: Engine) -> AsyncIterator[Rows]:
    page = await engine.rows()
    yield page
    while page.after is not None:
        page = await engine.rows(after=page.after)
        yield page


async def _tally(engine: Engine, progress: Progress) -> _Tally:
    tally, done = _Tally(), 0
    async for page in _pages(engine):
        tally.add_page(page)
        done += len(page.items)
        progress("taking digests", done, 0)
    return tally


async def _copy_blobs(source: Blobs, target: Blobs, progress: Progress) -> tuple[int, int]:
    """Bring over every blob that is not there, and read all of them back. Raises `Damaged`."""
    listed = [blob async for blob in source.list()]
    total, done = sum(blob.size_bytes for blob in listed), 0
    if source.url != target.url:
        for blob in listed:
            if await target.size(blob.digest) != blob.size_bytes:
                await target.put(source.read(blob.digest), size_bytes_max=blob.size_bytes)
            done += blob.size_bytes
            progress("copying blobs", done, total)
        async for finding in target.verify():
            if finding.kind != "leftover":
                raise Damaged(finding.where, finding.why)
    return len(listed), total


def _name_of(row: Row) -> str:
    match row:
        case RecordRow(value=None):
            return "tombstones"
        case RecordRow():
            return row.collection
        case OperationRow():
            return "operations"
        case FloorRow():
            return "incarnations"
        case _:
            return row.log
