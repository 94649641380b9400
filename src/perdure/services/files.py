"""What clients do with files: send, list, read, delete.

Bytes are on disk before the commit that names them. Whatever keeps that commit from happening
gives the bytes up again, and what a kill leaves of them is found by its claim. Bytes that are given
out were verified first, block by block, wherever a read starts.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Sequence
from contextlib import suppress

import msgspec
import structlog
import xxhash

from perdure.core.batch import Batch, join
from perdure.core.blobs import Blob
from perdure.core.clock import Clock
from perdure.core.errors import Conflict, Damaged, Missing, PerdureError, Unavailable
from perdure.core.limits import PAGE_MAX
from perdure.core.paging import Slice
from perdure.core.values import Record
from perdure.services.blobs import BlobKeeper
from perdure.services.requests import Caller, Requests
from perdure.surfaces.blobs import Claim
from perdure.surfaces.files import (
    BLOCK_BYTES,
    SUM_BYTES,
    File,
    Held,
    Order,
    Piece,
    is_over,
    owner_of,
)
from perdure.surfaces.state import State
from perdure.wire.files import CreateFile, FileList, FileObject
from perdure.wire.lists import no_such_after

_PIECE = 200

_log = structlog.get_logger("perdure.files")

encode = msgspec.json.encode


class Summing:
    """Bytes on their way into a blob, and the checksums of their blocks."""

    def __init__(self, chunks: AsyncIterator[bytes]) -> None:
        self._chunks = chunks
        self._sums = bytearray()
        self._block = xxhash.xxh3_64()
        self._left = BLOCK_BYTES

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for chunk in self._chunks:
            rest = memoryview(chunk)
            while rest:
                part, rest = rest[: self._left], rest[self._left :]
                self._block.update(part)
                self._left -= len(part)
                if not self._left:
                    self._close()
            yield chunk

    def sums(self) -> bytes:
        """The checksums, once all has passed."""
        if self._left < BLOCK_BYTES:
            self._close()
        return bytes(self._sums)

    def _close(self) -> None:
        self._sums += self._block.digest()
        self._block.reset()
        self._left = BLOCK_BYTES


async def ahead(chunks: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    """The same chunks, the next one on its way while the last is used: so the network and the disk
    work at once."""
    coming = asyncio.ensure_future(anext(chunks, b""))
    try:
        while chunk := await coming:
            coming = asyncio.ensure_future(anext(chunks, b""))
            yield chunk
    finally:
        coming.cancel()
        await asyncio.gather(coming, return_exceptions=True)
        await chunks.aclose()


class Files:
    """Files of one state and their blobs; every method names the caller or tenant first."""

    def __init__(
        self, state: State, keeper: BlobKeeper, requests: Requests, clock: Clock, bytes_max: int
    ) -> None:
        self._state = state
        self._keeper = keeper
        self._requests = requests
        self._clock = clock
        self._bytes_max = bytes_max

    async def create(
        self,
        tenant: str,
        chunks: AsyncGenerator[bytes, None],
        described: Callable[[], CreateFile],
        sender: Callable[[bytes], Caller],
    ) -> bytes:
        """Keep the bytes as a file; returns its wire body. `described` is asked when the last byte
        has arrived; `sender` makes the caller of what was sent, so that a repeat is known again.

        Raises what `chunks` and `described` raise, `LimitExceeded` and `StorageFull`; then there
        is no file, and no bytes.
        """
        summing = Summing(ahead(chunks))
        claim = await self._keeper.put(tenant, aiter(summing), size_bytes_max=self._bytes_max)
        try:
            request = described()
            caller = sender(encode((request, claim.value.digest)))
            piece = Piece(claim.value.digest, claim.value.size_bytes)
            file_id = self._clock.new_id("file").replace("_", "-")
            file = self.new(request, (piece,))
            held = Record((tenant, file_id), 1, file)
            mine = encode(self.shown(held))
            batch = self._state.files.create(held.key, file, summing.sums())
            batch += self._keeper.refer(claim, owner_of(file_id))
            answer = await self._requests.once(caller, batch, mine)
        except PerdureError:
            await self._keeper.give_up(claim)
            raise
        if answer is not mine:
            await self._keeper.give_up(claim)
        return answer

    async def get(self, tenant: str, file_id: str) -> Held:
        """The file's record. Raises `NotFound`, also for one whose time is over."""
        return await self._state.files.get(tenant, file_id, now_s=self._clock.now_s())

    async def describe(self, tenant: str, file_id: str) -> FileObject:
        """The file as shown, its bytes looked for. Raises `NotFound`."""
        held = await self.get(tenant, file_id)
        with suppress(Damaged):  # noted in the keeper's troubles, from which the status comes
            await self.check(held)
        return self.shown(held)

    async def check(self, held: Held) -> None:
        """Raises `Damaged` where bytes of a file are absent, or more or fewer than were stored, and
        `Missing` where it was deleted since."""
        for piece in held.value.pieces:
            await self._keeper.check(piece.digest, piece.size_bytes)

    async def list(
        self, tenant: str, *, purpose: str | None, order: Order, limit: int, after: str | None
    ) -> FileList:
        """One page of files. Raises `WireError` for an `after` that is not among them."""
        last: Held | None = None
        if after is not None:
            try:
                last = await self.get(tenant, after)
            except Missing:
                raise no_such_after("file", after) from None
        found: list[FileObject] = []
        cursor: str | None = None
        now_s = self._clock.now_s()
        while True:
            most = min(limit + 1 - len(found), PAGE_MAX)
            wanted = Slice(most, last, cursor, descending=order == "desc")
            page = await self._state.files.page(tenant, wanted, purpose=purpose)
            found += [self.shown(held) for held in page.items if not is_over(held.value, now_s)]
            cursor = page.cursor
            if cursor is None or len(found) > limit:
                break
        shown = found[:limit]
        return FileList(
            data=shown,
            first_id=shown[0].id if shown else None,
            last_id=shown[-1].id if shown else None,
            has_more=len(found) > limit,
        )

    async def content(
        self, held: Held, *, start: int = 0, size_bytes: int | None = None
    ) -> AsyncGenerator[bytes, None]:
        """The file's bytes from `start`, at most `size_bytes`, each verified before it is given
        out. Raises `Damaged` in place of the first that is not what was written, and `Missing`
        where the file was deleted since."""
        left = held.value.size_bytes - start
        if size_bytes is not None:
            left = min(left, size_bytes)
        sums = memoryview(held.attachment or b"")
        for piece in held.value.pieces:
            own, sums = sums[: piece.sums_bytes], sums[piece.sums_bytes :]
            if start >= piece.size_bytes:
                start -= piece.size_bytes
                continue
            size = min(left, piece.size_bytes - start)
            async for part in self._verified(piece, own, start, size):
                yield part
            left -= size
            start = 0
            if not left:
                return

    async def delete(self, tenant: str, file_id: str) -> None:
        """Delete a file and the bytes that no other file needs. Raises `NotFound`."""
        await self._delete(await self.get(tenant, file_id))

    async def sweep(self) -> None:
        """Delete the files whose time is over, a bounded piece at a time."""
        while held := await self._state.files.over(self._clock.now_s(), limit=_PIECE):
            for one in held:
                try:
                    await self._delete(one)
                except Conflict:
                    continue  # somebody else deleted it

    def shown(self, held: Held) -> FileObject:
        """A file as the API shows it."""
        file = held.value
        troubles = [
            f"{piece.digest}: {self._keeper.troubles[piece.digest]}"
            for piece in file.pieces
            if piece.digest in self._keeper.troubles
        ]
        return FileObject(
            id=held.key[-1],
            bytes=file.size_bytes,
            created_at=file.created_at_s,
            expires_at=file.expires_at_s,
            filename=file.filename,
            purpose=file.purpose,
            status="error" if troubles else "processed",
            status_details=f"Its bytes are damaged. {troubles[0]}." if troubles else None,
        )

    def new(self, request: CreateFile, pieces: tuple[Piece, ...]) -> File:
        """A file that is created now."""
        now_s = int(self._clock.now_s())
        after_s = request.expires_after_s
        return File(
            size_bytes=sum(piece.size_bytes for piece in pieces),
            created_at_s=now_s,
            filename=request.filename,
            purpose=request.purpose,
            pieces=pieces,
            expires_at_s=None if after_s is None else now_s + after_s,
        )

    async def _delete(self, held: Held) -> None:
        leaving, batch = self.leave(held.key[0], held.value.pieces, owner_of(held.key[-1]))
        await self._state.commit(self._state.files.delete(held) + batch)
        await self.forget(leaving)

    def hold(self, tenant: str, blobs: Iterable[Blob], owner: str) -> Batch:
        """See `surfaces.blobs.BlobUses.hold`."""
        return self._keeper.uses.hold(tenant, blobs, owner)

    def leave(
        self, tenant: str, pieces: Iterable[Piece | Blob], owner: str
    ) -> tuple[Sequence[Record[Claim]], Batch]:
        """The batch that ends an owner's references, and the claims it leaves."""
        sizes = {piece.digest: piece.size_bytes for piece in pieces}
        leaving = [self._keeper.leaving(tenant, digest, size) for digest, size in sizes.items()]
        return leaving, join(self._keeper.uses.let_go(claim, owner) for claim in leaving)

    async def forget(self, leaving: Iterable[Record[Claim]]) -> None:
        """Take the bytes away. The file is gone already: what cannot be taken now is taken by a
        sweep, which finds it by its claim."""
        for claim in leaving:
            try:
                await self._keeper.give_up(claim)
            except Unavailable as error:
                _log.warning("bytes are left to a sweep", blob=claim.value.digest, error=str(error))

    async def _verified(
        self, piece: Piece, sums: memoryview, start: int, size_bytes: int
    ) -> AsyncIterator[bytes]:
        """A stretch of one piece: whole blocks are read and verified, what was asked for of them
        is given out."""
        end = start + size_bytes
        at = start - start % BLOCK_BYTES
        until = min(piece.size_bytes, end + -end % BLOCK_BYTES)
        read = bytearray()
        try:
            async for chunk in self._keeper.blobs.read(
                piece.digest, start=at, size_bytes=until - at
            ):
                read += chunk
                while at < until and len(read) >= (size := min(BLOCK_BYTES, until - at)):
                    block = bytes(memoryview(read)[:size])
                    del read[:size]
                    place = at // BLOCK_BYTES * SUM_BYTES
                    if xxhash.xxh3_64_digest(block) != sums[place : place + SUM_BYTES]:
                        why = f"it is changed after byte {at}"
                        raise await self._keeper.lost(piece.digest, why)
                    yield block[max(start - at, 0) : end - at]
                    at += size
        except Damaged as damage:
            raise await self._keeper.lost(piece.digest, damage.why) from damage
        except Missing:
            raise await self._keeper.lost(piece.digest, "its bytes are gone") from None
        if at < until:
            raise await self._keeper.lost(piece.digest, f"it ends before byte {until}")
