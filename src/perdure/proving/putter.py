"""A program that puts known blobs, and prints what was acknowledged.

`python -m perdure.proving.putter DIRECTORY FIRST`: first `ready`, then the number of every blob
that was put, from FIRST on, written out before the next is begun. It goes on until it is killed;
blobs that refuse by name end it with `refused` and the code.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from perdure.core.clock import SystemClock
from perdure.core.disk import Disk
from perdure.core.errors import PerdureError
from perdure.engines.blobs_local import LocalBlobs

BLOB_BYTES_MAX = 1_000_000
_CHUNK_BYTES = 5_000


def content(number: int) -> bytes:
    """The bytes of a blob. They are of many sizes, so that a death falls between two chunks."""
    return f"blob {number} ".encode() * (1 + number * 7919 % 50_000)


def digest_of(number: int) -> str:
    """The name of a blob."""
    return hashlib.sha256(content(number)).hexdigest()


async def chunks(number: int) -> AsyncIterator[bytes]:
    """The bytes of a blob as they arrive."""
    data = content(number)
    for start in range(0, len(data), _CHUNK_BYTES):
        yield data[start : start + _CHUNK_BYTES]


async def _put(root: Path, first: int) -> None:
    blobs = await LocalBlobs.open(root, disk=Disk(), clock=SystemClock())
    os.write(1, b"ready\n")
    number = first
    while True:
        await blobs.put(chunks(number), size_bytes_max=BLOB_BYTES_MAX)
        os.write(1, b"%d\n" % number)
        number += 1


def main(arguments: Sequence[str]) -> None:
    """See the head of this file."""
    root, first = arguments
    try:
        asyncio.run(_put(Path(root), int(first)))
    except PerdureError as error:
        os.write(1, f"refused {error.code}\n".encode())


if __name__ == "__main__":
    main(sys.argv[1:])
