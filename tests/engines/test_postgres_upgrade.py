"""An upgrade of a database: killed at each of its steps, done by two at once, and refused."""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from perdure.core.batch import append, put
from perdure.core.clock import SystemClock
from perdure.core.disk import Disk
from perdure.core.errors import NeedsUpgrade, NewerFormat, Unavailable
from perdure.core.layouts import Records
from perdure.engines import open_blobs, open_engine, postgres_schema, restore_engine
from perdure.engines.postgres_schema import FORMAT, MIGRATIONS, Migration
from perdure.proving.subject import EVENTS, LAYOUTS, NOTES, Note, stored
from perdure.proving.subjects import postgres_url
from perdure.services.upgrading import Upgrading
from perdure.surfaces.blobs import BlobUses
from tests.engines.postgres_stores import beside, opened

BOX = ("default", "box", "1")
_KILL = "SELECT pg_terminate_backend(pg_backend_pid())"
_BEGIN = (
    "CREATE TABLE traces AS SELECT key, 2 AS trace FROM records_notes",
    "ALTER TABLE traces ADD COLUMN more bigint",
    "UPDATE traces SET trace = trace + 1, more = 1",
)


ALL = (*LAYOUTS, *BlobUses.promise.layouts)


@pytest.fixture
def url(tmp_path: Path) -> str:
    return postgres_url(tmp_path)


async def older(url: str) -> list[Any]:
    engine = await opened(url, layouts=ALL)
    await engine.commit(
        put(NOTES, BOX, Note("open", 1)) + append(EVENTS, ("default", "s"), [Note()])
    )
    found = await stored(engine)
    await engine.close()
    return found


def releases(steps: tuple[str, ...], patch: pytest.MonkeyPatch) -> None:
    """From now on the program is of a release that has these steps more."""
    more = [Migration(FORMAT + at, FORMAT + at, sql, sql) for at, sql in enumerate(steps, 1)]
    patch.setattr(postgres_schema, "MIGRATIONS", (*MIGRATIONS, *more))
    patch.setattr(postgres_schema, "FORMAT", FORMAT + len(more))


def upgrading(url: str, into: Path) -> Upgrading:
    opening = partial(open_engine, url, ALL)
    return Upgrading(
        opening, partial(open_blobs, "memory://"), into / "store", SystemClock(), Disk()
    )


def ignored(*told: object) -> None:
    pass


async def contents(url: str) -> dict[str, list[str]]:
    """Every row of every table of the schema."""
    async with beside(url) as session:
        names = await session.fetch(
            "SELECT relname FROM pg_class WHERE relnamespace = current_schema()::regnamespace "
            "AND relkind = 'r' ORDER BY 1"
        )
        return {
            name: sorted(map(repr, await session.fetch(f'SELECT * FROM "{name}"')))
            for (name,) in names
        }


# proves C16
async def test_an_upgrade_that_is_killed_at_any_step_leaves_the_old_and_then_goes_on(
    url: str, tmp_path: Path
) -> None:
    known = await older(url)
    before = await contents(url)
    for at in range(len(_BEGIN) + 1):
        with pytest.MonkeyPatch.context() as patch:
            releases((*_BEGIN[:at], _KILL, *_BEGIN[at:]), patch)
            with pytest.raises(Unavailable) as lost:
                await upgrading(url, tmp_path / f"{at}").open(ignored)
            assert not isinstance(lost.value, NeedsUpgrade)
        assert {name: rows for name, rows in (await contents(url)).items() if name in before} == (
            before
        )
        engine = await opened(url, layouts=ALL, read_only=True)
        assert await stored(engine) == known
        await engine.close()
    with pytest.MonkeyPatch.context() as patch:
        releases(_BEGIN, patch)
        engine = await upgrading(url, tmp_path).open(ignored)
        assert await stored(engine) == known
        await engine.close()


# proves C16
async def test_two_that_upgrade_at_once_do_it_once(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = await older(url)
    releases(_BEGIN, monkeypatch)
    engines = await asyncio.gather(*(upgrading(url, tmp_path).open(ignored) for _ in range(3)))
    for engine in engines:
        assert await stored(engine) == known
        assert engine.written.format == FORMAT + len(_BEGIN)
        await engine.close()
    (trace,) = (await contents(url))["traces"]
    assert "trace=3 more=1" in trace
    assert list(tmp_path.glob("store.before-upgrade-*"))


# proves C16
async def test_a_newer_database_is_refused_row_for_row_untouched(url: str, tmp_path: Path) -> None:
    await older(url)
    with pytest.MonkeyPatch.context() as patch:
        releases(_BEGIN, patch)
        await (await upgrading(url, tmp_path).open(ignored)).close()
    before = await contents(url)
    for read_only in (True, False):
        with pytest.raises(NewerFormat, match="left untouched"):
            await opened(url, layouts=ALL, read_only=read_only)
    assert await contents(url) == before


# proves C16, C17
async def test_a_snapshot_is_restored_by_the_release_before_and_by_this_one(
    url: str, tmp_path: Path
) -> None:
    fewer = Records("notes", Note, key=NOTES.key)
    before = (fewer, *(layout for layout in ALL if layout is not NOTES))
    engine = await opened(url, layouts=before)
    await engine.commit(put(fewer, BOX, Note("open", 1)))
    await engine.close()
    await (await upgrading(url, tmp_path).open(ignored)).close()
    (snapshot,) = tmp_path.glob("store.before-upgrade-*")
    for layouts, records in ((before, fewer), (ALL, NOTES)):
        again = postgres_url(tmp_path / f"{len(records.indexes)}")
        await restore_engine(again, snapshot, layouts, ignored)
        engine = await opened(again, layouts=layouts)
        record = await engine.get(records, BOX)
        assert record is not None
        assert record.version == 1
        assert [finding async for finding in engine.verify()] == []
        await engine.close()
