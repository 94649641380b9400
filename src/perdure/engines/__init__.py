"""Engines: how state is kept. `open_engine` and `open_blobs` alone pick one and import it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Generator, Sequence
from contextlib import AsyncExitStack, aclosing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perdure.core.addresses import shards_of, without_credentials
from perdure.core.blobs import Blobs
from perdure.core.clock import Clock, SystemClock
from perdure.core.disk import Disk
from perdure.core.engine import Engine, Progress, Resharded, Salvaged, Sharding, Snapshot
from perdure.core.errors import Invalid, Missing, NeedsUpgrade, StoreLocked, Unavailable
from perdure.core.layouts import Layout
from perdure.core.offload import off_loop, steps_off_loop
from perdure.core.values import Finding

if TYPE_CHECKING:
    from perdure.engines.postgres import PostgresEngine
    from perdure.engines.sharded import ShardedEngine

_SCHEMES = (
    "memory://, sqlite:///PATH, file:///DIRECTORY, postgresql://HOST/DATABASE?schema=NAME, "
    "shards:URL,URL,... of several of these"
)
_BLOB_SCHEMES = "memory://, file:///DIRECTORY, s3://BUCKET/PREFIX"


async def open_engine(
    url: str,
    layouts: Sequence[Layout],
    *,
    clock: Clock | None = None,
    disk: Disk | None = None,
    read_only: bool = False,
    note: Callable[[str], None] = lambda detail: None,
    copy_of: str | None = None,
    snapshots: Sequence[Snapshot] = (),
) -> Engine:
    """Open the store at `url`, recovering it first unless `read_only`. A store of an earlier
    release is upgraded if one of the `snapshots` is of it as it is now, and else that is
    `NeedsUpgrade`; `note` is told how far it is.

    With `copy_of`, the id of another store, it is made at `url` to become a copy of that, under the
    same id; or it is one that a copy which was cut off has left there. Nobody else opens it before
    `Engine.load` has completed it: that is `Unavailable`. Raises `Invalid` for any other store.

    `read_only` takes the lock in shared mode and replays, cuts and checkpoints nothing; commits
    are then refused. Raises `Invalid` for a URL no engine knows, `StoreLocked`, `NewerFormat`,
    `Damaged` where the store cannot be trusted at all, `WrongShards`.
    """
    clock, disk = clock or SystemClock(), disk or Disk()
    options: dict[str, Any] = {
        "clock": clock,
        "disk": disk,
        "read_only": read_only,
        "note": note,
        "snapshots": snapshots,
    }
    if urls := shards_of(url):
        if copy_of is not None:
            raise Invalid(
                "a copy is one store. Copy to one; then list it as the first of several shards."
            )
        opening = partial(open_engine, **options)
        return await _open_shards(urls, layouts, opening, clock, disk, read_only)
    scheme, separator, path = url.partition("://")
    if url == "memory://":
        from perdure.engines.memory import MemoryEngine

        return MemoryEngine(layouts, clock, copy_of=copy_of)
    options["copy_of"] = copy_of
    if scheme == "sqlite" and separator and len(path) > 1:
        from perdure.engines.sqlite import SqliteEngine

        return await SqliteEngine.open(path[1:], layouts, **options)
    if scheme == "file" and separator and len(path) > 1:
        from perdure.engines.files import FilesEngine

        return await FilesEngine.open(path[1:], layouts, **options)
    if scheme in ("postgresql", "postgres") and separator:
        return await _postgres().open(url, layouts, **options)
    raise Invalid(f"no engine opens {without_credentials(url)!r}; the known forms are {_SCHEMES}.")


def lock_of(url: str) -> Path | None:
    """Where the process that has the store at `url` says who it is; None for a store that several
    may have, or that ends with its process. It stays when that process has ended."""
    scheme, separator, path = url.partition("://")
    if not separator or len(path) < 2:
        return None
    if scheme == "sqlite":
        from perdure.engines.sqlite_recovery import Place as Database

        return Database(Path(path[1:]), SystemClock(), Disk()).beside(".lock")
    if scheme == "file":
        from perdure.engines.files_recovery import Place as Directory

        return Directory(Path(path[1:]), SystemClock(), Disk()).lock
    return None


async def _open_shards(
    urls: Sequence[str],
    layouts: Sequence[Layout],
    opening: Callable[[str, Sequence[Layout]], Awaitable[Engine]],
    clock: Clock,
    disk: Disk,
    read_only: bool,
) -> Engine:
    """All but the primary may be down: what lives in one that is, is `Unavailable` until it is back
    and was joined, by itself. A first start needs all."""
    from perdure.engines.sharded import ShardedEngine
    from perdure.engines.sharded_map import SHARD_LAYOUTS, Absent

    if any(url.startswith("file:") for url in urls):
        raise Invalid("plain files are whole by themselves, and never a shard.")
    async with AsyncExitStack() as opened:
        engines: list[Engine] = []
        absent: list[Absent] = []
        for url in urls:
            open_one = partial(opening, url, (*layouts, *SHARD_LAYOUTS))
            try:
                engines.append(await open_one())
            except (StoreLocked, NeedsUpgrade):
                raise
            except (Missing, Unavailable) as error:
                absent.append(Absent(url, open_one, error))
            else:
                opened.push_async_callback(engines[-1].close)
        whole = await ShardedEngine.open(
            engines, layouts, clock=clock, disk=disk, read_only=read_only, absent=absent
        )
        if not read_only:
            whole.watch.begin()
        opened.pop_all()
        return whole


def _postgres() -> type[PostgresEngine]:
    """The engine whose driver is an extra. Raises `Invalid` where that is not installed."""
    try:
        from perdure.engines.postgres import PostgresEngine
    except ModuleNotFoundError as error:
        raise Invalid(
            f"postgresql:// needs the driver {error.name}: install perdure[postgres]."
        ) from None
    return PostgresEngine


async def restore_engine(
    url: str,
    source: Path,
    layouts: Sequence[Layout],
    progress: Progress,
    *,
    clock: Clock | None = None,
    disk: Disk | None = None,
    check: Callable[[Engine], Awaitable[None]] | None = None,
) -> None:
    """Make a store at `url` of what `Engine.backup` wrote into `source`. It exists, under an id of
    its own, once all of it is verified and durable; before that there is none. `check` reads it
    just before, and may refuse it by raising.

    Raises `Invalid` where a store is already or none can be, `Damaged`, `NewerFormat`.
    """
    if urls := shards_of(url):
        from perdure.engines.sharded_map import SHARD_LAYOUTS

        found = await off_loop(lambda: [one for one in source.iterdir() if one.name.isdigit()])
        copies = sorted(found, key=lambda one: int(one.name))
        if len(copies) > len(urls):
            raise Invalid(f"{source} holds {len(copies)} shards; name as many places for them.")
        for one, copy in zip(urls, copies, strict=False):
            shard = (*layouts, *SHARD_LAYOUTS)
            await restore_engine(one, copy, shard, progress, clock=clock, disk=disk, check=check)
        return
    scheme, separator, path = url.partition("://")
    if scheme in ("postgresql", "postgres") and separator:
        clock, disk = clock or SystemClock(), disk or Disk()
        await _postgres().restore(
            url, source, layouts, progress, clock=clock, disk=disk, check=check
        )
        return
    if scheme not in ("sqlite", "file") or not separator or len(path) < 2:
        where = without_credentials(url)
        raise Invalid(f"a backup is restored to {_SCHEMES.partition(', ')[2]}; not to {where!r}.")
    clock, disk = clock or SystemClock(), disk or Disk()
    async with aclosing(
        steps_off_loop(_restoring(scheme, Path(path[1:]), source, layouts, clock, disk))
    ) as restoring:
        async for step in restoring:
            if not isinstance(step, Path):
                progress(*step)
            elif check is not None:
                made = await open_engine(f"{scheme}:///{step}", layouts, read_only=True)
                try:
                    await check(made)
                finally:
                    await made.close()


def _restoring(
    scheme: str, path: Path, source: Path, layouts: Sequence[Layout], clock: Clock, disk: Disk
) -> Generator[tuple[int, int] | Path, None, None]:
    """The steps of a restore, and at last where what it made may be looked at."""
    if scheme == "file":
        from perdure.engines import files_backup
        from perdure.engines.files_recovery import Place as Directory

        return files_backup.restore_steps(Directory(path, clock, disk), source, layouts)
    from perdure.engines import sqlite_backup
    from perdure.engines.sqlite_recovery import Place as Database

    return sqlite_backup.restore_steps(Database(path, clock, disk), source, layouts)


async def accept_engine(url: str, layouts: Sequence[Layout]) -> list[Finding]:
    """Take what hands changed in the files of the store at `url` for what is stored there, and say
    what that was. Raises `Invalid` where a store has no such files, and what `open_engine` does."""
    scheme, separator, path = url.partition("://")
    if scheme != "file" or not separator or len(path) < 2:
        raise Invalid(
            f"only what is kept in plain files is changed by hand: file:///DIRECTORY, and not "
            f"{without_credentials(url)!r}."
        )
    from perdure.engines.files import FilesEngine

    engine = await FilesEngine.open(path[1:], layouts, clock=SystemClock(), disk=Disk())
    try:
        return [finding async for finding in engine.accept()]
    finally:
        await engine.close()


async def salvage_engine(
    url: str,
    into: str,
    layouts: Sequence[Layout],
    progress: Callable[[str, int], None],
    *,
    clock: Clock | None = None,
    disk: Disk | None = None,
) -> Salvaged:
    """Make a store at `into` of what is sound in the damaged one at `url`, which is only read.
    `progress` is told what was read, and how many more rows of it.

    Raises `Invalid` where there is no way to salvage, `Missing`, `StoreLocked`, `NewerFormat`, and
    `Damaged` where nothing at all can be read.
    """
    clock, disk = clock or SystemClock(), disk or Disk()
    kinds = ("sqlite:///", "file:///")
    kind = next((it for it in kinds if url.startswith(it) and into.startswith(it)), None)
    if kind is None or kind in (url, into):
        raise Invalid(
            "a salvage goes from sqlite:///PATH to sqlite:///PATH, or from file:///DIRECTORY to "
            f"file:///DIRECTORY, not from {without_credentials(url)!r}."
        )
    source, target = (Path(where.removeprefix(kind)) for where in (url, into))
    if kind == "file:///":
        from perdure.engines import files_recovery, files_salvage

        old, new = (files_recovery.Place(path, clock, disk) for path in (source, target))
        return await files_salvage.salvage(old, new, layouts, progress)
    from perdure.engines.sqlite_recovery import Place
    from perdure.engines.sqlite_salvage import salvage_steps

    damaged, made = (Place(path, clock, disk) for path in (source, target))
    async with aclosing(steps_off_loop(salvage_steps(damaged, made, layouts))) as steps:
        async for step in steps:
            if isinstance(step, Salvaged):
                return step
            progress(*step)
    raise AssertionError("a salvage ends with what it brought over")


async def reshard_engine(
    engine: Engine, drain: Collection[str], progress: Callable[[int, int], None]
) -> Resharded:
    """Spread what is partitioned over all shards that the engine was opened with, but for those to
    `drain`, by id or URL; what a kill cut short goes on. `progress` is told partitions and rows.

    Raises `Invalid` for a store that is not made of shards, and for shards it does not have.
    """
    shards = _sharded(engine)
    if shards is None:
        raise Invalid(
            f"{engine.url} is one store. To spread it over several, list all of them, this one "
            'first, as `shards = ["...", "..."]` in perdure.toml.'
        )
    return await shards.mover.reshard(drain, progress)


def sharding_of(engine: Engine) -> Sharding | None:
    """The shards that a store is made of; None for one that is whole by itself."""
    shards = _sharded(engine)
    return None if shards is None else shards.sharding


def _sharded(engine: Engine) -> ShardedEngine | None:
    from perdure.engines.sharded import ShardedEngine
    from perdure.engines.wrapping import Wrapping

    while isinstance(engine, Wrapping):
        engine = engine.engine
    return engine if isinstance(engine, ShardedEngine) else None


async def open_blobs(
    url: str,
    *,
    clock: Clock | None = None,
    disk: Disk | None = None,
    read_only: bool = False,
    shared: bool = False,
    owner: str | None = None,
) -> Blobs:
    """Open the blobs at `url`, removing what a crash left unpublished unless `read_only`. They may
    be `shared` by processes where the engine is: of one host in a directory, of any in S3. `owner`
    is the id of the store they belong to, where it is known.

    Raises `Invalid` for a URL that names no place for blobs or another store's, and `StoreLocked`.
    """
    scheme, separator, path = url.partition("://")
    if url == "memory://":
        from perdure.engines.blobs_memory import MemoryBlobs

        return MemoryBlobs()
    if scheme == "file" and separator and len(path) > 1:
        from perdure.engines.blobs_local import LocalBlobs

        return await LocalBlobs.open(
            Path(path[1:]),
            disk=disk or Disk(),
            clock=clock or SystemClock(),
            read_only=read_only,
            shared=shared,
            owner=owner,
        )
    if scheme == "s3" and separator:
        try:
            from perdure.engines.blobs_s3 import S3Blobs
        except ModuleNotFoundError as error:
            raise Invalid(f"s3:// needs {error.name}: install perdure[s3].") from None
        clock = clock or SystemClock()
        return await S3Blobs.open(url, clock=clock, owner=owner, read_only=read_only, shared=shared)
    where = without_credentials(url)
    raise Invalid(f"no blobs are kept at {where!r}; the known forms are {_BLOB_SCHEMES}.")
