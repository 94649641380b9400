"""A circuit breaker: an upstream that only fails is left alone for a while.

Requests that would fail anyway are refused at once, so that their clients need not wait for
timeouts, and a server that comes back is not met by all of them: one finds out, the others follow.
"""

from __future__ import annotations

from perdure.core.clock import Clock

FAILURES_MAX = 5
PAUSE_FIRST_S = 5.0
PAUSE_MAX_S = 60.0


class Breaker:
    """Counts failures in a row. `FAILURES_MAX` of them open the circuit; after a pause, longer each
    time, it is half-open and lets one request through, whose success closes it."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._pause_s = PAUSE_FIRST_S
        self._until_s: float | None = None
        self.failures = 0
        self.opened = 0
        """How often it has opened."""

    @property
    def open(self) -> bool:
        """Whether requests are refused, but for the one that finds out."""
        return self._until_s is not None

    def wait_s(self) -> float:
        """How long requests will be refused from now on; 0 where one may be let through."""
        return 0.0 if self._until_s is None else max(0.0, self._until_s - self._clock.monotonic_s())

    def admit(self) -> bool:
        """Whether a request may be sent now. The one that finds out has a pause to do so; should
        it never say, the next one does."""
        if self.wait_s() > 0:
            return False
        if self._until_s is not None:
            self._until_s = self._clock.monotonic_s() + self._pause_s
        return True

    def started(self) -> None:
        """An answer has begun: others may be asked for, and the next failure opens again."""
        self._until_s = None

    def succeeded(self) -> None:
        """An answer has come to its end."""
        self.failures = 0
        self._until_s = None
        self._pause_s = PAUSE_FIRST_S

    def failed(self) -> None:
        """A request got no answer, or not all of it."""
        self.failures += 1
        if self.failures < FAILURES_MAX:
            return
        if self._until_s is None:
            self.opened += 1
        self._until_s = self._clock.monotonic_s() + self._pause_s
        self._pause_s = min(self._pause_s * 2, PAUSE_MAX_S)
