"""Opening the store that a drill is about, over a clock and a disk of the drill's own."""

from __future__ import annotations

from pathlib import Path

from perdure.core.clock import Clock
from perdure.core.disk import Disk
from perdure.core.engine import Engine
from perdure.engines.files import FilesEngine
from perdure.engines.sqlite import SqliteEngine
from perdure.proving.drills.drill import Subject, path_in
from perdure.proving.steps import LAYOUTS
from perdure.proving.watched import HastyDisk


async def open_in(place: Path, subject: Subject, clock: Clock, disk: Disk | None = None) -> Engine:
    """The store of a subject in a directory, with the layouts of `proving.steps`."""
    path, disk = str(path_in(place, subject)), disk or HastyDisk()
    if subject.startswith("files"):
        return await FilesEngine.open(path, LAYOUTS, clock=clock, disk=disk)
    return await SqliteEngine.open(path, LAYOUTS, clock=clock, disk=disk)
