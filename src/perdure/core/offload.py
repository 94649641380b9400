"""The one place that leaves the event loop: blocking work runs in a thread and is awaited."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


async def off_loop(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run `function` in a worker thread. Cancelling the caller does not stop it."""
    return await asyncio.to_thread(function, *args, **kwargs)
