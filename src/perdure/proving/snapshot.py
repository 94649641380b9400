"""A dead store, read whole: every record and every stream of every layout.

The store is copied before it is opened, so that looking at it changes nothing for the server that
will be started on it. Comparisons know no surface: what holds for one collection holds for all.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from perdure.core.engine import Engine
from perdure.core.keys import Key, show
from perdure.core.layouts import Layout, Log, Records
from perdure.core.limits import PAGE_MAX
from perdure.core.values import Tip
from perdure.engines import open_engine
from perdure.surfaces.boots import BOOTS, INSTANCES
from perdure.surfaces.state import LAYOUTS

STORE = "perdure.db"
BLOBS = "blobs"
_OF_BOOTS = {BOOTS.name, INSTANCES.name}


class Kept(msgspec.Struct, frozen=True):
    """One record as it was found."""

    version: int
    value: Any
    text: bytes
    attachment: bytes | None


class Stream(msgspec.Struct, frozen=True):
    """One stream as it was found; `entries` are those kept, from `tip.first` on."""

    tip: Tip
    entries: tuple[bytes, ...]


class Snapshot:
    """Records by collection and key, streams by log and key."""

    def __init__(self) -> None:
        self.records: dict[str, dict[Key, Kept]] = {}
        self.streams: dict[str, dict[Key, Stream]] = {}
        self.findings: list[str] = []
        self.files: dict[str, bytes] = {}
        """Every file of the store as it lay dead, by its path."""
        self._indexes: dict[tuple[str, int], dict[Key, dict[Key, Kept]]] = {}

    @classmethod
    async def of(
        cls,
        data: Path,
        scratch: Path,
        *,
        verify: bool,
        layouts: Sequence[Layout] = LAYOUTS,
        url: str | None = None,
    ) -> Snapshot:
        """Copy the store of a process that is dead, open the copy, read it. A store that is
        elsewhere, at `url`, is read as it is. Raises what opening or reading raises."""
        found = cls()
        found.files = _copy(data, scratch)
        if url is None:
            engine = await open_engine(f"sqlite:///{scratch / STORE}", layouts)
        else:
            engine = await open_engine(url, layouts, read_only=True)
        try:
            if verify:
                async for finding in engine.verify():
                    found.findings.append(f"{finding.where}: {finding.why}")
            for layout in layouts:
                if isinstance(layout, Records):
                    found.records[layout.name] = await _records(engine, layout)
                else:
                    found.streams[layout.name] = await _streams(engine, layout)
        finally:
            await engine.close()
        return found

    def under(self, records: Records[Any], *prefix: str) -> dict[Key, Kept]:
        """Records whose key starts with `prefix`."""
        size = len(prefix)
        index = self._indexes.get((records.name, size))
        if index is None:
            index = self._indexes[(records.name, size)] = {}
            for key, kept in self.records[records.name].items():
                index.setdefault(key[:size], {})[key] = kept
        return index.get(prefix, {})

    def events(self, log: Log[Any], key: Key) -> Stream:
        """One stream; an empty one where there is none."""
        return self.streams[log.name].get(key, Stream(Tip(), ()))

    @property
    def blobs(self) -> dict[str, bytes]:
        """What is published, by the name it has."""
        paths = {name: Path(name) for name in self.files}
        return {
            path.name: self.files[name]
            for name, path in paths.items()
            if path.parts[0] == BLOBS and len(path.parts) == 3 and path.parts[1] != "incoming"
        }

    def names_on_disk(self, text: str) -> list[str]:
        """The files that hold a text."""
        wanted = text.encode()
        return [name for name, data in self.files.items() if wanted in data]

    def fell_behind(self, earlier: Snapshot) -> Iterator[str]:
        """Where this state cannot have come after `earlier`."""
        for name, records in self.records.items():
            for key, now in records.items():
                then = earlier.records[name].get(key)
                if then is None:
                    continue
                if now.version < then.version:
                    yield f"{name} {show(key)} went from version {then.version} to {now.version}"
                elif now.version == then.version and now != then:
                    yield f"{name} {show(key)} says two things in version {now.version}"
        for name, streams in self.streams.items():
            for key, stream in streams.items():
                before = earlier.streams[name].get(key)
                if before is None or stream.tip.incarnation > before.tip.incarnation:
                    continue
                if stream.entries[: len(before.entries)] != before.entries:
                    yield f"{name} {show(key)} does not begin with what it was"

    def differs(self, other: Snapshot) -> Iterator[str]:
        """Every difference but those of boots and instances."""
        for mine, others in ((self.records, other.records), (self.streams, other.streams)):
            for name, kept in mine.items():
                if name in _OF_BOOTS:
                    continue
                for key in kept.keys() | others[name].keys():
                    if kept.get(key) != others[name].get(key):
                        yield f"{name} {show(key)} is not what it was"


def _copy(data: Path, scratch: Path) -> dict[str, bytes]:
    """Copy the directory; returns what is in it."""
    if scratch.exists():
        shutil.rmtree(scratch)
    shutil.copytree(data, scratch, ignore=shutil.ignore_patterns("*.sock*"))
    return {
        str(path.relative_to(scratch)): path.read_bytes()
        for path in sorted(scratch.rglob("*"))
        if path.is_file()
    }


async def _records(engine: Engine, records: Records[Any]) -> dict[Key, Kept]:
    found: dict[Key, Kept] = {}
    cursor: str | None = None
    while True:
        page = await engine.scan(records, (), limit=PAGE_MAX, cursor=cursor)
        for record in page.items:
            text = records.encode(record.value)
            found[record.key] = Kept(record.version, record.value, text, record.attachment)
        cursor = page.cursor
        if cursor is None:
            return found


async def _streams(engine: Engine, log: Log[Any]) -> dict[Key, Stream]:
    found: dict[Key, Stream] = {}
    cursor: str | None = None
    while True:
        page = await engine.streams(log, (), limit=PAGE_MAX, cursor=cursor)
        for key in page.items:
            tip = await engine.tip(log, key)
            entries: list[bytes] = []
            while tip.first + len(entries) <= tip.last:
                after = tip.first - 1 + len(entries)
                read = await engine.read(log, key, after=after, limit=PAGE_MAX)
                entries += [log.encode(entry.value) for entry in read]
            found[key] = Stream(tip, tuple(entries))
        cursor = page.cursor
        if cursor is None:
            return found
