"""Metadata: the small table of strings that clients attach to objects."""

from __future__ import annotations

from perdure.wire.errors import WireError

PAIRS_MAX = 16
KEY_CHARS_MAX = 64
VALUE_CHARS_MAX = 512


def check_metadata(metadata: dict[str, str] | None) -> None:
    """Raises `WireError` for more pairs or longer texts than the API allows."""
    if metadata is None:
        return
    if len(metadata) > PAIRS_MAX:
        raise WireError(
            f"Invalid 'metadata': too many properties. Expected an object with at most {PAIRS_MAX} "
            f"properties, but got {len(metadata)} instead.",
            param="metadata",
            code="object_above_max_properties",
        )
    for key, value in metadata.items():
        if len(key) > KEY_CHARS_MAX:
            raise _too_long("metadata", f"the key '{key[:20]}...'", KEY_CHARS_MAX, len(key))
        if len(value) > VALUE_CHARS_MAX:
            raise _too_long(f"metadata.{key}", "the value", VALUE_CHARS_MAX, len(value))


def _too_long(param: str, what: str, limit: int, actual: int) -> WireError:
    return WireError(
        f"Invalid '{param}': {what} is too long. Expected at most {limit} characters, but got "
        f"{actual} instead.",
        param=param,
        code="string_above_max_length",
    )
