"""The engine on plain files: what a person finds in the directory, and what becomes of what they do
there; torn tails, limits, and stores that must not be opened."""

from __future__ import annotations

import asyncio
import errno
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

import msgspec
import pytest

from perdure.core.batch import append, delete, drop, put, trim
from perdure.core.disk import Disk
from perdure.core.errors import (
    Damaged,
    Invalid,
    Latched,
    LimitExceeded,
    Missing,
    StorageFull,
    StoreLocked,
    Unavailable,
)
from perdure.core.layouts import Index, Records
from perdure.core.values import Tip
from perdure.engines import (
    accept_engine,
    files,
    files_commit,
    files_format,
    open_engine,
    restore_engine,
)
from perdure.engines.files_format import Identity, StreamFile, entry_line
from perdure.engines.files_names import encoded
from perdure.proving import hostile
from perdure.proving.drills.damage import files_in, laid
from perdure.proving.file_stories import history, judge, opened, small_journals
from perdure.proving.refusing import Call, Refusing, Trouble
from perdure.proving.subject import EVENTS, FACTS, LAYOUTS, NOTES, Note, stored, there
from tests.engines.upgrades import upgraded

A = ("default", "a")


def fact_at(root: Path) -> Path:
    return root / "things/a/fact.json"


def events_at(root: Path) -> Path:
    return root / "things/a/events.jsonl"


async def findings(root: Path) -> list[str]:
    engine = await opened(root)
    found = [f"{one.kind} {one.where}: {one.why}" async for one in engine.verify()]
    await engine.close()
    return found


# proves C20
def test_names_are_injective_whatever_the_file_system_makes_of_them() -> None:
    names = [*hostile.LEGAL_NAMES.values(), "a" * 255, "a" * 254 + "b", "\u00e9" * 127, ".", ".."]
    for other in ("A", "a", "%41", ".perdure", "a~", "a.json", "CON", "e\u0301", "\u00e9"):
        names.append(other)
    made = {encoded(name) for name in names}
    assert len({name.casefold() for name in made}) == len(set(names))
    for name in made:
        assert not name.startswith((".", "@"))
        assert len(name) <= 200
        assert "/" not in name


async def test_a_person_finds_what_is_stored(tmp_path: Path) -> None:
    engine = await opened(tmp_path / "store")
    await engine.commit(put(NOTES, ("default", "box", "Caf\u00e9"), Note("open", 7)))
    await engine.commit(put(FACTS, ("t", "x"), Note(), attachment=b"bytes"))
    await engine.commit(append(EVENTS, A, [Note(rank=1), Note(rank=2)]) + trim(EVENTS, A, 2))
    await engine.close()
    text = (tmp_path / "store/notes/box/%43af%c3%a9.json").read_bytes()
    found = msgspec.json.decode(text)
    assert (found["key"], found["version"]) == (["default", "box", "Caf\u00e9"], 1)
    assert found["value"]["rank"] == 7
    assert (tmp_path / "store/@tenants/t/things/x/fact.1.bin").read_bytes() == b"bytes"
    head, entry = (tmp_path / "store/things/a/events.jsonl").read_bytes().splitlines()
    assert msgspec.json.decode(head)["first"] == 2
    assert msgspec.json.decode(entry)["value"]["rank"] == 2


async def test_what_is_deleted_has_no_file(tmp_path: Path) -> None:
    engine = await opened(tmp_path / "store")
    await engine.commit(put(FACTS, A, Note(), attachment=b"x") + append(EVENTS, A, [Note()]))
    await engine.usage()
    await engine.commit(delete(FACTS, A) + drop(EVENTS, A))
    await engine.close()
    assert [
        path for path in tmp_path.rglob("*") if path.suffix in (".json", ".bin", ".jsonl")
    ] == []
    engine = await opened(tmp_path / "store")
    assert (await engine.commit(put(FACTS, A, Note()))).numbers == (3,)
    assert await engine.tip(EVENTS, A) == Tip(2, 1, 0)
    await engine.close()


EDITS: dict[str, Callable[[Path], None]] = {
    "a value": lambda root: _edit(fact_at(root), b"old", b"new"),
    "an older copy": lambda root: _edit(fact_at(root), b'"version": 2', b'"version": 1'),
    "another key": lambda root: _edit(fact_at(root), b'"a"]', b'"b"]'),
    "a file that is gone": lambda root: Disk().remove(fact_at(root)),
    "an entry": lambda root: _edit(events_at(root), b"second", b"SECOND"),
    "an entry that is gone": lambda root: _cut_line(events_at(root), 2),
    "a log that is gone": lambda root: Disk().remove(events_at(root)),
}


def _edit(path: Path, old: bytes, new: bytes) -> None:
    data = path.read_bytes()
    assert old in data
    Disk().write_file(path, data.replace(old, new))


def _cut_line(path: Path, at: int) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    Disk().write_file(path, b"".join(lines[:at] + lines[at + 1 :]))


# proves C7, C8
@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
async def test_what_a_hand_changed_is_damaged_and_the_rest_goes_on(
    edit: Callable[[Path], None], tmp_path: Path
) -> None:
    root = tmp_path / "store"
    engine = await opened(root)
    await engine.commit(put(FACTS, A, Note(body="older")))
    await engine.commit(put(FACTS, A, Note(body="old")) + put(FACTS, ("default", "c"), Note()))
    await engine.commit(append(EVENTS, A, [Note(body="first"), Note(body="second"), Note()]))
    await engine.close()
    edit(root)
    engine = await opened(root)
    asked = (engine.get(FACTS, A), engine.read(EVENTS, A, limit=9))
    answers = await asyncio.gather(*asked, return_exceptions=True)
    assert [type(it) for it in answers if isinstance(it, BaseException)] == [Damaged]
    assert there(await engine.get(FACTS, ("default", "c"))).version == 1
    assert [it async for it in engine.verify() if it.kind == "damaged"]
    await engine.commit(put(FACTS, A, Note()) + drop(EVENTS, A) + append(EVENTS, A, [Note()]))
    assert [it async for it in engine.verify()] == []
    await engine.close()


@pytest.mark.parametrize("edit", EDITS, ids=EDITS)
async def test_what_a_hand_changed_is_taken_when_it_is_accepted(edit: str, tmp_path: Path) -> None:
    root = tmp_path / "store"
    engine = await opened(root)
    await engine.commit(put(FACTS, A, Note(body="old"), attachment=b"kept"))
    await engine.commit(append(EVENTS, A, [Note(body="first"), Note(body="second"), Note()]))
    await engine.commit(put(FACTS, A, Note(body="old"), attachment=b"kept"))
    await engine.close()
    EDITS[edit](root)
    accepted = await accept_engine(f"file:///{root}", LAYOUTS)
    assert [one.kind for one in accepted] == ["accepted"]
    assert await findings(root) == []
    assert await accept_engine(f"file:///{root}", LAYOUTS) == []
    engine = await opened(root)
    record = await engine.get(FACTS, A)
    bodies = [entry.value.body for entry in await engine.read(EVENTS, A, limit=9)]
    tip = await engine.tip(EVENTS, A)
    await engine.close()
    if edit in ("another key", "a file that is gone"):
        assert record is None
    else:
        body = "new" if edit == "a value" else "old"
        assert (there(record).value.body, there(record).attachment) == (body, b"kept")
    changed = {"an entry": "SECOND", "an entry that is gone": None, "a log that is gone": None}
    second = [changed.get(edit, "second")] if changed.get(edit, "second") else []
    assert bodies == ([] if edit == "a log that is gone" else ["first", *second, None])
    assert tip.incarnation == (2 if edit in changed else 1)


async def test_only_files_are_changed_by_hand(tmp_path: Path) -> None:
    with pytest.raises(Invalid, match="plain files"):
        await accept_engine(f"sqlite:///{tmp_path}/state.db", LAYOUTS)


async def test_a_file_that_nobody_asked_for_is_named(tmp_path: Path) -> None:
    await (await opened(tmp_path / "store")).close()
    Disk().make_directory(tmp_path / "store/notes")
    Disk().write_file(tmp_path / "store/notes/README", b"mine")
    (found,) = await findings(tmp_path / "store")
    assert found.startswith(f"stray {tmp_path}/store/notes/README")


# proves C3, C7
async def test_a_journal_that_ends_at_any_byte_is_cut_there_and_says_so(tmp_path: Path) -> None:
    """Without its mark, as after a power cut: what was acknowledged last cannot be told from what
    never was, and all before it is there."""
    told = await history(random.Random(1), 4)
    root = tmp_path / "store"
    with small_journals():
        engine = await opened(root)
        ends = []
        for batch in told.batches:
            await engine.commit(batch)
            ends.append((root / ".perdure/journal").stat().st_size)
        own = {path.name: path.read_bytes() for path in (root / ".perdure").iterdir()}
        await engine.close()
        start = ends[0] - 1
        for size in range(start, ends[-1] + 1, 7):
            whole = sum(end <= size for end in ends)
            place = tmp_path / f"{size}"
            Disk().make_directory(place / ".perdure")
            for name in ("manifest", "journal"):
                data = own[name][:size] if name == "journal" else own[name]
                Disk().write_file(place / ".perdure" / name, data)
            engine = await opened(place)
            assert engine.recovered.replayed == whole
            assert not engine.recovered.clean
            torn = size not in ends
            assert [it.kind for it in engine.recovered.cut] == ["cut"] * torn
            assert await stored(engine) == told.moments[whole].stored
            await engine.close()


# proves C7
async def test_acknowledged_commits_that_are_gone_are_not_passed_over(tmp_path: Path) -> None:
    root = tmp_path / "store"
    with small_journals():
        engine = await opened(root)
        for number in range(3):
            await engine.commit(put(FACTS, A, Note(rank=number)))
        own = {path.name: path.read_bytes() for path in (root / ".perdure").iterdir()}
        await engine.close()
    for name, data in {"journal": own["journal"][:-40], "manifest": b""}.items():
        place = tmp_path / name
        Disk().make_directory(place / ".perdure")
        for file, kept in (own | {name: data}).items():
            Disk().write_file(place / ".perdure" / file, kept)
        with pytest.raises(Damaged):
            await opened(place)
    looked = await open_engine(f"file:///{tmp_path / 'journal'}", LAYOUTS, read_only=True)
    (finding,) = looked.recovered.findings
    assert "1 of the commits acknowledged after commit 2 are gone" in finding.why
    assert there(await looked.get(FACTS, A)).version == 2
    await looked.close()


# proves C11
async def test_a_second_owner_is_refused_and_the_lock_file_is_not_all_there_is(
    tmp_path: Path,
) -> None:
    root = tmp_path / "store"
    engine = await opened(root)
    with pytest.raises(StoreLocked):
        await opened(root)
    with pytest.raises(StoreLocked):
        await open_engine(f"file:///{root}", LAYOUTS, read_only=True)
    Disk().remove(root / ".perdure/lock")
    with pytest.raises(StoreLocked):
        await opened(root)
    await engine.commit(put(FACTS, A, Note()))
    await engine.close()
    assert await findings(root) == []


async def test_who_looks_changes_nothing_and_sees_the_journal(tmp_path: Path) -> None:
    root = tmp_path / "store"
    with pytest.raises(Missing):
        await open_engine(f"file:///{root}", LAYOUTS, read_only=True)
    with small_journals():
        engine = await opened(root)
        await engine.commit(put(FACTS, A, Note(rank=3)) + append(EVENTS, A, [Note()]))
        copy = tmp_path / "copy"
        for path in [path for path in root.rglob("*") if path.is_file()]:
            Disk().make_directory((copy / path.relative_to(root)).parent)
            Disk().write_file(copy / path.relative_to(root), path.read_bytes())
        await engine.close()
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    looked = await open_engine(f"file:///{copy}", LAYOUTS, read_only=True)
    assert there(await looked.get(FACTS, A)).value.rank == 3
    assert len(await looked.read(EVENTS, A, limit=9)) == 1
    with pytest.raises(Latched):
        await looked.commit(put(FACTS, A, Note()))
    assert [it async for it in looked.verify()] == []
    await looked.close()
    assert before == {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}


async def test_what_is_no_store_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    Disk().write_file(tmp_path / "mine/notes.txt", b"mine")
    with pytest.raises(Invalid, match=r"holds notes\.txt and no store"):
        await opened(tmp_path / "mine")
    root = tmp_path / "store"
    engine = await opened(root)
    await engine.commit(put(FACTS, A, Note()))
    await engine.close()
    Disk().remove(root / ".perdure/manifest")
    with pytest.raises(Damaged, match="its store is still there"):
        await opened(root)


async def test_a_collection_gets_the_indexes_that_were_declared_since(tmp_path: Path) -> None:
    old = Records("facts", Note, key=("tenant", "id"), indexes=(Index("due", ("due_s",)),))
    new = Records("facts", Note, key=old.key, indexes=(Index("ranked", ("rank",)), *old.indexes))
    url = f"file:///{tmp_path / 'store'}"
    engine = await open_engine(url, [old])
    for rank in (3, 1, 2):
        await engine.commit(put(old, ("t", f"{rank}"), Note(rank=rank)))
    await engine.close()
    engine = await upgraded(partial(open_engine, url, [new]))
    page = await engine.scan(new, ("t",), index="ranked", limit=9)
    assert [record.value.rank for record in page.items] == [1, 2, 3]
    assert [it async for it in engine.verify()] == []
    await engine.close()


# proves C18
async def test_so_many_places_are_kept_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "PLACES_MAX", 3)
    engine = await opened(tmp_path / "store")
    for number in range(3):
        await engine.commit(put(FACTS, ("t", f"{number}"), Note()))
    with pytest.raises(LimitExceeded, match="over the limit of 3"):
        await engine.commit(put(FACTS, ("t", "4"), Note()))
    await engine.close()


@pytest.mark.parametrize(
    ("limit", "most"), [("OVERLAY_BYTES_MAX", 10_000), ("OVERLAY_FILES_MAX", 2)]
)
async def test_commits_wait_for_files_that_are_far_behind(
    limit: str, most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files_commit, limit, most)
    with small_journals():
        engine = await opened(tmp_path / "store")
        for number in range(20):
            await engine.commit(put(FACTS, ("t", f"{number}"), Note(body="x" * 5_000)))
            assert engine._state.waiting_files <= 3
        await engine.close()


async def test_a_backup_gives_up_where_too_much_is_committed_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files_commit, "HELD_BYTES_MAX", 1_000)
    (tmp_path / "copy").mkdir()
    with small_journals():
        engine = await opened(tmp_path / "store")
        await engine.commit(put(FACTS, A, Note(body="x" * 2_000)))
        with pytest.raises(Unavailable, match="too much was committed"):
            await engine.backup(tmp_path / "copy", lambda done, total: None)
        await engine.commit(put(FACTS, A, Note()))
        await engine.close()


async def test_a_backup_that_was_changed_is_not_restored(tmp_path: Path) -> None:
    engine = await opened(tmp_path / "store")
    (tmp_path / "copy").mkdir()
    await engine.commit(put(FACTS, A, Note(), attachment=b"x") + append(EVENTS, A, [Note()]))
    await engine.backup(tmp_path / "copy", lambda done, total: None)
    await engine.close()
    data = (tmp_path / "copy/frames").read_bytes()
    changed = bytes((*data[:-9], data[-9] ^ 1, *data[-8:]))
    url = f"file:///{tmp_path / 'made'}"
    for wrong in (data[:-1], changed, b"", None):
        Disk().remove(tmp_path / "copy/frames")
        if wrong is not None:
            Disk().write_file(tmp_path / "copy/frames", wrong)
        with pytest.raises(Damaged):
            await restore_engine(url, tmp_path / "copy", LAYOUTS, lambda done, total: None)
        assert not (tmp_path / "made").exists()
    Disk().write_file(tmp_path / "copy/frames", data)
    (tmp_path / "made").mkdir()
    await restore_engine(url, tmp_path / "copy", LAYOUTS, lambda done, total: None)
    assert await findings(tmp_path / "made") == []


# proves C18
def test_an_entry_is_found_by_what_lies_near_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a long file little is read, and a damaged line on the way leads nowhere else."""
    monkeypatch.setattr(files_format, "_NEAR_BYTES", 256)
    identity = Identity("events", "t\x1fa", 1)
    lines = [entry_line(identity, seq, b'"%s"' % (b"x" * (seq % 90))) for seq in range(1, 3_001)]
    for at in (700, 1_500, 1_501, 1_502, 2_250):
        lines[at - 1] = lines[at - 1].replace(b'"seq":', b'"seq":9')
    path = tmp_path / "a.jsonl"
    Disk().write_file(path, b"head\n" + b"".join(lines))
    with StreamFile(path, identity) as file:
        for seq in range(1, 3_001):
            found = [number for number, _, _ in file.entries(seq, seq)]
            assert found == ([] if seq in (700, 1_500, 1_501, 1_502, 2_250) else [seq])
        looked = file._seek(2_999)
        assert path.stat().st_size - looked < 2_000


# proves C18
@pytest.mark.parametrize("near_bytes", [256, 8 * 1024])
def test_entries_of_a_long_file_are_taken_in_one_go_or_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, near_bytes: int
) -> None:
    """However wrong it is where they might lie, and however long; damage among them is met."""
    monkeypatch.setattr(files_format, "_NEAR_BYTES", near_bytes)
    identity = Identity("events", "t\x1fa", 1)
    values = [b'"%s"' % (b"x" * (seq * seq % 900)) for seq in range(1, 2_001)]
    lines = [entry_line(identity, seq, value) for seq, value in enumerate(values, 1)]
    lines[999] = lines[999].replace(b'"seq":1000', b'"seq":9999')
    lines[1_498] = lines[1_498].replace(b"x", b"y", 1)
    path = tmp_path / "a.jsonl"
    Disk().write_file(path, b"head\n" + b"".join(lines))
    size_bytes = path.stat().st_size
    with StreamFile(path, identity) as file:
        for first in range(1, 1_981, 7):
            last, wanted = first + 19, values[first - 1 : first + 19]
            damaged = bool({1_000, 1_499} & {*range(first, last + 1)})
            for near in (0, size_bytes * first // 2_000, size_bytes, 9 * size_bytes):
                taken = file.run(first, last, near, 20 * 1024)
                assert taken == (None if damaged else wanted)
            if not damaged:
                assert file.run(first, last, size_bytes * first // 2_000, 10) in (None, wanted)
            found = [value for _, value, _ in file.entries(first, last)]
            assert len(found) == (19 if damaged else 20)


async def test_a_history_of_every_kind_of_batch_survives_reopening(tmp_path: Path) -> None:
    told = await history(random.Random(7), 25)
    with small_journals(wait_s=0.0):
        for number in range(25):
            engine = await opened(tmp_path / "store")
            assert await engine.commit(told.batches[number]) == told.moments[number + 1].committed
            await engine.close()
        assert await judge(tmp_path / "store", told, 25, 25) == []


# proves C4
async def test_entries_that_a_crash_left_in_a_file_are_not_there_twice(tmp_path: Path) -> None:
    root = tmp_path / "store"
    engine = await opened(root)
    await engine.commit(append(EVENTS, A, [Note(rank=1)]))
    await engine.close()
    engine = await opened(root)
    await engine.commit(append(EVENTS, A, [Note(rank=2)]))
    await engine.usage()  # brings the files up to date
    killed = laid(files_in(root), tmp_path / "killed")
    await engine.close()
    path = events_at(killed)
    Disk().write_file(path, path.read_bytes()[:-9])
    assert await findings(killed) == []
    assert path.read_bytes() == events_at(root).read_bytes()


# proves C10
async def test_a_full_disk_is_refused_and_writes_resume(tmp_path: Path) -> None:
    root = tmp_path / "store"
    await (await opened(root)).close()
    refusing = Refusing(Trouble(calls=("disk.write",), n=3, errno=errno.ENOSPC))
    engine = await opened(root, refusing.disk)
    engine.announce("1\nboot\n")
    with small_journals():
        answers = [await _outcome(engine, rank) for rank in range(1, 6)]
    assert answers.count("StorageFull") == 1
    assert engine.latched is None
    killed = laid(files_in(root), tmp_path / "killed")
    await engine.close()
    engine = await opened(killed)
    assert there(await engine.get(FACTS, A)).version == 4
    await engine.close()


async def _outcome(engine: files.FilesEngine, rank: int) -> str:
    try:
        await engine.commit(put(FACTS, A, Note(rank=rank)))
    except StorageFull as full:
        return type(full).__name__
    return "done"


@pytest.mark.parametrize("call", ["disk.create", "disk.write", "disk.sync", "disk.names"])
async def test_a_disk_that_fails_while_a_store_is_closed_is_told_in_our_words(
    call: Call, tmp_path: Path
) -> None:
    refusing = Refusing(Trouble(calls=()))
    engine = await opened(tmp_path / "store", refusing.disk)
    await engine.commit(put(FACTS, A, Note("kept")))
    await engine.usage()  # flushes: what is left is the manifest and a new journal
    refusing.trouble = Trouble(calls=(call,), times=None)
    with pytest.raises(Unavailable):
        await engine.close()
    engine = await opened(tmp_path / "store")
    assert there(await engine.get(FACTS, A)).value == Note("kept")
    await engine.close()


async def test_a_close_is_not_lost_on_who_was_about_to_write_the_files(tmp_path: Path) -> None:
    """A task that is cancelled just as its wait ends may never learn that it was."""
    with small_journals():
        engine = await opened(tmp_path / "store")
        committer = engine._committer
        assert committer is not None
        await engine.commit(put(FACTS, A, Note()))
        await engine.usage()
        committer._behind.set()
        await engine.usage()
        committer._committing.add_done_callback(lambda _: committer._hurry.set())
        async with asyncio.timeout(30):
            await engine.close()
    assert await findings(tmp_path / "store") == []
