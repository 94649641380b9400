"""Keys: tuples of text segments, the first one the tenant, joined to one ordered text.

Invariant: `join` is injective and keeps tuple order. It holds because segments hold no control
character and the separator is one, which sorts before every character a segment may hold.
Nothing is normalised: NFC and NFD spellings of a name, or case twins, are different keys.
"""

from __future__ import annotations

import re

from perdure.core.errors import Invalid, LimitExceeded
from perdure.core.limits import KEY_BYTES_MAX, KEY_SEGMENTS_MAX, SEGMENT_BYTES_MAX

Key = tuple[str, ...]

DEFAULT_TENANT = "default"
SYSTEM_TENANT = "_system"
"""Tenant of what belongs to the installation. No API key maps to it: names of tenants that keys
carry start with a letter or digit."""

SEPARATOR = "\x1f"

_ABOVE_ALL = "\U0010ffff" * (SEGMENT_BYTES_MAX // 4 + 1)
_SEGMENT = re.compile(r"[^\x00-\x1f\x7f\ud800-\udfff]+")
_SHORT_ASCII_KEY = re.compile(r"[\x20-\x7e]{1,255}(?:\x1f[\x20-\x7e]{1,255}){0,7}")


def join(key: Key) -> str:
    """The stored text of a key.

    Raises `Invalid` for an empty key or segment, a control character or a lone surrogate, and
    `LimitExceeded` for too many segments, or too many bytes in one or in all of them.
    """
    try:
        text = SEPARATOR.join(key)
    except TypeError:
        raise Invalid(f"a key is a tuple of strings, not {key!r}.") from None
    if (
        len(text) <= KEY_BYTES_MAX
        and _SHORT_ASCII_KEY.fullmatch(text)
        and text.count(SEPARATOR) == len(key) - 1
    ):
        return text
    if not key:
        raise Invalid("a key needs at least one segment.")
    if len(key) > KEY_SEGMENTS_MAX:
        raise LimitExceeded("the number of key segments", len(key), KEY_SEGMENTS_MAX)
    for segment in key:
        _check_segment(segment)
    size_bytes = len(text.encode())
    if size_bytes > KEY_BYTES_MAX:
        raise LimitExceeded("the whole key, in bytes,", size_bytes, KEY_BYTES_MAX)
    return text


def split(text: str) -> Key:
    """The key whose stored text is `text`."""
    return tuple(text.split(SEPARATOR))


def span(prefix: Key) -> tuple[str, str]:
    """Bounds (low, high) such that a longer key starts with `prefix` iff low < text < high."""
    if not prefix:
        return "", _ABOVE_ALL
    text = join(prefix)
    return text + SEPARATOR, text + " "


def show(key: Key) -> str:
    """A key for people: slashes between segments, the default tenant elided."""
    shown = key[1:] if len(key) > 1 and key[0] == DEFAULT_TENANT else key
    return "/".join(shown)


def _check_segment(segment: str) -> None:
    if not segment:
        raise Invalid("a key segment is empty.")
    if not _SEGMENT.fullmatch(segment):
        raise Invalid(
            f"the key segment {segment[:40]!r} holds a control character or a lone surrogate."
        )
    size_bytes = len(segment.encode())
    if size_bytes > SEGMENT_BYTES_MAX:
        raise LimitExceeded(f"the key segment {segment[:20]!r}...", size_bytes, SEGMENT_BYTES_MAX)
