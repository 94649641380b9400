"""Waiting for a condition, with an end: the only polling that tests and proofs do."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

_PAUSE_S = 0.01


class TooLate(AssertionError):
    """A condition did not come to hold in time. A hang is a failure, not a wait."""


async def wait_until(holds: Callable[[], Awaitable[bool]], deadline_s: float, what: str) -> float:
    """Ask again and again until `holds`; returns the seconds it took. Raises `TooLate`."""
    began_s = time.monotonic()
    while not await holds():
        taken_s = time.monotonic() - began_s
        if taken_s > deadline_s:
            raise TooLate(f"{what} did not happen within {deadline_s:g} s")
        await asyncio.sleep(_PAUSE_S)
    return time.monotonic() - began_s
