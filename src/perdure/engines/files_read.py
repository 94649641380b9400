"""Reading from the files, each answer held to what the store knows of it: a file that was edited,
put back from an older copy, cut or removed is `Damaged`, and never another answer."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from perdure.core.errors import Damaged, Unavailable
from perdure.core.keys import show, split
from perdure.core.values import record_sum
from perdure.engines.files_format import StreamFile, parse_record, shown_sum
from perdure.engines.files_manifest import RecordRow, StreamRow
from perdure.engines.files_names import Tree
from perdure.engines.files_state import identity_of

_CHANGED = "its file is not as it was written"


def where_of(row: RecordRow | StreamRow) -> str:
    """A record or stream, for people."""
    return f"{row.collection if isinstance(row, RecordRow) else row.log} {show(split(row.place))}"


def stored_record(tree: Tree, row: RecordRow) -> tuple[bytes, bytes | None]:
    """Value and attachment of a record as it was committed. Raises `Damaged`."""
    key, where = split(row.place), where_of(row)
    with reading(where):
        file = parse_record(tree.record(row.collection, key).read_bytes())
    if file is None or (file.collection, file.key) != (row.collection, key):
        raise Damaged(where, _CHANGED)
    if file.version != row.version:
        raise Damaged(where, f"its file holds version {file.version}, not {row.version}")
    value, attachment = bytes(file.value), None
    if row.attached:
        path = tree.attachment(row.collection, key, row.version)
        with reading(where):
            attachment = path.read_bytes()
    checksum = record_sum(row.collection, row.place, row.version, value, attachment)
    if checksum != row.sum or file.sum != shown_sum(checksum):
        raise Damaged(where, _CHANGED)
    return value, attachment


def stored_entries(tree: Tree, row: StreamRow, first: int, last: int) -> list[bytes]:
    """Entries `first` to `last` of a stream, which its file holds. Raises `Damaged`."""
    where = where_of(row)
    count = row.file_last - row.file_first + 1
    near = row.size_bytes * (first - row.file_first) // count
    size_bytes = row.size_bytes * (last - first + 1) // count
    found: dict[int, bytes] = {}
    with (
        reading(where),
        StreamFile(tree.stream(row.log, split(row.place)), identity_of(row)) as file,
    ):
        if (values := file.run(first, last, near, size_bytes)) is not None:
            return values
        for seq, value, _ in file.entries(first, last):
            found[seq] = value
    for seq in range(first, last + 1):
        if seq not in found:
            raise lacks_entry(where, seq)
    return [found[seq] for seq in range(first, last + 1)]


def lacks_entry(where: str, seq: int) -> Damaged:
    """What is said of an entry that should be there."""
    return Damaged(f"{where} entry {seq}", "it is missing, or not as it was written")


@contextmanager
def reading(where: str) -> Iterator[None]:
    """Say of a file that cannot be read whose it is. Raises `Damaged`, and `Unavailable` where the
    process lacks what reading takes."""
    try:
        yield
    except FileNotFoundError:
        raise Damaged(where, "its file is missing") from None
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            raise Unavailable(f"{where} could not be read: {error}. Try again.") from error
        raise Damaged(where, f"its file cannot be read ({error.strerror})") from error
