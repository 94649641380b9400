"""Where a record or a stream lies: names of files that a person can read and that no id escapes.

A key becomes a path of one directory a segment: `notes/box/1.json`. The default tenant is left
out; those of others lie under `@tenants`. What belongs to the engine lies in `.perdure`.

Invariants
- The encoding is injective, and stays so on a file system that ignores case or normalises text:
  only lower-case ASCII letters, digits, `-`, `_` and `.` stand for themselves, everything else is
  percent-encoded. No name begins with a dot, so none is `..`, hidden, or the engine's own.
- A long name is cut and ends with `~` and a hash. Names are never believed: the file holds the true
  key, and one that holds another is damaged.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from perdure.core.keys import DEFAULT_TENANT, Key

OWN = ".perdure"
_TENANTS = "@tenants"
_PLAIN = frozenset(b"abcdefghijklmnopqrstuvwxyz0123456789-_.")
NAME_BYTES_MAX = 200
"""Of an encoded segment, which leaves room for suffixes within the 255 bytes of a name."""

_HASH_BYTES = 16


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


def path_of(root: Path, collection: str, key: Key) -> Path:
    """The path of a record or stream, before its suffix."""
    tenant, *rest = key
    top = root if tenant == DEFAULT_TENANT else root / _TENANTS / encoded(tenant)
    return top.joinpath(encoded(collection), *map(encoded, rest or (tenant,)))


def record_path(root: Path, collection: str, key: Key) -> Path:
    """The file of a record."""
    return _with_suffix(path_of(root, collection, key), ".json")


def attachment_path(root: Path, collection: str, key: Key, version: int) -> Path:
    """The file of the attachment that one version of a record has."""
    return _with_suffix(path_of(root, collection, key), f".{version}.bin")


def log_path(root: Path, collection: str, key: Key) -> Path:
    """The file of a stream."""
    return _with_suffix(path_of(root, collection, key), ".jsonl")


def _with_suffix(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)
