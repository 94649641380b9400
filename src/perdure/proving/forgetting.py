"""A sync that fails once, and a kernel that then takes the pages for written: they can be read
until the power goes, and no later sync brings them to the disk. What is acknowledged after a
reopening must not rest on them."""

from __future__ import annotations

from pathlib import Path

from perdure.core.clock import SystemClock
from perdure.core.errors import PerdureError
from perdure.engines.sqlite import SqliteEngine
from perdure.proving.steps import LAYOUTS, step, troubles
from perdure.proving.watched import SYNC_FAILED, HastyDisk, WatchedDisk


async def lost_to_a_failed_sync(home: Path) -> list[str]:
    """Commit, fail a sync, reopen, commit, cut the power; what does not hold after that."""
    live, cut = home / "live", home / "cut"
    disk = WatchedDisk(hasty=True)
    for place in (live, cut):
        HastyDisk().make_directory(place)
    engine = await _opened(live, disk)
    await engine.commit(step(0, 1))
    failed = False

    def fail(call: str, suffix: str) -> None:
        nonlocal failed
        if (call, suffix) == ("sync", "-wal") and not failed:
            failed = True
            disk.loose = [write for write in disk.loose if not write.name.endswith(suffix)]
            raise SYNC_FAILED

    disk.watch = fail
    try:
        await engine.commit(step(0, 2))
        return ["a commit was acknowledged whose sync had failed"]
    except PerdureError:
        await engine.close()
    engine = await _opened(live, disk)
    await engine.commit(step(0, 3))
    survivors = disk.contents().survivors()
    mark = (live / "state.db.mark").read_bytes()
    await engine.close()
    for name, data in (survivors | {"state.db.mark": mark}).items():
        HastyDisk().write_file(cut / name, data)
    try:
        engine = await _opened(cut, WatchedDisk(hasty=True))
    except PerdureError as error:
        return [f"the store does not open: {error}"]
    wrong = await troubles(engine, {0: 3}, {0: 3})
    await engine.close()
    return wrong


async def _opened(place: Path, disk: WatchedDisk) -> SqliteEngine:
    return await SqliteEngine.open(
        str(place / "state.db"), LAYOUTS, clock=SystemClock(), disk=HastyDisk(), vfs=disk.name
    )
