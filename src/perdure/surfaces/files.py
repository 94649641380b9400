"""Files: the facts about what was uploaded, and the blobs that hold its bytes.

A file is a list of pieces, each a blob, so that what arrived in parts becomes one file without
moving a byte. Its record and its references to the blobs are one commit (surfaces/blobs): facts
and bytes are there together or not at all.

The record's attachment holds a checksum (XXH3-64) for every block of every piece, in order. So a
read can start anywhere and still verify each byte before it gives it out.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from perdure.core import cursors
from perdure.core.batch import Batch, delete, put
from perdure.core.engine import Engine, Survives
from perdure.core.keys import Key
from perdure.core.layouts import Index, Records
from perdure.core.promises import Durability, Promise
from perdure.core.values import Page, Record
from perdure.wire.errors import NotFound

BLOCK_BYTES = 1024 * 1024
"""What one checksum covers. Part of the stored format: the sums of a piece are as many as its
blocks, the last one shorter."""

SUM_BYTES = 8


class Piece(msgspec.Struct, frozen=True):
    """A blob that holds a stretch of a file."""

    digest: str
    size_bytes: int

    @property
    def sums_bytes(self) -> int:
        """How much of the checksums belongs to this piece."""
        return -(-self.size_bytes // BLOCK_BYTES) * SUM_BYTES


class File(msgspec.Struct, frozen=True):
    """A file as it was described. Past `expires_at_s` it does not exist, swept or not."""

    size_bytes: int
    created_at_s: int
    filename: str
    purpose: str
    pieces: tuple[Piece, ...]
    expires_at_s: int | None = None


FILES = Records(
    "files",
    File,
    key=("tenant", "file_id"),
    indexes=(
        Index("by_creation", ("created_at_s",)),
        Index("by_purpose", ("purpose", "created_at_s")),
        Index("by_expiry", ("expires_at_s",), every_tenant=True),
    ),
)

Held = Record[File]
Order = Literal["asc", "desc"]


class Files:
    """Reads of files, and the batches that write them."""

    promise = Promise(
        surface="files",
        durability=Durability.SHARED,
        acknowledgement="the bytes are on disk before the record that names them, in one answer",
        survives=Survives(process_crash=True, power_cut=True, failed_sync=True, damage=True),
        owner="whoever commits the file; its bytes never change",
        recovery="none needed: a file is one commit; bytes without a file are swept as blobs",
        retention="until deleted, or until its expires_after has passed",
        layouts=(FILES,),
        statements=("C3", "C4", "R10"),
    )

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def get(self, tenant: str, file_id: str, *, now_s: float) -> Held:
        """The file's record; its attachment holds the checksums. Raises `NotFound`."""
        record = await self._engine.get(FILES, (tenant, file_id))
        if record is None or is_over(record.value, now_s):
            raise NotFound("File", file_id)
        return record

    async def page(
        self,
        tenant: str,
        *,
        purpose: str | None,
        order: Order,
        limit: int,
        after: Held | None = None,
        cursor: str | None = None,
    ) -> Page[Held]:
        """Files by creation, going on after the file `after` or at `cursor`. Those whose time is
        over are among them until they are swept."""
        index = "by_creation" if purpose is None else "by_purpose"
        where = () if purpose is None else (purpose,)
        descending = order == "desc"
        if after is not None:
            cursor = cursors.at_record(
                self._engine.store_id,
                FILES,
                (tenant,),
                after,
                index=index,
                where=where,
                descending=descending,
            )
        return await self._engine.scan(
            FILES,
            (tenant,),
            index=index,
            where=where,
            limit=limit,
            cursor=cursor,
            descending=descending,
        )

    async def over(self, now_s: float, *, limit: int) -> list[Held]:
        """Files of every tenant whose time is over, the longest first."""
        page = await self._engine.scan(FILES, (), index="by_expiry", limit=limit)
        return [held for held in page.items if is_over(held.value, now_s)]

    def create(self, key: Key, file: File, sums: bytes) -> Batch:
        """A new file. Commit it with the references to its pieces."""
        return put(FILES, key, file, attachment=sums, expect=0)

    def delete(self, held: Held) -> Batch:
        """Delete a file. Commit it with the end of the references to its pieces."""
        return delete(FILES, held.key, expect=held.version)


def is_over(file: File, now_s: float) -> bool:
    """Whether the file's time is over."""
    return file.expires_at_s is not None and file.expires_at_s <= now_s


def owner_of(file_id: str) -> str:
    """The name under which a file refers to blobs."""
    return f"files/{file_id}"
