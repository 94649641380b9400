"""What is left of the write-ahead log after a crash, and the mark that tells loss from a torn tail.

Each transaction writes its commit number, as a *stamp*, into page 2 of the database; after its
fsync the same number goes, un-synced, into the *mark* beside the database (core/mark.py). SQLite
recovers the log up to the first frame whose cumulative checksum fails. What follows it is either
- the last group, whose fsync never returned: legal, nobody was told; it is cut and reported; or
- more, because an earlier, synced transaction was damaged: acknowledged commits are gone, and
  which keys they changed cannot be known. Then a stamp two above the recovered one may still
  stand in the log (its group was written only after the one before it was durable), or the mark
  is above the recovered number.

Invariant: a transaction writes its number only over the one before it. So an owner whose lock file
was removed, and whose store another process took since, can write nothing more.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

import apsw
import msgspec
import xxhash

from perdure.core.values import Finding
from perdure.engines.sqlite_driver import PAGE_BYTES
from perdure.engines.sqlite_schema import SQL

_STAMP = b"perdure\x01"
_STAMP_BYTES = len(_STAMP) + 16
_STAMP_PAGE = 2
_WAL_HEADER_BYTES = 32
_FRAME_HEADER_BYTES = 24
FRAME_BYTES = _FRAME_HEADER_BYTES + PAGE_BYTES


def stamp(number: int) -> bytes:
    """The commit number as it is kept in the database."""
    body = _STAMP + number.to_bytes(8)
    return body + xxhash.xxh3_64_digest(body)


def read_stamp(data: bytes) -> int | None:
    """The number in a stamp, None where it is not one."""
    body, digest = data[:-8], data[-8:]
    if len(data) != _STAMP_BYTES or xxhash.xxh3_64_digest(body) != digest:
        return None
    return int.from_bytes(body[len(_STAMP) :])


def advance(connection: apsw.Connection, number: int) -> bool:
    """Stamp the transaction as commit `number`; whether the commit before it is the last one."""
    connection.execute(SQL["next_stamp"], (stamp(number), stamp(number - 1)))
    return connection.changes() == 1


class PostMortem(msgspec.Struct, frozen=True):
    """What stands in a log behind the frames SQLite recovered."""

    cut: tuple[Finding, ...]
    newest: int
    """The highest commit number stamped into the frames that were not recovered."""


def examine(path: Path, recovered_frames: int) -> PostMortem:
    """Look behind the recovered frames of the log at `path`.

    A log whose header is torn has no frames: it is a new one, of which nothing was acknowledged,
    unless a stamp says otherwise.
    """
    end = _WAL_HEADER_BYTES + recovered_frames * FRAME_BYTES
    if not path.exists() or path.stat().st_size <= end:
        return PostMortem((), 0)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as log:
        salt = log[16:24]
        torn = len(log) - end < FRAME_BYTES
        newest = 0
        for frame in range(end, len(log), FRAME_BYTES):
            torn = torn or log[frame + 8 : frame + 16] == salt
            if int.from_bytes(log[frame : frame + 4]) == _STAMP_PAGE:
                page = log[frame + _FRAME_HEADER_BYTES : frame + FRAME_BYTES]
                newest = max(newest, *_stamps(page), 0)
    why = "a transaction that was never acknowledged was cut off"
    return PostMortem((Finding(f"{path}:{end}", why, "cut"),) if torn else (), newest)


def _stamps(page: bytes) -> Iterator[int]:
    at = page.find(_STAMP)
    while at >= 0:
        number = read_stamp(page[at : at + _STAMP_BYTES])
        if number is not None:
            yield number
        at = page.find(_STAMP, at + 1)
