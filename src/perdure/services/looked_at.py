"""Opening what others may be looking at: a command that only reads has soon done, and whoever is to
have the store waits for it instead of failing."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

from perdure.core.clock import Clock
from perdure.core.errors import StoreLocked

T = TypeVar("T")

LOOKED_AT_S = 10.0
"""How long that is waited for: `perdure verify` of a large store takes longer."""

_LOOKS_APART_S = 0.1


async def once_unseen(clock: Clock, open_it: Callable[[], Awaitable[T]]) -> T:
    """What `open_it` opens, once nobody looks at it. Raises `StoreLocked` for what somebody owns,
    and for what is looked at for long."""
    until_s = clock.monotonic_s() + LOOKED_AT_S
    while True:
        try:
            return await open_it()
        except StoreLocked as locked:
            if locked.holder or clock.monotonic_s() >= until_s:
                raise
        await clock.sleep(_LOOKS_APART_S)
