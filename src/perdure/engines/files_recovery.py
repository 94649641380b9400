"""Opening a store of files: take it, read the manifest and the journal, bring the files up to
date, and only then let anybody write.

A store exists once it has a manifest, which is written last. What was recovered is applied to
synced files, and the journal starts over as a new one, before the first acknowledgement: the page
cache may hold frames that never reached the disk.

Format steps run once the files have everything, and then the manifest is written, by which the
store is of the new format. Until that moment the store is read as one of the format before, also
for its snapshot; so a step leaves every file, at each moment, such that both formats read it, and
does again what one that was cut off has done. What only the new format knows is not yet written.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import msgspec
from msgspec.structs import replace

from perdure.core.clock import Clock
from perdure.core.disk import READ_ONLY, Disk, Lock
from perdure.core.engine import Recovered, Snapshot, Step, Written
from perdure.core.errors import Damaged, Invalid, Missing, Unavailable
from perdure.core.keys import split
from perdure.core.layouts import Columns, Layout, Records, default_path
from perdure.core.mark import Mark, read_mark
from perdure.core.stored import (
    FormatStep,
    Lacking,
    check_layouts,
    check_whole,
    newest,
    shape_of,
)
from perdure.core.values import Finding
from perdure.engines.files_apply import Applier
from perdure.engines.files_journal import Found, Journal, is_new, read_journal
from perdure.engines.files_manifest import (
    Head,
    LayoutRow,
    RecordRow,
    Row,
    read_manifest,
    write_manifest,
)
from perdure.engines.files_names import OWN, Tree
from perdure.engines.files_read import stored_record
from perdure.engines.files_state import State

Note = Callable[[str], None]
_NOTED_EVERY = 1_000
_LOOK = " It can be looked at as it is, but kept in use only where this user can write."

Steps = tuple[FormatStep["Store"], ...]

STEPS: Steps = ()
"""From format 1 on, one after another. The last leads to the format that this release writes."""


class Place(msgspec.Struct, frozen=True):
    """Where a store lies, and what to reach it with."""

    root: Path
    clock: Clock
    disk: Disk
    steps: Steps = STEPS

    @property
    def format(self) -> int:
        """The one that stores are made in."""
        return newest(self.steps)

    @property
    def manifest(self) -> Path:
        return self.root / OWN / "manifest"

    @property
    def journal(self) -> Path:
        return self.root / OWN / "journal"

    @property
    def mark(self) -> Path:
        return self.root / OWN / "mark"

    @property
    def lock(self) -> Path:
        return self.root / OWN / "lock"


class Store:
    """An open store: its locks, its state, and what was found in it. Without a journal it can only
    be read."""

    def __init__(
        self, place: Place, lock: Lock, state: State, tree: Tree, recovered: Recovered
    ) -> None:
        self.place = place
        self.lock = lock
        self.state = state
        self.tree = tree
        self.recovered = recovered
        self.written = Written(state.format, place.format)
        self.applier = Applier(place.disk, tree)
        self.journal: Journal | None = None
        self.mark: Mark | None = None
        self.manifest_bytes = 0
        self._manifest_number = state.number if state.applied == state.number else -1

    def write_manifest(self, head: Head, rows: Sequence[Row]) -> None:
        """Write down the state that a moment's `State.manifest` gave."""
        place = self.place
        self.manifest_bytes = write_manifest(place.disk, place.manifest, head, rows)
        self._manifest_number = head.number if head.applied == head.number else -1

    def start_journal(
        self, base: int, frames: Sequence[bytes] = (), *, closed: bool = False
    ) -> None:
        """Let the journal start over after commit `base`."""
        place, before = self.place, self.journal
        self.journal = Journal.create(
            *(place.disk, place.journal, self.state.store_id, base, frames), closed=closed
        )
        if before is not None:
            before.close()

    def value(self, row: RecordRow) -> tuple[bytes, bytes | None]:
        """Value and attachment of a record, from the overlay or its file. Raises `Damaged`."""
        waiting = self.state.waiting_records.get((row.collection, row.place))
        if waiting is not None and waiting.change.value is not None:
            return waiting.change.value, waiting.change.attachment
        return stored_record(self.tree, row)

    def finish(self) -> None:
        """Write down that all is in the files, and let go."""
        try:
            if self._manifest_number != self.state.number:
                self.write_manifest(*self.state.manifest())
            self.start_journal(self.state.number, closed=True)
        finally:
            self.release()

    def release(self) -> None:
        """Let go without writing anything."""
        if self.journal is not None:
            self.journal.close()
        if self.mark is not None:
            self.mark.close()
        self.lock.release()


def open_store(
    place: Place,
    layouts: Sequence[Layout],
    *,
    read_only: bool,
    note: Note,
    copy_of: str | None = None,
    snapshots: Sequence[Snapshot] = (),
) -> Store:
    """Open, recover and take the store at `place`; made first where there is none. With `copy_of`,
    the id of another store, it is one that becomes its copy. An older one is upgraded, if it is as
    one of the `snapshots` has it.

    Raises `StoreLocked`, `NewerFormat`, `NeedsUpgrade`, `Invalid`, `Missing` (only when
    `read_only`), and `Damaged` where acknowledged commits are gone (when `read_only` that is a
    finding instead).
    """
    started_s = place.clock.monotonic_s()
    try:
        store = _open(place, layouts, note, copy_of, snapshots, read_only=read_only)
    except OSError as error:
        look = "" if read_only or error.errno not in READ_ONLY else _LOOK
        raise Unavailable(f"{place.root} cannot be opened: {error.strerror}.{look}") from error
    duration_s = place.clock.monotonic_s() - started_s
    store.recovered = replace(store.recovered, duration_s=duration_s)
    return store


def _open(
    place: Place,
    layouts: Sequence[Layout],
    note: Note,
    copy_of: str | None,
    snapshots: Sequence[Snapshot],
    *,
    read_only: bool,
) -> Store:
    if not read_only:
        place.disk.make_directory(place.root)
        place.disk.make_directory(place.root / OWN)
    elif not place.manifest.exists():
        raise Missing(f"{place.root} holds no store, so there is nothing to read.")
    with ExitStack() as held, ExitStack() as undo:
        lock = place.disk.lock(place.lock, shared=read_only)
        undo.callback(lock.release)
        if not read_only:
            if place.journal.exists():  # an owner whose lock file was removed still holds this one
                held.callback(place.disk.lock(place.journal).release)
            lock.note(f"{os.getpid()}\n")  # at once: what is noted is of one that is dead
            if not place.manifest.exists():
                _create(place, copy_of)
        manifest = read_manifest(place.manifest, place.format)
        rows = [(row.name, row.version, row.shape) for row in manifest.head.layouts]
        lacking = check_layouts(rows, str(place.root), layouts)
        state, tree = State(manifest), tree_of(place.root, manifest.head.layouts)
        for layout in lacking.collections:
            tree.declare(layout)
        store = Store(place, lock, state, tree, _recover(place, state, read_only=read_only))
        undo.callback(store.release)
        check_whole(str(place.root), state.store_id, state.copy_of, copy_of)
        store.written = _written(store, lacking)
        if not read_only:
            store.written.require(str(place.root), state.store_id, snapshots)
        for records in lacking.indexes:
            _add_indexes(store, records, note)
        state.open_orders(layouts)
        if not read_only:
            _take(store, lacking, note)
        undo.pop_all()
        return store


def tree_of(root: Path, rows: Iterable[LayoutRow]) -> Tree:
    """Where collections lie that a store holds. Raises `Invalid`."""
    tree = Tree(root)
    for row in rows:
        key, indexes = msgspec.json.decode(row.shape)
        path = row.path or default_path(row.name, key)
        tree.add(row.name, path, is_records=indexes is not None)
    return tree


def _create(place: Place, copy_of: str | None) -> None:
    """Make an empty store: first a journal, then the manifest by which it exists."""
    others = sorted(path.name for path in place.root.iterdir() if path.name != OWN)
    if place.journal.exists() and (others or not is_new(place.journal)):
        raise Damaged(
            str(place.manifest), "it is gone, but its store is still there. Bring it back"
        )
    if others:
        raise Invalid(
            f"{place.root} holds {others[0]} and no store. Name an empty directory, or a new one."
        )
    store_id = copy_of or place.clock.new_id("store")
    Journal.create(place.disk, place.journal, store_id, 0, closed=True).close()
    head = Head(place.format, store_id, 0, 0, copy_of=copy_of)
    write_manifest(place.disk, place.manifest, head, [])


def _recover(place: Place, state: State, *, read_only: bool) -> Recovered:
    """Take every commit that the files may lack, if they are all there."""
    if not place.journal.exists():
        found, why = None, "the journal is gone"
    else:
        found = read_journal(place.journal, state.store_id)
        why = lost_commits(found, state, read_mark(place.mark, state.store_id))
    if why and not read_only:
        raise Damaged(str(place.journal), f"{why}. Bring it back, or restore a backup")
    findings = (Finding(str(place.journal), why),) if why else ()
    if found is None or found.base > state.applied:
        return Recovered(clean=False, findings=findings)
    lacking = [one for one in found.frames if one[0].number > state.applied]
    for frame, data in lacking:
        state.take(frame, data)
    cut: tuple[Finding, ...] = ()
    if found.size_bytes > found.end and not why:
        what = "a commit that was never acknowledged was cut off"
        cut = (Finding(f"{place.journal}:{found.end}", what, "cut"),)
    clean = found.head.closed and found.size_bytes == found.end and not found.frames
    return Recovered(clean and not why, len(lacking), cut, findings)


def lost_commits(found: Found, state: State, mark: int) -> str:
    """Which acknowledged commits are gone; empty where none are."""
    if found.base > state.applied:
        return f"it begins after commit {found.base}, and files are as of {state.applied}"
    last = found.frames[-1][0].number if found.frames else found.base
    newest = max(state.number, mark, found.behind)
    if newest <= last:
        return ""
    return (
        f"it is damaged at byte {found.end}: at least {newest - last} of the commits acknowledged "
        f"after commit {last} are gone"
    )


def _written(store: Store, lacking: Lacking) -> Written:
    """What the store is in, and what an upgrade would do to it."""
    place, state = store.place, store.state
    rows = state.places
    todo = [Step(step.says, rows) for step in place.steps if step.format > state.format]
    for records in lacking.indexes:
        rows = sum(name == records.name for name, _ in state.records)
        todo.append(Step(f"new indexes of {records.name}", rows, records.name))
    return Written(state.format, place.format, tuple(todo), state.number)


def _add_indexes(store: Store, records: Records[Any], note: Note) -> None:
    """Work out the columns of a collection that was declared with more indexes since. A record
    that cannot be read has none, so that no index leads to it."""
    state = store.state
    rows = [row for place, row in state.records.items() if place[0] == records.name]
    none = (None,) * len(records.fields)
    for done, row in enumerate(rows):
        if done % _NOTED_EVERY == 0:
            note(f"indexes of {records.name}: {done} of {len(rows)} records")
        columns: Columns = none
        if row.version > 0:
            with suppress(Damaged):
                value, _ = store.value(row)
                columns = records.stored_columns(records.decode(split(row.place), value))
        state.records[(row.collection, row.place)] = replace(row, columns=columns)


def change_format(store: Store, note: Note) -> None:
    """Run the steps that the store lacks. It is of the new format once its manifest says so."""
    for step in store.place.steps:
        if step.format > store.state.format:
            note(f"format {step.format}: {step.says}")
            step.run(store)
            store.state.format = step.format


def _take(store: Store, lacking: Lacking, note: Note) -> None:
    """Bring the files up to date, then begin to own the store."""
    place, state = store.place, store.state
    work = state.work()
    state.done(work, store.applier.apply(work))
    declared = (*lacking.collections, *lacking.indexes)
    for one in declared:
        known = state.layouts.get(one.name)
        path = one.path if known is None else known.path
        state.layouts[one.name] = LayoutRow(one.name, one.version, shape_of(one), path)
    change_format(store, note)
    if declared or store.written.steps or not store.recovered.clean:
        store.write_manifest(*state.manifest())
    store.written = Written(state.format, place.format)
    store.start_journal(state.number)
    store.mark = Mark(place.disk, place.mark, state.store_id)
    store.mark.write(state.number)
