"""What clients do with uploads: announce a file, send its parts side by side, name their order.

A part is a blob of its own, so completing an upload moves references, never bytes: whatever its
size, it is one small commit. A part that nobody names is let go with the upload.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

import msgspec

from perdure.core.batch import join
from perdure.core.clock import Clock
from perdure.core.errors import Conflict, LimitExceeded, Missing, PerdureError
from perdure.core.offload import off_loop
from perdure.core.values import Record
from perdure.services.blobs import BlobKeeper
from perdure.services.files import Files, Summing, ahead
from perdure.services.requests import Caller, Requests
from perdure.surfaces.blobs import Reference
from perdure.surfaces.files import (
    HeldPart,
    HeldUpload,
    Part,
    Piece,
    Upload,
    UploadStatus,
    owner_of,
    owner_of_part,
)
from perdure.surfaces.state import State
from perdure.wire.errors import WireError
from perdure.wire.files import (
    PART_BYTES_MAX,
    PARTS_MAX,
    UPLOAD_KEPT_S,
    CompleteUpload,
    CreateFile,
    FileObject,
    UploadObject,
    UploadPartObject,
    parse_complete_upload,
    parse_create_upload,
)

ENDED_KEPT_S = 24 * 3600
"""How long an upload that has ended still says so."""

_PIECE = 200

encode = msgspec.json.encode


class Uploads:
    """Uploads of one state; every method names the caller or tenant first."""

    def __init__(
        self, state: State, keeper: BlobKeeper, files: Files, requests: Requests, clock: Clock
    ) -> None:
        self._state = state
        self._keeper = keeper
        self._files = files
        self._requests = requests
        self._clock = clock

    async def create(self, caller: Caller, sent: Any) -> bytes:
        """Announce a file; returns the upload's wire body. Raises `WireError`."""
        request = parse_create_upload(sent)
        now_s = int(self._clock.now_s())
        after = request.expires_after
        upload = Upload(
            size_bytes=request.bytes,
            created_at_s=now_s,
            expires_at_s=now_s + UPLOAD_KEPT_S,
            due_at_s=now_s + UPLOAD_KEPT_S,
            filename=request.filename,
            purpose=request.purpose,
            expires_after_s=None if after is None else after.seconds,
        )
        key = (caller.tenant, self._clock.new_id("upload"))
        batch = self._state.uploads.create(key, upload)
        return await self._requests.once(caller, batch, encode(_shown(Record(key, 1, upload))))

    async def add(
        self,
        tenant: str,
        upload_id: str,
        chunks: AsyncGenerator[bytes, None],
        sender: Callable[[bytes], Caller],
    ) -> bytes:
        """Keep the bytes as a part; returns its wire body. Raises `NotFound`, `WireError` for an
        upload that is not pending, `LimitExceeded`, and what `chunks` raises; then nothing is
        kept."""
        held = await self._pending(tenant, upload_id)
        await self._check_room(held)
        summing = Summing(ahead(chunks))
        claim = await self._keeper.put(tenant, aiter(summing), size_bytes_max=PART_BYTES_MAX)
        try:
            caller = sender(claim.value.digest.encode())
            part_id = self._clock.new_id("part")
            piece = Piece(claim.value.digest, claim.value.size_bytes)
            part = Part(piece, int(self._clock.now_s()))
            mine = encode(
                UploadPartObject(id=part_id, created_at=part.created_at_s, upload_id=upload_id)
            )
            batch = self._state.uploads.add(held, part_id, part, summing.sums())
            batch += self._keeper.refer(claim, owner_of_part(part_id))
            answer = await self._requests.once(caller, batch, mine)
        except PerdureError as error:
            await self._keeper.give_up(claim)
            if isinstance(error, Conflict):
                await self._pending(tenant, upload_id)  # says what it has become meanwhile
            raise
        if answer is not mine:
            await self._keeper.give_up(claim)
        return answer

    async def complete(self, caller: Caller, upload_id: str, sent: Any) -> bytes:
        """Make the file; returns the upload's wire body with the file in it. Of several such
        requests that are equal one makes it, and all get the same answer. Raises `NotFound`, and
        `WireError` for parts that are not there or not what was announced."""
        request = parse_complete_upload(sent)
        if (seen := await self._requests.recall(caller)) is not None and seen.attachment:
            return seen.attachment
        try:
            made = await self._made(caller.tenant, upload_id, request)
            return made or await self._complete(caller, upload_id, request)
        except (Conflict, Missing, WireError):  # it may have ended meanwhile, and its parts be gone
            made = await self._made(caller.tenant, upload_id, request)
            if made is None:
                await self._pending(caller.tenant, upload_id)  # says what else it has become
                raise
            return made

    async def _made(self, tenant: str, upload_id: str, request: CompleteUpload) -> bytes | None:
        """The answer to the equal request that completed the upload, while its file is there."""
        held = await self._state.uploads.get(tenant, upload_id)
        upload = held.value
        if upload.file_id is None or upload.completed_by != _digest(request):
            return None
        try:
            file = await self._files.get(tenant, upload.file_id)
        except Missing:
            return None
        return encode(_shown(held, self._files.shown(file)))

    async def _complete(self, caller: Caller, upload_id: str, request: CompleteUpload) -> bytes:
        held = await self._pending(caller.tenant, upload_id)
        upload = held.value
        parts = await self._named(held, request.part_ids)
        described = CreateFile(upload.filename, upload.purpose, upload.expires_after_s)
        file = self._files.new(described, tuple(part.value.piece for part in parts))
        if file.size_bytes != upload.size_bytes:
            raise WireError(
                f"The parts have {file.size_bytes} bytes in all, and {upload.size_bytes} were "
                "announced.",
                param="part_ids",
                code="upload_size_mismatch",
            )
        key = (caller.tenant, self._clock.new_id("file").replace("_", "-"))
        made = Record(key, 1, file, b"".join(part.attachment or b"" for part in parts))
        if request.md5 is not None:
            await self._check_md5(made, request.md5)
        due_at_s = int(self._clock.now_s()) + ENDED_KEPT_S
        ended = msgspec.structs.replace(upload, status=UploadStatus.COMPLETED)
        answer = encode(_shown(Record(held.key, 0, ended), self._files.shown(made)))
        passed = [(owner_of_part(part.key[-1]), _reference(part)) for part in parts]
        batch = (
            self._state.files.create(key, file, made.attachment or b"")
            + self._state.uploads.end(
                held,
                UploadStatus.COMPLETED,
                due_at_s,
                file_id=key[-1],
                completed_by=_digest(request),
            )
            + self._state.uploads.remove(parts)
            + self._keeper.uses.pass_on(caller.tenant, passed, owner_of(key[-1]))
        )
        answer = await self._requests.once(caller, batch, answer)
        await self._clear(held)
        return answer

    async def cancel(self, caller: Caller, upload_id: str) -> bytes:
        """Give an upload up, with its parts; returns its wire body. Raises `NotFound`, and
        `WireError` for one that is not pending."""
        if (seen := await self._requests.recall(caller)) is not None and seen.attachment:
            return seen.attachment
        held = await self._pending(caller.tenant, upload_id)
        ended = msgspec.structs.replace(held.value, status=UploadStatus.CANCELLED)
        due_at_s = int(self._clock.now_s()) + ENDED_KEPT_S
        answer = await self._requests.once(
            caller,
            self._state.uploads.end(held, UploadStatus.CANCELLED, due_at_s),
            encode(_shown(Record(held.key, 0, ended))),
        )
        await self._clear(held)
        return answer

    async def sweep(self) -> None:
        """End the uploads whose hour is over, forget those that ended a day ago, and let go of
        whatever parts they still have."""
        now_s = int(self._clock.now_s())
        while due := await self._state.uploads.due(now_s, limit=_PIECE):
            for held in due:
                pending = held.value.status is UploadStatus.PENDING
                try:
                    if pending:
                        await self._state.commit(
                            self._state.uploads.end(
                                held, UploadStatus.EXPIRED, now_s + ENDED_KEPT_S
                            )
                        )
                    await self._clear(held)
                    if not pending:
                        await self._state.commit(self._state.uploads.forget(held))
                except Conflict:
                    continue  # it was completed or cancelled in the meantime

    async def _pending(self, tenant: str, upload_id: str) -> HeldUpload:
        """An upload that can still change. Raises `NotFound` and `WireError`."""
        held = await self._state.uploads.get(tenant, upload_id)
        status = held.value.status
        if status is UploadStatus.PENDING and held.value.expires_at_s > self._clock.now_s():
            return held
        became = UploadStatus.EXPIRED if status is UploadStatus.PENDING else status
        raise WireError(
            f"Upload '{upload_id}' is {became.value}; nothing can be added to it or changed. "
            "Create a new upload.",
            param="upload_id",
            code=f"upload_{became.value}",
        )

    async def _check_room(self, held: HeldUpload) -> None:
        """Parts whose answer was lost may lie beside those that will be named, so there is room
        for twice what was announced, and no more."""
        count = size_bytes = 0
        async for part in self._state.uploads.parts(held.key):
            count += 1
            size_bytes += part.value.piece.size_bytes
        if count >= PARTS_MAX:
            raise LimitExceeded("the number of parts", count + 1, PARTS_MAX)
        if size_bytes >= 2 * held.value.size_bytes:
            raise LimitExceeded(
                "what lies in parts, in bytes,", size_bytes, 2 * held.value.size_bytes
            )

    async def _named(self, held: HeldUpload, part_ids: Sequence[str]) -> list[HeldPart]:
        found: list[HeldPart] = []
        parts = await self._state.uploads.named(held.key, part_ids)
        for place, part in enumerate(parts):
            if part is None:
                raise WireError(
                    f"Upload '{held.key[-1]}' has no part '{part_ids[place]}'.",
                    param=f"part_ids[{place}]",
                    code="upload_part_not_found",
                )
            found.append(part)
        return found

    async def _check_md5(self, made: Any, md5: str) -> None:
        """Raises `WireError` where the bytes have another one."""
        state = hashlib.md5(usedforsecurity=False)
        async for part in self._files.content(made):
            await off_loop(state.update, part)
        digest = state.digest()
        if md5.lower() != digest.hex() and md5 != base64.b64encode(digest).decode():
            raise WireError(
                f"The parts, in this order, have the MD5 {digest.hex()}, not '{md5}'.",
                param="md5",
                code="upload_md5_mismatch",
            )

    async def _clear(self, held: HeldUpload) -> None:
        """Let go of the parts of an upload that has ended: none can come any more."""
        parts = [part async for part in self._state.uploads.parts(held.key)]
        for start in range(0, len(parts), _PIECE):
            piece = parts[start : start + _PIECE]
            leaving = [
                self._keeper.leaving(
                    held.key[0], part.value.piece.digest, part.value.piece.size_bytes
                )
                for part in piece
            ]
            await self._state.commit(
                self._state.uploads.remove(piece)
                + join(
                    self._keeper.uses.let_go(claim, owner_of_part(part.key[-1]))
                    for claim, part in zip(leaving, piece, strict=True)
                )
            )
            await self._files.forget(leaving)


def _digest(request: CompleteUpload) -> str:
    """By which an equal request is known again."""
    return hashlib.sha256(encode(request)).hexdigest()


def _reference(part: HeldPart) -> Reference:
    return Reference(part.value.piece.digest, part.value.piece.size_bytes)


def _shown(held: HeldUpload, file: FileObject | None = None) -> UploadObject:
    upload = held.value
    return UploadObject(
        id=held.key[-1],
        bytes=upload.size_bytes,
        created_at=upload.created_at_s,
        expires_at=upload.expires_at_s,
        filename=upload.filename,
        purpose=upload.purpose,
        status=upload.status.value,
        file=file,
    )
