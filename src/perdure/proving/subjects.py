"""The engines this repository proves: a subject is a name and a way to open."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import apsw

from perdure.core.clock import Clock
from perdure.core.disk import Disk
from perdure.core.engine import Engine
from perdure.core.keys import Key, join
from perdure.core.layouts import Layout
from perdure.engines import open_engine, restore_engine
from perdure.proving.subject import LAYOUTS, Subject


async def _memory(directory: Path, layouts: Sequence[Layout], clock: Clock) -> Engine:
    return await open_engine("memory://", layouts, clock=clock)


async def _sqlite(directory: Path, layouts: Sequence[Layout], clock: Clock) -> Engine:
    Disk().make_directory(directory)
    return await open_engine(f"sqlite:///{directory / 'state.db'}", layouts, clock=clock)


def _damage_sqlite(directory: Path, key: Key) -> None:
    """Change a byte of a value as somebody would who writes past the engine."""
    connection = apsw.Connection(str(directory / "state.db"), vfs="cksmvfs")
    place = join(key)
    value = bytearray(
        connection.execute("SELECT value FROM records_notes WHERE key = ?", (place,)).get
    )
    value[-3] ^= 1
    connection.execute("UPDATE records_notes SET value = ? WHERE key = ?", (bytes(value), place))
    connection.close()


async def _restore_sqlite(copy: Path, directory: Path) -> None:
    url = f"sqlite:///{directory / 'state.db'}"
    await restore_engine(url, copy, LAYOUTS, lambda done, total: None)


KNOWN = {
    subject.name: subject
    for subject in (
        Subject("memory", _memory),
        Subject("sqlite", _sqlite, _damage_sqlite, _restore_sqlite),
    )
}
