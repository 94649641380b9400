"""Blobs in an S3-compatible store: `PREFIX/ab/ab34...` is a published blob, as in a directory.

Invariants
- An object is there whole or not at all: it appears when the store has acknowledged all of it. What
  fits into one part is sent once its digest is known; what does not, on its way, under
  `PREFIX/incoming/`, and is copied to its name by the store itself. Bytes are signed as they are
  sent, so S3 refuses what arrives as something else; where a lax imitation of it does not, reading
  does.
- What cannot be learned from the store is `Unavailable`, and never taken for absence, for an end,
  or for damage: a bucket that is gone, a connection that is cut, a server that does not answer.
- Bytes are read by ranges, each a question of its own that may be asked again; an object never
  changes, so they fit together. A whole read is held to the digest before its last bytes are given.
- Nobody but the store (`owner`) that was here first writes here: another one would sweep the bytes
  it knows nothing of.

Credentials come from where those of AWS do: the environment, a role, never the URL.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterable, AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager, nullcontext, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlsplit

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import S3Store

from perdure.core.blobs import Blob, Publishing, absent, check_digest, check_range, unclaimed
from perdure.core.clock import Clock
from perdure.core.errors import (
    Closed,
    Damaged,
    Invalid,
    LimitExceeded,
    PerdureError,
    StorageFull,
    Unavailable,
)
from perdure.core.limits import CLOCK_OFF_S
from perdure.core.values import Finding

if TYPE_CHECKING:
    from obstore import AsyncWritableFile

PART_BYTES = 8 * 1024 * 1024
"""What is sent at once. A blob that is not larger is one request."""

RANGE_BYTES = 4 * 1024 * 1024
BLOB_BYTES_MAX = 5 * 1024 * 1024 * 1024
"""The most that S3 copies in one piece."""

_OWNER = "owner"
_INCOMING = "incoming"
_ABANDONED_S = 24 * 3600
_CONNECT_S = 5
_RETRIES = 3
_DROP_S = 2
"""Who drops a blob holds off everybody who wants the same bytes, and for 3 seconds at most; so a
drop is asked for once, and given up sooner."""

_FULL = ("StorageFull", "QuotaExceeded", "507 ")


class S3Blobs:
    """See `core.blobs.Blobs`; made by `open`."""

    def __init__(self, url: str, clock: Clock, *, read_only: bool) -> None:
        self.url = url
        self.recovered: tuple[Finding, ...] = ()
        self._store = _connect(url, retries=_RETRIES)
        self._dropping = _connect(url, retries=0, timeout_s=_DROP_S)
        self._clock = clock
        self._read_only = read_only
        self._closed = False

    @classmethod
    async def open(
        cls, url: str, *, clock: Clock, owner: str | None, read_only: bool, shared: bool
    ) -> S3Blobs:
        """Find the bucket, and take the place in it for the store `owner`. What nobody can be
        sending any more is removed from `incoming/`. `read_only` changes nothing.

        Raises `Invalid` where the bucket does not exist, the place is another store's or the URL is
        not understood, and `Unavailable`.
        """
        blobs = cls(url, clock, read_only=read_only)
        await blobs._require_bucket()
        if not read_only:
            if owner is not None:
                await blobs._take(owner)
            old_s = clock.now_s() - _ABANDONED_S - CLOCK_OFF_S if shared else None
            blobs.recovered = tuple([left async for left in blobs._leftovers(old_s)])
            for left in blobs.recovered:
                await blobs._delete(left.where.removeprefix(f"{url} "))
        return blobs

    async def put(
        self,
        chunks: AsyncIterable[bytes],
        *,
        size_bytes_max: int,
        publishing: Publishing = unclaimed,
    ) -> Blob:
        self._check_writable()
        most = min(size_bytes_max, BLOB_BYTES_MAX)
        arriving = _Arriving(self._store, f"{_INCOMING}/{self._clock.new_id('blob')}")
        try:
            async for chunk in chunks:
                if (size_bytes := arriving.size_bytes + len(chunk)) > most:
                    raise LimitExceeded("the blob, in bytes,", size_bytes, most)
                with _translated(self.url):
                    await arriving.add(chunk)
            blob = Blob(arriving.hash.hexdigest(), arriving.size_bytes)
            with _translated(self.url):
                await arriving.end()
            async with publishing(blob):
                self._check_writable()
                with _translated(self.url):
                    await asyncio.shield(arriving.publish(_path(blob.digest)))
        finally:
            with suppress(BaseError, OSError):  # what is left there is found by the next start
                await asyncio.shield(arriving.discard())
        return blob

    async def size(self, digest: str) -> int | None:
        self._check_open()
        with _translated(self.url):
            try:
                return int((await self._store.head_async(_path(digest)))["size"])
            except FileNotFoundError:
                pass
        await self._require_bucket()
        return None

    async def read(
        self, digest: str, *, start: int = 0, size_bytes: int | None = None
    ) -> AsyncIterator[bytes]:
        self._check_open()
        check_range(start, size_bytes)
        stored = await self.size(digest)
        if stored is None:
            raise absent(digest)
        end = stored if size_bytes is None else min(stored, start + size_bytes)
        whole = start == 0 and end == stored
        seen = hashlib.sha256()
        while start < end:
            chunk = await self._range(digest, start, min(start + RANGE_BYTES, end))
            start += len(chunk)
            seen.update(chunk)
            if whole and start == end and seen.hexdigest() != digest:
                raise _damaged(digest)
            yield chunk
        if whole and not stored and seen.hexdigest() != digest:
            raise _damaged(digest)

    async def drop(self, digest: str) -> None:
        self._check_writable()
        await asyncio.shield(self._delete(_path(digest)))

    def dropping(self, digest: str) -> AbstractAsyncContextManager[None]:
        return nullcontext()  # what goes is asked for once, and given up soon: see `_DROP_S`

    async def list(self) -> AsyncIterator[Blob]:
        self._check_open()
        async for path, size_bytes, _ in self._objects(None):
            folder, _, name = path.rpartition("/")
            if len(name) == 2 * hashlib.sha256().digest_size and folder == name[:2]:
                yield Blob(name, size_bytes)

    async def verify(self) -> AsyncIterator[Finding]:
        async for blob in self.list():
            try:
                async for _ in self.read(blob.digest):
                    pass
            except Damaged as damage:
                yield Finding(damage.where, damage.why)
            except PerdureError as error:
                if await self.size(blob.digest) is not None:  # not dropped since it was listed
                    yield Finding(f"the blob {blob.digest}", str(error), "unreadable")
        async for left in self._leftovers(None):
            yield left

    async def close(self) -> None:
        self._closed = True

    async def _range(self, digest: str, start: int, end: int) -> bytes:
        with _translated(self.url):
            try:
                got = await self._store.get_range_async(_path(digest), start=start, end=end)
            except FileNotFoundError:
                got = None
        if got is None:
            await self._require_bucket()
            raise absent(digest)
        if len(got) != end - start:
            raise Unavailable(
                f"{self.url}: of the blob {digest} came {len(got)} bytes, and not {end - start}. "
                "Try again."
            )
        return bytes(got)

    async def _objects(self, prefix: str | None) -> AsyncIterator[tuple[str, int, float]]:
        """Path, size and time of each object."""
        pages = self._store.list(prefix)
        while True:
            with _translated(self.url):
                page = await anext(pages, None)
            if page is None:
                return
            for found in page:
                yield found["path"], found["size"], found["last_modified"].timestamp()

    async def _leftovers(self, before_s: float | None) -> AsyncIterator[Finding]:
        async for path, _, at_s in self._objects(_INCOMING):
            if before_s is None or at_s < before_s:
                yield Finding(f"{self.url} {path}", "bytes that were never published", "leftover")

    async def _delete(self, path: str) -> None:
        with _translated(self.url), suppress(FileNotFoundError):
            await self._dropping.delete_async(path)

    async def _take(self, owner: str) -> None:
        """Be the one store that keeps its bytes here. Raises `Invalid` where another does."""
        with _translated(self.url):
            try:
                await self._store.head_async(_OWNER)
            except FileNotFoundError:
                with suppress(AlreadyExistsError):
                    await self._store.put_async(_OWNER, owner.encode(), mode="create")
            found = bytes(await (await self._store.get_async(_OWNER)).bytes_async()).decode()
        if found != owner:
            raise Invalid(
                f"{self.url} keeps the bytes of another store, {found}, and this one, {owner}, "
                "would remove them as nobody's. Name another prefix. If that store is gone for "
                f"good, remove the object {_OWNER!r} there."
            )

    async def _require_bucket(self) -> None:
        """Absence means something only in a bucket that is there. Raises `Unavailable`."""
        with _translated(self.url):
            await self._store.list_with_delimiter_async(_OWNER)

    def _check_writable(self) -> None:
        self._check_open()
        if self._read_only:
            raise Invalid(f"{self.url} was opened for reading only.")

    def _check_open(self) -> None:
        if self._closed:
            raise Closed(f"{self.url} was closed.")


class _Arriving:
    """Bytes on their way: held here while they are one part, sent on as soon as they are more."""

    def __init__(self, store: S3Store, path: str) -> None:
        self.hash = hashlib.sha256()
        self.size_bytes = 0
        self._store = store
        self._path = path
        self._held = bytearray()
        self._writer: AsyncWritableFile | None = None
        self._sent = False

    async def add(self, chunk: bytes) -> None:
        self.hash.update(chunk)
        self.size_bytes += len(chunk)
        self._held += chunk
        if len(self._held) >= PART_BYTES:
            if self._writer is None:
                self._writer = obstore.open_writer_async(
                    self._store, self._path, buffer_size=PART_BYTES, max_concurrency=2
                )
            await self._writer.write(bytes(self._held))
            self._held.clear()

    async def end(self) -> None:
        """All of it was added: what was sent on is completed."""
        if self._writer is not None:
            await self._writer.write(bytes(self._held))
            self._sent = True
            await self._writer.close()

    async def publish(self, path: str) -> None:
        if self._sent:
            await self._store.copy_async(self._path, path)
        else:
            await self._store.put_async(path, bytes(self._held))

    async def discard(self) -> None:
        """Remove what was sent on. Parts that were never completed are nothing that can be seen;
        the bucket's own rule removes them."""
        if self._sent:
            await self._store.delete_async(self._path)


def _connect(url: str, *, retries: int, timeout_s: int | None = None) -> S3Store:
    """A client of `s3://BUCKET[/PREFIX][?endpoint=URL&region=NAME&timeout_s=N]`, or one of another
    patience."""
    parts = urlsplit(url)
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    endpoint, region = options.pop("endpoint", None), options.pop("region", None)
    asked_s = options.pop("timeout_s", "60")
    known = asked_s.isdecimal() and 1 <= int(asked_s) <= 3600 and not options
    if not parts.netloc or "@" in parts.netloc or parts.fragment or not known:
        raise Invalid(
            "blobs in S3 are named s3://BUCKET/PREFIX?endpoint=URL&region=NAME&timeout_s=60, of "
            "which the bucket is needed. Keys are not part of it: put them into AWS_ACCESS_KEY_ID "
            "and AWS_SECRET_ACCESS_KEY."
        )
    patience = timedelta(seconds=timeout_s or int(asked_s))
    more: dict[str, Any] = {"endpoint": endpoint, "region": region}
    return S3Store(
        parts.netloc,
        prefix=parts.path.strip("/") or None,
        client_options={
            "allow_http": (endpoint or "").startswith("http://"),
            "connect_timeout": min(patience, timedelta(seconds=_CONNECT_S)),
            "timeout": patience,
        },
        retry_config={"max_retries": retries, "retry_timeout": patience},
        **{name: value for name, value in more.items() if value is not None},
    )


@contextmanager
def _translated(url: str) -> Iterator[None]:
    """Raise what the client says inside the block as ours."""
    try:
        yield
    except (BaseError, OSError) as error:
        why = str(error).split("\n")[0]
        if "NoSuchBucket" in why:
            raise Unavailable(
                f"{url}: there is no such bucket. Make it, or correct the URL."
            ) from error
        if any(word in why for word in _FULL):
            raise StorageFull(
                f"{url}: the object store is full ({why}). Nothing was stored; it will work again "
                "once there is space."
            ) from error
        raise Unavailable(f"{url}: the object store did not do it ({why}). Try again.") from error


def _path(digest: str) -> str:
    return f"{check_digest(digest)[:2]}/{digest}"


def _damaged(digest: str) -> Damaged:
    return Damaged(f"the blob {digest}", "its bytes have another digest")
