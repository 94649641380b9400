"""The worker runtime as a person finds it on plain files: which files there are, what stands in
them, and that no id leaves its place or meets another."""

from __future__ import annotations

import os
import re
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import perdure
from perdure.core.batch import put
from perdure.core.disk import Disk
from perdure.core.errors import Damaged, Invalid
from perdure.core.layouts import Layout, Log, Records
from perdure.engines import open_engine
from perdure.engines.files_names import Tree
from perdure.proving import hostile
from perdure.surfaces.state import LAYOUTS
from perdure.surfaces.workers import Runtime, Workers
from perdure.wire.errors import WireError

AT = ("lab", "scout")


def listing(root: Path) -> list[str]:
    """Every file below a root, and every directory in which there is nothing."""
    return sorted(
        str(path.relative_to(root)) + "/" * path.is_dir()
        for path in root.rglob("*")
        if not path.is_relative_to(root / ".perdure")
        and (path.is_file() or not any(path.iterdir()))
    )


async def lived(root: Path) -> None:
    """A runtime with a worker of each kind: one at work, one archived; and another's."""
    async with perdure.open(f"file:///{root}") as state:
        workers = state.workers
        await workers.create_runtime({"id": "lab", "config": {"model": "m"}})
        for worker_id in ("scout", "old"):
            await workers.create("lab", {"id": worker_id, "config": {"goal": "look"}})
            await workers.input("lab", worker_id, {"content": "go", "submission_id": "s1"})
        run = await workers.start(*AT)
        step = {"generation": run.generation, "taken": 1, "state": {"turn": 1}, "name": "turn"}
        said = [{"role": "assistant", "content": "found\nit"}]
        await workers.progress(*AT, step | {"transcript": said})
        await workers.overview(*AT)
        await workers.usage(*AT)
        await workers.stop("lab", "old")
        await workers.retain("lab", "old", {"operation_id": "op1", "mode": "archive"})


# proves W3
async def test_a_runtime_is_a_directory_and_a_worker_is_one_in_it(tmp_path: Path) -> None:
    root = tmp_path / "state"
    await lived(root)
    assert listing(root) == [
        "runtimes/lab/retentions/op1/parts/00000000.1.bin",
        "runtimes/lab/retentions/op1/parts/00000000.json",
        "runtimes/lab/retentions/op1/retention.json",
        "runtimes/lab/runtime.json",
        "runtimes/lab/workers/scout/events.jsonl",
        "runtimes/lab/workers/scout/inputs.jsonl",
        "runtimes/lab/workers/scout/overview.json",
        "runtimes/lab/workers/scout/state.json",
        "runtimes/lab/workers/scout/submissions/s1.json",
        "runtimes/lab/workers/scout/transcript.jsonl",
        "runtimes/lab/workers/scout/usage.json",
        "runtimes/lab/workers/scout/worker.json",
    ]
    desk = root / "runtimes/lab/workers/scout"
    lines = (desk / "state.json").read_text().splitlines()
    assert lines[0] == "{"
    assert lines[1:4] == [
        '  "collection": "worker_states",',
        '  "key": ["default","lab","scout"],',
        '  "version": 4,',
    ]
    assert lines[-2].startswith('  "value": {')
    assert msgspec.json.decode((desk / "state.json").read_bytes())["value"]["value"] == {"turn": 1}
    head, *said = (desk / "transcript.jsonl").read_bytes().splitlines()
    assert msgspec.json.decode(head)["key"] == ["default", *AT]
    contents = [msgspec.json.decode(line)["value"]["content"] for line in said]
    assert contents == ["go", "found\nit"]


# proves W3, C8
async def test_a_file_in_another_place_is_damaged_there_and_missed_here(tmp_path: Path) -> None:
    root = tmp_path / "state"
    async with perdure.open(f"file:///{root}") as state:
        await state.workers.create_runtime({"id": "lab"})
        for worker_id in ("a", "b", "c"):
            await state.workers.create("lab", {"id": worker_id})
    workers = root / "runtimes/lab/workers"
    Disk().replace(workers / "a/worker.json", workers / "b/worker.json")
    async with perdure.open(f"file:///{root}") as state:
        for worker_id in ("a", "b"):
            with pytest.raises(Damaged, match=f"workers lab/{worker_id}"):
                await state.workers.get("lab", worker_id)
        assert (await state.workers.get("lab", "c")).id == "c"
        found = {one.where async for one in state.engine.verify()}
    assert found == {"workers lab/a", "workers lab/b"}


HOSTILE = (
    *hostile.LEGAL_NAMES.values(),
    "worker.json",
    "runtime",
    "workers",
    ".perdure",
    "@tenants",
)
NAMES = st.sampled_from(HOSTILE) | st.text(
    st.characters(exclude_categories=["Cc", "Cs"]), min_size=1, max_size=60
).filter(lambda name: len(name.encode()) <= 255)
LAID = tuple(layout for promise in (Workers.promise, Workers.views) for layout in promise.layouts)


# proves W3
@given(st.lists(st.tuples(NAMES, NAMES, NAMES), min_size=2, max_size=12, unique=True))
@settings(max_examples=150, deadline=None)
def test_no_two_ids_meet_and_none_leaves_the_root(ids: list[tuple[str, str, str]]) -> None:
    """Whatever the ids: no file is another's, also where case is ignored, none is a directory of
    another, and what the names say stays below the root."""
    root = Path("/store")
    tree = Tree(root)
    for layout in LAID:
        tree.declare(layout)
    asked: dict[tuple[str, tuple[str, ...]], Path] = {}
    for parts in ids:
        for tenant in ("default", parts[2]):
            for layout in LAID:
                key = (tenant, *(parts * 2)[: len(layout.key) - 1])
                file = tree.stream if isinstance(layout, Log) else tree.record
                asked[layout.name, key] = file(layout.name, key)
    paths = list(asked.values())
    folded = {str(path).casefold() for path in paths}
    assert len(folded) == len(paths)
    assert folded.isdisjoint(str(folder).casefold() for path in paths for folder in path.parents)
    for path in paths:
        assert root in path.parents
        assert ".." not in path.parts
        assert all(len(part.encode()) <= 255 for part in path.parts)
        assert path.relative_to(root).parts[0] in ("runtimes", "@tenants")


# proves W3, C20
async def test_hostile_ids_are_refused_or_have_a_place_of_their_own(tmp_path: Path) -> None:
    """Over the wire ids are plain words; who embeds the library may take any that a key can be."""
    root = tmp_path / "within" / "state"
    wire_names = ("CON", "con", "NAME", "name", "-rf", "_", "a" * 128, "A" * 128)
    async with perdure.open(f"file:///{root}") as state:
        for name in (*HOSTILE, *hostile.REFUSED_NAMES.values()):
            if not re.fullmatch(r"[A-Za-z0-9_-]{1,128}", name):
                with pytest.raises((Invalid, WireError)):
                    await state.workers.create_runtime({"id": name})
        await state.engine.usage()
        assert listing(root) == []
        for name in wire_names:
            await state.workers.create_runtime({"id": name})
            await state.workers.create(name, {"id": name, "config": {"for": name}})
        for name in HOSTILE:
            made = Runtime(1, "f", msgspec.Raw(msgspec.json.encode(name)))
            await state.commit(state.runtimes.establish(("T", name), made))
    async with perdure.open(f"file:///{root}") as state:
        for name in wire_names:
            assert (await state.workers.get(name, name)).config == {"for": name}
        for name in HOSTILE:
            found = await state.runtimes.runtime(("T", name))
            assert msgspec.json.decode(found.value.config) == name
        assert [one async for one in state.engine.verify()] == []
    assert os.listdir(tmp_path) == ["within"]
    assert os.listdir(tmp_path / "within") == ["state"]
    assert sorted(os.listdir(root)) == [".perdure", "@tenants", "runtimes"]
    assert len(os.listdir(root / "runtimes")) == len(wire_names)
    assert len(os.listdir(root / "@tenants/%54/runtimes")) == len(HOSTILE)


def _records(name: str, path: str | None = None) -> Layout:
    return Records(name, str, key=("tenant", "id"), path=path)


@pytest.mark.parametrize(
    "layouts",
    [
        (_records("a", "x/*"), _records("b", "x/*")),
        (_records("a", "x/*/y"), _records("b", "x/*/y")),
        (_records("a", "x/*"), _records("b", "x/*/y")),
        (_records("x"), _records("b", "x/*/y")),
        (_records("a", "x/*"), Log("b", str, key=("tenant", "id"), path="x/*/y")),
        (_records("a", "x/*"), Records("b", str, key=("tenant",), path="x/y")),
        (_records("a", "x/*/y"), Records("b", str, key=("tenant", "id", "n"), path="x/*/*")),
    ],
)
def test_collections_whose_files_could_meet_are_refused(layouts: tuple[Layout, ...]) -> None:
    tree = Tree(Path("/store"))
    tree.declare(layouts[0])
    with pytest.raises(Invalid, match="could meet"):
        tree.declare(layouts[1])


@pytest.mark.parametrize("path", ["x", "x/*/*", "X/*", "../*", "x//*", "/*", "x/*.json", "x/a*"])
def test_a_path_that_is_none_is_refused(path: str) -> None:
    with pytest.raises(Invalid, match="not made of lower-case names"):
        _records("a", path)


def test_no_collections_of_ours_can_meet() -> None:
    tree = Tree(Path("/store"))
    for layout in LAYOUTS:
        tree.declare(layout)


async def test_a_collection_stays_where_it_was_first_written(tmp_path: Path) -> None:
    """A store that an earlier declaration wrote is read and written as it is."""
    url = f"file:///{tmp_path / 'state'}"
    for path in ("x/*", "y/*"):
        engine = await open_engine(url, [_records("a", path)])
        await engine.commit(put(_records("a", path), ("default", path[0]), "v"))
        await engine.close()
    assert listing(tmp_path / "state") == ["x/x.json", "x/y.json"]
