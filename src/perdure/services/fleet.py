"""The fleet: which of the processes that share a store are alive, and whose work is to be taken
over.

A boot lives as long as its heartbeat moves. Nobody's time of day is compared with anybody else's: a
challenger sees a heartbeat stand still for `LEASE_S` on its own monotonic clock, and then ends that
boot's lease. Whatever a boot begins is written under a check of its lease, so one that was only
paused begins nothing more once it wakes; what it had begun is fenced by the records that its
successors have changed. A heartbeat that is refused is how it learns of it.

Where one process at a time can hold the store, opening it voids all of that: one boot is alive.
"""

from __future__ import annotations

import asyncio

import msgspec
import structlog

from perdure.core.batch import Batch
from perdure.core.clock import Clock
from perdure.core.errors import Conflict, Unavailable
from perdure.core.values import Record
from perdure.surfaces.boots import Instance
from perdure.surfaces.state import State

HEARTBEAT_S = 1.5
LEASE_S = 6.0
WATCH_S = 1.0
_BLIND_S = 3.0

_log = structlog.get_logger("perdure.fleet")


def taken_for_dead() -> Unavailable:
    """What a process says whose lease was ended."""
    return Unavailable(
        "this process stood still for so long that the others on its store took it for dead, and "
        "its work over. Start it again."
    )


class _Seen(msgspec.Struct, frozen=True):
    """The version of a heartbeat, and since when it is known."""

    version: int
    since_s: float


class Fleet:
    """The boots of one state, as one of them sees them."""

    def __init__(self, state: State, clock: Clock, boot_id: str) -> None:
        self.boot_id = boot_id
        self.living = frozenset({boot_id})
        self.lost = asyncio.Event()
        """Set once this boot was taken for dead: it must end."""
        self.gone: set[str] = set()
        """Boots that have ended and whose work nobody here has seen to yet."""
        self._state = state
        self._clock = clock
        self._looked_at_s = self._beat_at_s = clock.monotonic_s()
        self._shared = state.engine.shared
        self._seen: dict[str, _Seen] = {}

    @property
    def lease(self) -> Batch:
        """What goes with every commit by which this boot begins something of its own."""
        return self._state.boots.alive(self.boot_id) if self._shared else Batch()

    @property
    def silent_s(self) -> float:
        """How long ago this boot gave its last sign of life. After half a lease it may still write,
        and must not be asked to: by the end of it others will have taken over."""
        return self._clock.monotonic_s() - self._beat_at_s if self._shared else 0.0

    async def lives(self, boot_id: str | None) -> bool:
        """Whether a boot is alive. Who is not known is looked for in the store, after the record
        that names it was read: it may have begun a moment ago."""
        if boot_id is None:
            return False
        return boot_id in self.living or boot_id in await self.leaseholders()

    async def leaseholders(self) -> frozenset[str]:
        """The boots that may write, as the store says now."""
        return frozenset(await self._leases()) if self._shared else self.living

    async def join(self, before: str | None) -> None:
        """Take a lease, and learn who else has one. The boot `before` this one in the same place
        has none any more: nobody else can be there, so it is dead."""
        if self._shared:
            boots = self._state.boots
            ended = boots.end_lease(before) if before else Batch()
            await self._state.commit(ended + boots.take_lease(self.boot_id))
            self.living = frozenset(await self._leases())

    async def settle(self) -> list[Instance]:
        """The others that are alive, once each was seen to move or was taken for dead."""
        first = await self._versions()
        while True:
            await self.watch()
            now = await self._versions()
            moved = {boot_id for boot_id, version in now.items() if version != first.get(boot_id)}
            others = self.living - {self.boot_id}
            if others <= moved:
                beats = await self._heartbeats()
                return [beat.value for beat in beats if beat.value.boot_id in others]
            await self._clock.sleep(WATCH_S / 4)

    async def beat(self, alive: Instance, also: Batch) -> None:
        """Give a sign of life, in one commit with `also`. Raises `Conflict` once the fleet has
        taken this boot for dead."""
        try:
            await self._state.commit(self._state.boots.heartbeat(alive) + also + self.lease)
        except Conflict:
            self.lost.set()
            raise taken_for_dead() from None
        self._beat_at_s = self._clock.monotonic_s()

    async def watch(self) -> None:
        """Look who is alive, and end the leases of those that are not. A heartbeat stands still for
        as long as somebody looks and gives signs of life too: while the store is away, nobody can.
        """
        leases = await self._leases()
        beats = {beat.value.boot_id: beat for beat in await self._heartbeats()}
        now_s = self._clock.monotonic_s()
        if now_s - min(self._looked_at_s, self._beat_at_s) > _BLIND_S:
            self._seen.clear()
        self._looked_at_s = now_s
        for boot_id in leases - {self.boot_id}:
            beat = beats.get(boot_id)
            version = 0 if beat is None else beat.version
            seen = self._seen.get(boot_id)
            if seen is None or seen.version != version:
                self._seen[boot_id] = _Seen(version, now_s)
            elif now_s - seen.since_s >= LEASE_S and await self._end(boot_id, beat):
                leases = leases - {boot_id}
        self._seen = {boot_id: seen for boot_id, seen in self._seen.items() if boot_id in leases}
        self.gone |= self.living - leases - {self.boot_id}
        self.living = frozenset(leases | {self.boot_id})

    async def leave(self) -> None:
        """End the lease in good order: others need not wait for it to stand still."""
        if self._shared:
            await self._state.commit(self._state.boots.end_lease(self.boot_id))

    async def _end(self, boot_id: str, beat: Record[Instance] | None) -> bool:
        """Whether a boot is dead from now on: not if it gives a sign of life at this moment."""
        try:
            await self._state.commit(self._state.boots.bury(boot_id, beat) + self.lease)
        except Conflict:
            return False
        _log.warning("a process of the fleet is dead", boot=boot_id, stood_still_s=LEASE_S)
        return True

    async def _versions(self) -> dict[str, int]:
        return {beat.value.boot_id: beat.version for beat in await self._heartbeats()}

    async def _leases(self) -> set[str]:
        return {lease.key[-1] async for lease in self._state.boots.leases()}

    async def _heartbeats(self) -> list[Record[Instance]]:
        return [beat async for beat in self._state.boots.heartbeats()]
