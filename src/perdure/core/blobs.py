"""The blobs protocol: content-addressed bytes beside the engine.

A blob is named by the SHA-256 of its bytes, so writing the same bytes twice keeps one copy. Who
may need a blob is not known here: claims and references are records (surfaces/blobs.py), and a
sweep drops only digests that have neither.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterable, AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import Protocol

import msgspec

from perdure.core.errors import Invalid, Missing
from perdure.core.values import Finding

_DIGEST = re.compile(r"[0-9a-f]{64}")


class Blob(msgspec.Struct, frozen=True):
    """A stored blob: lower-case hex SHA-256 of its bytes, and their number."""

    digest: str
    size_bytes: int


Publishing = Callable[[Blob], AbstractAsyncContextManager[None]]
"""Entered when a blob's bytes are complete and nobody can see them yet, left once they can be
seen. Whoever means to keep the blob commits a claim there; if it raises, nothing is published."""


def unclaimed(blob: Blob) -> AbstractAsyncContextManager[None]:
    """Publish without a claim: the next sweep may take the blob."""
    return nullcontext()


class Blobs(Protocol):
    """Where blobs are kept. `Damaged` names the blob whose bytes do not match its digest. A
    digest that is not lower-case hex SHA-256 is `Invalid`; after `close` everything is `Closed`.
    """

    url: str

    recovered: tuple[Finding, ...]
    """What opening removed: bytes of a `put` that a crash cut short."""

    async def put(
        self,
        chunks: AsyncIterable[bytes],
        *,
        size_bytes_max: int,
        publishing: Publishing = unclaimed,
    ) -> Blob:
        """Store bytes as they arrive, in flat memory; durable, directory entry included, when it
        returns. A failure or a kill on the way leaves nothing a reader can see.

        Bytes that are stored already are written again all the same: what an earlier write left
        behind, damaged or never synced, is not built upon.

        Raises `LimitExceeded` past `size_bytes_max`, and `StorageFull`.
        """
        ...

    async def size(self, digest: str) -> int | None:
        """Size in bytes of a stored blob, or None. Does not read the bytes."""
        ...

    def read(
        self, digest: str, *, start: int = 0, size_bytes: int | None = None
    ) -> AsyncIterator[bytes]:
        """Bytes from `start`, at most `size_bytes`. A read of the whole blob is verified against
        the digest and raises `Damaged` before its last chunk is given out; `Missing` if absent.
        """
        ...

    async def drop(self, digest: str) -> None:
        """Forget a blob; durable when it returns. Dropping what is absent changes nothing."""
        ...

    def dropping(self, digest: str) -> AbstractAsyncContextManager[None]:
        """Entered before the last look at who needs a blob, left when it was dropped or is to stay.
        Meanwhile, however long this process stands still, no `put` that shares the place shows
        these bytes: it waits, then raises `Unavailable`. An object store cannot keep anybody out.

        Raises `StoreLocked` while another process drops it, and `Missing`.
        """
        ...

    def list(self) -> AsyncIterator[Blob]:
        """Every stored blob, in the order of digests."""
        ...

    def verify(self) -> AsyncIterator[Finding]:
        """Read every blob and yield those whose bytes do not match, and leftover temporaries."""
        ...

    async def close(self) -> None:
        """Release what is held. Closing twice is harmless."""
        ...


def check_digest(digest: str) -> str:
    """The digest, if it has the form of one: what is not never reaches a path. Raises `Invalid`."""
    if not _DIGEST.fullmatch(digest):
        raise Invalid(f"{digest[:80]!r} is not a lower-case hex SHA-256.")
    return digest


def check_range(start: int, size_bytes: int | None) -> None:
    """Refuse a range that is none. Raises `Invalid`."""
    if start < 0 or (size_bytes is not None and size_bytes < 0):
        raise Invalid(f"bytes are read from 0 on, not {size_bytes} from {start}.")


def absent(digest: str) -> Missing:
    """The error for a blob that is not stored."""
    return Missing(f"the blob {digest} is not stored.")
