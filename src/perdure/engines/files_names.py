"""Where a record or a stream lies: names of files that a person can read and that no id escapes.

A collection declares a path, such as `notes/*/*`, and each segment of a key takes the place of a
star: `notes/box/1.json`. Several collections may share a directory. The default tenant is left
out; those of others lie under `@tenants`. What belongs to the engine lies in `.perdure`.

Invariants
- The encoding is injective, and stays so on a file system that ignores case or normalises text:
  only lower-case ASCII letters, digits, `-`, `_` and `.` stand for themselves, everything else is
  percent-encoded. No name begins with a dot, so none is `..`, hidden, or the engine's own.
- No two collections have a file in common, nor one a file where another has a directory, whatever
  the ids: a store in which they could is not opened.
- A long name is cut and ends with `~` and a hash. Names are never believed: the file holds the true
  key, and one that holds another is damaged.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from perdure.core.errors import Invalid
from perdure.core.keys import DEFAULT_TENANT, Key
from perdure.core.layouts import Layout, Records

OWN = ".perdure"
_TENANTS = "@tenants"
_PLAIN = frozenset(b"abcdefghijklmnopqrstuvwxyz0123456789-_.")
NAME_BYTES_MAX = 200
"""Of an encoded segment, which leaves room for suffixes within the 255 bytes of a name."""

_HASH_BYTES = 16
_STAR = "*"
_RECORD, _STREAM = ".json", ".jsonl"


def encoded(segment: str) -> str:
    """A segment as a name."""
    data = segment.encode()
    parts = [chr(byte) if byte in _PLAIN else f"%{byte:02x}" for byte in data]
    if parts[0] == ".":
        parts[0] = "%2e"
    name = "".join(parts)
    if len(name) <= NAME_BYTES_MAX:
        return name
    digest = hashlib.blake2b(data, digest_size=_HASH_BYTES).hexdigest()
    kept = name[: NAME_BYTES_MAX - len(digest) - 1]
    return f"{kept.rpartition('%')[0] if '%' in kept[-2:] else kept}~{digest}"


class Tree:
    """Where below a root the collections of a store lie."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._parts: dict[str, tuple[str, ...]] = {}
        self._shapes: dict[str, tuple[str, ...]] = {}

    def declare(self, layout: Layout) -> None:
        """Take a collection in as it declares itself. Raises `Invalid`."""
        self.add(layout.name, layout.path, is_records=isinstance(layout, Records))

    def add(self, collection: str, path: str, *, is_records: bool) -> None:
        """Take a collection in. Raises `Invalid` where one of its files could be another's file or
        directory."""
        parts = tuple(part if part == _STAR else encoded(part) for part in path.split("/"))
        shape = (*parts[:-1], parts[-1] + (_RECORD if is_records else _STREAM))
        for other, known in self._shapes.items():
            if all(map(_can_meet, shape, known)):
                raise Invalid(
                    f"{self.root}: files of {collection} ({'/'.join(shape)}) and of {other} "
                    f"({'/'.join(known)}) could meet. Declare another path for one of them."
                )
        self._parts[collection], self._shapes[collection] = parts, shape

    def record(self, collection: str, key: Key) -> Path:
        """The file of a record."""
        return self._path(collection, key, _RECORD)

    def attachment(self, collection: str, key: Key, version: int) -> Path:
        """The file of the attachment that one version of a record has."""
        return self._path(collection, key, f".{version}.bin")

    def stream(self, log: str, key: Key) -> Path:
        """The file of a stream."""
        return self._path(log, key, _STREAM)

    def _path(self, collection: str, key: Key, suffix: str) -> Path:
        tenant, *rest = key
        segments = iter(rest)
        names = [
            encoded(next(segments)) if part == _STAR else part for part in self._parts[collection]
        ]
        names[-1] += suffix
        top = self.root if tenant == DEFAULT_TENANT else self.root / _TENANTS / encoded(tenant)
        return top.joinpath(*names)


def _can_meet(one: str, other: str) -> bool:
    """Whether some id makes these two names the same; a star stands at the beginning of one."""
    if one.startswith(_STAR) and other.startswith(_STAR):
        ends = one[1:], other[1:]
        return ends[0].endswith(ends[1]) or ends[1].endswith(ends[0])
    if other.startswith(_STAR):
        one, other = other, one
    return other.endswith(one[1:]) if one.startswith(_STAR) else one == other
