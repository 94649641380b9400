"""What a job holds: all that its request was accepted with and that others may delete meanwhile.

Deleting a file or an earlier response succeeds at once, and what was accepted before is still done
as it was accepted: the job keeps the items of earlier turns as they were read, and refers to the
blobs of every file that is named in them or in its own input. Both go in the commit of its end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from perdure.core.batch import Batch
from perdure.core.blobs import Blob
from perdure.core.errors import Damaged, Missing
from perdure.core.keys import Key, show
from perdure.core.values import Record
from perdure.services.attachments import named_files
from perdure.services.files import Files
from perdure.surfaces.blobs import Claim
from perdure.surfaces.files import File
from perdure.surfaces.files import Held as HeldFile
from perdure.surfaces.jobs import JOB_INPUTS, Held, JobInput
from perdure.surfaces.state import State
from perdure.wire.items import Item


class Past(msgspec.Struct, frozen=True):
    """What a request builds on: the items of earlier turns as they are stored, and the files that
    are kept for it, by id. `ancestors` are what its response is to remember of its chain."""

    history: list[Item]
    files: dict[str, HeldFile] = {}
    ancestors: tuple[str, ...] = ()


class Taken(msgspec.Struct, frozen=True):
    """What a new job holds: `batch` makes it so, `blobs` stand in the job."""

    batch: Batch
    blobs: tuple[Blob, ...]


class _Kept(msgspec.Struct, frozen=True):
    """A file and the checksums of its blocks."""

    version: int
    file: File
    sums: bytes


class _Stored(msgspec.Struct, frozen=True):
    history: list[Item]
    files: dict[str, _Kept]


class Holds:
    """Takes and lets go of what the jobs of one state hold."""

    def __init__(self, state: State, files: Files) -> None:
        self._state = state
        self._files = files

    async def take(self, job: Key, history: Sequence[Item], items: Sequence[Item]) -> Taken:
        """Hold what a request of these items builds on. The commit raises `Conflict` where one of
        its files was deleted since."""
        tenant = job[0]
        files: dict[str, _Kept] = {}
        blobs: dict[str, Blob] = {}
        batch = Batch()
        for file_id in named_files([*history, *items]):
            try:
                held = await self._files.get(tenant, file_id)
            except Missing:
                continue  # of an earlier turn, and gone: the model was told so
            files[file_id] = _Kept(held.version, held.value, held.attachment or b"")
            for piece in held.value.pieces:
                blobs[piece.digest] = Blob(piece.digest, piece.size_bytes)
            batch += self._state.files.unchanged(held)
        if history or files:
            kept = msgspec.json.encode(_Stored(list(history), files))
            batch += self._state.jobs.keep(job, JobInput(len(history), len(files)), kept)
        batch += self._files.hold(tenant, blobs.values(), owner_of_job(job))
        return Taken(batch, tuple(blobs.values()))

    async def past(self, job: Held) -> Past:
        """What a job holds. Raises `Damaged`."""
        found = await self._state.jobs.kept(job.key)
        if found is None:
            return Past([])
        try:
            stored = _decode(found.attachment or b"")
        except msgspec.MsgspecError as error:
            raise Damaged(f"{JOB_INPUTS.name} {show(job.key)}", f"no input: {error}") from None
        files = {
            file_id: Record((job.key[0], file_id), kept.version, kept.file, kept.sums)
            for file_id, kept in stored.files.items()
        }
        return Past(stored.history, files)

    def leave(self, job: Held) -> tuple[Sequence[Record[Claim]], Batch]:
        """The batch to be committed with a job's end, and what to `forget` after it."""
        return self._files.leave(job.key[0], job.value.blobs, owner_of_job(job.key))

    async def forget(self, leaving: Sequence[Record[Claim]]) -> None:
        """Take away the bytes that nobody else needs."""
        await self._files.forget(leaving)


def owner_of_job(job: Key) -> str:
    """The name under which a job refers to blobs."""
    return f"jobs/{job[-1]}"


_decode: Callable[[bytes], _Stored] = msgspec.json.Decoder(_Stored).decode
