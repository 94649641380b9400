"""JSON in and out: one strict reader for what strangers send, one canonical writer for values.

A stored value is compact JSON text. Its bytes are the authority: checksums cover them and no
engine re-encodes them. What JSON libraries disagree about (NaN, integers beyond 64 bits, lone
surrogates, duplicate keys, absurd depth) is refused here, so that every engine sees the same.
"""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

import msgspec

from perdure.core.errors import Invalid, LimitExceeded
from perdure.core.limits import JSON_DEPTH_MAX

INT_MIN, INT_MAX = -(2**63), 2**63 - 1
_INT_DIGITS_MAX = 20

_encoder = msgspec.json.Encoder()


def parse(data: bytes | str) -> Any:
    """Strictly parse one JSON document into plain Python values.

    Raises `Invalid` for malformed text, duplicate object keys, NaN or infinities, integers
    outside signed 64 bits, lone surrogates, invalid UTF-8 or more than `JSON_DEPTH_MAX` levels.
    """
    try:
        text = data if isinstance(data, str) else data.decode()
        value = _strict.decode(text)
    except UnicodeDecodeError as error:
        raise Invalid(f"the JSON text is not UTF-8: {error}.") from None
    except json.JSONDecodeError as error:
        raise Invalid(f"the text is not JSON: {error}.") from None
    except RecursionError:
        raise LimitExceeded("the JSON depth", _depth(text), JSON_DEPTH_MAX) from None
    if isinstance(data, str) and not is_sound(data):
        raise Invalid("the JSON text holds a lone surrogate, which has no UTF-8 form.")
    if text.count("[") + text.count("{") > JSON_DEPTH_MAX or "\\u" in text:
        check(value)
    return value


def check(value: Any) -> None:
    """Refuse what has no single meaning in JSON, wherever it hides inside plain values.

    Raises `Invalid`; walks without recursion, so depth itself cannot hurt.
    """
    level: list[Any] = [value]
    depth = 0
    while level:
        below: list[Any] = []
        for part in level:
            _check_leaf(part)
            if not isinstance(part, dict | list | tuple):
                continue
            if depth == JSON_DEPTH_MAX:
                raise LimitExceeded("the JSON depth", depth + 1, JSON_DEPTH_MAX)
            if isinstance(part, dict):
                for name in part:
                    if not isinstance(name, str):
                        raise Invalid(f"an object key is {name!r}, not a string.")
                    _check_leaf(name)
                below.extend(part.values())
            else:
                below.extend(part)
        level = below
        depth += 1


def plain(value: Any) -> Any:
    """Structs, wherever they are nested, as plain values for `check`; a `Raw` is taken on trust."""
    try:
        return msgspec.to_builtins(value, enc_hook=_trust_raw)
    except (TypeError, RecursionError) as error:
        raise Invalid(f"the value cannot be written as JSON: {error}.") from None


def encode(value: Any) -> bytes:
    """Compact JSON text of structs and plain values already known to be sound (see `check`)."""
    try:
        return _encoder.encode(value)
    except (UnicodeEncodeError, TypeError, OverflowError, RecursionError) as error:
        raise Invalid(f"the value cannot be written as JSON: {error}.") from None


def _trust_raw(part: Any) -> None:
    if not isinstance(part, msgspec.Raw):
        raise TypeError(f"{type(part).__name__} has no JSON form")


def is_sound(text: str) -> bool:
    """Whether text has a UTF-8 form, which a lone surrogate denies it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_leaf(part: Any) -> None:
    if isinstance(part, str):
        if not part.isascii() and not is_sound(part):
            raise Invalid("a string holds a lone surrogate, which has no UTF-8 form.")
    elif isinstance(part, float):
        if not math.isfinite(part):
            raise Invalid(f"the number {part} is not finite.")
    elif isinstance(part, int) and not INT_MIN <= part <= INT_MAX:
        raise Invalid("an integer is outside the signed 64-bit range.")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise Invalid(f"the object key {name[:80]!r} appears twice.")
            seen.add(name)
    return made


def _integer(text: str) -> int:
    if len(text) > _INT_DIGITS_MAX or not INT_MIN <= (number := int(text)) <= INT_MAX:
        raise Invalid("an integer is outside the signed 64-bit range.")
    return number


def _number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise Invalid(f"the number {text[:40]} is not finite.")
    return number


def _constant(text: str) -> NoReturn:
    raise Invalid(f"{text} is not JSON.")


def _depth(text: str) -> int:
    deepest = depth = 0
    for character in text:
        if character in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif character in "]}":
            depth -= 1
    return deepest


_strict = json.JSONDecoder(
    object_pairs_hook=_object,
    parse_int=_integer,
    parse_float=_number,
    parse_constant=_constant,
)
