"""The engines this repository proves: a subject is a name and a way to open."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from perdure.core.clock import Clock
from perdure.core.disk import Disk
from perdure.core.engine import Engine
from perdure.core.layouts import Layout
from perdure.engines import open_engine
from perdure.proving.subject import Subject


async def _memory(directory: Path, layouts: Sequence[Layout], clock: Clock) -> Engine:
    return await open_engine("memory://", layouts, clock=clock)


async def _sqlite(directory: Path, layouts: Sequence[Layout], clock: Clock) -> Engine:
    Disk().make_directory(directory)
    return await open_engine(f"sqlite:///{directory / 'state.db'}", layouts, clock=clock)


KNOWN = {
    subject.name: subject for subject in (Subject("memory", _memory), Subject("sqlite", _sqlite))
}
