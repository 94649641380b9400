"""A store of an earlier release gets the indexes that were declared since, whatever happens."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import apsw
import pytest

from perdure.core.batch import append, delete, put
from perdure.core.clock import SystemClock
from perdure.core.disk import Disk
from perdure.core.engine import Snapshot
from perdure.core.errors import Damaged, Invalid, NeedsUpgrade
from perdure.core.layouts import Index, Log, Records
from perdure.engines import sqlite_upgrade
from perdure.engines.sqlite import SqliteEngine
from perdure.proving.steps import Note
from tests.engines.upgrades import upgraded

NARROW = Records("notes", Note, key=("tenant", "note"))
DUE = Records(
    "notes", Note, key=("tenant", "note"), indexes=(Index("due", ("at",), every_tenant=True),)
)
WIDE = Records(
    "notes",
    Note,
    key=("tenant", "note"),
    indexes=(
        Index("by_state", ("state", "at")),
        Index("due", ("at",), every_tenant=True),
        Index("by_age", ("at",)),
    ),
)
EVENTS = Log("events", Note, key=("tenant", "stream"))


class Stop(Exception):
    """Raised in place of a death."""


def ignored(detail: str) -> None:
    pass


async def opened(
    path: Path,
    notes: Records[Note],
    note: Callable[[str], None] = ignored,
    **options: Any,
) -> SqliteEngine:
    """The store; upgraded, if it has fewer indexes."""
    opening = partial(
        SqliteEngine.open, str(path), (notes, EVENTS), clock=SystemClock(), disk=Disk()
    )
    try:
        return await opening(note=note, **options)
    except NeedsUpgrade:
        return await upgraded(opening, note=note, **options)


async def fill(path: Path, notes: Records[Note], count: int = 250) -> None:
    engine = await opened(path, notes)
    for number in range(count):
        text = None if number % 7 == 0 else "open" if number % 2 else "closed"
        value = Note(f"{number}", text, None if number % 5 == 0 else number)
        await engine.commit(put(notes, (f"t{number % 3}", f"{number}"), value, attachment=b"a"))
    await engine.commit(delete(notes, ("t1", "1")) + append(EVENTS, ("t", "s"), [Note("e")]))
    await engine.close()


async def answers(path: Path) -> list[object]:
    """Everything that can be asked of the wide layout, by every index."""
    engine = await opened(path, WIDE)
    found: list[object] = []
    for tenant in ("t0", "t1", "t2"):
        for index, where in (("by_state", ("open",)), ("by_state", ()), ("by_age", ())):
            for descending in (False, True):
                page = await engine.scan(
                    WIDE,
                    (tenant,),
                    index=index,
                    where=where,
                    limit=1_000,
                    descending=descending,
                )
                found.append(page.items)
    found.append((await engine.scan(WIDE, (), index="due", limit=1_000)).items)
    found.append(await engine.count(WIDE, ("t0",), index="by_state", group=1))
    assert [finding async for finding in engine.verify()] == []
    assert engine.recovered.findings == ()
    await engine.close()
    return found


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite_upgrade, "_PIECE_ROWS", 20)
    monkeypatch.setattr(sqlite_upgrade, "_CHECKPOINT_PIECES", 3)


@pytest.mark.parametrize("before", [NARROW, DUE])
async def test_a_store_gets_its_indexes_at_open(tmp_path: Path, before: Records[Note]) -> None:
    await fill(tmp_path / "old.db", before)
    await fill(tmp_path / "new.db", WIDE)
    told: list[str] = []
    await (await opened(tmp_path / "old.db", WIDE, told.append)).close()
    assert told[0] == "indexing notes: 20 of 249"
    assert told[-1] == "indexing notes: 249 of 249"
    assert await answers(tmp_path / "old.db") == await answers(tmp_path / "new.db")
    told.clear()
    engine = await opened(tmp_path / "old.db", WIDE, told.append)
    assert told == []
    await engine.commit(put(WIDE, ("t0", "more"), Note("more", "open", 1_000)))
    page = await engine.scan(WIDE, ("t0",), index="by_age", limit=1, descending=True)
    assert page.items[0].key == ("t0", "more")
    await engine.close()


async def test_an_interrupted_upgrade_is_old_or_done_again(tmp_path: Path) -> None:
    await fill(tmp_path / "new.db", WIDE)
    wanted = await answers(tmp_path / "new.db")
    for death in (1, 4, 13):
        path = tmp_path / f"{death}.db"
        await fill(path, NARROW)
        left = death

        def note(detail: str) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                raise Stop

        with pytest.raises(Stop):
            await opened(path, WIDE, note)
        engine = await opened(path, NARROW)  # the release before still opens it, and writes
        await engine.commit(put(NARROW, ("t9", "new"), Note("x", "open", 5)))
        await engine.close()
        assert await answers(path) == [*wanted[:-2], *await later(path), wanted[-1]]


async def later(path: Path) -> list[object]:
    """What the index of all tenants holds once the old release has written to it."""
    engine = await opened(path, WIDE)
    page = await engine.scan(WIDE, (), index="due", limit=1_000)
    assert ("t9", "new") in [record.key for record in page.items]
    await engine.close()
    return [page.items]


_KILLED = """
import asyncio, os, signal, sys
from pathlib import Path
from perdure.engines import sqlite_upgrade
from tests.engines.test_sqlite_upgrade import WIDE, opened
sqlite_upgrade._PIECE_ROWS = 20
left = int(sys.argv[2])
def note(detail):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
asyncio.run(opened(Path(sys.argv[1]), WIDE, note))
"""


# proves C3
async def test_a_kill_during_an_upgrade_loses_nothing(tmp_path: Path) -> None:
    await fill(tmp_path / "new.db", WIDE)
    wanted = await answers(tmp_path / "new.db")
    for death in (1, 7, 13):
        path = tmp_path / f"{death}.db"
        await fill(path, NARROW)
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", _KILLED, str(path), str(death), env=os.environ | {}
        )
        assert await asyncio.wait_for(process.wait(), 30) == -signal.SIGKILL
        assert await answers(path) == wanted


async def test_a_store_opened_to_look_only_is_not_upgraded(tmp_path: Path) -> None:
    await fill(tmp_path / "old.db", NARROW)
    before = (tmp_path / "old.db").read_bytes()
    engine = await opened(tmp_path / "old.db", WIDE, read_only=True)
    assert [finding async for finding in engine.verify()] == []
    with pytest.raises(Invalid, match="start the server once"):
        await engine.get(WIDE, ("t0", "0"))
    assert len(await engine.read(EVENTS, ("t", "s"), limit=9)) == 1
    await engine.close()
    assert (tmp_path / "old.db").read_bytes() == before


# proves C2
async def test_an_older_release_refuses_a_store_with_more_indexes(tmp_path: Path) -> None:
    await fill(tmp_path / "new.db", WIDE)
    before = (tmp_path / "new.db").read_bytes()
    with pytest.raises(Invalid, match="left untouched"):
        await opened(tmp_path / "new.db", NARROW)
    assert (tmp_path / "new.db").read_bytes() == before


# proves C7
async def test_what_is_damaged_is_not_upgraded_and_damage_found_late_stays(tmp_path: Path) -> None:
    await fill(tmp_path / "old.db", NARROW)
    connection = apsw.Connection(str(tmp_path / "old.db"), vfs="cksmvfs")
    connection.execute(
        "UPDATE records_notes SET value = ? WHERE key = ?", (b'{"text": 5', "t0\x1f3")
    )
    connection.close()
    with pytest.raises(Damaged, match="notes t0/3"):
        await opened(tmp_path / "old.db", WIDE)
    before = await opened(tmp_path / "old.db", NARROW, read_only=True)
    assert before.written.number is not None
    taken = Snapshot(before.store_id, before.written.number, 1)
    await before.close()
    engine = await opened(tmp_path / "old.db", WIDE, snapshots=[taken])
    found = [finding.where async for finding in engine.verify()]
    assert found == ["notes t0/3"]
    with pytest.raises(Damaged):
        await engine.get(WIDE, ("t0", "3"))
    assert await engine.get(WIDE, ("t0", "6")) is not None
    await engine.close()
