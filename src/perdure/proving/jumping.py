"""A clock whose time of day jumps, or stands still. Its monotonic side goes on evenly, as that of
every machine does."""

from __future__ import annotations

import msgspec

from perdure.core.clock import SystemClock

HOUR_S = 3600.0
DAY_S = 24 * HOUR_S


class Jumps(msgspec.Struct, frozen=True, kw_only=True):
    """How far off a clock begins, and by how much it jumps whenever it was read `every` times. A
    `still` one does not move by itself."""

    off_s: float = 0.0
    by_s: float = 0.0
    every: int = 20
    still: bool = False

    def __str__(self) -> str:
        still = "still, " if self.still else ""
        return f"{still}{self.off_s:+g} s, {self.by_s:+g} s at every read {self.every}"


class JumpingClock(SystemClock):
    """Jumps as it is told, and as its owner says beside that."""

    def __init__(self, jumps: Jumps) -> None:
        super().__init__()
        self._jumps = jumps
        self._began_s = super().now_s()
        self._off_s = jumps.off_s
        self._reads = 0

    def now_s(self) -> float:
        self._reads += 1
        if self._reads % self._jumps.every == 0:
            self._off_s += self._jumps.by_s
        return (self._began_s if self._jumps.still else super().now_s()) + self._off_s

    def jump(self, by_s: float) -> None:
        """Let the time of day be another."""
        self._off_s += by_s
