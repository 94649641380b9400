"""Time and ids as objects that are passed in, so that tests own them.

Durations come from `monotonic_s` only; `now_s` is for people and for declared deadlines.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from typing import Protocol


class Clock(Protocol):
    """Where time and randomness come from."""

    def now_s(self) -> float:
        """Seconds since the Unix epoch; may jump either way."""
        ...

    def monotonic_s(self) -> float:
        """Seconds that never go back, comparable within this process only."""
        ...

    async def sleep(self, duration_s: float) -> None:
        """Return after `duration_s` of monotonic time."""
        ...

    def new_id(self, prefix: str) -> str:
        """A fresh id `prefix_<48 hex>`, never given out before."""
        ...


_ID_BYTES = 24
_IDS_DRAWN = 128


class SystemClock:
    """The machine's clocks and its random source, which is asked for many ids at once."""

    def __init__(self) -> None:
        self._drawn = b""

    def now_s(self) -> float:
        return time.time()

    def monotonic_s(self) -> float:
        return time.monotonic()

    async def sleep(self, duration_s: float) -> None:
        await asyncio.sleep(duration_s)

    def new_id(self, prefix: str) -> str:
        if not self._drawn:
            self._drawn = secrets.token_bytes(_ID_BYTES * _IDS_DRAWN)
        fresh, self._drawn = self._drawn[:_ID_BYTES], self._drawn[_ID_BYTES:]
        return f"{prefix}_{fresh.hex()}"
