"""What a start is doing and what it found: the object behind `/v1/startup`, true at any moment."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import msgspec

from perdure.core.clock import Clock
from perdure.surfaces.boots import Phase, SurfaceRecovery


class Check(msgspec.Struct, frozen=True):
    """One condition of readiness. `reason` says why it fails, or what holds."""

    name: str
    ok: bool
    reason: str


class Readiness(msgspec.Struct, frozen=True):
    """Whether traffic is welcome, check by check; `warnings` do not stop it."""

    ready: bool
    checks: tuple[Check, ...]
    warnings: tuple[str, ...] = ()


class Startup:
    """Phases in order, with what recovery found. Written by the lifecycle, read by anyone."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.began_s = clock.monotonic_s()
        self.phases: list[Phase] = []
        self.recovery: tuple[SurfaceRecovery, ...] = ()
        self.done = False

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time one phase; while it runs it is listed without a duration."""
        began_s = self._clock.monotonic_s()
        at = len(self.phases)
        self.phases.append(Phase(name))
        yield
        self.phases[at] = msgspec.structs.replace(
            self.phases[at], duration_s=round(self._clock.monotonic_s() - began_s, 6)
        )

    def note(self, detail: str) -> None:
        """Say how far the running phase is."""
        self.phases[-1] = msgspec.structs.replace(self.phases[-1], detail=detail)

    @property
    def duration_s(self) -> float:
        """Seconds since the start began, or how long it took."""
        if self.done:
            return sum(phase.duration_s or 0.0 for phase in self.phases)
        return self._clock.monotonic_s() - self.began_s
