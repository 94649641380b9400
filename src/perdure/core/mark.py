"""The mark: the number of the last durable commit, kept beside a log of commits.

A commit's number is written here, un-synced, after its fsync has returned and before anybody is
told. After a crash a log that ends earlier than its mark has lost what was acknowledged, which
nothing in the log itself may show.

Invariant: the mark never exceeds a number whose fsync has returned, so a power cut may lower it
and never raise it.
"""

from __future__ import annotations

import os
from pathlib import Path

import xxhash

from perdure.core.disk import Disk

_SLOT_BYTES = 512


class Mark:
    """Two slots, written in turn, so that a torn write leaves the other. Bound to the store, so a
    mark of another one counts for nothing."""

    def __init__(self, disk: Disk, path: Path, store_id: str) -> None:
        self._disk = disk
        self._store = store_id.encode()
        self._fd = disk.open_fixed(path, 2 * _SLOT_BYTES)

    def write(self, number: int) -> None:
        """Record that `number` is durable. Not synced: its loss is legal."""
        slot = _slot(number, self._store)
        self._disk.overwrite(self._fd, slot, number % 2 * _SLOT_BYTES)

    def close(self) -> None:
        """Release the file."""
        os.close(self._fd)


def read_mark(path: Path, store_id: str) -> int:
    """The highest number in a mark's sound slots; 0 where there is none."""
    if not path.exists():
        return 0
    data = path.read_bytes()
    found = 0
    for start in (0, _SLOT_BYTES):
        number = int.from_bytes(data[start : start + 8])
        if data[start : start + 16] == _slot(number, store_id.encode()):
            found = max(found, number)
    return found


def _slot(number: int, store: bytes) -> bytes:
    body = number.to_bytes(8)
    return body + xxhash.xxh3_64_digest(body + store)
