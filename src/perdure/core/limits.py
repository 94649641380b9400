"""Every limit of the data model, in one place. Over a limit is `LimitExceeded`, never a clamp."""

from __future__ import annotations

SEGMENT_BYTES_MAX = 255
"""UTF-8 bytes in one key segment; also what an ordinary file system allows in one name."""

KEY_SEGMENTS_MAX = 8
KEY_BYTES_MAX = 1_024
COLUMN_BYTES_MAX = 255
"""Of one indexed text. A B-tree of some engine holds entries of at most about 2,700 bytes, and an
index entry is the tenant, a few fields and the key."""

VALUE_BYTES_MAX = 16 * 1024 * 1024
ATTACHMENT_BYTES_MAX = 64 * 1024 * 1024
BATCH_OPS_MAX = 20_000
BATCH_BYTES_MAX = 128 * 1024 * 1024
JSON_DEPTH_MAX = 128
OPERATION_ID_BYTES_MAX = 255

PAGE_MAX = 1_000
"""Most records a scan, keys a get_many or entries a read returns at once."""

ROWS_BYTES_MAX = 8 * 1024 * 1024
"""Of a page of rows, unless its one row is larger."""

OPERATION_KEPT_S = 24 * 3600
"""An operation id answers repeats for this long; afterwards the engine may sweep it."""

CLOCK_OFF_S = 24 * 3600
"""The time of day may jump by so much, either way. What is to be kept for a time is kept so much
longer before it is swept, or a jump would end it at once."""

TOMBSTONE_KEPT_S = 7 * 24 * 3600
"""A tombstone outlives operation ids and the longest lease, so a stale owner never matches."""
