"""What strangers send: names, JSON texts and values that libraries, databases and file systems
disagree about. Either every engine keeps them unchanged, or all refuse them before writing.
"""

from __future__ import annotations

import math
from typing import Any

from perdure.core.limits import JSON_DEPTH_MAX, SEGMENT_BYTES_MAX


def _nested(levels: int) -> Any:
    value: Any = []
    for _ in range(levels - 1):
        value = [value]
    return value


LEGAL_NAMES: dict[str, str] = {
    "traversal": "../../etc/passwd",
    "parent": "..",
    "here": ".",
    "absolute": "/etc/passwd",
    "slash": "a/b",
    "backslash": "a\\b",
    "percent-encoded": "%2e%2e%2f",
    "device": "CON",
    "trailing dot": "name.",
    "space": " ",
    "leading dash": "-rf",
    "glob": "*",
    "quotes": "'\"`",
    "sql": "'); DROP TABLE records; --",
    "like pattern": "%_",
    "upper": "NAME",
    "lower": "name",
    "composed": "caf\u00e9",
    "decomposed": "cafe\u0301",
    "right to left": "\u202egnp.exe",
    "zero width": "na\u200bme",
    "byte order mark": "\ufeff",
    "line separator": "\u2028",
    "highest": "\U0010ffff",
    "before the surrogates": "\ud7ff",
    "after the surrogates": "\ue000",
    "number": "1",
    "number, written longer": "01",
    "longest": "x" * SEGMENT_BYTES_MAX,
    "longest, in wide characters": "\U0001f600" * (SEGMENT_BYTES_MAX // 4),
}
"""Segments that must be kept, and stay distinct from each other."""

REFUSED_NAMES: dict[str, str] = {
    "empty": "",
    "NUL": "a\0b",
    "newline": "a\n",
    "delete": "\x7f",
    "separator": "a\x1fb",
    "lone high surrogate": "a\ud800",
    "lone low surrogate": "\udfffa",
    "300 bytes": "x" * 300,
    "over the limit in bytes only": "\u00e9" * (SEGMENT_BYTES_MAX // 2 + 1),
}

REFUSED_JSON: dict[str, bytes] = {
    "nothing": b"",
    "NaN": b'{"a":NaN}',
    "infinity": b"[-Infinity]",
    "overflowing number": b"1e999",
    "2**63": b"9223372036854775808",
    "below -2**63": b"[-9223372036854775809]",
    "5,000 digits": b"[" + b"9" * 5_000 + b"]",
    "200,000 levels": b"[" * 200_000 + b"]" * 200_000,
    "200,000 objects": b'{"a":' * 200_000 + b"1" + b"}" * 200_000,
    "one level too many": b"[" * (JSON_DEPTH_MAX + 1) + b"]" * (JSON_DEPTH_MAX + 1),
    "duplicate keys": b'{"a":1,"b":{"c":1,"c":1}}',
    "duplicate keys, one escaped": b'{"a":1,"\\u0061":2}',
    "lone surrogate": b'["\\ud800"]',
    "lone surrogate as a key": b'{"\\udc00":1}',
    "not UTF-8": b'"\xff"',
    "surrogate in UTF-8": b'"\xed\xa0\x80"',
    "byte order mark": b"\xef\xbb\xbf{}",
    "raw NUL": b'"\0"',
    "trailing comma": b"[1,]",
    "trailing text": b"{} {}",
    "unfinished": b'{"a":',
}

REFUSED_VALUES: dict[str, Any] = {
    "NaN": {"a": math.nan},
    "infinity": [math.inf],
    "2**63": {"a": [2**63]},
    "below -2**63": -(2**63) - 1,
    "5,000 digits": 10**5_000,
    "lone surrogate": "\ud800",
    "lone surrogate as a key": {"\udfff": 1},
    "number as a key": {1: 1},
    "one level too many": _nested(JSON_DEPTH_MAX + 1),
    "200,000 levels": _nested(200_000),
    "no JSON form": {"a": object()},
}

LEGAL_VALUES: dict[str, Any] = {
    "null": None,
    "empty object": {},
    "empty name": {"": ""},
    "NUL in text": {"a": "x\0y"},
    "every control character": "".join(map(chr, range(32))) + "\x7f",
    "largest": 2**63 - 1,
    "smallest": -(2**63),
    "beyond a double's integers": 2**53 + 1,
    "smallest double": 5e-324,
    "largest double": 1.7976931348623157e308,
    "whole double": 1.0,
    "sum of tenths": 0.1 + 0.2,
    "booleans are not numbers": [True, 1, False, 0],
    "composed and decomposed": {"\u00e9": 1, "e\u0301": 2},
    "beyond the plane": "\U0001f600\U0010ffff\u2028\u2029\ufeff",
    "case twins": {"A": 1, "a": 2},
    "proto": {"__proto__": {"constructor": None}},
    "as deep as fits in one field": _nested(JSON_DEPTH_MAX - 1),
    "text like numbers": ["1", "1.0", "1e5", "true", "null", "NaN"],
}
"""Values that must come back equal, with equal types."""
