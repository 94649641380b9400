"""What is sound in a damaged store of files, as rows for a new store, and what is not, by name.

Each file says itself what it holds: key, version and checksum of a record, number and checksum of
an entry. So what the manifest and the journal say is used where they are sound, and done without
where they are not: then more may be gone than is named, and what was deleted, or which operation
ids were used, is not known.

A record is brought over in the version that it should have, or a later one that only the lost
commits knew; an older copy of it is not. Log numbers have no holes, so a stream is kept up to its
first damaged entry; it begins a new incarnation then, as the numbers behind will be given again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, aclosing, suppress
from pathlib import Path

import msgspec

from perdure.core.engine import Salvaged
from perdure.core.errors import Damaged, Invalid, Missing
from perdure.core.keys import Key, join, show, split
from perdure.core.layouts import Layout, Log, Records
from perdure.core.mark import read_mark
from perdure.core.offload import off_loop, steps_off_loop
from perdure.core.rows import Filling, FloorRow, OperationRow, RecordRow, Row, StreamRow
from perdure.core.values import Lost, Tip, record_sum
from perdure.engines.files import FilesEngine
from perdure.engines.files_format import Identity, RecordFile, StreamFile, parse_record, shown_sum
from perdure.engines.files_journal import read_journal, store_of
from perdure.engines.files_manifest import Head, Manifest, read_manifest
from perdure.engines.files_names import OWN
from perdure.engines.files_recovery import Place, lost_commits, tree_of
from perdure.engines.files_state import State

_NO_MANIFEST = (
    "what was deleted and which operation ids were used is not known, and more may be gone than is "
    "named"
)


class _StreamHead(msgspec.Struct, frozen=True):
    log: str
    key: Key
    incarnation: int
    first: int


_head = msgspec.json.Decoder(_StreamHead)


async def salvage(
    source: Place, target: Place, layouts: Sequence[Layout], progress: Callable[[str, int], None]
) -> Salvaged:
    """Make a store at `target`, which must not exist, of what is sound at `source`, which is only
    read.

    Raises `Missing`, `Invalid` where there is no store, `StoreLocked` and `NewerFormat`.
    """
    if target.root.exists():
        raise Invalid(f"{target.root} exists, and a salvage never overwrites. Name another place.")
    kept = dict.fromkeys((*(layout.name for layout in layouts), "tombstones", "operations"), 0)
    with ExitStack() as held:
        salvaging = await off_loop(_begun, source, layouts, held)
        engine = await FilesEngine.open(
            str(target.root), layouts, clock=target.clock, disk=target.disk
        )
        try:
            async with aclosing(steps_off_loop(salvaging.pages())) as pages:
                async for page in pages:
                    await engine.load(page)
                    for row in page:
                        name, rows = _counted(row)
                        kept[name] += rows
                        progress(name, rows)
        finally:
            await engine.close()
    return Salvaged(kept, salvaging.lost)


def _begun(place: Place, layouts: Sequence[Layout], held: ExitStack) -> _Salvage:
    if not place.root.exists():
        raise Missing(f"{place.root} does not exist, so there is nothing to salvage.")
    if not (place.root / OWN).exists():
        raise Invalid(f"{place.root} is not a Perdure store. It was left as it is.")
    for path in (place.lock, place.journal):
        if path.exists():
            held.callback(place.disk.lock(path, shared=True).release)
    return _Salvage(place, layouts)


def _counted(row: Row) -> tuple[str, int]:
    """Where a row is counted, and as how many."""
    match row:
        case RecordRow():
            return ("tombstones" if row.value is None else row.collection), 1
        case StreamRow():
            return row.log, len(row.values)
        case OperationRow():
            return "operations", 1
    return row.log, 0


class _Salvage:
    """One salvage under way."""

    def __init__(self, place: Place, layouts: Sequence[Layout]) -> None:
        self.lost: list[Lost] = []
        self._layouts = {layout.name: layout for layout in layouts}
        manifest = self._manifest(place)
        self._doubted = manifest is None
        """Whether files may know of commits that nothing else knows of."""
        if manifest is None:
            manifest = Manifest(Head(place.format, store_of(place.journal), 0, 0), [])
        self._state = State(manifest)
        self._tree = tree_of(place.root, manifest.head.layouts)
        for layout in layouts:
            if layout.name not in self._state.layouts:
                self._tree.declare(layout)
        self._recover(place)

    def pages(self) -> Generator[tuple[Row, ...], None, None]:
        """Everything that is sound, in pages that a store can load."""
        filling = Filling()
        for row in self._rows():
            if not filling.take(row):
                yield filling.page(whole=False).items
                filling = Filling()
                filling.take(row)
        yield filling.page(whole=True).items

    def _rows(self) -> Iterator[Row]:
        records, streams = self._found()
        names = {*self._state.layouts, *(name for name, _ in records | streams)}
        unknown = sorted(names - self._layouts.keys())
        self.lost += [Lost(name, "this release knows no such collection") for name in unknown]
        for place in sorted(records | self._state.records.keys()):
            if isinstance(self._layouts.get(place[0]), Records):
                yield from self._record(*place)
        for place in sorted(streams | self._state.streams.keys()):
            if isinstance(log := self._layouts.get(place[0]), Log):
                yield from self._stream(log, place[1])
        for name, incarnation in self._state.incarnations.items():
            if name in self._layouts:
                yield FloorRow(name, incarnation)
        for done in self._state.operations.values():
            yield OperationRow(done.id, done.partition, done.digest, done.numbers)

    def _manifest(self, place: Place) -> Manifest | None:
        try:
            return read_manifest(place.manifest, place.format)
        except (FileNotFoundError, Damaged):
            self.lost.append(Lost("", f"its manifest is damaged or gone: {_NO_MANIFEST}"))
            return None

    def _recover(self, place: Place) -> None:
        """Take the commits of the journal that files may lack, as far as it is sound."""
        state = self._state
        try:
            found = read_journal(place.journal, state.store_id)
        except (FileNotFoundError, Damaged):
            why = "its journal is damaged or gone: its last commits may be"
        else:
            if self._doubted:  # whatever the files have of it already
                state.applied = max(state.applied, found.base)
            why = lost_commits(found, state, read_mark(place.mark, state.store_id))
            for frame, data in found.frames:
                if found.base <= state.applied < frame.number:
                    state.take(frame, data)
        if why:
            self._doubted = True
            self.lost.append(Lost("", why))

    def _found(self) -> tuple[set[tuple[str, str]], set[tuple[str, str]]]:
        """Places of which there are files, by what stands in them."""
        records: set[tuple[str, str]] = set()
        streams: set[tuple[str, str]] = set()
        if not self._doubted:
            return records, streams
        for folder, folders, names in os.walk(self._tree.root):
            if folder == str(self._tree.root):
                folders.remove(OWN)
            for path in (Path(folder, name) for name in names):
                place: tuple[str, Key] | None = None
                if path.suffix == ".json" and (file := parse_record(path.read_bytes())):
                    place = (file.collection, file.key)
                elif path.suffix == ".jsonl" and (head := _head_of(path)):
                    place = (head.log, head.key)
                elif path.suffix not in (".json", ".jsonl"):
                    continue
                if place is None:
                    name = str(path.relative_to(self._tree.root))
                    self.lost.append(Lost("", f"the file {name} does not say what it holds"))
                else:
                    kept = records if path.suffix == ".json" else streams
                    kept.add((place[0], join(place[1])))
        return records, streams

    def _record(self, name: str, place: str) -> Iterator[RecordRow]:
        row = self._state.records.get((name, place))
        waiting = self._state.waiting_records.get((name, place))
        version = abs(row.version) if row is not None else 0
        file = self._sound(name, split(place))
        if waiting is not None and (file is None or file[0].version <= version):
            change = waiting.change
            found = RecordRow(name, place, version, change.value, change.attachment)
        elif row is not None and row.version < 0 and (file is None or file[0].version <= version):
            found = RecordRow(name, place, version)
        elif file is None or file[0].version < version:
            older = "" if file is None else f": its file holds version {file[0].version}"
            gone = f"version {version} is damaged or gone{older}"
            self._lose(name, place, gone if version else "it is not as it was written")
            return
        elif file[0].version > version and not self._doubted:
            self._lose(name, place, f"its file holds version {file[0].version}, not {version}")
            return
        else:
            found = RecordRow(name, place, file[0].version, bytes(file[0].value), file[1])
        layout = self._layouts[name]
        assert isinstance(layout, Records)
        if found.value is not None:
            try:
                layout.columns(layout.decode(split(place), found.value))
            except Damaged as damage:
                self._lose(name, place, damage.why)
                return
        yield found

    def _sound(self, name: str, key: Key) -> tuple[RecordFile, bytes | None] | None:
        """A record's file and attachment, if they are as they were written."""
        with suppress(OSError):
            file = parse_record(self._tree.record(name, key).read_bytes())
            if file is None or (file.collection, file.key) != (name, key):
                return None
            attachment = None
            if file.attachment is not None:
                attachment = self._tree.attachment(name, key, file.version).read_bytes()
            checksum = record_sum(name, join(key), file.version, bytes(file.value), attachment)
            return (file, attachment) if shown_sum(checksum) == file.sum else None
        return None

    def _stream(self, log: Log[object], place: str) -> Iterator[StreamRow]:
        key = split(place)
        row = self._state.streams.get((log.name, place))
        head = _head_of(self._tree.stream(log.name, key)) if self._doubted else None
        if head is not None and (row is None or head.incarnation > row.tip.incarnation):
            tip = Tip(head.incarnation, head.first, head.first - 1)
        elif row is not None:
            tip = row.tip
        else:
            return
        sound = tip.first - 1 + sum(1 for _ in self._values(log, place, tip))
        at = (log.name, place, tip.incarnation)
        first = tip.first
        if sound < tip.last:
            why = "the first of these is damaged or gone, and numbers have no holes"
            self.lost.append(Lost(log.name, why, show(key), (sound + 1, tip.last)))
            at = (log.name, place, tip.incarnation + 1)
            if sound < first:
                first, sound = 1, 0
        if sound < first:
            yield StreamRow(*at, first, sound)
            return
        for after, value in enumerate(self._values(log, place, tip), first - 1):
            yield StreamRow(*at, first, after, (value,))

    def _values(self, log: Log[object], place: str, tip: Tip) -> Iterator[bytes]:
        """The entries of a stream up to the first that is damaged or gone: those in its file, then
        those in the journal. What the files alone know of is looked for in a store in doubt."""
        key, seq = split(place), tip.first
        last = (1 << 63) - 1 if self._doubted else tip.last
        path, identity = (
            self._tree.stream(log.name, key),
            Identity(log.name, place, tip.incarnation),
        )
        with suppress(OSError, Damaged), StreamFile(path, identity) as file:
            for found, value, _ in file.entries(seq, last):
                if found != seq:
                    break
                log.decode(key, value)
                yield value
                seq += 1
        waiting = self._state.waiting_streams.get((log.name, place))
        if waiting is not None and self._state.tip((log.name, place)) == tip:
            for behind in range(max(seq, waiting.first), tip.last + 1):
                if behind != seq:
                    return
                yield waiting.at(behind)
                seq += 1

    def _lose(self, name: str, place: str, why: str) -> None:
        self.lost.append(Lost(name, why, show(split(place))))


def _head_of(path: Path) -> _StreamHead | None:
    """What the first line of a stream's file says."""
    with suppress(OSError, msgspec.MsgspecError, UnicodeDecodeError), path.open("rb") as file:
        return _head.decode(file.readline())
    return None
