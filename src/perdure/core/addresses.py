"""Addresses of stores and servers as people may see them: in listings, in errors, in logs."""

from __future__ import annotations

from urllib.parse import parse_qsl, urlencode

_SECRET = {"user", "password", "passfile", "sslpassword"}


def without_credentials(url: str) -> str:
    """The URL without the names and passwords in it. What names a file or nothing has none."""
    scheme, separator, rest = url.partition("://")
    if not separator or scheme in ("sqlite", "file"):
        return url
    place, _, query = rest.partition("?")
    host, slash, path = place.partition("/")
    pairs = [(name, value) for name, value in parse_qsl(query, True) if name not in _SECRET]
    shown = urlencode(pairs, safe="/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}{'?' * bool(shown)}{shown}"
