"""Walking everything a store of files holds, and saying what is not as it was written.

Each record and each line is judged by itself, against the checksum in its file and what the store
knows of it. Every function here is one step, and reads files that nobody writes meanwhile.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from perdure.core.disk import TEMPORARY
from perdure.core.engine import Usage
from perdure.core.errors import Damaged
from perdure.core.keys import split
from perdure.core.layouts import Records
from perdure.core.values import Finding
from perdure.engines.files_format import StreamFile, head_line, parse_line
from perdure.engines.files_manifest import RecordRow, StreamRow
from perdure.engines.files_names import OWN, Tree
from perdure.engines.files_read import reading, stored_record, where_of
from perdure.engines.files_state import State, identity_of

_MISSING_MAX = 100
"""Of one stream so many entries are named; more of the same says nothing new."""


def judge_records(
    tree: Tree, declared: Records[Any] | None, rows: Iterable[RecordRow]
) -> list[Finding]:
    """Findings about records of one collection; one that is declared otherwise, or not at all, is
    held to its checksums only."""
    found: list[Finding] = []
    for row in rows:
        try:
            value, _ = stored_record(tree, row)
            if declared is not None:
                columns = declared.stored_columns(declared.decode(split(row.place), value))
                if columns != row.columns:
                    raise Damaged(where_of(row), "its index columns are not those of its value")
        except Damaged as damage:
            found.append(Finding(damage.where, damage.why))
    return found


def judge_stream(tree: Tree, row: StreamRow) -> list[Finding]:
    """Findings about a stream: its head, every number that its tip promises, and what stands
    besides."""
    where, identity = where_of(row), identity_of(row)
    found: list[Finding] = []
    sound: set[int] = set()
    try:
        with (
            reading(where),
            StreamFile(tree.stream(row.log, split(row.place)), identity) as file,
        ):
            for offset, line in file.lines():
                if offset == 0:
                    if line != head_line(identity, row.file_first):
                        found.append(Finding(where, "its first line is not as it was written"))
                    continue
                entry = parse_line(line, identity)
                if entry is None or entry[0] in sound or not _within(row, entry[0]):
                    found.append(Finding(f"{where} byte {offset}", "nobody wrote this line"))
                else:
                    sound.add(entry[0])
    except Damaged as damage:
        return [Finding(damage.where, damage.why)]
    missing = [seq for seq in range(row.file_first, row.file_last + 1) if seq not in sound]
    found += [
        Finding(f"{where} entry {seq}", "it is missing, or not as it was written")
        for seq in missing[:_MISSING_MAX]
    ]
    return found


def strays(root: Path, known: set[str]) -> Iterator[Finding]:
    """Files below a root that nobody asked for."""
    for folder, folders, names in os.walk(root):
        if folder == str(root):
            folders.remove(OWN)
        for name in names:
            path = os.path.join(folder, name)
            if path not in known:
                half = name.endswith(TEMPORARY)
                why = "it was never finished" if half else "no record or stream is kept there"
                yield Finding(path, why, "stray")


def files_of(tree: Tree, state: State) -> set[str]:
    """Every file that a store may have: those of places whose files are behind among them."""
    found = {
        str(tree.record(row.collection, split(row.place)))
        for place, row in state.records.items()
        if row.version > 0 or place in state.waiting_records
    }
    for place, row in state.records.items():
        versions = {row.on_disk}
        if (waiting := state.waiting_records.get(place)) is not None:
            versions |= waiting.attachments
        for version in versions - {0}:
            found.add(str(tree.attachment(row.collection, split(row.place), version)))
    for place, stream in state.streams.items():
        if stream.size_bytes or place in state.waiting_streams:
            found.add(str(tree.stream(stream.log, split(stream.place))))
    return found


def usage_of(tree: Tree, state: State) -> Usage:
    """What files take, by collection. Blocks; nobody may write meanwhile."""
    taken: dict[str, int] = {}
    for (name, _), row in state.records.items():
        key = split(row.place)
        paths = [tree.record(name, key)] if row.version > 0 else []
        if row.attached:
            paths.append(tree.attachment(name, key, row.version))
        taken[name] = taken.get(name, 0) + sum(map(_size, paths))
    for (name, _), stream in state.streams.items():
        taken[name] = taken.get(name, 0) + stream.size_bytes
    other = sum(map(_size, (tree.root / OWN).iterdir()))
    return Usage(taken, other, 0, other + sum(taken.values()))


def _within(row: StreamRow, seq: int) -> bool:
    return row.file_first <= seq <= row.file_last


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # verify says so; here it takes nothing
        return 0
