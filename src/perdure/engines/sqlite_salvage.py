"""Making a new sqlite store of what is sound in a damaged one, and naming what is not.

What is brought over is brought over as it was: versions, tombstones, numbers of entries and
operation ids, each held to its checksum first. Every table of rows is read twice: by its own tree,
and by the index of its keys, which finds rows that the tree does not lead to any more and names
those that are gone.

Log numbers have no holes, so a stream is kept up to its first damaged entry. It begins a new
incarnation then, as the numbers behind will be given out again.

The new store has an id and commits of its own, like one made of a backup.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

from perdure.core.disk import TEMPORARY
from perdure.core.engine import Salvaged
from perdure.core.errors import Damaged, Invalid, Missing, NewerFormat
from perdure.core.keys import show, split
from perdure.core.layouts import Layout, Log, Records
from perdure.core.stored import operation_sum
from perdure.core.values import Lost, Tip, entry_sum, record_sum, tip_sum
from perdure.engines.sqlite_driver import translating
from perdure.engines.sqlite_recovery import (
    Place,
    Store,
    open_store,
    post_mortem,
    recovered_number,
)
from perdure.engines.sqlite_rescue import UNREADABLE, Rescue, copy_damaged
from perdure.engines.sqlite_schema import (
    SQL,
    STREAM_SHIFT,
    Table,
    incarnations,
)
from perdure.engines.sqlite_upgrade import empty_log

Step = tuple[str, int]
"""What is being read, and how many rows of it were in this step."""

Take = Callable[..., str]
"""Brings a row over and returns nothing, or says why it cannot be."""

_RECORD = "version, sum, value, attachment"
_TOMBSTONE = "version, sum, deleted_s"
_STREAM = "incarnation, first, last, sum, dropped_s"
_OPERATION = "digest, numbers, sum, committed_s"
_NEXT_ENTRY = "SELECT id FROM entries WHERE id >= ? ORDER BY id LIMIT 1"

_IDS = ((-(1 << 63),), ((1 << 63) - 1,))
_ABOVE_TEXT = b""
_STEP_ROWS = 500
_CHECKPOINT_ROWS = 10_000
_MISMATCH = "it does not match its checksum"
_BLIND = "its table and the index of its keys are both damaged: more may be gone than is named"


def salvage_steps(
    source: Place, target: Place, layouts: Sequence[Layout]
) -> Generator[Step | Salvaged, None, None]:
    """Steps, and at last what was salvaged. `source` is not changed; `target` must not exist."""
    if not source.path.exists():
        raise Missing(f"{source.path} does not exist, so there is nothing to salvage.")
    if target.path.exists():
        raise Invalid(f"{target.path} exists, and a salvage never overwrites. Name another place.")
    copy = Place(target.beside(f"-damaged{TEMPORARY}"), target.clock, target.disk)
    with ExitStack() as undo, translating(str(source.path)):
        if source.beside(".lock").exists():  # a store that nobody ever held is not given a lock
            undo.callback(source.disk.lock(source.beside(".lock"), shared=True).release)
        target.disk.make_directory(target.path.parent)
        for suffix in ("", "-wal", "-shm", ".mark"):
            undo.callback(target.disk.unlink, copy.beside(suffix))
        yield "copying the damaged store", 0
        unread = copy_damaged(source, copy)
        rescue = Rescue(copy)
        undo.callback(rescue.close)
        _check_ours(rescue, source, layouts)
        store = open_store(target, layouts, read_only=False)
        try:
            salvage = Salvage(rescue, store, layouts)
            if unread:
                salvage.lost.append(Lost("", f"the disk did not give {unread} bytes of its files"))
            yield from salvage.steps()
            made = Salvaged(salvage.kept, salvage.lost)
        except BaseException:
            store.release()
            raise
        store.finish(store.number)
        yield made


def _check_ours(rescue: Rescue, source: Place, layouts: Sequence[Layout]) -> None:
    """Refuse what is no store of ours, and one that a newer release wrote: what it means by what
    it holds is not known here. What damaged pages say counts for nothing."""
    if not {"commits", "layouts", "streams"} & rescue.tables:
        if source.beside(".mark").exists():
            raise Damaged(str(source.path), "none of its tables can be found")
        raise Invalid(f"{source.path} is not a Perdure store. It was left as it is.")
    if rescue.strict is None:
        return
    declared = {layout.name: layout.version for layout in layouts}
    try:
        rows: list[Any] = rescue.strict.execute(SQL["layouts"]).fetchall()
    except UNREADABLE:
        return
    for name, version, _ in rows:
        if version > declared.get(name, version):
            raise NewerFormat(
                f"{source.path}: {name} was written in version {version}; this release knows up to "
                f"{declared[name]}. Salvage it with a newer Perdure."
            )


class Salvage:
    """One salvage under way."""

    def __init__(self, rescue: Rescue, store: Store, layouts: Sequence[Layout]) -> None:
        self.lost: list[Lost] = []
        self._rescue = rescue
        self._into = store.connection
        self._tables = [Table(it) for it in layouts if isinstance(it, Records)]
        self._logs = {it.name for it in layouts if isinstance(it, Log)}
        self._streams: set[int] = set()
        self._now_s = int(store.place.clock.now_s())

    def steps(self) -> Iterator[Step]:
        """Everything, one part after another."""
        self._commits()
        for table in self._tables:
            take = partial(self._take_record, table)
            yield from self._rows(f"records_{table.records.name}", _RECORD, ("key",), take)
        yield from self._keyed(
            "tombstones", _TOMBSTONE, ("collection", "key"), self._take_tombstone
        )
        for table in self._tables:
            self._settle_deletions(table)
        yield from self._rows("streams", _STREAM, ("log", "key"), self._take_stream)
        yield from self._strays()
        yield from self._keyed("operations", _OPERATION, ("id", "partition"), self._take_operation)
        known = {f"records_{table.records.name}" for table in self._tables}
        for name in self._rescue.tables - known:
            if name.startswith("records_"):
                self.lost.append(Lost(_collection(name), "this release knows no such collection"))

    @property
    def kept(self) -> dict[str, int]:
        """What the new store holds: rows of each collection, and entries of each log."""
        counted = {
            table.records.name: self._count(f"SELECT count(*) FROM {table.name}")
            for table in self._tables
        }
        counted |= dict.fromkeys(self._logs, 0) | dict(self._into.execute(SQL["entries_by_log"]))
        for name in ("tombstones", "operations"):
            counted[name] = self._count(f"SELECT count(*) FROM {name}")
        return counted

    def _count(self, sql: str) -> int:
        count: int = self._into.execute(sql).get
        return count

    def _commits(self) -> None:
        """Which commits are gone, as far as the log and the mark tell; and which incarnations of
        dropped streams are used up."""
        rescue = self._rescue
        try:
            number = recovered_number(rescue.strict or rescue.lenient, rescue.copy.path)
            ((store_id,),) = rescue.rows("store", SQL["fact"], ("store_id",))
            why = post_mortem(rescue.copy, rescue.lenient, str(store_id), number)[2]
        except (*UNREADABLE, Damaged, ValueError):
            why = "which commit was its last cannot be read, so it is not known whether any is gone"
        if why:
            self.lost.append(Lost("", why))
        for log in self._logs:
            with suppress(*UNREADABLE):
                for (highest,) in rescue.rows("store", SQL["fact"], (incarnations(log),)):
                    if isinstance(highest, int):
                        self._into.execute(SQL["raise_fact"], (incarnations(log), highest))

    def _rows(self, table: str, columns: str, names: tuple[str, ...], take: Take) -> Iterator[Step]:
        """A table whose rows have an id and an index of `names`: by both."""
        rescue, collection = self._rescue, _collection(table)
        if table not in rescue.tables:
            if rescue.doubted:
                self.lost.append(Lost(collection, "its table cannot be found"))
            return
        quoted, keys, joined = f'"{table}"', f"the keys of {collection}", ", ".join(names)
        lost: dict[int, Lost] = {}
        row = f"id, {joined}, {columns}"
        for found in rescue.walk(table, quoted, ("id",), row, *_IDS):
            with self._into:
                for id, *rest in found:
                    if why := take(id, *rest):
                        lost[id] = _lost(table, rest, why)
            yield self._stepped(collection, len(found))
        by_key = f'{quoted} INDEXED BY "sqlite_autoindex_{table}_1"'
        bounds = ("",) * len(names), (_ABOVE_TEXT,) * len(names)
        marks = ", ".join("?" * len(names))
        known = f"SELECT 1 FROM {quoted} WHERE ({joined}) = ({marks})"
        for found in rescue.walk(keys, by_key, names, f"{joined}, id", *bounds):
            with self._into:
                for *place, id in found:
                    if not self._into.execute(known, place).fetchall():
                        why = self._take_alone(f"SELECT {row} FROM {quoted} WHERE id = ?", id, take)
                        lost[id] = _lost(table, place, why)
            yield self._stepped(keys, len(found))
        self.lost += [one for one in lost.values() if one.why]
        if {table, keys} <= rescue.doubted:
            self.lost.append(Lost(collection, _BLIND))

    def _take_alone(self, sql: str, id: int, take: Take) -> str:
        """Take the row of this id, wherever the walk ended before it; why not, if that fails."""
        try:
            found = self._rescue.rows("", sql, (id,))
        except UNREADABLE as error:
            return f"it cannot be read ({error})"
        return take(*found[0]) if found else "it is gone"

    def _keyed(
        self, table: str, columns: str, names: tuple[str, ...], take: Take
    ) -> Iterator[Step]:
        """A table that is its own index."""
        bounds = ("",) * len(names), (_ABOVE_TEXT,) * len(names)
        row = f"{', '.join(names)}, {columns}"
        if table not in self._rescue.tables:
            self.lost.append(Lost(table, "its table cannot be found"))
            return
        for found in self._rescue.walk(table, table, names, row, *bounds):
            with self._into:
                for values in found:
                    if why := take(*values):
                        self.lost.append(_lost(table, values, why))
            yield self._stepped(table, len(found))
        if table in self._rescue.doubted:
            self.lost.append(Lost(table, "it is damaged: more may be gone than is named"))

    def _stepped(self, what: str, rows: int) -> Step:
        """Between two steps the log is emptied when it has grown, so that it stays small."""
        self._since_checkpoint += rows
        if self._since_checkpoint >= _CHECKPOINT_ROWS:
            self._since_checkpoint = 0
            empty_log(self._into)
        return what, rows

    _since_checkpoint = 0

    def _take_record(self, table: Table, id: int, place: Any, *rest: Any) -> str:
        name = table.records.name
        if not _typed((place, *rest), (str, int, int, bytes, bytes | None)):
            return _MISMATCH
        version, checksum, value, attachment = rest
        if record_sum(name, place, version, value, attachment) != checksum:
            return _MISMATCH
        try:
            columns = table.records.columns(table.records.decode(split(place), value))
        except Damaged as damage:
            return damage.why
        newer = f"{table.put} WHERE excluded.version > {table.name}.version"
        self._into.execute(newer, table.values(place, version, columns, value, attachment))
        return ""

    def _take_tombstone(self, collection: Any, key: Any, *rest: Any) -> str:
        if not _typed((collection, key, *rest), (str, str, int, int, int)):
            return _MISMATCH
        version, checksum, deleted_s = rest
        if record_sum(collection, key, version, None, None) != checksum:
            return _MISMATCH
        self._into.execute(SQL["bury"], (collection, key, version, checksum, deleted_s))
        return ""

    def _settle_deletions(self, table: Table) -> None:
        """Of a record and a tombstone of one key the newer is right; the other is a remainder."""
        named = {"collection": table.records.name}
        of = f"t.collection = :collection AND t.key = {table.name}.key"
        self._into.execute(
            f"DELETE FROM {table.name} WHERE EXISTS "
            f"(SELECT 1 FROM tombstones AS t WHERE {of} AND t.version > {table.name}.version)",
            named,
        )
        self._into.execute(
            f"DELETE FROM tombstones WHERE collection = :collection AND EXISTS "
            f"(SELECT 1 FROM {table.name} AS r WHERE r.key = tombstones.key)",
            named,
        )

    def _take_stream(self, id: int, log: Any, key: Any, *rest: Any) -> str:
        self._streams.add(id)
        if not _typed((log, key, *rest), (str, str, int, int, int, int, int | None)):
            return _MISMATCH
        incarnation, first, last, checksum, dropped_s = rest
        tip = Tip(incarnation, first, last)
        if tip_sum(log, key, tip) != checksum:
            return _MISMATCH
        if log not in self._logs:
            return "this release knows no such log"
        sound = self._sound_until(id, log, key, tip)
        kept = tip
        if sound < last:
            kept = Tip(incarnation + 1, first, sound) if sound >= first else Tip(incarnation + 1)
            dropped_s = None if kept.last else self._now_s
            why = "the first of these is damaged or gone, and numbers have no holes"
            self.lost.append(Lost(log, why, show(split(key)), (sound + 1, last)))
        for found in self._entries(id, kept.first, kept.last):
            self._into.executemany(
                SQL["add_entry"],
                [
                    ((id << STREAM_SHIFT) + seq, entry_sum(log, key, kept.incarnation, seq, it), it)
                    for seq, (_, it) in found.items()
                ],
            )
        numbers = (kept.incarnation, kept.first, kept.last)
        self._into.execute(
            SQL["set_tip"], (id, log, key, *numbers, tip_sum(log, key, kept), dropped_s)
        )
        return ""

    def _sound_until(self, id: int, log: str, key: str, tip: Tip) -> int:
        """The number of the last entry before the first that is damaged or gone."""
        seq = tip.first - 1
        for found in self._entries(id, tip.first, tip.last):
            while seq + 1 in found:
                checksum, value = found[seq + 1]
                if not _typed((checksum, value), (int, bytes)):
                    return seq
                if entry_sum(log, key, tip.incarnation, seq + 1, value) != checksum:
                    return seq
                seq += 1
        return seq

    def _entries(self, id: int, first: int, last: int) -> Iterator[dict[int, tuple[Any, Any]]]:
        """Entries by number, until a number is not there; each by itself where that is damaged."""
        base = id << STREAM_SHIFT
        for start in range(first, last + 1, _STEP_ROWS):
            end = min(start + _STEP_ROWS - 1, last)
            try:
                rows = self._rescue.rows("", SQL["entries_between"], (base + start, base + end))
            except UNREADABLE:
                rows = []
                for seq in range(start, end + 1):
                    with suppress(*UNREADABLE):
                        one = (base + seq, base + seq)
                        rows += self._rescue.rows("", SQL["entries_between"], one)
            found = {at - base: (checksum, value) for at, checksum, value in rows}
            yield found
            if len(found) <= end - start:
                return

    def _strays(self) -> Iterator[Step]:
        """Entries whose stream's name is gone."""
        id = 0
        while True:
            try:
                rows = self._rescue.rows("", _NEXT_ENTRY, (id,))
            except UNREADABLE:
                why = (
                    "its table cannot be followed: entries of streams that are gone may stand there"
                )
                self.lost.append(Lost("entries", why))
                return
            if not rows or rows[0][0] < id:
                return
            stream = rows[0][0] >> STREAM_SHIFT
            if stream not in self._streams:
                self.lost.append(Lost("entries", f"the name of their stream {stream} is gone"))
            id = (stream + 1) << STREAM_SHIFT
            yield "entries", 0

    def _take_operation(self, id: Any, partition: Any, *rest: Any) -> str:
        if not _typed((id, partition, *rest), (str, str, int, bytes, int, int)):
            return _MISMATCH
        digest, numbers, checksum, _ = rest
        if operation_sum((id, partition), digest, numbers) != checksum:
            return _MISMATCH
        self._into.execute(SQL["add_operation"], (id, partition, *rest))
        return ""


def _typed(values: Sequence[Any], types: tuple[Any, ...]) -> bool:
    """Whether values are of these types; a damaged row may hold anything."""
    return all(map(isinstance, values, types))


def _collection(table: str) -> str:
    return table.removeprefix("records_")


def _lost(table: str, place: Sequence[Any], why: str) -> Lost:
    """A loss by the place that a row or an index gives it."""
    parts = [part if isinstance(part, str) else repr(part) for part in place]
    if table == "operations":
        return Lost(table, why, parts[0])
    if table == "tombstones":
        why = f"its tombstone: {why}; made again, it would begin in version 1"
    collection, key = (_collection(table), parts[0]) if table[:8] == "records_" else parts[:2]
    return Lost(collection, why, show(split(key)))
