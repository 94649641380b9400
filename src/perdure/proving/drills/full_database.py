"""A database whose disk is really full: its tables, or its log, lie on a small image of their own.

A table that cannot grow fails the transaction, and nothing else. A log that cannot grow ends the
server, which does not come back before there is space: then it is started again, and the engine is
not.
"""

from __future__ import annotations

import os
import shutil
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Literal, get_args

from perdure.core.clock import SystemClock
from perdure.core.engine import Engine
from perdure.core.errors import PerdureError, StorageFull
from perdure.engines import open_engine
from perdure.proving.drills.database import FailingDatabase, Writing
from perdure.proving.drills.drill import Subject, Trial
from perdure.proving.drills.ext4 import Image, image, lacks_images
from perdure.proving.faults import FULL_DISK
from perdure.proving.postgres import Server, make_server
from perdure.proving.steps import LAYOUTS, Unsound, last_step, troubles
from perdure.proving.waiting import TooLate, wait_until

_BEFORE_MAX = 12
_AFTER = 3
_LEFT_BYTES_MAX = 1024 * 1024
"""So much space is left at most when writers come to the end of it."""

_REFUSED = 8
_DEADLINE_S = 60.0
_LOG_BYTES = 1_000_000

Part = Literal["tables", "log"]
_PARTS: tuple[Part, ...] = get_args(Part)


class FullDatabase:
    """See `says`."""

    fault = FULL_DISK
    subject: Subject = "postgres"
    says = (
        "the disk of a PostgreSQL is full. Where it is that of its tables, writes are refused by "
        "name, reads go on, and writes work again once there is space; where it is that of its "
        "log, the server ends, and is started when there is space: every step is there once, and "
        "the engine goes on by itself"
    )

    def lacks(self) -> str | None:
        return FailingDatabase().lacks() or lacks_images()

    async def run(self, trial: Trial) -> None:
        case = 0
        while not trial.over and case != trial.case:
            case += 1
            if trial.wants(case):
                part = _PARTS[(case - 1) % len(_PARTS)]
                trial.count(part)
                server = make_server()
                wrong = await self._judge(trial, case, part, server)
                trial.judged(case, (f"{part}: {one}" for one in wrong), server.directory)
                server.stop()
                if not wrong:
                    server.remove()

    async def _judge(self, trial: Trial, case: int, part: Part, server: Server) -> list[str]:
        rng = trial.rng(case)
        with ExitStack() as undo:
            disk = undo.enter_context(image(server.directory))
            undo.callback(server.stop)  # what is in use cannot be unmounted
            url = await (_tables_on if part == "tables" else _log_on)(disk, server)
            engine = await open_engine(url, LAYOUTS, clock=SystemClock())
            writing = Writing(engine)
            try:
                await writing.reach(rng.randrange(_BEFORE_MAX))
                _fill(disk, leave=rng.randrange(_LEFT_BYTES_MAX))
                if part == "tables":
                    wrong = await _refused(engine, writing)
                    _make_room(disk)
                else:
                    await _use_up_the_log(server)
                    _make_room(disk)
                    server.start()
                    await writing.reach(_AFTER)
                    wrong = await writing.stop()
                wrong += await troubles(engine, writing.acknowledged, writing.begun)
            except (TooLate, PerdureError) as error:
                wrong = [*(await writing.stop()), str(error)]
            finally:
                await engine.close()
        trial.count("steps", sum(writing.acknowledged.values()))
        trial.count("refused", writing.refused.total())
        return wrong


async def _tables_on(disk: Image, server: Server) -> str:
    """A store whose tables are on this disk."""
    import asyncpg

    place = disk.root / "tables"
    place.mkdir()
    _give(place, server)
    session = await asyncpg.connect(server.dsn)
    try:
        await session.execute(f"CREATE TABLESPACE small LOCATION '{place}'")
        await session.execute("CREATE DATABASE small TABLESPACE small")
    finally:
        await session.close()
    return f"{server.dsn.replace('/postgres?', '/small?')}&schema=full"


async def _log_on(disk: Image, server: Server) -> str:
    """A store whose server has its log on this disk."""
    server.stop()
    there, place = server.directory / "data" / "pg_wal", disk.root / "log"
    shutil.copytree(there, place)
    shutil.rmtree(there)
    there.symlink_to(place)
    for path in (place, *place.rglob("*")):
        _give(path, server)
    server.start()
    return f"{server.dsn}&schema=full"


def _give(path: Path, server: Server) -> None:
    """Let the server own it."""
    owner = server.directory.stat()
    os.chown(path, owner.st_uid, owner.st_gid)


def _fill(disk: Image, *, leave: int) -> None:
    """Leave so many bytes at most to whoever is not root."""
    free = os.statvfs(disk.root)
    ballast = os.open(_ballast(disk), os.O_WRONLY | os.O_CREAT)
    try:
        os.posix_fallocate(ballast, 0, max(free.f_bavail * free.f_frsize - leave, 1))
    finally:
        os.close(ballast)


def _make_room(disk: Image) -> None:
    _ballast(disk).unlink()


def _ballast(disk: Image) -> Path:
    return disk.root / "ballast"


async def _refused(engine: Engine, writing: Writing) -> list[str]:
    """Write until that is refused by name, and read then; what is wrong."""

    async def full() -> bool:
        return writing.ended or writing.refused[StorageFull.code] >= _REFUSED

    await wait_until(full, _DEADLINE_S, "writes that are refused, for want of space")
    wrong = await writing.stop()
    for writer, least in writing.acknowledged.items():
        try:
            if await last_step(engine, writer) < least:
                wrong.append(f"writer {writer}: a step is gone while the disk is full")
        except (Unsound, PerdureError) as error:
            wrong.append(f"while the disk is full: {error}")
    return wrong


async def _use_up_the_log(server: Server) -> None:
    """Write to the log until the server is gone, beside whoever else does."""
    import asyncpg

    with suppress(asyncpg.PostgresError, asyncpg.InterfaceError, OSError):
        session = await asyncpg.connect(server.dsn)
        while True:
            await session.execute(
                "SELECT pg_logical_emit_message(false, 'full', repeat('x', $1))", _LOG_BYTES
            )
    await wait_until(server.is_gone, _DEADLINE_S, "the end of a server without a log")
