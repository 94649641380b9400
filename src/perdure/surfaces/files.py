"""Files: the facts about what was uploaded, and the blobs that hold its bytes; and uploads, which
become files when their parts are named in order.

A file is a list of pieces, each a blob, so that what arrived in parts becomes one file without
moving a byte. Its record and its references to the blobs are one commit (surfaces/blobs): facts
and bytes are there together or not at all.

The record's attachment holds a checksum (XXH3-64) for every block of every piece, in order. So a
read can start anywhere and still verify each byte before it gives it out.
"""

from __future__ import annotations

import enum
from collections.abc import AsyncIterator, Sequence
from typing import Literal

import msgspec

from perdure.core.batch import Batch, check, delete, join, put
from perdure.core.engine import Engine, Survives
from perdure.core.keys import Key
from perdure.core.layouts import Index, Records
from perdure.core.limits import PAGE_MAX
from perdure.core.paging import Slice, every, page_of
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


class UploadStatus(enum.Enum):
    """Where an upload stands; the names are the wire's. Only `pending` can change."""

    PENDING = "pending"
    COMPLETED = "completed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


class Upload(msgspec.Struct, frozen=True):
    """A file that is announced. `due_at_s` is when somebody must look at it: at its expiry while
    it is pending, else when it is to be forgotten. `completed_by` is a digest of the request that
    made it the file `file_id`."""

    size_bytes: int
    created_at_s: int
    expires_at_s: int
    due_at_s: int
    filename: str
    purpose: str
    status: UploadStatus = UploadStatus.PENDING
    expires_after_s: int | None = None
    file_id: str | None = None
    completed_by: str | None = None


class Part(msgspec.Struct, frozen=True):
    """A part of an upload that has arrived; its attachment holds the checksums of its blocks."""

    piece: Piece
    created_at_s: int


UPLOADS = Records(
    "uploads",
    Upload,
    key=("tenant", "upload_id"),
    indexes=(Index("by_due", ("due_at_s",), every_tenant=True),),
)
PARTS = Records("upload_parts", Part, key=("tenant", "upload_id", "part_id"))

Held = Record[File]
HeldUpload = Record[Upload]
HeldPart = Record[Part]
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
        retention="until deleted, or until its expires_after has passed; an upload for an hour",
        layouts=(FILES, UPLOADS, PARTS),
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
        wanted: Slice[File],
        *,
        purpose: str | None = None,
    ) -> Page[Held]:
        """Files in the order they were created, of one purpose where it is given. Those whose time
        is over are among them until they are swept."""
        index, where = ("by_creation", ()) if purpose is None else ("by_purpose", (purpose,))
        return await page_of(self._engine, FILES, (tenant,), wanted, index=index, where=where)

    async def over(self, now_s: float, *, limit: int) -> list[Held]:
        """Files of every tenant whose time is over, the longest first."""
        page = await self._engine.scan(FILES, (), index="by_expiry", limit=limit)
        return [held for held in page.items if is_over(held.value, now_s)]

    def create(self, key: Key, file: File, sums: bytes) -> Batch:
        """A new file. Commit it with the references to its pieces."""
        return put(FILES, key, file, attachment=sums, expect=0)

    def unchanged(self, held: Held) -> Batch:
        """What whoever relies on a file adds to a commit: a `Conflict` once it was deleted."""
        return check(FILES, held.key, held.version)

    def delete(self, held: Held) -> Batch:
        """Delete a file. Commit it with the end of the references to its pieces."""
        return delete(FILES, held.key, expect=held.version)


class Uploads:
    """Reads of uploads and their parts, and the batches that write them. Parts arrive side by
    side: each checks that the upload is as it was, none changes it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def get(self, tenant: str, upload_id: str) -> HeldUpload:
        """The upload's record. Raises `NotFound`."""
        record = await self._engine.get(UPLOADS, (tenant, upload_id))
        if record is None:
            raise NotFound("Upload", upload_id)
        return record

    async def due(self, now_s: float, *, limit: int) -> list[HeldUpload]:
        """Uploads of every tenant that somebody must look at, the longest due first."""
        page = await self._engine.scan(UPLOADS, (), index="by_due", limit=limit)
        return [held for held in page.items if held.value.due_at_s <= now_s]

    async def named(self, upload: Key, part_ids: Sequence[str]) -> list[HeldPart | None]:
        """Parts by their ids, in that order."""
        found: list[HeldPart | None] = []
        for start in range(0, len(part_ids), PAGE_MAX):
            keys = [(*upload, part_id) for part_id in part_ids[start : start + PAGE_MAX]]
            found += await self._engine.get_many(PARTS, keys)
        return found

    def parts(self, upload: Key) -> AsyncIterator[HeldPart]:
        """Every part of an upload."""
        return every(self._engine, PARTS, upload)

    def create(self, key: Key, upload: Upload) -> Batch:
        """A new upload."""
        return put(UPLOADS, key, upload, expect=0)

    def add(self, held: HeldUpload, part_id: str, part: Part, sums: bytes) -> Batch:
        """A part, if the upload has not changed. Commit it with the reference to its bytes."""
        return check(UPLOADS, held.key, held.version) + put(
            PARTS, (*held.key, part_id), part, attachment=sums, expect=0
        )

    def end(
        self,
        held: HeldUpload,
        status: UploadStatus,
        due_at_s: int,
        *,
        file_id: str | None = None,
        completed_by: str | None = None,
    ) -> Batch:
        """The end of an upload; no part can come after it."""
        ended = msgspec.structs.replace(
            held.value,
            status=status,
            due_at_s=due_at_s,
            file_id=file_id,
            completed_by=completed_by,
        )
        return put(UPLOADS, held.key, ended, expect=held.version)

    def remove(self, parts: Sequence[HeldPart]) -> Batch:
        """Forget parts, as they were read. Commit it with what becomes of their references."""
        return join(delete(PARTS, part.key, expect=part.version) for part in parts)

    def forget(self, held: HeldUpload) -> Batch:
        """Forget an upload that has ended."""
        return delete(UPLOADS, held.key, expect=held.version)


def is_over(file: File, now_s: float) -> bool:
    """Whether the file's time is over."""
    return file.expires_at_s is not None and file.expires_at_s <= now_s


def owner_of(file_id: str) -> str:
    """The name under which a file refers to blobs."""
    return f"files/{file_id}"


def owner_of_part(part_id: str) -> str:
    """The name under which a part of an upload refers to its blob."""
    return f"upload_parts/{part_id}"
