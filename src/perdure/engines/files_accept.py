"""Taking for what is stored what somebody changed in the files by hand.

Nothing is patched: every change becomes an ordinary batch, so it is in the journal first, and the
file is written anew. A record goes on in its next version, or is deleted where its file is gone or
cannot be read; so whoever knows the old version is refused. A stream begins anew: its lines, as
they stand, are entries 1, 2, 3... of its next incarnation.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from contextlib import suppress
from itertools import islice
from typing import Any

import msgspec

from perdure.core.batch import Append, Batch, Put, delete, drop
from perdure.core.errors import Damaged, Invalid
from perdure.core.keys import split
from perdure.core.layouts import Layout, Log, Records
from perdure.core.values import Finding
from perdure.engines.files_format import StreamFile, parse_line, parse_record
from perdure.engines.files_manifest import RecordRow, StreamRow
from perdure.engines.files_names import Tree
from perdure.engines.files_read import stored_record, where_of
from perdure.engines.files_state import identity_of
from perdure.engines.files_verify import judge_stream

_ENTRIES = 1_000
"""Of one batch."""

Accepted = tuple[Finding, list[Batch]]
"""What is taken for what, and the batches that do so."""


def acceptances(
    tree: Tree, layouts: Mapping[str, Layout], records: list[RecordRow], streams: list[StreamRow]
) -> Generator[Accepted | None, None, None]:
    """What differs in the files of some rows; None for each that does not. Blocks."""
    for row in records:
        layout = layouts.get(row.collection)
        try:
            stored_record(tree, row)
            yield None
        except Damaged:
            yield _record(tree, layout, row) if isinstance(layout, Records) else None
    for stream in streams:
        log = layouts.get(stream.log)
        wrong = isinstance(log, Log) and bool(judge_stream(tree, stream))
        yield _stream(tree, log, stream) if wrong and isinstance(log, Log) else None


def _record(tree: Tree, records: Records[Any], row: RecordRow) -> Accepted:
    key, where = split(row.place), where_of(row)
    with suppress(OSError, Invalid, Damaged, msgspec.MsgspecError):
        file = parse_record(tree.record(row.collection, key).read_bytes())
        if file is not None and (file.collection, file.key) == (row.collection, key):
            text = msgspec.json.format(bytes(file.value), indent=-1)
            columns = records.columns(records.decode(key, text))
            attachment = _attachment(tree, row)
            put = Put(records, key, row.place, text, columns, attachment, row.version)
            why = f"what its file says is version {row.version + 1} now"
            return Finding(where, why, "accepted"), [Batch((put,))]
    why = "it is deleted, as its file is gone or says nothing"
    return Finding(where, why, "accepted"), [delete(records, key, expect=row.version)]


def _attachment(tree: Tree, row: RecordRow) -> bytes | None:
    path = tree.attachment(row.collection, split(row.place), row.version)
    return path.read_bytes() if row.attached and path.exists() else None


def _stream(tree: Tree, log: Log[Any], row: StreamRow) -> Accepted:
    key = split(row.place)
    values = iter(_values(tree, log, row))
    batches, count = [drop(log, key)], 0
    while part := tuple(islice(values, _ENTRIES)):
        batches.append(Batch((Append(log, key, row.place, part, count),)))
        count += len(part)
    first = batches[0] + batches[1] if len(batches) > 1 else batches[0]
    why = f"its lines are entries 1 to {count} of a new incarnation" if count else "it is dropped"
    return Finding(where_of(row), why, "accepted"), [first, *batches[2:]]


def _values(tree: Tree, log: Log[Any], row: StreamRow) -> Iterator[bytes]:
    """The values of all lines that hold one, in their order."""
    key = split(row.place)
    with suppress(OSError), StreamFile(tree.stream(row.log, key), identity_of(row)) as file:
        for _, line in file.lines():
            with suppress(Damaged, Invalid):
                if (entry := parse_line(line, None)) is not None:
                    log.decode(key, entry[1])
                    yield entry[1]
