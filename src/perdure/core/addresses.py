"""Addresses of stores and servers as people may see them: in listings, in errors, in logs."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import parse_qsl, urlencode

_SECRET = {"user", "password", "passfile", "sslpassword"}


SHARDS = "shards:"
_NEXT_URL = re.compile(r",(?=[a-z]+://)")
"""A comma may also stand within a URL, between hosts."""


def shards_of(url: str) -> list[str]:
    """The URLs of the shards that `shards:URL,URL,...` names; none of any other."""
    return _NEXT_URL.split(url.removeprefix(SHARDS)) if url.startswith(SHARDS) else []


def of_shards(urls: Iterable[str]) -> str:
    """The one URL of several shards."""
    return SHARDS + ",".join(urls)


def store_path(url: str) -> Path | None:
    """Where a store is that lies in files of its own."""
    scheme, _, path = url.partition(":///")
    return Path(path) if scheme in ("sqlite", "file") else None


def without_credentials(url: str) -> str:
    """The URL without the names and passwords in it. What names a file or nothing has none."""
    if shards := shards_of(url):
        return of_shards(map(without_credentials, shards))
    scheme, separator, rest = url.partition("://")
    if not separator or scheme in ("sqlite", "file"):
        return url
    place, _, query = rest.partition("?")
    host, slash, path = place.partition("/")
    pairs = [(name, value) for name, value in parse_qsl(query, True) if name not in _SECRET]
    shown = urlencode(pairs, safe="/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}{'?' * bool(shown)}{shown}"
