"""Blobs in memory: the shortest way to keep `core.blobs`, for `memory://` and for tests."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterable, AsyncIterator
from contextlib import AbstractAsyncContextManager, nullcontext

from perdure.core.blobs import Blob, Publishing, absent, check_digest, check_range, unclaimed
from perdure.core.errors import Closed, Damaged, LimitExceeded
from perdure.core.values import Finding


class MemoryBlobs:
    """See `core.blobs.Blobs`."""

    url = "memory://"
    recovered: tuple[Finding, ...] = ()

    def __init__(self) -> None:
        self._bytes: dict[str, bytes] = {}
        self._closed = False

    async def put(
        self,
        chunks: AsyncIterable[bytes],
        *,
        size_bytes_max: int,
        publishing: Publishing = unclaimed,
    ) -> Blob:
        self._check_open()
        data = bytearray()
        async for chunk in chunks:
            data += chunk
            if len(data) > size_bytes_max:
                raise LimitExceeded("the blob, in bytes,", len(data), size_bytes_max)
        blob = Blob(hashlib.sha256(data).hexdigest(), len(data))
        async with publishing(blob):
            self._check_open()
            self._bytes[blob.digest] = bytes(data)
        return blob

    async def size(self, digest: str) -> int | None:
        self._check_open()
        data = self._bytes.get(check_digest(digest))
        return None if data is None else len(data)

    async def read(
        self, digest: str, *, start: int = 0, size_bytes: int | None = None
    ) -> AsyncIterator[bytes]:
        self._check_open()
        check_range(start, size_bytes)
        data = self._bytes.get(check_digest(digest))
        if data is None:
            raise absent(digest)
        end = len(data) if size_bytes is None else start + size_bytes
        if start == 0 and end >= len(data) and hashlib.sha256(data).hexdigest() != digest:
            raise Damaged(f"the blob {digest}", "its bytes have another digest")
        if part := data[start:end]:
            yield part

    async def drop(self, digest: str) -> None:
        self._check_open()
        self._bytes.pop(check_digest(digest), None)

    def dropping(self, digest: str) -> AbstractAsyncContextManager[None]:
        return nullcontext()  # nobody shares it

    async def list(self) -> AsyncIterator[Blob]:
        self._check_open()
        for digest, data in sorted(self._bytes.items()):
            yield Blob(digest, len(data))

    async def verify(self) -> AsyncIterator[Finding]:
        self._check_open()
        for digest, data in sorted(self._bytes.items()):
            if hashlib.sha256(data).hexdigest() != digest:
                yield Finding(f"the blob {digest}", "its bytes have another digest")

    async def close(self) -> None:
        self._closed = True

    def _check_open(self) -> None:
        if self._closed:
            raise Closed("the blobs in memory were closed.")
