"""The blobs protocol: content-addressed bytes beside the engine.

A blob is named by the SHA-256 of its bytes, so writing the same bytes twice keeps one copy. Who
may need a blob is not known here: claims and references are records (surfaces/blobs.py), and a
sweep drops only digests that have neither.
"""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator
from typing import Protocol

import msgspec

from perdure.core.values import Finding


class Blob(msgspec.Struct, frozen=True):
    """A stored blob: lower-case hex SHA-256 of its bytes, and their number."""

    digest: str
    size_bytes: int


class Blobs(Protocol):
    """Where blobs are kept. `Damaged` names the blob whose bytes do not match its digest."""

    url: str

    async def put(self, chunks: AsyncIterable[bytes], *, size_bytes_max: int) -> Blob:
        """Store bytes as they arrive, in flat memory; durable, directory entry included, when it
        returns. A failure or a kill on the way leaves nothing a reader can see.

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

    def list(self) -> AsyncIterator[Blob]:
        """Every stored blob, in the order of digests."""
        ...

    def verify(self) -> AsyncIterator[Finding]:
        """Read every blob and yield those whose bytes do not match, and leftover temporaries."""
        ...

    async def close(self) -> None:
        """Release what is held. Closing twice is harmless."""
        ...
