"""What stands in the files: a record is one JSON document, a stream one JSON document a line.

The value is kept byte for byte as it was committed, and each record and each line carries a
checksum over all that identifies and fills it. Since a line says its number, one is found by
bisection: there is no table of offsets that could be wrong.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import msgspec

from perdure.core.keys import Key, split
from perdure.core.limits import VALUE_BYTES_MAX
from perdure.core.values import entry_sum_hex

_LINE_BYTES_MAX = 2 * VALUE_BYTES_MAX + 4_096
"""A value with line breaks is kept as a JSON string, which at most doubles it."""

_NEAR_BYTES = 8 * 1024
"""Closer than this a line is looked for one by one. So much is read first, then twice as much each
time."""

_READ_BYTES_MAX = 256 * 1024
_AS_WRITTEN = re.compile(rb'\{"seq":([0-9]{1,19}),"sum":"([0-9a-f]{16})","value":')
"""How the line of an entry begins, but for those with line breaks in their values."""


class RecordFile(msgspec.Struct, frozen=True):
    """A record as it stands in its file. `attachment` is the name of the file with its bytes."""

    collection: str
    key: Key
    version: int
    sum: str
    value: msgspec.Raw
    attachment: str | None = None


class _Line(msgspec.Struct, frozen=True):
    """An entry; `text` holds a value in which there are line breaks."""

    seq: int
    sum: str
    value: msgspec.Raw = msgspec.Raw()
    text: str | None = None


class Identity(msgspec.Struct, frozen=True):
    """What the checksum of an entry is made with besides its number and value."""

    log: str
    place: str
    incarnation: int


_record = msgspec.json.Decoder(RecordFile)
_line = msgspec.json.Decoder(_Line)


def shown_sum(number: int) -> str:
    """A checksum as it stands in a file."""
    return f"{number & 0xFFFF_FFFF_FFFF_FFFF:016x}"


def record_text(file: RecordFile) -> bytes:
    """The bytes of a record's file: a field a line, the value last and as it was committed."""
    fields = msgspec.structs.asdict(file)
    value = bytes(fields.pop("value"))
    head = b"".join(
        b'  "%s": %s,\n' % (name.encode(), msgspec.json.encode(field))
        for name, field in fields.items()
        if field is not None
    )
    return b'{\n%s  "value": %s\n}\n' % (head, value)


def parse_record(data: bytes) -> RecordFile | None:
    """What a record's file says; None where it says nothing."""
    with suppress(msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return _record.decode(data)
    return None


def head_line(identity: Identity, first: int) -> bytes:
    """The first line of a stream's file: whose entries follow, and from which number on."""
    head = {
        "log": identity.log,
        "key": split(identity.place),
        "incarnation": identity.incarnation,
        "first": first,
    }
    return msgspec.json.encode(head) + b"\n"


def entry_line(identity: Identity, seq: int, value: bytes) -> bytes:
    """The line of an entry."""
    start = f'{{"seq":{seq},"sum":"{_sum(identity, seq, value)}",'.encode()
    if b"\n" in value or b"\r" in value:
        return start + b'"text":' + msgspec.json.encode(value.decode()) + b"}\n"
    return start + b'"value":' + value + b"}\n"


def parse_line(line: bytes, identity: Identity | None) -> tuple[int, bytes] | None:
    """The number and value in a line; None where it is not as it was written. Without an identity
    its checksum is not looked at."""
    if not line.endswith(b"}\n"):
        return None
    if identity is not None and (start := _AS_WRITTEN.match(line)) is not None:
        seq, value = int(start[1]), line[start.end() : -2]
        if _sum(identity, seq, value).encode() == start[2]:
            return seq, value
    with suppress(msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        found = _line.decode(line)
        value = found.text.encode() if found.text is not None else bytes(found.value)
        if not value or found.seq < 1:
            return None
        if identity is None:
            return found.seq, value
        return (found.seq, value) if _sum(identity, found.seq, value) == found.sum else None
    return None


def _sum(identity: Identity, seq: int, value: bytes) -> str:
    return entry_sum_hex(identity.log, identity.place, identity.incarnation, seq, value)


class StreamFile:
    """A stream's file, open for reading. A context manager."""

    def __init__(self, path: Path, identity: Identity) -> None:
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._identity = identity
        self.size_bytes = os.fstat(self._fd).st_size

    def __enter__(self) -> StreamFile:
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._fd)

    def run(self, first: int, last: int, near: int, size_bytes: int) -> list[bytes] | None:
        """The values of entries `first` to `last`, which might lie at the offset `near` and take so
        many bytes. None where that is not so, or not each is sound: then look at `entries`."""
        wanted_bytes = size_bytes + size_bytes // 4 + _NEAR_BYTES
        data = os.pread(self._fd, wanted_bytes, self._seek(first, near))
        at, values = data.find(b'{"seq":%d,' % first), []
        for seq in range(first, last + 1):
            end = data.find(b"\n", at) + 1
            found = parse_line(data[at:end], self._identity)
            if found is None or found[0] != seq:
                return None
            values.append(found[1])
            at = end
        return values

    def entries(self, first: int, last: int) -> Iterator[tuple[int, bytes, bytes]]:
        """Number, value and line of each sound entry from `first` to `last`, in order."""
        for _, line in self._lines(self._seek(first)):
            found = parse_line(line, self._identity)
            if found is None or found[0] < first:
                continue
            if found[0] > last:
                return
            yield *found, line
            if found[0] == last:
                return

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """Every line with its offset, sound or not."""
        return self._lines(0)

    def _seek(self, seq: int, near: int | None = None) -> int:
        """An offset at or before the line of entry `seq`, and not far from it. It is looked for
        from `near` in strides that double, until it lies between two of them."""
        low, high, stride = 0, self.size_bytes, _NEAR_BYTES
        at = high // 2 if near is None else near - _NEAR_BYTES // 2
        while high - low > _NEAR_BYTES:
            if not low < at < high:
                at = (low + high) // 2
            found = self._first_sound(at, high)
            if found is None or found[1] > seq:
                high, at = at, at - stride
            else:
                low, at = found[0], found[0] + stride
            stride *= 2
        return low

    def _first_sound(self, start: int, end: int) -> tuple[int, int] | None:
        """Offset and number of the first sound entry whose line begins behind `start`."""
        lines = self._lines(start)
        next(lines, None)  # the rest of the line in which `start` lies
        for offset, line in lines:
            if offset >= end:
                return None
            found = parse_line(line, self._identity)
            if found is not None:
                return offset, found[0]
        return None

    def _lines(self, offset: int) -> Iterator[tuple[int, bytes]]:
        """Lines from an offset on; a piece of one that is longer than any line may be is one."""
        left, wanted = b"", _NEAR_BYTES
        while True:
            chunk = os.pread(self._fd, wanted, offset + len(left))
            wanted = max(min(2 * wanted, _READ_BYTES_MAX), len(left))  # linear for a long line
            left += chunk
            start = 0
            while (end := left.find(b"\n", start) + 1) > 0:
                yield offset + start, left[start:end]
                start = end
            offset, left = offset + start, left[start:]
            if not chunk or len(left) > _LINE_BYTES_MAX:
                if left:
                    yield offset, left
                if not chunk:
                    return
                offset, left = offset + len(left), b""
