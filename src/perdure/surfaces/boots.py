"""Boots and instances: every start of a process, what it recovered, and whether it ended clean.

A boot is written when it starts, again when it is ready and when it ends; one that was killed
never gets its last write, and that absence is how the next boot knows. An instance is a place
that boots happen in (a data directory); its heartbeat tells a living process from a killed one.
Where several processes share a store, each boot holds a lease, and whoever ends it fences the boot.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import msgspec

from perdure.core.batch import Batch, check, delete, put
from perdure.core.engine import Engine, Survives
from perdure.core.errors import Damaged
from perdure.core.keys import SYSTEM_TENANT, Key
from perdure.core.layouts import Records
from perdure.core.paging import every
from perdure.core.promises import Durability, Promise
from perdure.core.values import Finding, Page, Record


class SurfaceRecovery(msgspec.Struct, frozen=True):
    """What one surface found at a start: counts, what was damaged, and how long it took."""

    surface: str
    loaded: int = 0
    replayed: int = 0
    cut: int = 0
    requeued: int = 0
    interrupted: int = 0
    orphaned: int = 0
    damaged: int = 0
    duration_s: float = 0.0
    findings: tuple[Finding, ...] = ()


class Phase(msgspec.Struct, frozen=True):
    """One step of a start. `duration_s` is None while it runs."""

    name: str
    duration_s: float | None = None
    detail: str = ""


class Boot(msgspec.Struct, frozen=True):
    """One start of one instance. Times are Unix seconds; `ended_clean` stays False after a kill.

    `number` counts the boots of an instance from 1 and is its epoch on exclusive stores.
    """

    boot_id: str
    instance_id: str
    number: int
    pid: int
    version: str
    started_at_s: float
    previous_boot_id: str | None
    previous_ended_clean: bool | None
    ready_at_s: float | None = None
    ended_at_s: float | None = None
    ended_clean: bool = False
    phases: tuple[Phase, ...] = ()
    recovery: tuple[SurfaceRecovery, ...] = ()


class Instance(msgspec.Struct, frozen=True):
    """The last sign of life of an instance; `blobs` is where it keeps the bytes of files."""

    instance_id: str
    boot_id: str
    pid: int
    url: str
    ready: bool
    heartbeat_at_s: float
    blobs: str = ""


class Lease(msgspec.Struct, frozen=True):
    """A boot may begin work as long as this stands; nobody writes it twice."""

    boot_id: str


BOOTS = Records("boots", Boot, key=("tenant", "instance_id", "number"))
INSTANCES = Records("instances", Instance, key=("tenant", "instance_id"), urgent=True)
LEASES = Records("leases", Lease, key=("tenant", "boot_id"), urgent=True)


class Boots:
    """Reads of boots and instances, and the batches that write them."""

    promise = Promise(
        surface="boots",
        durability=Durability.AUDIT,
        acknowledgement="durable before the server answers its first request",
        survives=Survives(process_crash=True, power_cut=True, failed_sync=True, damage=True),
        owner="the process that boots",
        recovery="the boot without an end is the one that was killed",
        retention="the newest 1000 boots of each instance (retention.boots_kept)",
        layouts=(BOOTS, INSTANCES, LEASES),
        statements=("C13", "C15"),
    )

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def newest(self, instance_id: str) -> tuple[Record[Boot] | None, list[Finding]]:
        """The newest boot of an instance that can be read, and those after it that cannot."""
        damaged: list[Finding] = []
        cursor: str | None = None
        while True:
            try:
                page = await self.history(instance_id, limit=1, cursor=cursor)
                return (page.items[0] if page.items else None), damaged
            except Damaged as damage:
                damaged.append(Finding(damage.where, damage.why))
                if damage.resume is None:
                    return None, damaged
                cursor = damage.resume

    async def history(
        self, instance_id: str, *, limit: int, cursor: str | None = None
    ) -> Page[Record[Boot]]:
        """Boots of an instance, the newest first."""
        return await self._engine.scan(
            BOOTS, (SYSTEM_TENANT, instance_id), limit=limit, cursor=cursor, descending=True
        )

    async def before(self, instance_id: str, number: int, *, limit: int) -> list[Key]:
        """Keys of boots numbered below `number`, the oldest first."""
        page = await self._engine.scan(BOOTS, (SYSTEM_TENANT, instance_id), limit=limit)
        return [boot.key for boot in page.items if boot.value.number < number]

    def forget(self, key: Key) -> Batch:
        """Forget a boot that retention no longer keeps."""
        return delete(BOOTS, key)

    async def instances(self, *, limit: int, cursor: str | None = None) -> Page[Record[Instance]]:
        """Every instance that ever booted on this store."""
        return await self._engine.scan(INSTANCES, (SYSTEM_TENANT,), limit=limit, cursor=cursor)

    def record(self, boot: Boot, *, expect: int | None = None) -> Batch:
        """Write a boot as it stands now."""
        number = f"{boot.number:010d}"
        return put(BOOTS, (SYSTEM_TENANT, boot.instance_id, number), boot, expect=expect)

    def heartbeats(self, damaged: list[Finding] | None = None) -> AsyncIterator[Record[Instance]]:
        """The last sign of life of every instance; those that cannot be read go to `damaged`."""
        unread = [] if damaged is None else damaged
        return every(self._engine, INSTANCES, (SYSTEM_TENANT,), damaged=unread)

    def leases(self) -> AsyncIterator[Record[Lease]]:
        """The boots that may begin work."""
        return every(self._engine, LEASES, (SYSTEM_TENANT,), damaged=[])

    def heartbeat(self, instance: Instance) -> Batch:
        """Say that an instance is alive."""
        return put(INSTANCES, (SYSTEM_TENANT, instance.instance_id), instance)

    def take_lease(self, boot_id: str) -> Batch:
        """Let a boot begin work."""
        return put(LEASES, (SYSTEM_TENANT, boot_id), Lease(boot_id), expect=0)

    def alive(self, boot_id: str) -> Batch:
        """What goes with the commits of a boot: a `Conflict` once its lease was ended."""
        return check(LEASES, (SYSTEM_TENANT, boot_id), 1)

    def end_lease(self, boot_id: str) -> Batch:
        """Let a boot begin nothing more."""
        return delete(LEASES, (SYSTEM_TENANT, boot_id))

    def bury(self, boot_id: str, last: Record[Instance] | None) -> Batch:
        """End the lease of a boot whose heartbeat stands still. Raises `Conflict` where that moves
        after all; `last` is None where another boot of the instance has taken its place."""
        ended = delete(LEASES, (SYSTEM_TENANT, boot_id), expect=1)
        if last is None:
            return ended
        dead = msgspec.structs.replace(last.value, ready=False)
        return ended + put(INSTANCES, last.key, dead, expect=last.version)
