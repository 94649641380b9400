"""A salvage of plain files: everything that is sound comes over as it was, whatever else is gone,
and what is not is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from perdure.core.batch import append, delete, drop, put
from perdure.core.disk import Disk
from perdure.core.engine import Salvaged
from perdure.core.errors import Invalid, Missing, StoreLocked
from perdure.core.values import Lost, Tip
from perdure.engines import salvage_engine
from perdure.proving.drills.damage import files_in, laid
from perdure.proving.file_stories import opened, small_journals
from perdure.proving.subject import EVENTS, FACTS, LAYOUTS, NOTES, Note, stored, there
from perdure.proving.watched import HastyDisk

A, B, C = ("default", "a"), ("t", "B"), ("default", "c")
GONE = ("default", "gone")

Files = dict[str, bytes]


async def made(home: Path) -> tuple[Files, list[object]]:
    """The files of a store that was killed while its files were behind its journal, and all that
    was in it."""
    with small_journals():
        engine = await opened(home / "store")
        long = put(FACTS, ("default", "long"), Note(body="x" * 1_500))
        await engine.commit(long + put(FACTS, A, Note("one")) + put(FACTS, GONE, Note()))
        await engine.commit(put(FACTS, B, Note(), attachment=b"bytes").named("first"))
        await engine.commit(append(EVENTS, A, [Note(rank=1), Note(body="two\nlines")]))
        await engine.commit(delete(FACTS, GONE) + append(EVENTS, C, [Note()]))
        await engine.commit(drop(EVENTS, C))
        await engine.usage()  # flushes, and the journal starts over
        await engine.commit(put(FACTS, A, Note("two")) + append(EVENTS, A, [Note(rank=3)]))
        await engine.commit(put(NOTES, ("t", "box", "1"), Note("new")))
        everything = await stored(engine)
        files = files_in(home / "store")
        await engine.close()
    return files, everything


async def salvaged(home: Path, files: Files) -> tuple[Salvaged, Path]:
    damaged = laid(files, home / "damaged")
    into = home / "salvaged"
    told = await salvage_engine(
        f"file:///{damaged}", f"file:///{into}", LAYOUTS, lambda name, rows: None, disk=HastyDisk()
    )
    assert {name: data for name, data in files_in(damaged).items() if "lock" not in name} == {
        name: data for name, data in files.items() if "lock" not in name
    }
    return told, into


# proves C7
@pytest.mark.parametrize("closed", [False, True])
async def test_of_a_sound_store_nothing_is_lost(tmp_path: Path, closed: bool) -> None:
    files, everything = await made(tmp_path)
    told, into = await salvaged(tmp_path, files_in(tmp_path / "store") if closed else files)
    assert told.lost == []
    assert (told.kept["facts"], told.kept["events"], told.kept["tombstones"]) == (3, 3, 1)
    engine = await opened(into)
    assert await stored(engine) == everything
    assert [finding async for finding in engine.verify()] == []
    repeated = await engine.commit(put(FACTS, B, Note(), attachment=b"bytes").named("first"))
    assert repeated.numbers == (1,)
    assert (await engine.commit(put(FACTS, GONE, Note()))).numbers == (3,)
    assert (await engine.tip(EVENTS, C)).incarnation == 2
    await engine.close()


# proves C7
@pytest.mark.parametrize("harm", ["gone", "cut", "flip"])
@pytest.mark.parametrize("name", ["manifest", "journal", "manifest of a closed store"])
async def test_without_manifest_or_journal_the_files_speak(
    name: str, harm: str, tmp_path: Path
) -> None:
    """What the files had is there; with the journal, so is what they had not yet."""
    files, everything = await made(tmp_path)
    if " " in name:
        name, files = "manifest", files_in(tmp_path / "store")
    path = f".perdure/{name}"
    data = files.pop(path)
    if harm != "gone":
        files[path] = data[:20] if harm == "cut" else bytes((data[0] ^ 1, *data[1:]))
    told, into = await salvaged(tmp_path, files)
    assert [lost.collection for lost in told.lost if not lost.key] == [""]
    assert name in told.lost[0].why
    engine = await opened(into)
    if name == "manifest":
        assert await stored(engine) == everything
    else:
        assert there(await engine.get(FACTS, A)).value == Note("one")
        assert (await engine.tip(EVENTS, A)).last == 2
        assert (await engine.commit(put(FACTS, GONE, Note()))).numbers == (3,)
    assert there(await engine.get(FACTS, B)).attachment == b"bytes"
    assert [finding async for finding in engine.verify()] == []
    await engine.close()


HARMS: dict[str, tuple[str, Callable[[bytes], bytes], Lost]] = {
    "a record": (
        "things/a/fact.json",
        lambda data: data.replace(b'"two"', b'"TWO"'),
        Lost("facts", "version 2 is damaged or gone", "a"),
    ),
    "an attachment": (
        "@tenants/t/things/%42/fact.1.bin",
        lambda data: data[:-1],
        Lost("facts", "version 1 is damaged or gone", "t/B"),
    ),
    "an entry": (
        "things/a/events.jsonl",
        lambda data: data.replace(b"lines", b"LINES"),
        Lost(
            "events",
            "the first of these is damaged or gone, and numbers have no holes",
            "a",
            (2, 3),
        ),
    ),
}


# proves C7
@pytest.mark.parametrize("harm", HARMS)
async def test_what_is_damaged_is_named_and_the_rest_comes_over(harm: str, tmp_path: Path) -> None:
    await made(tmp_path)
    files = files_in(tmp_path / "store")
    name, change, lost = HARMS[harm]
    assert change(files[name]) != files[name]
    told, into = await salvaged(tmp_path, files | {name: change(files[name])})
    assert [(one.collection, one.key, one.entries) for one in told.lost] == [
        (lost.collection, lost.key, lost.entries)
    ]
    assert told.lost[0].why.startswith(lost.why)
    engine = await opened(into)
    if harm == "an entry":
        assert await engine.tip(EVENTS, A) == Tip(2, 1, 1)
    assert len((await engine.scan(FACTS, (), limit=10)).items) == 3 - (harm != "an entry")
    assert [finding async for finding in engine.verify()] == []
    await engine.close()


# proves C7
async def test_a_byte_changed_in_any_file_costs_no_more_than_what_it_is_in(tmp_path: Path) -> None:
    killed, everything = await made(tmp_path)
    sound = {repr(one) for one in everything}
    number = 0
    for files in (killed, files_in(tmp_path / "store")):
        for name, data in files.items():
            for at in range(0, len(data), 211):
                number += 1
                changed = bytes((*data[:at], data[at] ^ 1, *data[at + 1 :]))
                told, into = await salvaged(tmp_path / str(number), files | {name: changed})
                engine = await opened(into)
                found = {repr(one) for one in await stored(engine)}
                assert [finding async for finding in engine.verify()] == []
                await engine.close()
                named = [one for one in told.lost if one.key]
                streams = sum(one.entries is not None for one in named)
                if name != ".perdure/journal":
                    assert len(found - sound) <= streams, (name, at)
                    assert len(sound - found) == len(named) <= 1, (name, at)
                else:
                    assert told.lost or found == sound, at


# proves C7
async def test_an_older_copy_of_a_record_is_not_taken_for_it(tmp_path: Path) -> None:
    before, _ = await made(tmp_path)
    name = "things/a/fact.json"
    told, into = await salvaged(tmp_path, files_in(tmp_path / "store") | {name: before[name]})
    why = "version 2 is damaged or gone: its file holds version 1"
    assert told.lost == [Lost("facts", why, "a")]
    engine = await opened(into)
    assert await engine.get(FACTS, A) is None
    await engine.close()


# proves C7
async def test_a_file_that_does_not_say_whose_it_is_is_named_where_nothing_else_does(
    tmp_path: Path,
) -> None:
    await made(tmp_path)
    files = files_in(tmp_path / "store")
    del files[".perdure/manifest"]
    files["things/a/fact.json"] = files["things/a/fact.json"][:-9]
    sound = files["things/long/fact.json"]
    files["things/long/fact.json"] = sound.replace(b"xx", b"xy", 1)
    told, _ = await salvaged(tmp_path, files)
    assert told.lost[1:] == [
        Lost("", "the file things/a/fact.json does not say what it holds"),
        Lost("facts", "it is not as it was written", "long"),
    ]


async def test_what_is_no_damaged_store_is_refused(tmp_path: Path) -> None:
    async def refused(kind: type[Exception], source: Path) -> None:
        url, into = f"file:///{source}", f"file:///{tmp_path / 'into'}"
        with pytest.raises(kind):
            await salvage_engine(url, into, LAYOUTS, lambda name, rows: None)
        assert not (tmp_path / "into").exists()

    Disk().make_directory(tmp_path / "empty")
    await refused(Invalid, tmp_path / "empty")
    await refused(Missing, tmp_path / "nothing")
    engine = await opened(tmp_path / "store")
    await refused(StoreLocked, tmp_path / "store")
    await engine.close()
    with pytest.raises(Invalid, match="never overwrites"):
        await salvage_engine(
            f"file:///{tmp_path / 'store'}",
            f"file:///{tmp_path / 'empty'}",
            LAYOUTS,
            lambda name, rows: None,
        )
