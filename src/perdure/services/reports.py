"""Reports for operators: what is promised, how this start went, who is alive.

The same structs are served over HTTP, printed by the command line, and read from a store that no
process holds, so the three cannot differ.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

import msgspec

from perdure import __version__
from perdure.core.clock import Clock
from perdure.core.engine import Sharding, Survives
from perdure.core.promises import LossBound, Promise
from perdure.core.values import Finding
from perdure.services.lifecycle import Node
from perdure.services.shards import shard_warnings
from perdure.services.startup import Check
from perdure.surfaces.boots import Boot, Instance, Phase, SurfaceRecovery
from perdure.surfaces.proofs import proofs_of
from perdure.surfaces.state import PROMISES, State

HEARTBEAT_STALE_S = 15.0
"""An instance whose last sign of life is older than this is not counted as ready."""


class SurfaceState(msgspec.Struct, frozen=True, kw_only=True):
    """One surface: what it declares, where it is kept, and how its last recovery went. `proofs`
    are test ids by statement."""

    surface: str
    durability: str
    acknowledgement: str
    survives: Survives
    loss_bound: LossBound | None
    owner: str
    recovery: str
    retention: str
    engine: str
    version: int
    collections: tuple[str, ...]
    proofs: dict[str, tuple[str, ...]]
    last_recovery: SurfaceRecovery | None


class StateReport(msgspec.Struct, frozen=True, kw_only=True):
    """Every surface, and where what is promised is more than the engine holds. `shards` is None for
    a store that is whole by itself."""

    object: str = "perdure.state"
    profile: str
    engine: str
    surfaces: tuple[SurfaceState, ...]
    warnings: tuple[str, ...]
    shards: Sharding | None = None


class StartupReport(msgspec.Struct, frozen=True, kw_only=True):
    """A start, while it happens or after. `recovery` says what each surface found, and what was
    found in each shard that came later."""

    object: str = "perdure.startup"
    instance_id: str | None
    boot_id: str
    number: int | None
    pid: int
    version: str
    ready: bool
    done: bool
    duration_s: float
    heartbeat_age_s: float | None
    previous_boot_id: str | None
    previous_ended_clean: bool | None
    phases: tuple[Phase, ...]
    recovery: tuple[SurfaceRecovery, ...]
    checks: tuple[Check, ...]
    warnings: tuple[str, ...]
    shards: Sharding | None = None


class InstanceState(msgspec.Struct, frozen=True, kw_only=True):
    """An instance and its last sign of life. `ready` is what it said then, and false once that is
    too long ago: a killed process leaves no "ready" behind."""

    object: str = "perdure.instance"
    id: str
    boot_id: str
    pid: int
    url: str
    ready: bool
    heartbeat_age_s: float


class BootState(msgspec.Struct, frozen=True, kw_only=True):
    """One recorded boot. `ended_clean` is false for one that was killed, or still runs."""

    object: str = "perdure.boot"
    id: str
    boot: Boot


def state_report(
    engine: str,
    profile: str,
    recovery: Iterable[SurfaceRecovery],
    warnings: Sequence[str],
    promises: Sequence[Promise] = PROMISES,
    shards: Sharding | None = None,
) -> StateReport:
    """What every surface promises on this engine."""
    found = {entry.surface: entry for entry in recovery}
    surfaces = tuple(
        SurfaceState(
            surface=promise.surface,
            durability=promise.durability.value,
            acknowledgement=promise.acknowledgement,
            survives=promise.survives,
            loss_bound=promise.loss_bound,
            owner=promise.owner,
            recovery=promise.recovery,
            retention=promise.retention,
            engine=engine,
            version=promise.version,
            collections=tuple(layout.name for layout in promise.layouts),
            proofs=proofs_of(promise),
            last_recovery=found.get(promise.surface),
        )
        for promise in promises
    )
    return StateReport(
        profile=profile,
        engine=engine,
        surfaces=surfaces,
        warnings=(*warnings, *shard_warnings(shards)),
        shards=shards,
    )


def startup_report(node: Node) -> StartupReport:
    """How this node's start is going, or went."""
    readiness = node.readiness()
    boot = node.boot if node.opened else None
    beat_age_s = node.clock.now_s() - node.heartbeat_at_s if node.heartbeat_at_s else None
    return StartupReport(
        instance_id=boot.instance_id if boot else None,
        boot_id=node.boot_id,
        number=boot.number if boot else None,
        pid=os.getpid(),
        version=__version__,
        ready=readiness.ready,
        done=node.startup.done,
        duration_s=round(node.startup.duration_s, 6),
        heartbeat_age_s=None if beat_age_s is None else round(max(0.0, beat_age_s), 3),
        previous_boot_id=boot.previous_boot_id if boot else None,
        previous_ended_clean=boot.previous_ended_clean if boot else None,
        phases=tuple(node.startup.phases),
        recovery=node.startup.recovery,
        checks=readiness.checks,
        warnings=readiness.warnings,
        shards=node.sharding,
    )


def instance_state(instance: Instance, state: State, clock: Clock, running: str) -> InstanceState:
    """An instance as seen now. Where one process at a time can hold the store, only the boot that
    is `running` (empty for none) can be alive, however fresh the others' last signs are."""
    age_s = max(0.0, clock.now_s() - instance.heartbeat_at_s)
    possible = state.engine.shared or instance.boot_id == running
    return InstanceState(
        id=instance.instance_id,
        boot_id=instance.boot_id,
        pid=instance.pid,
        url=instance.url,
        ready=instance.ready and possible and age_s <= HEARTBEAT_STALE_S,
        heartbeat_age_s=round(age_s, 3),
    )


class LastSeen(msgspec.Struct, frozen=True, kw_only=True):
    """What a store that nobody serves says of those who did: the last sign of life of each, and the
    boot begun last. What cannot be read is `damaged`."""

    instances: list[Instance]
    boot: Boot | None
    damaged: list[Finding]


async def last_seen(state: State) -> LastSeen:
    """Who served a store last."""
    damaged: list[Finding] = []
    instances = [beat.value async for beat in state.boots.heartbeats(damaged)]
    boots: list[Boot] = []
    for instance in instances:
        boot, unread = await state.boots.newest(instance.instance_id)
        boots += [] if boot is None else [boot.value]
        damaged += unread
    newest = max(boots, key=lambda boot: boot.started_at_s, default=None)
    return LastSeen(instances=instances, boot=newest, damaged=damaged)


def boot_state(boot: Boot) -> BootState:
    """A boot as listed."""
    return BootState(id=boot.boot_id, boot=boot)
