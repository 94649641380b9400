"""Engines: how state is kept. `open_engine` is the only place that picks one and imports it."""

from __future__ import annotations

from collections.abc import Sequence

from perdure.core.clock import Clock, SystemClock
from perdure.core.disk import Disk
from perdure.core.engine import Engine
from perdure.core.errors import Invalid
from perdure.core.layouts import Layout

_SCHEMES = "memory://, sqlite:///PATH"


async def open_engine(
    url: str,
    layouts: Sequence[Layout],
    *,
    clock: Clock | None = None,
    disk: Disk | None = None,
    read_only: bool = False,
) -> Engine:
    """Open the store at `url`, recovering it first unless `read_only`.

    `read_only` takes the lock in shared mode and replays, cuts and checkpoints nothing; commits
    are then refused. Raises `Invalid` for a URL no engine knows, `StoreLocked`, `NewerFormat`,
    `Damaged` where the store cannot be trusted at all.
    """
    clock = clock or SystemClock()
    scheme, separator, path = url.partition("://")
    if url == "memory://":
        from perdure.engines.memory import MemoryEngine

        return MemoryEngine(layouts, clock)
    if scheme == "sqlite" and separator and len(path) > 1:
        from perdure.engines.sqlite import SqliteEngine

        return await SqliteEngine.open(
            path[1:], layouts, clock=clock, disk=disk or Disk(), read_only=read_only
        )
    raise Invalid(f"no engine opens {url!r}; the known forms are {_SCHEMES}.")
