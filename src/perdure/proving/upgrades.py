"""Upgrades that are cut off, and snapshots that are not sound: what a store is then.

There has been one format so far, so the steps here are steps of nobody: each leaves a trace in
every record, and no state may have some of these traces under a number that does not stand for
them. The engines run them as they would run their own.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import apsw
import msgspec

from perdure.core.batch import put
from perdure.core.clock import SystemClock
from perdure.core.disk import Disk
from perdure.core.engine import Engine, Snapshot
from perdure.core.errors import Damaged, NeedsUpgrade, NewerFormat, PerdureError
from perdure.core.keys import split
from perdure.core.layouts import Index, Records
from perdure.core.stored import FormatStep
from perdure.engines import files_recovery, open_blobs, open_engine
from perdure.engines.files import FilesEngine
from perdure.engines.files_recovery import Store
from perdure.engines.sqlite import SqliteEngine
from perdure.engines.sqlite_driver import connect
from perdure.proving.crashstates import RecordingDisk, crash_states
from perdure.proving.file_stories import history, small_journals
from perdure.proving.subject import LAYOUTS, Note, stored
from perdure.proving.watched import HastyDisk, WatchedDisk
from perdure.services.upgrading import Upgrading
from perdure.surfaces.blobs import BlobUses

_BATCHES = 12
_STATES_MAX = 40
_LAST_STATES = 20
"""Of these, most are of the new format."""

_DB = "state.db"

Marks = list[int]
"""What the steps have left in the records of a store, one number each."""


def _begin_traces(connection: apsw.Connection) -> None:
    connection.execute("CREATE TABLE traces (key TEXT PRIMARY KEY, trace INTEGER)")
    connection.execute("INSERT INTO traces SELECT key, 2 FROM records_notes")


def _go_on_with_traces(connection: apsw.Connection) -> None:
    connection.execute("UPDATE traces SET trace = trace + 1")


SQLITE_STEPS = (
    FormatStep(2, "each note has a trace", _begin_traces),
    FormatStep(3, "each trace is one more", _go_on_with_traces),
)


def _trace(format: int, store: Store) -> None:
    """Write every record once more, with a field that no reader knows."""
    sign = b'{"trace":%d,' % format
    for row in store.state.records.values():
        if row.version > 0:
            path = store.tree.record(row.collection, split(row.place))
            _, _, fields = path.read_bytes().partition(b'"collection"')
            store.place.disk.write_file(path, sign + b'"collection"' + fields)


FILES_STEPS = (
    FormatStep(2, "each record has a trace", partial(_trace, 2)),
    FormatStep(3, "each trace is one more", partial(_trace, 3)),
)


class Kept(msgspec.Struct, frozen=True):
    """A store of the first format, killed before it was closed: what is in it, the snapshot that
    would be taken of it, and how it is opened."""

    home: Path
    opening: Callable[..., Awaitable[Engine]]
    traces: Callable[[Path], Marks]
    stored: list[Any]
    snapshot: Snapshot


def _opening(at: Path, **options: Any) -> Awaitable[Engine]:
    options = {"clock": SystemClock(), "disk": HastyDisk(), **options}
    if at.suffix == ".db":
        return SqliteEngine.open(str(at), LAYOUTS, **{"steps": SQLITE_STEPS, **options})
    return FilesEngine.open(str(at), LAYOUTS, **{"steps": FILES_STEPS, **options})


async def _made(home: Path, name: str, traces: Callable[[Path], Marks]) -> Kept:
    told = await history(random.Random(7), _BATCHES)
    engine = await _opening(home / "living" / name, steps=())
    for at, batch in enumerate(told.batches):
        await engine.commit(batch)
        if at == _BATCHES // 2:
            await engine.usage()  # of plain files some are up to date, and others only journalled
    shutil.copytree(home / "living", home / "old")
    await engine.close()
    looked = home / "looked"
    shutil.copytree(home / "old", looked)
    engine = await _opening(looked / name, read_only=True)
    number = engine.written.number
    assert number is not None
    kept = Kept(home, _opening, traces, await stored(engine), Snapshot(engine.store_id, number, 1))
    await engine.close()
    return kept


async def cut_sqlite(home: Path) -> tuple[int, list[str]]:
    """Cut an upgrade of a sqlite store at every call to its disk, with all that was written since
    the last sync, and with nothing of it: how many states that were, and what is wrong."""
    kept = await _made(home, _DB, _sqlite_traces)
    real = home / "real"
    shutil.copytree(home / "old", real)
    disk = WatchedDisk(hasty=True)
    moments = []
    disk.watch = lambda call, suffix: moments.append(disk.contents())
    await (await _opening(real / _DB, vfs=disk.name, snapshots=[kept.snapshot])).close()
    moments.append(disk.contents())
    states = {
        tuple(sorted(moment.survivors(some).items()))
        for moment in moments
        for some in ((), range(len(moment.loose)))
    }
    wrong: list[str] = []
    for at, state in enumerate(sorted(states)):
        case = home / f"case-{at}"
        shutil.copytree(home / "old", case, ignore=shutil.ignore_patterns(f"{_DB}*[lm]"))
        shutil.copy(home / "old" / f"{_DB}.mark", case)
        for name, data in state:
            (case / name).write_bytes(data)
        wrong += [f"state {at}: {it}" for it in await _judge(kept, case / _DB)]
    return len(states), wrong


async def cut_files(home: Path) -> tuple[int, list[str]]:
    """The same of a store of plain files, at every step of its disk, in every state that it may
    leave: some of them, chosen by a seed."""
    with small_journals():
        kept = await _made(home, "store", _file_traces)
        real = home / "real"
        shutil.copytree(home / "old", real)
        disk = RecordingDisk()
        disk.adopt(real)
        sound = len(disk.steps)
        await (await _opening(real / "store", disk=disk, snapshots=[kept.snapshot])).close()
        states = list(crash_states(disk.steps, real, after=sound))
        chosen = random.Random(7).sample(states[:-_LAST_STATES], _STATES_MAX)
        wrong: list[str] = []
        for at, state in enumerate(chosen + states[-_LAST_STATES:]):
            case = state.write(home / f"case-{at}")
            wrong += [f"state {at}: {it}" for it in await _judge(kept, case / "store")]
    return len(states), wrong


async def _judge(kept: Kept, at: Path) -> list[str]:
    """What does not hold in a store whose upgrade was cut off: it is old or new, the release before
    opens it or refuses it, and the next opening goes on by itself."""
    wrong: list[str] = []
    try:
        look = await kept.opening(at, read_only=True)
        format, snapshot = look.written.format, Snapshot(look.store_id, look.written.number or 0, 1)
        wrong += [] if await stored(look) == kept.stored else ["it holds something else"]
        await look.close()
        wrong += await _refused(kept, at, format)
        wrong += _half_done(kept, at, format)
        try:
            engine = await kept.opening(at)
        except NeedsUpgrade:
            engine = await kept.opening(at, snapshots=[snapshot])
        wrong += [] if await stored(engine) == kept.stored else ["upgraded, it holds other things"]
        wrong += [f"upgraded: {it.where}: {it.why}" async for it in engine.verify()]
        await engine.close()
        wrong += _half_done(kept, at, 3)
    except (PerdureError, apsw.Error) as error:
        wrong.append(f"it is not opened by itself: {error!r}")
    return wrong


async def _refused(kept: Kept, at: Path, format: int) -> list[str]:
    """Whether the release before does as it should."""
    try:
        await (await kept.opening(at, steps=(), read_only=True)).close()
    except NewerFormat:
        return ["the release before refuses a store of its own format"] if format == 1 else []
    return ["the release before opens a newer format"] if format > 1 else []


def _half_done(kept: Kept, at: Path, format: int) -> list[str]:
    traces = kept.traces(at)
    if format == 2 or (format == 3 and set(traces) != {3}):
        return [f"it says format {format}, and its records have the traces {traces}"]
    if format == 1 and at.suffix == ".db" and traces:
        return [f"it says format 1, and there are traces already: {traces}"]
    return []


def _sqlite_traces(at: Path) -> Marks:
    with closing(connect(str(at), read_only=True)) as connection:
        tables = connection.execute("SELECT 1 FROM sqlite_schema WHERE name = 'traces'").fetchall()
        notes = "SELECT trace FROM records_notes LEFT JOIN traces USING (key)"
        return [trace or 0 for (trace,) in connection.execute(notes)] if tables else []


def _file_traces(at: Path) -> Marks:
    records = (path.read_bytes() for path in at.rglob("*.json"))
    return [int(data[9:10]) if data.startswith(b'{"trace"') else 0 for data in records]


FEWER = Records("notes", Note, key=("tenant", "note"))
_BLOBS = BlobUses.promise.layouts
MORE = Records("notes", Note, key=FEWER.key, indexes=(Index("ranked", ("rank",)),))


class Fading(Disk):
    """Loses a byte of a snapshot once that was written, looked at and named."""

    def replace(self, source: Path, target: Path) -> None:
        super().replace(source, target)
        if "before-upgrade" in target.name:
            changed = next(path for path in _copied(target) if path.stat().st_size)
            data = bytearray(changed.read_bytes())
            data[len(data) // 2] ^= 1
            changed.write_bytes(data)


def _copied(snapshot: Path) -> Iterator[Path]:
    return (path for path in snapshot.iterdir() if path.is_file() and path.suffix != ".json")


async def upgraded_over_a_bad_snapshot(home: Path) -> str | None:
    """What shows that a store was upgraded though its snapshot is not what was written; None where
    it was left alone."""
    url = f"file:///{home / 'store'}"
    engine = await open_engine(url, [FEWER, *_BLOBS])
    await engine.commit(put(FEWER, ("t", "1"), Note(rank=1)))
    await engine.close()
    disk = Fading()
    upgrading = Upgrading(
        partial(open_engine, url, [MORE, *_BLOBS], disk=disk),
        partial(open_blobs, "memory://"),
        home / "store",
        SystemClock(),
        disk,
    )
    try:
        await (await upgrading.open(lambda what, done, total: None)).close()
    except Damaged:
        engine = await open_engine(url, [FEWER, *_BLOBS], read_only=True)
        await engine.close()
        return "the store was changed" if engine.written.steps else None
    return "it was upgraded, and no sound snapshot is left of it"


def outside_of_the_transaction(
    connection: apsw.Connection, steps: Any, note: Callable[[str], None]
) -> None:
    """A planted bug: every statement of the steps is by itself."""
    connection.execute("COMMIT")
    for step in steps:
        if step.format > connection.pragma("user_version"):
            step.run(connection)
            connection.pragma("user_version", step.format)
    connection.execute("BEGIN IMMEDIATE")


def number_first(connection: apsw.Connection, steps: Any, note: Callable[[str], None]) -> None:
    """A planted bug: the format is raised, and then the steps are run."""
    left = [step for step in steps if step.format > connection.pragma("user_version")]
    for step in left:
        connection.pragma("user_version", step.format)
    connection.execute("COMMIT")
    connection.execute("BEGIN IMMEDIATE")
    for step in left:
        step.run(connection)


_change_format = files_recovery.change_format


def manifest_first(store: Store, note: Callable[[str], None]) -> None:
    """A planted bug: the manifest says the new format before the files have it."""
    found = store.state.format
    store.state.format = store.place.format
    store.write_manifest(*store.state.manifest())
    store.state.format = found
    _change_format(store, note)
