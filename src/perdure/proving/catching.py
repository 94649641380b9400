"""Every planted bug, put where it belongs, and what catches it: the proof that proofs can fail.

The server's bugs live through short campaigns, an engine's through the conformance suite, a disk's
through the states that a power cut leaves, and bugs inside the SQLite engine through the drills of
`perdure torture`. `catch` says what first showed a bug, or None: then a proof is worth nothing.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from perdure.core.batch import Batch
from perdure.core.disk import Disk, Lock
from perdure.core.engine import Engine, Written
from perdure.core.limits import OPERATION_KEPT_S
from perdure.core.offload import off_loop
from perdure.core.values import Committed
from perdure.engines import (
    blobs_local,
    files,
    files_commit,
    files_format,
    files_recovery,
    files_state,
    sqlite,
    sqlite_commit,
    sqlite_driver,
    sqlite_recovery,
    sqlite_schema,
)
from perdure.engines.files_apply import Applier
from perdure.engines.files_journal import Journal
from perdure.engines.files_recovery import Store
from perdure.engines.sqlite import SqliteEngine
from perdure.engines.sqlite_checkpoint import Checkpointer
from perdure.engines.sqlite_commit import Committer
from perdure.engines.wrapping import Wrapping
from perdure.proving import conformance, planted_files, planted_shards, upgrades
from perdure.proving.campaign import Stage
from perdure.proving.crashstates import RecordingDisk
from perdure.proving.drills.blob_cuts import CutBlobs
from perdure.proving.drills.calls import FailedSystemCalls, FullSystem, KilledCalls
from perdure.proving.drills.clocks import JumpedEngine, JumpedServer
from perdure.proving.drills.cuts import CutEngine
from perdure.proving.drills.damaged_server import DamagedServer
from perdure.proving.drills.drill import Drill, Trial
from perdure.proving.drills.ext4 import CutExt4
from perdure.proving.drills.failing_server import FailingServer
from perdure.proving.drills.failures import FailedCalls, FullDisk
from perdure.proving.drills.file_cuts import CutFiles, Met
from perdure.proving.drills.file_damage import DamagedFiles
from perdure.proving.drills.file_failures import FAILING_FILES
from perdure.proving.drills.owned_server import OwnedServer
from perdure.proving.drills.owners import KilledBlobs, OwnedBlobs, OwnedEngine
from perdure.proving.drills.read_only import ReadOnlyEngine
from perdure.proving.drills.requests import ContendingRequests
from perdure.proving.drills.shards import KilledMoves
from perdure.proving.drills.slow import SlowBlobs, SlowEngine
from perdure.proving.drills.slow_server import SlowServer
from perdure.proving.faults import FULL_DISK
from perdure.proving.forgetting import lost_to_a_failed_sync
from perdure.proving.jumping import DAY_S, Jumps
from perdure.proving.pair import Pair, PairLife, PairStage
from perdure.proving.planted import PLANTS, unchecked_record
from perdure.proving.planted_disks import DISKS
from perdure.proving.planted_engines import PLANTED, subject_of
from perdure.proving.planted_lives import CASES, PAIRS, shown_in_lives
from perdure.proving.refusing import Trouble
from perdure.proving.rules import logs
from perdure.proving.subjects import KNOWN
from perdure.proving.sweeping import lost_to_a_sweep
from perdure.proving.waiting import TooLate
from perdure.services import upgrading
from perdure.services.backups import Manifest, Progress, read_manifest
from perdure.services.blobs import BlobKeeper

_REFUSED_SYNC = Trouble(calls=("sqlite.sync",), n=25, times=None)
_SECONDS = 60.0
"""What a drill is given to catch a bug."""

_FLEETS = 4
"""Lives that two servers are given to show one."""

Catch = Callable[[Stage, Path], Awaitable[str | None]]


class Bug(msgspec.Struct, frozen=True):
    """A planted bug: what is wrong, the part that has it, and what catches it in an empty
    directory. `lacks` says why that cannot run on this machine, if so."""

    says: str
    part: str
    by: str
    catch: Catch
    lacks: Callable[[], str | None] = lambda: None


class Caught(msgspec.Struct, frozen=True):
    """What became of a planted bug. `shown` is what first showed it, None if nothing did."""

    says: str
    part: str
    by: str
    shown: str | None
    seconds: float


async def catch_all(home: Path, told: Callable[[str, int, int], None]) -> list[Caught]:
    """Plant every bug, one after the other."""
    found: list[Caught] = []
    async with _staged(home) as stage:
        ready = [bug for bug in BUGS if bug.lacks() is None]
        for number, bug in enumerate(ready):
            told(f"planted: {bug.says}", number, len(ready))
            began_s = time.monotonic()
            shown = await bug.catch(stage, home / f"bug-{number}")
            if shown is not None:
                shown = shown.replace(f"{home}/", "")
            taken_s = round(time.monotonic() - began_s, 2)
            found.append(Caught(bug.says, bug.part, bug.by, shown, taken_s))
    return found


@asynccontextmanager
async def _staged(home: Path) -> AsyncIterator[Stage]:
    Disk().make_directory(home)
    async with Stage(home) as stage:
        yield stage


async def _in_lives(plant: str, stage: Stage, home: Path) -> str | None:
    violations = await shown_in_lives(stage, home, plant)
    seen = [one for one in violations if one.check in CASES[plant].checks]
    return str(seen[0]) if seen else None


async def _by_rules(planted: Callable[[Engine], Wrapping], stage: Stage, home: Path) -> str | None:
    with replaced(logs, "SOON_S", 0.5):
        return await conformance.first_broken(subject_of(planted), home)


async def _by_damage(stage: Stage, home: Path) -> str | None:
    rules = [rule for rule in conformance.RULES if rule.damaging]
    with (
        replaced(sqlite, "checked_record", unchecked_record),
        replaced(sqlite_schema, "checked_record", unchecked_record),
    ):
        return await conformance.first_broken(KNOWN["sqlite"], home, rules)


async def _by_drill(
    drill: Drill, owner: object, name: str, bug: Any, stage: Stage, home: Path
) -> str | None:
    with replaced(owner, name, bug):
        return await _shown(drill, home)


async def _by_sweeping(stage: Stage, home: Path) -> str | None:
    with replaced(BlobKeeper, "_lock", lambda keeper, digest: asyncio.Lock()):
        return await lost_to_a_sweep()


async def _by_forgetting(stage: Stage, home: Path) -> str | None:
    with replaced(sqlite_recovery, "empty_log", lambda connection: None):
        return next(iter(await lost_to_a_failed_sync(home)), None)


async def _on_disk(disk: Callable[[], RecordingDisk], stage: Stage, home: Path) -> str | None:
    return await _shown(CutBlobs(disk), home)


async def _on_files(disk: Callable[[], Met], stage: Stage, home: Path) -> str | None:
    return await _shown(CutFiles(disk), home)


async def _by_writer(drill: Drill, stage: Stage, home: Path) -> str | None:
    return await _shown(drill, home)


def _planted(plant: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "perdure.proving.planted_files", plant)


async def _past_the_overlay(stage: Stage, home: Path) -> str | None:
    with replaced(Store, "value", planted_files.read_past_the_overlay):
        return await conformance.first_broken(KNOWN["files"], home)


async def _shown(drill: Drill, home: Path) -> str | None:
    trial = Trial(home, "1", seconds=_SECONDS, wrong_max=1)
    try:
        await drill.run(trial)
    except TooLate as late:
        return f"a hang: {late}"
    if not trial.violations:
        return None
    first = trial.violations[0]
    return f"case {first.case}: {first.what}"


@contextmanager
def replaced(owner: object, name: str, by: Any) -> Iterator[None]:
    """Something of the program is something else for a while."""
    kept = getattr(owner, name)
    setattr(owner, name, by)
    try:
        yield
    finally:
        setattr(owner, name, kept)


def _synchronous(level: int) -> Callable[[Any, str, Any], None]:
    """Have SQLite sync less than the engine asks for, and the engine believe that it does."""
    force = sqlite_driver._force

    def forced(connection: Any, pragma: str, value: Any) -> None:
        force(connection, pragma, level if pragma == "synchronous" else value)

    return forced


def _forget_latch(committer: object, why: str) -> None:
    pass


def _deaf(checkpointer: Checkpointer, *arguments: Any, **options: Any) -> None:
    _make_checkpointer(checkpointer, *arguments, **options | {"failed": lambda why: None})


async def _with_a_plant(plant: str, stage: Stage, home: Path) -> str | None:
    """A server with a bug whose disk refuses a sync, twice: the second life reads of the first."""
    drill = FailingServer(FULL_DISK, "", [_REFUSED_SYNC] * 2)
    drill.plant = plant
    return await _shown(drill, home)


async def _by_owners(plant: str, stage: Stage, home: Path) -> str | None:
    return await _shown(OwnedEngine("perdure.proving.planted_writer", plant), home)


async def _by_a_slow_disk(plant: str, stage: Stage, home: Path) -> str | None:
    return await _shown(SlowServer(plant), home)


async def _by_two_servers(plant: str, stage: Stage, home: Path) -> str | None:
    return await _shown(OwnedServer(plant), home)


async def _by_a_fleet(plant: str, stage: Stage, home: Path) -> str | None:
    Disk().make_directory(home)
    async with PairStage(home) as two:
        with Pair(two, home / "pair", seed="1", plant=plant) as pair:
            for _ in range(_FLEETS):
                if not await pair.live(PairLife(strike=PAIRS[plant])):
                    return str(pair.verdict.violations[0])
    return None


async def _by_clocks(plant: str, stage: Stage, home: Path) -> str | None:
    return await _shown(JumpedServer(Jumps(off_s=-DAY_S), plant=plant), home)


def _lock_nothing(disk: Disk, path: Path, *, shared: bool = False) -> Lock:
    return Lock(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), path)


async def _by_server_damage(plant: str, stage: Stage, home: Path) -> str | None:
    return await _shown(DamagedServer(plant), home)


async def _by_contention(plant: str, stage: Stage, home: Path) -> str | None:
    return await _shown(ContendingRequests(plant), home)


async def _hasty(engine: SqliteEngine, batch: Batch) -> Committed:
    """Answer, and commit in one's own time."""
    committing = asyncio.ensure_future(_commit(engine, batch))
    _under_way.add(committing)
    committing.add_done_callback(_under_way.discard)
    return Committed(tuple(1 for _ in batch.ops))


Cut = Callable[[Path], Awaitable[tuple[int, list[str]]]]


async def _by_cut_upgrades(
    cut: Cut, owner: object, name: str, bug: Any, stage: Stage, home: Path
) -> str | None:
    Disk().make_directory(home)
    with replaced(owner, name, bug):
        return next(iter((await cut(home))[1]), None)


async def _by_bad_snapshots(
    owner: object, name: str, bug: Any, stage: Stage, home: Path
) -> str | None:
    with replaced(owner, name, bug):
        return await upgrades.upgraded_over_a_bad_snapshot(home)


async def _believed(source: Path, progress: Progress) -> Manifest:
    return read_manifest(source)


def _require_nothing(written: Written, *of: object) -> None:
    pass


_commit = SqliteEngine.commit
_make_checkpointer = Checkpointer.__init__
_under_way: set[asyncio.Future[Committed]] = set()


_IN_SQLITE: tuple[tuple[str, Drill, Any, str, Any], ...] = (
    ("SQLite never syncs", CutEngine(), sqlite_driver, "_force", _synchronous(0)),
    (
        "SQLite syncs with the next checkpoint",
        CutEngine(),
        sqlite_driver,
        "_force",
        _synchronous(1),
    ),
    ("after a failed sync the engine goes on", FailedCalls(), Committer, "latch", _forget_latch),
    (
        "what a checkpoint's failed sync means for later commits is not seen",
        *(FailedCalls(), Checkpointer, "__init__", _deaf),
    ),
    (
        "a full disk is taken for a disk that failed",
        *(FullDisk(), sqlite_commit, "leaves_doubt", lambda error: True),
    ),
    (
        "what SQLite says of a disk that it may not write leaves the engine in its own words",
        *(ReadOnlyEngine(), sqlite_recovery, "translating", nullcontext),
    ),
    ("a commit is answered as it is handed over", SlowEngine(), SqliteEngine, "commit", _hasty),
    (
        "each commit waits for a sync of its own",
        *(SlowEngine(), Committer, "_gather", lambda committer, first: [first]),
    ),
)

_IN_FILES: tuple[tuple[str, Drill, Any, str, Any], ...] = (
    (
        "the journal starts over without the commits that the files lack",
        *(CutFiles(), Store, "start_journal", planted_files.drop_frames),
    ),
    (
        "what a write without space left in the journal is written after",
        *(FAILING_FILES[1], Disk, "cut", planted_files.never_cut),
    ),
    (
        "a full disk is taken for a disk that failed",
        *(FAILING_FILES[1], Journal, "_cut", planted_files.give_up),
    ),
    (
        "entries are written behind what a crash left of others",
        *(CutFiles(), Disk, "cut", planted_files.never_cut),
    ),
    (
        "directories in which nothing is left stay",
        *(CutFiles(), Applier, "_remove_empty", planted_files.forget_what_was_removed),
    ),
    (
        "after a failed sync the engine goes on",
        *(FAILING_FILES[0], files_commit.Committer, "latch", _forget_latch),
    ),
    (
        "a commit is answered before its sync",
        *(SlowEngine("files"), files.FilesEngine, "commit", planted_files.answer_first),
    ),
    (
        "each commit waits for a sync of its own",
        *(SlowEngine("files"), files_commit.Committer, "_gather", planted_files.gather_one),
    ),
    (
        "operation ids are forgotten by the time of day alone",
        *(JumpedEngine("files"), files_state, "_OPERATION_OLD_S", OPERATION_KEPT_S),
    ),
    (
        "what the system says while a store is closed leaves the engine in its own words",
        *(ReadOnlyEngine("files"), files, "translated", lambda path: nullcontext()),
    ),
    (
        "the checksum of a record's file is not looked at",
        *(DamagedFiles(), files_recovery, "stored_record", planted_files.unchecked_record),
    ),
    (
        "the checksum of a line is not looked at",
        *(DamagedFiles(), files_format, "parse_line", planted_files.unchecked_line),
    ),
    (
        "which commit was acknowledged last is not looked at",
        *(DamagedFiles(), files_recovery, "read_mark", lambda path, store_id: 0),
    ),
)

_WRITERS_OF_FILES: tuple[tuple[str, Drill], ...] = (
    ("hasty", KilledCalls(_planted("hasty"), "files-process", "/journal")),
    ("untyped", FailedSystemCalls(_planted("untyped"), "files-process", "/journal")),
    ("deaf", FullSystem(_planted("deaf"), "files-process", "/journal")),
    ("unsynced", CutExt4(_planted("unsynced"), "files-ext4")),
)

_UPGRADES: tuple[tuple[str, str, Cut, object, str, Any], ...] = (
    (
        "the steps of an upgrade are committed one by one",
        *("SQLite engine", upgrades.cut_sqlite, sqlite_recovery, "change_format"),
        upgrades.outside_of_the_transaction,
    ),
    (
        "the number of a format is raised before the data",
        *("SQLite engine", upgrades.cut_sqlite, sqlite_recovery, "change_format"),
        upgrades.number_first,
    ),
    (
        "the number of a format is raised before the data",
        *("files engine", upgrades.cut_files, files_recovery, "change_format"),
        upgrades.manifest_first,
    ),
)

BUGS: tuple[Bug, ...] = (
    *(
        Bug(says, part, "cuts of an upgrade", partial(_by_cut_upgrades, cut, owner, name, bug))
        for says, part, cut, owner, name, bug in _UPGRADES
    ),
    *(
        Bug(
            says,
            *("upgrades", "a disk that loses a byte of a snapshot"),
            partial(_by_bad_snapshots, owner, name, bug),
        )
        for says, owner, name, bug in (
            ("a snapshot is not read again", upgrading, "check_backup", _believed),
            ("a store is upgraded without a snapshot", Written, "require", _require_nothing),
        )
    ),
    *(
        Bug(PLANTS[plant].says, "server", "lives that end in a death", partial(_in_lives, plant))
        for plant in CASES
    ),
    *(
        Bug(
            says,
            "SQLite engine",
            f"{drill.fault.name} / {drill.subject}",
            partial(_by_drill, drill, owner, name, bug),
        )
        for says, drill, owner, name, bug in _IN_SQLITE
    ),
    *(
        Bug(
            says,
            "files engine",
            f"{drill.fault.name} / {drill.subject}",
            partial(_by_drill, drill, owner, name, bug),
        )
        for says, drill, owner, name, bug in _IN_FILES
    ),
    *(
        Bug(
            says,
            "shards",
            "process-crash / shards",
            partial(_by_drill, KilledMoves(), owner, name, bug),
        )
        for says, owner, name, bug in planted_shards.BUGS
    ),
    *(
        Bug(says, "files engine", "power-cut / files", partial(_on_files, disk))
        for says, disk in planted_files.DISKS.items()
    ),
    *(
        Bug(
            planted_files.WRITERS[plant][0],
            "files engine",
            f"{drill.fault.name} / {drill.subject}",
            partial(_by_writer, drill),
            drill.lacks,
        )
        for plant, drill in _WRITERS_OF_FILES
    ),
    Bug(
        "a read does not look for what is committed and not in the files yet",
        *("files engine", "conformance rules", _past_the_overlay),
    ),
    Bug(
        "after a failed sync the store is reopened and goes on in the same log",
        *("SQLite engine", "a kernel that forgets what it failed to sync", _by_forgetting),
    ),
    *(
        Bug(PLANTS[plant].says, "server", "failed-sync / server", partial(_with_a_plant, plant))
        for plant in ("hides-failures", "stops-reading")
    ),
    Bug(
        PLANTS["trusts-clock"].says,
        *("server", "clock-jump / server", partial(_by_clocks, "trusts-clock")),
    ),
    *(
        Bug(
            PLANTS[plant].says,
            *("SQLite engine", "two-owners / engine", partial(_by_owners, plant)),
        )
        for plant in ("writes-beside", "keeps-lock")
    ),
    *(
        Bug(
            "a second process gets in beside the owner",
            *(part, f"two-owners / {drill.subject}"),
            partial(_by_drill, drill, Disk, "lock", _lock_nothing),
        )
        for part, drill in (
            ("SQLite engine", OwnedEngine()),
            ("files engine", OwnedEngine(subject="files")),
            ("blob store", OwnedBlobs()),
        )
    ),
    Bug(
        PLANTS["writes-beside"].says,
        *("server", "two-owners / server", partial(_by_two_servers, "writes-beside")),
    ),
    Bug(
        "who reads blobs waits behind those whose blobs are synced",
        *("blob store", "slow-disk / blobs"),
        partial(_by_drill, SlowBlobs(), blobs_local, "off_loop_to_write", off_loop),
    ),
    *(
        Bug(PLANTS[plant].says, "server", "slow-disk / server", partial(_by_a_slow_disk, plant))
        for plant in ("reads-behind", "starts-in-line")
    ),
    Bug(
        "what a put that was killed has left is not removed",
        *("blob store", "process-crash / blobs"),
        partial(_by_drill, KilledBlobs(), Disk, "remove", lambda disk, path: None),
    ),
    Bug(
        PLANTS["writes-over"].says,
        *("server", "process-crash / http", partial(_by_contention, "writes-over")),
    ),
    *(
        Bug(
            PLANTS[plant].says, "server", "two servers on one database", partial(_by_a_fleet, plant)
        )
        for plant in PAIRS
    ),
    Bug(PLANTS["trusts-rows"].says, "SQLite engine", "conformance rules", _by_damage),
    Bug(
        PLANTS["hides-damage"].says,
        *("server", "damage / server", partial(_by_server_damage, "hides-damage")),
    ),
    Bug(
        "a sweep drops bytes that are just being put again",
        *("keeper of blobs", "a sweep and an upload at once", _by_sweeping),
    ),
    *(
        Bug(says, "blob store", "power-cut / blobs", partial(_on_disk, disk))
        for says, disk in DISKS.items()
    ),
    *(
        Bug(says, "any engine", "conformance rules", partial(_by_rules, planted))
        for says, planted in PLANTED.items()
    ),
)
