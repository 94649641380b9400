"""The library: a store opened in a program of one's own, with no server and no configuration.

`open` is for async programs. `blocking` serves scripts: one portal runs the event loop in a thread
and hands every call over, so there are no second, synchronous versions of anything.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, TypeVar

from perdure.engines import open_engine
from perdure.surfaces.state import LAYOUTS, State

T = TypeVar("T")


@asynccontextmanager
async def open(url: str, *, read_only: bool = False) -> AsyncIterator[State]:
    """The state kept at `url` (`sqlite:///state.db`, `memory://`), closed cleanly at the end;
    `read_only` changes nothing in it, not even what a crash left to be recovered.

    Raises what `open_engine` raises; `StoreLocked` where a server or another program has it.
    """
    engine = await open_engine(url, LAYOUTS, read_only=read_only)
    try:
        yield State(engine)
    finally:
        await engine.close()


@contextmanager
def blocking(url: str) -> Iterator[Any]:
    """The same state for a program without an event loop: its async methods return their results,
    its async iterators are plain ones, and its pure functions stay what they are."""
    portal = _Portal()
    try:
        opened = open(url)
        state = portal.run(opened.__aenter__())
        try:
            yield _Blocking(state, portal)
        finally:
            portal.run(opened.__aexit__(None, None, None))
    finally:
        portal.close()


class _Portal:
    """An event loop in a thread of its own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="perdure-portal")
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def iterate(self, source: AsyncIterator[T]) -> Iterator[T]:
        async def following() -> tuple[T] | None:
            try:
                return (await anext(source),)
            except StopAsyncIteration:
                return None

        while (item := self.run(following())) is not None:
            yield item[0]

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class _Blocking:
    """An object whose async methods block."""

    def __init__(self, target: Any, portal: _Portal) -> None:
        self._target = target
        self._portal = portal

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._target, name)
        if inspect.iscoroutinefunction(found):
            return lambda *args, **kwargs: self._portal.run(found(*args, **kwargs))
        if inspect.isasyncgenfunction(found):
            return lambda *args, **kwargs: self._portal.iterate(found(*args, **kwargs))
        if callable(found) or isinstance(found, str | int | float | bytes | tuple | None):
            return found
        return _Blocking(found, self._portal)
