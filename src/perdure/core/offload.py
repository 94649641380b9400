"""The one place that leaves the event loop: blocking work runs in a thread and is awaited."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


async def off_loop(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run `function` in a worker thread. Cancelling the caller does not stop it."""
    return await asyncio.to_thread(function, *args, **kwargs)


_WRITERS = ThreadPoolExecutor(8, thread_name_prefix="perdure-write")


async def off_loop_to_write(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """As `off_loop`, in threads that are kept for writing. A disk may take long over a sync, and
    however many wait for it, nobody who reads waits behind them."""
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(_WRITERS, partial(function, *args, **kwargs))


class Lane:
    """A thread of one's own, for work that must be done in the order in which it was given."""

    def __init__(self, name: str) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run `function` after all that was given before. Cancelling the caller does not stop
        it."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, partial(function, *args, **kwargs))

    def close(self) -> None:
        """Finish what was given, then end the thread."""
        self._thread.shutdown()


async def steps_off_loop(
    steps: Generator[T, None, None], run: Callable[..., Awaitable[Any]] = off_loop
) -> AsyncGenerator[T, None]:
    """Run a blocking generator in worker threads, by `run`, one step after another. However it is
    left, the step under way is finished and the generator closed; so close it (`aclosing`)."""
    step: asyncio.Future[Any] | None = None
    try:
        while True:
            step = asyncio.ensure_future(run(_next, steps))
            if not (given := await asyncio.shield(step)):
                return
            yield given[0]
    finally:
        if step is not None:
            await asyncio.wait((step,))
        await off_loop(steps.close)


def _next(steps: Generator[T, None, None]) -> tuple[T] | None:
    for step in steps:
        return (step,)
    return None
