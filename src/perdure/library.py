"""The library: a store opened in a program of one's own, with no server and no configuration.

`open` is for async programs. `blocking` serves scripts: one portal runs the event loop in a thread
and hands every call over, so there are no second, synchronous versions of anything.
"""

from __future__ import annotations

import asyncio
import atexit
import inspect
import os
import threading
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from perdure.core.addresses import store_path
from perdure.core.blobs import Blob
from perdure.core.clock import Clock, SystemClock
from perdure.core.disk import TEMPORARY, Disk
from perdure.core.engine import Engine, Resharded, Sharding
from perdure.core.errors import Closed, Damaged, Invalid, Unavailable
from perdure.core.keys import Key
from perdure.core.offload import off_loop
from perdure.core.values import Finding
from perdure.engines import (
    accept_engine,
    lock_of,
    open_blobs,
    open_engine,
    reshard_engine,
    restore_engine,
    salvage_engine,
    sharding_of,
)
from perdure.services import backups, copying, verification
from perdure.services.backups import Manifest, Progress
from perdure.services.blobs import BlobKeeper
from perdure.services.copying import Copied
from perdure.services.looked_at import once_unseen
from perdure.services.recovery import free, unfinished
from perdure.services.retiring import Retiring
from perdure.services.salvage import Salvaging, complete_salvage
from perdure.services.tail import Tail
from perdure.services.upgrading import Migration, Upgrading
from perdure.services.verification import Verified
from perdure.services.workers import Workers
from perdure.surfaces.state import LAYOUTS, State

T = TypeVar("T")

lock_file = lock_of
"""Where whoever has a store says so, for those who may not open an engine."""


class Embedded(State):
    """The state in a program of one's own: surfaces, whose writes are batches for `commit`, and the
    worker runtime of the default tenant, whose operations commit by themselves."""

    def __init__(self, engine: Engine, clock: Clock) -> None:
        super().__init__(engine)
        runner = None if engine.shared else _EMBEDDED
        self.workers = Workers(self, clock, Tail(engine), runner=runner)

    @property
    def sharding(self) -> Sharding | None:
        """The shards, where the store is made of several."""
        return sharding_of(self.engine)


_EMBEDDED = "embedded"
"""Who vouches for a run that begins in a program that alone has the store: whoever opens that next
knows the run is over. Where others share the store nobody does, and `restore` takes it over."""


@asynccontextmanager
async def open(url: str, *, read_only: bool = False) -> AsyncIterator[Embedded]:
    """The state kept at `url` (`sqlite:///state.db`, `memory://`), closed cleanly at the end;
    `read_only` changes nothing in it, not even what a crash left to be recovered.

    Where an older Perdure wrote it, a snapshot is kept beside it and it is upgraded; one that lies
    in a database is `NeedsUpgrade`, which `migrate` or a server does. Raises what `open_engine`
    raises; `StoreLocked` where a server or another program has it. One that only
    looks at it is waited for.
    """
    clock = SystemClock()
    opening = partial(open_engine, url, LAYOUTS)
    beside = None if read_only else store_path(url)
    if beside is None:
        engine = await opening(read_only=read_only)
    else:
        upgrading = _upgrading(url, blobs_beside(url) or "memory://", beside)
        engine = await once_unseen(clock, partial(upgrading.open, _untold))
    try:
        state = Embedded(engine, clock)
        if not (read_only or engine.shared):
            findings: list[Finding] = []
            async for held in unfinished(state.runtimes.vouched_for, findings):
                await free(state, held, clock, findings)
            with suppress(Unavailable):  # the next who opens goes on
                await Retiring(state, clock).sweep()
        yield state
    finally:
        await engine.close()


async def migrate(
    url: str, blobs: str, data: Path, progress: Progress, *, dry_run: bool = False
) -> Migration:
    """Upgrade the store at `url` to what this release writes, keeping a snapshot of it as it is,
    with the blobs at the URL `blobs`: beside the store, or in the directory `data` where that is a
    database. Then everything is verified. A `dry_run` only says what that would do.

    Raises `StorageFull` where there is no room for that, before anything is changed; `Damaged`.
    """
    upgrading = _upgrading(url, blobs, store_path(url) or data / "store")
    plan = await upgrading.plan()
    if dry_run or not plan.steps:
        return plan
    engine = await upgrading.open(progress)
    try:
        progress("verifying", 0, 0)
        async for finding in engine.verify():
            raise Damaged(finding.where, finding.why)
        return msgspec.structs.replace(plan, format=engine.written.format, done=True)
    finally:
        await engine.close()


def _upgrading(url: str, blobs: str, beside: Path) -> Upgrading:
    return Upgrading(
        partial(open_engine, url, LAYOUTS),
        partial(open_blobs, blobs, read_only=True),
        beside,
        SystemClock(),
        Disk(),
    )


def _untold(what: str, done: int, total: int) -> None:
    pass


async def back_up(url: str, blobs: str, target: Path, progress: Progress) -> Manifest:
    """Back up a store that no process holds, and the blobs at the URL `blobs` if there are any;
    see `services.backups`. A server backs up its own: ask that."""
    async with open(url, read_only=True) as state, _looking(state.engine, blobs) as keeper:
        await _require_unused(
            state,
            "could remove bytes while they are copied. Run the backup where it runs, with its "
            "--data; if it was killed, start one there first.",
        )
        return await backups.back_up(
            state.engine, keeper, target, progress, clock=SystemClock(), disk=Disk()
        )


async def copy(source: str, target: str, blobs: str, blobs_to: str, progress: Progress) -> Copied:
    """Copy the store at the URL `source`, which no process may use, to the empty place `target`,
    and its blobs to the URL `blobs_to`; or complete a copy that was cut off. See `copying`.

    Raises `Invalid` where the target is no such place, `Unavailable`, `Damaged`, `NewerFormat`.
    """
    clock = SystemClock()
    async with AsyncExitStack() as stack:
        state = await stack.enter_async_context(open(source, read_only=True))
        await _require_unused(
            state, "writes to it. Stop it first; if it was killed, start one and stop it."
        )
        engine = await open_engine(target, LAYOUTS, copy_of=state.engine.store_id)
        stack.push_async_callback(engine.close)
        read = await open_blobs(blobs, read_only=True)
        stack.push_async_callback(read.close)
        kept = await open_blobs(
            blobs_to, read_only=blobs_to == blobs, owner=engine.store_id, shared=engine.shared
        )
        stack.push_async_callback(kept.close)
        keeper = BlobKeeper(engine, kept, clock, clock.new_id("boot"))
        return await copying.copy(state.engine, engine, read, keeper, progress)


def blobs_beside(url: str) -> str | None:
    """Where the blobs of a SQLite store lie unless told otherwise; None for any other."""
    path = url.removeprefix("sqlite:///")
    return None if path == url else f"file:///{Path(path).absolute().parent / 'blobs'}"


async def _require_unused(state: State, why: str) -> None:
    async for lease in state.boots.leases():
        raise Unavailable(f"a server uses this store (boot {lease.value.boot_id}), and {why}")


async def verify(url: str, blobs: str) -> Verified:
    """Look for damage in a store that no process holds, and in the blobs at the URL `blobs`, and
    change nothing; see `services.verification`. A server verifies its own: ask that."""
    async with open(url, read_only=True) as state, _looking(state.engine, blobs) as keeper:
        return await verification.verify(state.engine, keeper)


async def verify_workers(url: str, within: Key) -> Verified:
    """Look for what does not hold of the workers of a tenant, of a runtime, or of one, in a store
    that no process holds, and change nothing; see `services.verification`."""
    async with open(url, read_only=True) as state:
        return await verification.verify_workers(state, within)


async def accept(url: str) -> list[Finding]:
    """Take what somebody changed by hand in a store of plain files, which no process holds, for
    what is stored, and say what that was. Raises `Invalid` for another store."""
    return await accept_engine(url, LAYOUTS)


async def restore(url: str, blobs: str, source: Path, progress: Progress) -> Manifest:
    """Make the store at `url`, and the blobs at the URL `blobs`, of the backup at `source`. Neither
    may be there. Raises `Invalid`, and what `backups.check_backup` and `restore_engine` raise."""
    if not await _is_empty(blobs):
        raise Invalid(f"{blobs} is not empty. A backup is restored into an empty place only.")
    manifest = await backups.check_backup(source, progress)
    try:
        await _restore(url, blobs, source, progress, manifest)
    except BaseException:
        await _clear(blobs)  # it was empty, and the next restore finds it so
        raise
    return manifest


async def _restore(
    url: str, blobs: str, source: Path, progress: Progress, manifest: Manifest
) -> None:
    if manifest.blobs.count:
        kept = await open_blobs(blobs)
        try:
            await backups.restore_blobs(source, kept, progress)
        finally:
            await kept.close()

    async def check(engine: Engine) -> None:
        async with _looking(engine, blobs) as keeper:
            await keeper.require_bytes()

    await restore_engine(
        url,
        source,
        LAYOUTS,
        lambda done, total: progress("restoring the store", done, total),
        check=check,
    )


async def salvage(url: str, blobs: str, target: Path, progress: Progress) -> Salvaging:
    """Make a data directory at the absolute path `target`, which must not exist, of what is sound
    in the store at `url` and the blobs at the URL `blobs`; no process may hold them, and they are
    not changed. Plain files become plain files again, in `state`. It has its name, and so exists,
    only when all of it is verified and durable.

    Raises what `salvage_engine` raises, and `Damaged` where what was made is not sound itself."""
    growing, disk = target.with_name(target.name + TEMPORARY), Disk()
    if found := next((path for path in (target, growing) if path.exists()), None):
        raise Invalid(
            f"{found} exists, and a salvage never overwrites. Name another, or remove it."
        )
    try:
        made = await _salvage(url, blobs, growing, progress)
        await off_loop(disk.replace, growing, target)
        await off_loop(disk.sync_directory, target.parent)
    except BaseException:
        await off_loop(disk.remove_tree, growing)
        raise
    return made


async def _salvage(url: str, blobs: str, into: Path, progress: Progress) -> Salvaging:
    clock, done = SystemClock(), Counter[str]()

    def tell(what: str, rows: int) -> None:
        done[what] += rows
        progress(f"salvaging {what}", done[what], 0)

    files = url.startswith("file:")
    made = f"file:///{into / 'state'}" if files else f"sqlite:///{into / 'perdure.db'}"
    rows = await salvage_engine(url, made, LAYOUTS, tell)
    async with AsyncExitStack() as stack:
        engine = await open_engine(made, LAYOUTS)
        stack.push_async_callback(engine.close)
        source = await open_blobs(blobs, read_only=True)
        stack.push_async_callback(source.close)
        kept = await open_blobs(f"file:///{into / 'blobs'}")
        stack.push_async_callback(kept.close)
        keeper = BlobKeeper(engine, kept, clock, clock.new_id("boot"))
        return await complete_salvage(State(engine), keeper, source, rows, progress)


async def reshard(url: str, drain: Sequence[str], progress: Progress) -> Resharded:
    """Move the partitions of the store of shards at `url` to where they belong by the shards there
    are, but for those to `drain`; see `reshard_engine`. A server reshards its own: ask that."""
    engine = await open_engine(url, LAYOUTS)
    try:
        return await reshard_engine(
            engine,
            drain,
            lambda partitions, rows: progress(f"moved {rows} rows, partitions", partitions, 0),
        )
    finally:
        await engine.close()


@asynccontextmanager
async def _looking(engine: Engine, blobs: str) -> AsyncIterator[BlobKeeper]:
    """The keeper of blobs that are only looked at."""
    kept, clock = await open_blobs(blobs, read_only=True), SystemClock()
    try:
        yield BlobKeeper(engine, kept, clock, clock.new_id("boot"))
    finally:
        await kept.close()


def _directory(blobs: str) -> Path | None:
    """The directory that blobs are kept in, if it is one."""
    path = blobs.removeprefix("file:///")
    return None if path == blobs else Path(path)


async def _is_empty(blobs: str) -> bool:
    directory = _directory(blobs)
    if directory is not None:
        return not directory.exists() or not any(directory.iterdir())
    return not await _listed(blobs)


async def _clear(blobs: str) -> None:
    directory = _directory(blobs)
    if directory is not None:
        return Disk().remove_tree(directory)
    kept = await open_blobs(blobs)
    try:
        for blob in await _listed(blobs):
            await kept.drop(blob.digest)
    finally:
        await kept.close()


async def _listed(blobs: str) -> list[Blob]:
    kept = await open_blobs(blobs, read_only=True)
    try:
        return [blob async for blob in kept.list()]
    finally:
        await kept.close()


@contextmanager
def blocking(url: str) -> Iterator[Any]:
    """The same state for a program without an event loop: its async methods return their results,
    its async iterators are plain ones, and its pure functions stay what they are. Any thread of
    the process that opened it may use it, also one that runs an event loop, which waits meanwhile.

    A program that ends without leaving this loses nothing that was acknowledged. A fork of the
    process, and who comes after the end, is told by `Closed`.
    """
    portal = _Portal()
    try:
        opened = open(url)
        state = portal.run(opened.__aenter__())
        try:
            yield _Blocking(state, portal)
        finally:
            if portal.why_closed is None:
                portal.run(opened.__aexit__(None, None, None))
    finally:
        portal.close()


class _Portal:
    """An event loop in a thread of its own, which the end of the program does not wait for."""

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._loop = asyncio.new_event_loop()
        self._ended = False
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="perdure-portal", daemon=True
        )
        self._thread.start()
        atexit.register(self._end)

    @property
    def why_closed(self) -> str | None:
        """Why nothing can be asked any more, None while it can."""
        if self._pid != os.getpid():
            return (
                f"this store was opened by process {self._pid}, and its threads are not in a fork "
                "of that. Open a store in the process that uses it, once the other has closed it."
            )
        return "this store was closed. Open it again." if self._ended else None

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`. An interrupt ends it first, so that nothing goes on unseen."""
        if (why := self.why_closed) is not None:
            work.close()
            raise Closed(why)
        begun: list[asyncio.Task[Any] | None] = []

        async def running() -> T:
            begun.append(asyncio.current_task())
            return await work

        future = asyncio.run_coroutine_threadsafe(running(), self._loop)
        try:
            return future.result()
        except BaseException:
            if future.cancel():
                asyncio.run_coroutine_threadsafe(_over(begun), self._loop).result()
                work.close()
            raise

    def iterate(self, source: AsyncGenerator[T, None]) -> Iterator[T]:
        async def following() -> tuple[T] | None:
            try:
                return (await anext(source),)
            except StopAsyncIteration:
                return None

        try:
            while (item := self.run(following())) is not None:
                yield item[0]
        finally:
            if self.why_closed is None:
                self.run(source.aclose())

    def close(self) -> None:
        if self.why_closed is None:
            atexit.unregister(self._end)
            self._end()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def _end(self) -> None:
        self._ended = True


async def _over(begun: Sequence[asyncio.Task[Any] | None]) -> None:
    """Return when what has begun, if anything has, is over."""
    if tasks := [task for task in begun if task is not None]:
        await asyncio.wait(tasks)


class _Blocking:
    """An object whose async methods block."""

    def __init__(self, target: Any, portal: _Portal) -> None:
        self._target = target
        self._portal = portal

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._target, name)
        if inspect.iscoroutinefunction(found):
            return lambda *args, **kwargs: self._portal.run(found(*args, **kwargs))
        if inspect.isasyncgenfunction(found):
            return lambda *args, **kwargs: self._portal.iterate(found(*args, **kwargs))
        if callable(found) or isinstance(found, str | int | float | bytes | tuple | None):
            return found
        return _Blocking(found, self._portal)
