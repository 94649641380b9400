"""Stores that a release has written are opened by every later one; and nobody changes what is
stored without knowing it."""

from __future__ import annotations

import difflib
from collections.abc import AsyncIterator, Sequence
from functools import partial
from pathlib import Path

import msgspec
import pytest

from perdure.core.blobs import Blobs
from perdure.core.disk import Disk
from perdure.core.engine import Engine
from perdure.core.layouts import Index, Layout, Records
from perdure.engines import (
    files_journal,
    files_names,
    open_blobs,
    open_engine,
    restore_engine,
    sqlite_schema,
    sqlite_wal,
)
from perdure.services.upgrading import Upgrading
from perdure.surfaces.files import FILES
from perdure.surfaces.state import LAYOUTS
from tests.golden import fingerprint as printing
from tests.golden.contents import Then, blob, decode_all, listing
from tests.golden.fingerprint import fingerprint
from tests.golden.make import FINGERPRINT, HERE, LISTING, NOW, PLACES, unpack, url_of

ARCHIVES = sorted(HERE.glob("format-*/*.tar.xz"))


async def blobs() -> Blobs:
    """Those that golden stores name."""

    async def chunks(at: int) -> AsyncIterator[bytes]:
        yield blob(at)

    made = await open_blobs("memory://")
    for at in range(4):
        await made.put(chunks(at), size_bytes_max=100)
    return made


async def opened(url: str, home: Path, layouts: Sequence[Layout] = LAYOUTS) -> Engine:
    """The store, upgraded if it is of an older release."""
    opening = partial(open_engine, url, layouts, clock=Then())
    return await Upgrading(opening, blobs, home / "kept", Then(), Disk()).open(lambda *told: None)


# proves C16
@pytest.mark.parametrize("archive", ARCHIVES, ids=lambda path: f"{path.parent.name}/{path.name}")
async def test_a_store_of_a_release_is_opened_and_holds_what_it_held(
    archive: Path, tmp_path: Path
) -> None:
    unpack(archive, tmp_path)
    name = archive.name.partition(".")[0]
    expected = (archive.parent / LISTING).read_text()
    for _ in range(2):
        engine = await opened(url_of(name, tmp_path), tmp_path)
        assert await listing(engine) == expected
        assert await decode_all(engine) > 3 * len(LAYOUTS)
        assert [finding async for finding in engine.verify()] == []
        await engine.close()


# proves C16
@pytest.mark.parametrize("archive", ARCHIVES, ids=lambda path: f"{path.parent.name}/{path.name}")
async def test_a_store_of_a_release_gets_the_indexes_of_a_later_one(
    archive: Path, tmp_path: Path
) -> None:
    unpack(archive, tmp_path)
    named = Index("by_name", ("filename",))
    later = Records("files", FILES.type, key=FILES.key, indexes=(*FILES.indexes, named))
    layouts = [later if one is FILES else one for one in LAYOUTS]
    name = archive.name.partition(".")[0]
    engine = await opened(url_of(name, tmp_path), tmp_path, layouts)
    assert await listing(engine) == (archive.parent / LISTING).read_text()
    assert [kept.name.partition("-upgrade")[0] for kept in tmp_path.glob("kept*")]
    await engine.close()


# proves C16, C17
@pytest.mark.parametrize("archive", ARCHIVES, ids=lambda path: f"{path.parent.name}/{path.name}")
async def test_a_backup_of_a_release_is_restored(archive: Path, tmp_path: Path) -> None:
    unpack(archive, tmp_path)
    name = archive.name.partition(".")[0]
    url = url_of(name, tmp_path / "restored")
    (tmp_path / "restored" / "data").mkdir(parents=True)
    await restore_engine(url, tmp_path / "backup", LAYOUTS, lambda done, total: None, clock=Then())
    engine = await opened(url, tmp_path / "restored")
    assert await listing(engine) == (archive.parent / LISTING).read_text()
    await engine.close()


def test_every_collection_is_in_the_stores_of_this_release() -> None:
    assert {archive.name for archive in ARCHIVES if archive.parent == NOW} == {
        f"{name}.tar.xz" for name in PLACES
    }
    held = {line.split()[1] for line in (NOW / LISTING).read_text().splitlines()}
    missing = sorted({layout.name for layout in LAYOUTS} - held)
    assert missing == [], (
        f"no golden store holds {', '.join(missing)}. Until this format is released: `python -m "
        "tests.golden.make stores`; afterwards stores of the next release hold them."
    )


# proves C16
def test_nothing_that_is_stored_changes_unnoticed() -> None:
    lines = [text.splitlines() for text in (FINGERPRINT.read_text(), fingerprint())]
    changed = [
        line
        for line in difflib.unified_diff(*lines, lineterm="", n=0)
        if not line.startswith(("---", "+++", "@@"))
    ]
    assert not changed, (
        "what stands in stores is not what it was:\n"
        + "\n".join(changed)
        + "\nWould this release misread a store of the last one, or that one a store of this? Then "
        "it needs a new format: a step in STEPS of the engine (of PostgreSQL, a numbered file in "
        "engines/sql/postgres), the stores of the old format kept in tests/golden, and a word in "
        "docs/formats.md. A field with a default, a new collection and a new index need none. "
        "Either way, then write it down: `python -m tests.golden.make fingerprint`."
    )


class Narrower(msgspec.Struct):
    metadata: dict[str, str]


@pytest.mark.parametrize(
    ("owner", "name", "other"),
    [
        (files_journal, "_MAGIC", b"another\n"),
        (files_names, "_PLAIN", frozenset(b"ab")),
        (sqlite_schema, "SQL", {**sqlite_schema.SQL, "create": "CREATE TABLE other (id)"}),
        (sqlite_wal, "_STAMP", b"perdure2"),
        (
            printing,
            "LAYOUTS",
            [Records("conversations", Narrower, key=("tenant", "conversation_id"))],
        ),
    ],
)
def test_a_change_of_what_is_stored_is_noticed(
    owner: object, name: str, other: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = fingerprint()
    monkeypatch.setattr(owner, name, other)
    assert fingerprint() != before
