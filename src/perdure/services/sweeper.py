"""The sweeper: forgets what its retention no longer keeps, a bounded piece at a time."""

from __future__ import annotations

import msgspec

from perdure.core.batch import Batch, join
from perdure.core.clock import Clock
from perdure.surfaces.idempotency import KEPT_S
from perdure.surfaces.state import State

_PIECE = 200


class SweeperStats(msgspec.Struct):
    """Counters since start."""

    forgotten: int = 0


class Sweeper:
    """Sweeps one state; `sweep` is called again and again by the supervisor."""

    def __init__(self, state: State, clock: Clock) -> None:
        self._state = state
        self._clock = clock
        self.stats = SweeperStats()

    async def sweep(self) -> int:
        """Forget request keys past their day. Returns how many; every piece is one commit."""
        before_s = int(self._clock.now_s()) - KEPT_S
        forgotten = 0
        while keys := await self._state.idempotency.older_than(before_s, limit=_PIECE):
            batch: Batch = join(self._state.idempotency.forget(key) for key in keys)
            await self._state.commit(batch)
            forgotten += len(keys)
        self.stats.forgotten += forgotten
        return forgotten
