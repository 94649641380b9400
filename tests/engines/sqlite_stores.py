"""What the tests of the sqlite engine keep in their stores, and how they open them.

Run as a program it is a writer: it commits until it is killed and prints what was acknowledged.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import msgspec

from perdure.core.batch import Batch, append, put
from perdure.core.clock import Clock, SystemClock
from perdure.core.disk import Disk
from perdure.core.layouts import Index, Log, Records
from perdure.engines.sqlite import SqliteEngine

WRITERS = 8


class Note(msgspec.Struct):
    text: str
    state: str | None = None
    at: int | None = None


NOTES = Records(
    "notes",
    Note,
    key=("tenant", "note"),
    indexes=(Index("by_state", ("state", "at")), Index("due", ("at",), every_tenant=True)),
)
EVENTS = Log("events", Note, key=("tenant", "stream"))
LAYOUTS = (NOTES, EVENTS)


async def opened(
    path: Path,
    *,
    vfs: str | None = None,
    read_only: bool = False,
    clock: Clock | None = None,
    disk: Disk | None = None,
) -> SqliteEngine:
    return await SqliteEngine.open(
        str(path),
        LAYOUTS,
        clock=clock or SystemClock(),
        disk=disk or Disk(),
        read_only=read_only,
        vfs=vfs,
    )


def step(writer: int, number: int) -> Batch:
    """What one acknowledgement covers: a record, its copy, and an entry that counts them."""
    text = f"{writer}-{number} " + "x" * (number * 37 % 1500)
    note = Note(text, "open" if number % 2 else None, number)
    return (
        put(NOTES, ("t", f"w{writer}-{number}"), note, expect=0)
        + put(NOTES, ("t", f"last-{writer}"), note)
        + append(EVENTS, ("t", f"w{writer}"), [Note(text)], after=number - 1)
    )


async def last_step(engine: SqliteEngine, writer: int) -> int:
    """The last step of a writer that is there. Fails unless all before it are, whole and equal."""
    last = (await engine.tip(EVENTS, ("t", f"w{writer}"))).last
    for number in range(1, last + 1):
        put_note, _, appended = step(writer, number).ops
        record = await engine.get(NOTES, ("t", f"w{writer}-{number}"))
        assert record is not None
        assert NOTES.encode(record.value) == put_note.value  # type: ignore[union-attr]
        (entry,) = await engine.read(EVENTS, ("t", f"w{writer}"), after=number - 1, limit=1)
        assert EVENTS.encode(entry.value) == appended.entries[0]  # type: ignore[union-attr]
    newest = await engine.get(NOTES, ("t", f"last-{writer}"))
    assert (newest.value.at if newest else 0) == last
    assert (newest.version if newest else 0) == last
    assert await engine.get(NOTES, ("t", f"w{writer}-{last + 1}")) is None
    return last


async def damage(engine: SqliteEngine) -> list[str]:
    return [f"{found.where}: {found.why}" async for found in engine.verify()]


async def _write(path: Path) -> None:
    engine = await opened(path)
    os.write(1, b"ready\n")

    async def write(writer: int) -> None:
        number = (await engine.tip(EVENTS, ("t", f"w{writer}"))).last
        while True:
            number += 1
            await engine.commit(step(writer, number))
            os.write(1, f"{writer} {number}\n".encode())

    await asyncio.gather(*(write(writer) for writer in range(WRITERS)))


if __name__ == "__main__":
    asyncio.run(_write(Path(sys.argv[1])))
