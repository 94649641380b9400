"""The sweeper: forgets what its retention no longer keeps, a bounded piece at a time."""

from __future__ import annotations

import msgspec

from perdure.core.batch import Batch, join
from perdure.core.clock import Clock
from perdure.core.limits import CLOCK_OFF_S
from perdure.surfaces.boots import Boot
from perdure.surfaces.idempotency import KEPT_S
from perdure.surfaces.state import State

_PIECE = 200


class SweeperStats(msgspec.Struct):
    """Counters since start."""

    forgotten: int = 0


class Sweeper:
    """Sweeps one state; `sweep` is called again and again by the supervisor.

    `boot` is the running one: of its instance, the `boots_kept` newest stay.
    """

    def __init__(self, state: State, clock: Clock, boot: Boot, boots_kept: int) -> None:
        self._state = state
        self._clock = clock
        self._boot = boot
        self._boots_kept = boots_kept
        self.stats = SweeperStats()

    async def sweep(self) -> None:
        """Forget request keys past their day, and boots past their number."""
        idempotency, boots = self._state.idempotency, self._state.boots
        before_s = int(self._clock.now_s()) - KEPT_S - CLOCK_OFF_S
        while keys := await idempotency.older_than(before_s, limit=_PIECE):
            await self._forget([idempotency.forget(key) for key in keys])
        oldest = self._boot.number - self._boots_kept + 1
        while keys := await boots.before(self._boot.instance_id, oldest, limit=_PIECE):
            await self._forget([boots.forget(key) for key in keys])

    async def _forget(self, batches: list[Batch]) -> None:
        """One piece, one commit."""
        await self._state.commit(join(batches))
        self.stats.forgotten += len(batches)
