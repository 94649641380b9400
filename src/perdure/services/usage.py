"""How much of the disk each surface takes: measured now and then, told with the time it was."""

from __future__ import annotations

import msgspec

from perdure.core.blobs import Blobs
from perdure.core.clock import Clock
from perdure.core.errors import Unavailable
from perdure.surfaces.state import PROMISES, State

PERIOD_S = 60.0
"""How often it is considered."""

_AGE_S = 600.0
_SHARE = 100


class SurfaceUsage(msgspec.Struct, frozen=True):
    """What one surface takes, its indexes included."""

    surface: str
    size_bytes: int


class DiskUse(msgspec.Struct, frozen=True, kw_only=True):
    """What the store takes, and the blobs beside it. `other_bytes` are the engine's own,
    `free_bytes` are used again before the file grows; the log comes on top."""

    measured_at_s: float
    duration_s: float
    surfaces: tuple[SurfaceUsage, ...]
    other_bytes: int
    free_bytes: int
    total_bytes: int
    blobs: int
    blobs_bytes: int


class Measuring:
    """Keeps the last measurement. One that takes long is taken more seldom: measuring has at most
    a hundredth of the time, so that a large store is not read all day."""

    def __init__(self, state: State, blobs: Blobs, clock: Clock) -> None:
        self.last: DiskUse | None = None
        self._state = state
        self._blobs = blobs
        self._clock = clock

    async def measure(self) -> None:
        """Measure, if the last measurement is old enough. Where so much is written that measuring
        has to make way, the last one stays."""
        if self.last is not None:
            age_s = self._clock.now_s() - self.last.measured_at_s
            if 0 <= age_s < max(_AGE_S, _SHARE * self.last.duration_s):
                return
        began_s = self._clock.monotonic_s()
        try:
            usage = await self._state.engine.usage()
            sizes = [blob.size_bytes async for blob in self._blobs.list()]
        except Unavailable:
            return
        self.last = DiskUse(
            measured_at_s=self._clock.now_s(),
            duration_s=round(self._clock.monotonic_s() - began_s, 6),
            surfaces=tuple(
                SurfaceUsage(
                    promise.surface,
                    sum(usage.collections.get(layout.name, 0) for layout in promise.layouts),
                )
                for promise in PROMISES
            ),
            other_bytes=usage.other_bytes,
            free_bytes=usage.free_bytes,
            total_bytes=usage.total_bytes,
            blobs=len(sizes),
            blobs_bytes=sum(sizes),
        )
