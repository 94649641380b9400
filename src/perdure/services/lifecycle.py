"""The lifecycle of a node: open the engine, check promises, recover, serve, stop.

This is the composition root: it alone reads the configuration and makes the parts. A start is a
recorded boot: it is written before recovery, again with what was found, and at a clean stop once
more. A boot that lacks its last write was killed. Nothing acknowledged depends on the stop.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import structlog

from perdure import __version__
from perdure.core.addresses import store_path
from perdure.core.batch import Batch
from perdure.core.blobs import Blobs
from perdure.core.clock import Clock, SystemClock
from perdure.core.disk import Disk, Lock, translated
from perdure.core.engine import Engine, Resharded, Sharding
from perdure.core.errors import Conflict, PromiseBroken, StoreLocked, Unavailable
from perdure.core.offload import off_loop_to_write
from perdure.core.promises import check_promises
from perdure.core.values import Finding
from perdure.engines import open_blobs, open_engine, reshard_engine, sharding_of
from perdure.services.attachments import Attachments
from perdure.services.background import KIND, BackgroundResponses
from perdure.services.backups import Manifest, Progress, back_up
from perdure.services.blobs import DROP_S, BlobKeeper
from perdure.services.compaction import Compactor
from perdure.services.config import Config
from perdure.services.config import Upstream as UpstreamSettings
from perdure.services.context import Context
from perdure.services.conversations import Conversations
from perdure.services.files import Files
from perdure.services.fleet import HEARTBEAT_S as FLEET_HEARTBEAT_S
from perdure.services.fleet import LEASE_S, WATCH_S, Fleet
from perdure.services.gateway import Gateway, Store
from perdure.services.holds import Holds
from perdure.services.jobs import RETRY_S, Jobs
from perdure.services.looked_at import once_unseen
from perdure.services.recovery import Recovery, engine_recovery
from perdure.services.requests import Requests
from perdure.services.retention import Retention
from perdure.services.retiring import Retiring
from perdure.services.sealing import Sealing
from perdure.services.shards import shard_warnings
from perdure.services.startup import Check, Readiness, Startup
from perdure.services.supervisor import Supervisor
from perdure.services.sweeper import Sweeper
from perdure.services.tail import Tail
from perdure.services.tokens import TokenCounter
from perdure.services.upgrading import Upgrading
from perdure.services.uploads import Uploads
from perdure.services.upstream import Upstream
from perdure.services.upstreams import Member, Upstreams
from perdure.services.usage import PERIOD_S as MEASURE_S
from perdure.services.usage import Measuring
from perdure.services.workers import Workers
from perdure.surfaces.boots import Boot, Instance, SurfaceRecovery
from perdure.surfaces.state import LAYOUTS, PROMISES, State

HEARTBEAT_S = 5.0
_SWEEP_S = 60.0
_PROBE_S = 15.0
_TEND_S = 3600.0
_JOINED_S = 2.0

_NOTHING = Batch()

T = TypeVar("T")

_log = structlog.get_logger("perdure.lifecycle")

Control = Callable[[str], AbstractAsyncContextManager[str]]
"""Answers the operator for as long as it is entered; what it gives is where. It is given what sets
this process apart from others over the same data directory."""


@asynccontextmanager
async def _no_control(apart: str) -> AsyncIterator[str]:
    yield ""


class Node:
    """One running Perdure: made cold, opened, drained, closed, in that order.

    `wrap` lets a test put a wrapper around the engine; `url` is how others reach this node.
    """

    def __init__(
        self,
        config: Config,
        *,
        environment: Mapping[str, str] = os.environ,
        clock: Clock | None = None,
        disk: Disk | None = None,
        wrap: Callable[[Engine], Engine] = lambda engine: engine,
        url: str = "",
    ) -> None:
        self.config = config
        self.clock = clock or SystemClock()
        self.boot_id = self.clock.new_id("boot")
        self.startup = Startup(self.clock)
        self.url = url
        self.warnings: list[str] = []
        self.state: State
        self.fleet: Fleet
        self.measuring: Measuring
        self.retention: Retention
        self.gateway: Gateway
        self.jobs: Jobs
        self.conversations: Conversations
        self.tokens: TokenCounter
        self.compactor: Compactor
        self.upstreams = Upstreams(())
        self.tail: Tail
        self.blobs: BlobKeeper
        self.files: Files
        self.uploads: Uploads
        self.boot: Boot
        self.heartbeat_at_s = 0.0
        self.joined: set[str] = set()
        """Shards whose recovery is in the report of this start."""
        self.opened = False
        self.draining = False
        self._environment = environment
        self._disk = disk or Disk()
        self._wrap = wrap
        self._supervisor = Supervisor(self.clock)
        self._apart = ""
        self._transient: State
        self._held: AsyncExitStack

    async def open(self, control: Control = _no_control) -> None:
        """Become ready, with `control` entered before that is told and left before the store is let
        go. Raises what makes the store unusable, after releasing it again."""
        async with AsyncExitStack() as held:
            with self.startup.phase("open engine"):
                engine = await once_unseen(self.clock, self._open_engine)
                held.push_async_callback(engine.close)
            with self.startup.phase("open blobs"):
                blobs = await once_unseen(self.clock, partial(self._open_blobs, engine))
                held.push_async_callback(blobs.close)
            self.blobs = BlobKeeper(engine, blobs, self.clock, self.boot_id)
            held.push_async_callback(self._let_go)
            lock = self._take_place() if engine.shared else None
            if lock is not None:
                held.callback(lock.release)
            at = await held.enter_async_context(control(self._apart))
            note = f"{os.getpid()}\n{self.boot_id}\n{at}\n"
            engine.announce(note)
            if lock is not None:
                lock.note(note)
            await self._open_over(engine)
            self._held = held.pop_all()

    async def _open_engine(self) -> Engine:
        if not self.config.engine_url.startswith("memory:"):
            await off_loop_to_write(self._disk.make_directory, self.config.data_path)
        options: dict[str, Any] = {"clock": self.clock, "disk": self._disk}
        upgrading = Upgrading(
            partial(
                open_engine, self.config.engine_url, LAYOUTS, note=self.startup.note, **options
            ),
            partial(open_blobs, self.config.blobs_url, **options, read_only=True),
            store_path(self.config.engine_url) or self.config.data_path / "store",
            *(self.clock, self._disk),
        )
        return self._wrap(await upgrading.open(self._tell))

    def _tell(self, what: str, done: int, total: int) -> None:
        of = f": {done} of {total}" if total else ""
        self.startup.note(f"a snapshot before the upgrade: {what}{of}")

    async def _open_blobs(self, engine: Engine) -> Blobs:
        return await open_blobs(
            self.config.blobs_url,
            clock=self.clock,
            disk=self._disk,
            shared=engine.shared,
            owner=engine.store_id,
        )

    def _take_place(self) -> Lock:
        """A place that is this process's alone among those that share the data directory."""
        number = 1
        while True:
            try:
                lock = self._disk.lock(self.config.process_lock(number))
            except StoreLocked:
                number += 1
                continue
            self._apart = "" if number == 1 else f"-{number}"
            return lock

    async def _open_over(self, engine: Engine) -> None:
        with self.startup.phase("check promises"):
            self.warnings += check_promises(PROMISES, engine, self.config.profile)
        self.state = State(engine)
        self.fleet = Fleet(self.state, self.clock, self.boot_id)
        self.measuring = Measuring(self.state, self.blobs.blobs, self.clock)
        days = self.config.retention.responses_days
        self.retention = Retention(self.state, self.clock, days)
        self._transient = State(await open_engine("memory://", LAYOUTS, clock=self.clock))
        with self.startup.phase("record boot"):
            unread = await self._begin_boot()
        with self.startup.phase("recover"):
            found = [engine_recovery(engine.recovered)]
            self._report_joined()
            if unread:
                read = SurfaceRecovery(surface="boots", damaged=len(unread), findings=tuple(unread))
                found.append(read)
            found += await self._recovered()
            self.startup.recovery = tuple(found)
            self.warnings += _damage(found)
        with self.startup.phase("connect upstream"):
            self._make_services()
            await self.jobs.adopt()
        self.boot = msgspec.structs.replace(
            self.boot,
            ready_at_s=self.clock.now_s(),
            phases=tuple(self.startup.phases),
            recovery=self.startup.recovery,
        )
        await self._record_boot(ready=True)
        self.startup.done = True
        self.opened = True
        kept = self.config.retention.boots_kept
        sweeper = Sweeper(self.state, self.clock, self.boot, kept)
        if engine.shared:
            self._supervisor.every("watch", WATCH_S, self._watch, pause_max_s=WATCH_S)
            self._supervisor.every("clear marks", DROP_S, self.blobs.clear_marks)
        self._supervisor.every("sweep", _SWEEP_S, sweeper.sweep)
        self._supervisor.every("retire workers", _SWEEP_S, Retiring(self.state, self.clock).sweep)
        self._supervisor.every("forget transient", _SWEEP_S, self.gateway.sweep_transient)
        self._supervisor.every("retention", _SWEEP_S, self.retention.sweep)
        self._supervisor.every("measure", MEASURE_S, self.measuring.measure)
        self._supervisor.every("sweep files", _SWEEP_S, self.files.sweep)
        self._supervisor.every("sweep uploads", _SWEEP_S, self.uploads.sweep)
        self._supervisor.every("tend blobs", _TEND_S, self.blobs.tend)
        self._supervisor.every("upstreams", _PROBE_S, self.upstreams.probe)
        self._supervisor.every("jobs", 0.0, self.jobs.take)
        self._supervisor.every("retry jobs", RETRY_S, self.jobs.retry)
        if sharding_of(engine) is not None:
            self._supervisor.every("shards", _JOINED_S, self._heed_shards)

    async def _require_company(self) -> None:
        """Raises `PromiseBroken` where another process lives on this store that this one must not
        run beside: any in profile `local`; one that keeps the bytes of files elsewhere, because
        what one of the two acknowledges the other could not read. One that serves already shows
        who of two that are starting is the stranger, and that one is refused by itself."""
        if not self.state.engine.shared:
            return
        self.startup.note("looking who else is alive")
        others, mine = await self.fleet.settle(), self._blobs_at()
        at_home = any(other.ready and other.blobs == mine for other in others)
        for other in others:
            if self.config.profile == "local":
                raise PromiseBroken(
                    f"process {other.pid} at {other.url} uses this store too, and profile 'local' "
                    'is for one process. Set profile = "shared" for all of them.'
                )
            if other.blobs != mine and not at_home:
                raise PromiseBroken(
                    f"process {other.pid} on this store keeps files at {other.blobs}, and this one "
                    f"would at {mine}. Give all of them one place, with `blobs`."
                )

    async def _let_go(self) -> None:
        """End what goes on in the background, and the lease, so that nobody waits for it."""
        await self._supervisor.stop()
        if hasattr(self, "fleet"):
            try:
                await self.fleet.leave()
            except (Conflict, Unavailable) as error:
                _log.error("the lease could not be given back", error=str(error))

    def _blobs_at(self) -> str:
        """Where the bytes of files are, so that processes of several hosts can compare: what one
        has in memory is nobody else's."""
        url = self.config.blobs_url
        if url.startswith("memory:"):
            return f"{self.boot_id}:{url}"
        return f"{socket.gethostname()}:{url}" if url.startswith("file:") else url

    async def _recovered(self) -> list[SurfaceRecovery]:
        """Recover what boots that are not alive have left."""
        self.blobs.living = self.fleet.leaseholders
        self.blobs.lease = lambda: self.fleet.lease
        found = await Recovery(self.state, self.clock, self.fleet).run(self.startup.note)
        return [*found, await self.blobs.recover()]

    async def _watch(self) -> None:
        """See who of the fleet has gone, recover what it left, and queue what waits."""
        await self.fleet.watch()
        if gone := set(self.fleet.gone):
            found = [one for one in await self._recovered() if one.loaded or one.orphaned]
            told = {one.surface: msgspec.to_builtins(one) for one in found}
            _log.info("taken over", boots=sorted(gone), recovered=told)
            self.fleet.gone -= gone
        await self.gateway.heed()
        await self.jobs.heed()

    def readiness(self) -> Readiness:
        """Whether traffic is welcome now, and every reason why or why not."""
        if not self.opened:
            running = self.startup.phases[-1].name if self.startup.phases else "starting"
            return Readiness(False, (Check("recovery", False, f"starting: {running}"),))
        latched = self.state.engine.latched
        failing = self._supervisor.failing.get("heartbeat")
        if not failing and self.fleet.silent_s > LEASE_S / 2:
            failing = f"it has not answered for {self.fleet.silent_s:.1f} s"
        checks = (
            Check("engine", not (latched or failing), latched or failing or "writable"),
            Check("recovery", True, f"done in {self.startup.duration_s:.3f} s"),
            *self.upstreams.checks(),
            Check("accepting", not self.draining, "draining" if self.draining else "yes"),
        )
        trouble = [f"{name}: {why}" for name, why in self._supervisor.failing.items()]
        shards = shard_warnings(self.sharding)
        warnings = (*self.warnings, *shards, *self.blobs.warnings, *trouble)
        return Readiness(all(check.ok for check in checks), checks, warnings)

    @property
    def sharding(self) -> Sharding | None:
        """The shards, where the store is made of several."""
        return sharding_of(self.state.engine) if self.opened else None

    def _report_joined(self) -> list[SurfaceRecovery]:
        """What opening found in each shard that was down when this process started and has come
        back since. No surface is partitioned so far, so none has anything to recover there."""
        sharding = sharding_of(self.state.engine)
        found = []
        for shard in sharding.shards if sharding else ():
            if shard.id and shard.recovered and shard.id not in self.joined:
                self.joined.add(shard.id)
                told = engine_recovery(shard.recovered)
                found.append(msgspec.structs.replace(told, surface=f"shard {shard.id}"))
        return found

    async def _heed_shards(self) -> None:
        if found := self._report_joined():
            _log.info("shards joined", shards=[one.surface for one in found])
            self.startup.recovery += tuple(found)
            self.warnings += _damage(found)

    async def drain(self, timeout_s: float) -> None:
        """Take no new work; let what runs end within `timeout_s`; interrupt what does not, and let
        go of what runs in the background."""
        self.draining = True
        if self.opened:
            await asyncio.gather(self.gateway.drain(timeout_s), self.jobs.drain(timeout_s))

    def workers_of(self, tenant: str) -> Workers:
        """The worker runtime of one tenant; this boot vouches for the runs that begin in it."""
        return Workers(
            *(self.state, self.clock, self.tail),
            tenant=tenant,
            runner=self.boot_id,
            lease=lambda: self.fleet.lease,
        )

    async def back_up(self, target: Path, progress: Progress) -> Manifest:
        """Copy everything as it is now to `target`, while requests go on. See `backups`."""
        return await back_up(
            self.state.engine, self.blobs, target, progress, clock=self.clock, disk=self._disk
        )

    async def reshard(self, drain: Sequence[str], progress: Progress) -> Resharded:
        """Move partitions to where they belong, while requests go on. See `reshard_engine`."""
        return await reshard_engine(
            self.state.engine,
            drain,
            lambda partitions, rows: progress(f"moved {rows} rows, partitions", partitions, 0),
        )

    async def close(self) -> None:
        """Stop background work, mark the boot clean, close the engine. Signs of life go on until
        the lease is given back, so that nobody takes over what is being ended here."""
        if not self.opened:
            return
        self.opened = False
        self.draining = True
        await self._supervisor.stop(but="heartbeat")
        await self.gateway.close()
        await self.jobs.close()
        await self.upstreams.close()
        self.boot = msgspec.structs.replace(
            self.boot, ended_at_s=self.clock.now_s(), ended_clean=True
        )
        try:
            await self._record_boot(ready=False)
        except (Conflict, Unavailable) as error:
            _log.error("the boot could not be marked clean", error=str(error))
        await self._transient.engine.close()
        await self._held.aclose()

    async def _begin_boot(self) -> list[Finding]:
        """Record this boot; the ones just before it that cannot be read, which ended nobody knows
        how."""
        instance_id = await off_loop_to_write(self._instance_id)
        previous, unread = await self.state.boots.newest(instance_id)
        known = previous.value if previous and not unread else None
        self.boot = Boot(
            boot_id=self.boot_id,
            instance_id=instance_id,
            number=(previous.value.number if previous else 0) + len(unread) + 1,
            pid=os.getpid(),
            version=__version__,
            started_at_s=self.clock.now_s(),
            previous_boot_id=known.boot_id if known else None,
            previous_ended_clean=known.ended_clean if known else (False if unread else None),
        )
        await self.fleet.join(self.boot.previous_boot_id)
        await self._record_boot(ready=False, expect=0)
        beat_s = FLEET_HEARTBEAT_S if self.state.engine.shared else HEARTBEAT_S
        self._supervisor.every("heartbeat", beat_s, self._beat, pause_max_s=beat_s)
        await self._require_company()
        return unread

    def _instance_id(self) -> str:
        """The id of this place: made once, kept in the data directory where there is one."""
        if not self.config.data_path.is_dir():
            return self.clock.new_id("inst")
        path = self.config.data_path / f"instance{self._apart}"
        with translated(path):
            if not path.exists():
                self._disk.write_file(path, self.clock.new_id("inst").encode())
            return path.read_text().strip()

    def _make_services(self) -> None:
        self.upstreams = Upstreams([self._member(one) for one in self.config.every_upstream])
        stored = Requests(self.state, self.clock, self.boot_id)
        transient = Requests(self._transient, self.clock, self.boot_id)
        sealing = Sealing(self.state, self.clock)
        self.conversations = Conversations(self.state, stored, sealing, self.clock)
        bytes_max = self.config.limits.file_bytes_max
        self.files = Files(self.state, self.blobs, stored, self.clock, bytes_max)
        attachments = Attachments(self.files)
        context = Context(self.state, sealing, attachments, self.config.tools.orphans)
        self.tokens = TokenCounter(self.state, context, self.upstreams, self.clock)
        self.uploads = Uploads(self.state, self.blobs, self.files, stored, self.clock)
        self.tail = tail = Tail(self.state.engine)
        jobs = self.config.jobs
        holds = Holds(self.state, self.files)
        self.jobs = Jobs(
            *(self.state, holds, self.clock),
            running_max=jobs.running_max,
            attempts_max=jobs.attempts_max,
        )
        self.gateway = Gateway(
            Store(self.state, tail, stored),
            Store(self._transient, Tail(self._transient.engine), transient),
            context,
            self.upstreams,
            self.clock,
            self.fleet,
            self.jobs,
            holds,
        )
        gateway, stats = self.gateway, self.gateway.stats
        sources = gateway.to_go_on_with, gateway.source_again
        self.jobs.register(
            KIND,
            BackgroundResponses(
                *(self.state, tail, self.clock, self.fleet, *sources, holds, stats),
                upstream_wait_s=self.config.jobs.upstream_wait_s,
            ),
        )
        self.compactor = Compactor(
            self.state,
            self.gateway,
            context,
            sealing,
            self.clock,
            writes=bool(self.upstreams),
        )

    def _member(self, settings: UpstreamSettings) -> Member:
        assert settings.url is not None, "checked when the configuration was read"
        upstream = Upstream(
            settings.url,
            key=settings.key(self._environment),
            api=settings.api,
            connect_timeout_s=settings.connect_timeout_s,
            read_timeout_s=settings.read_timeout_s,
            attempts_max=settings.attempts_max,
            clock=self.clock,
        )
        return Member(
            settings.name,
            upstream,
            settings.models,
            settings.aliases,
            settings.required,
            settings.continues,
        )

    async def _record_boot(self, *, ready: bool, expect: int | None = None) -> None:
        """Write the boot as it stands, and a sign of life with it: the last one may be that of a
        process that was killed a moment ago and says that it is ready."""
        await self._beat(ready, self.state.boots.record(self.boot, expect=expect))

    async def _beat(self, ready: bool | None = None, also: Batch = _NOTHING) -> None:
        ready = self.opened and not self.draining if ready is None else ready
        alive = self._alive(ready)
        await self.fleet.beat(alive, also)
        self.heartbeat_at_s = alive.heartbeat_at_s

    def _alive(self, ready: bool) -> Instance:
        return Instance(
            instance_id=self.boot.instance_id,
            boot_id=self.boot_id,
            pid=os.getpid(),
            url=self.url,
            ready=ready,
            heartbeat_at_s=self.clock.now_s(),
            blobs=self._blobs_at(),
        )


def _damage(found: list[SurfaceRecovery]) -> list[str]:
    """What recovery could not read, one line a surface."""
    return [
        f"{one.surface}: recovery found {one.damaged} damaged, first {one.findings[0].where} "
        f"({one.findings[0].why}); run `perdure verify` for all of it"
        for one in found
        if one.damaged and one.findings
    ]
