"""The import rule of the layers, function-local imports included, and no cycles anywhere."""

from __future__ import annotations

from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.tidy.tree import Source, Tree, plant, repository

MAY_IMPORT = {
    "core": set(),
    "wire": {"core"},
    "numeric": {"core"},
    "engines": {"core"},
    "surfaces": {"core", "wire", "numeric"},
    "services": {"core", "wire", "numeric", "surfaces"},
    "frontends": {"core", "wire", "surfaces", "services"},
    "library": {"core", "wire", "surfaces", "services"},
    "proving": {"core", "wire", "numeric", "engines", "surfaces", "services", "frontends"},
}
INSTEAD = {
    "core": "move what is needed down into core, or take it as an argument",
    "wire": "wire holds formats only; do the work in a surface or a service",
    "numeric": "pass arrays in and out; numeric knows nothing of storage",
    "engines": "an engine knows layouts and values of core, and receives other engines",
    "surfaces": "take an Engine (core/engine.py) as an argument",
    "services": "take an Engine as an argument; the composition root opens it",
    "frontends": "ask a service",
    "library": "ask a service",
}
DOORS = {
    ("perdure.services.lifecycle", "perdure.engines"),
    ("perdure.library", "perdure.engines"),
    ("perdure.frontends.cli.torture", "perdure.proving"),
    ("perdure.frontends.cli.demo", "perdure.proving"),
}
"""The only exceptions: who opens engines (a server, an embedder), and commands that run proofs."""

SURFACE_REGISTRY = "perdure.surfaces.state"
PARTS = {
    *("perdure.surfaces.items", "perdure.surfaces.proofs"),
    *("perdure.engines.wrapping", "perdure.engines.group"),
    *("perdure.engines.ordered", "perdure.engines.waiting"),
}
"""What neighbours may share: items belong to responses and to conversations; wrappers are alike;
what groups batches, keeps order in memory or lets tails wait is of no single engine."""


def imports(source: Source, modules: set[str]) -> list[tuple[int, str]]:
    """Modules of ours that a source imports, with the line."""
    found = []
    for line, module, name in source.imported:
        target = f"{module}.{name}" if f"{module}.{name}" in modules else module
        if target in modules and target != source.module:
            found.append((line, target))
    return found


def layer(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in MAY_IMPORT else "library"


def layer_violations(tree: Tree) -> list[str]:
    modules = {source.module for source in tree.product}
    found = []
    for source in tree.product:
        own = layer(source.module)
        for line, target in imports(source, modules):
            other = layer(target)
            if other in MAY_IMPORT[own] | {own, "library"}:
                continue
            if any(source.module == who and target.startswith(what) for who, what in DOORS):
                continue
            found.append(f"{source.path}:{line} imports {target}: {INSTEAD[own]}.")
    return found


def neighbour_violations(tree: Tree) -> list[str]:
    """Engines do not import engines; surfaces do not import surfaces."""
    modules = {source.module for source in tree.product}
    found = []
    for source in tree.product:
        for line, target in imports(source, modules):
            where = f"{source.path}:{line} imports {target}"
            both = {layer(source.module), layer(target)}
            if target in PARTS:
                continue
            if both == {"engines"} and _engine(source.module) not in ("", _engine(target)):
                found.append(f"{where}: take the other engine as an argument.")
            if both == {"surfaces"} and source.module != SURFACE_REGISTRY:
                found.append(f"{where}: add their batches where a service commits them.")
    return found


def cycles(tree: Tree) -> list[str]:
    modules = {source.module for source in tree.product}
    graph = {
        source.module: {target for _, target in imports(source, modules)} for source in tree.product
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return [f"{' -> '.join(error.args[1])}: these are one module, or a third one is missing."]
    return []


def _engine(module: str) -> str:
    """The engine a module belongs to: `sqlite` for engines/sqlite.py and engines/sqlite_*.py."""
    parts = module.split(".")
    return parts[2].split("_")[0] if len(parts) > 2 else ""


def test_layers_import_only_what_lies_below() -> None:
    assert layer_violations(repository()) == []


def test_neighbours_do_not_know_each_other() -> None:
    assert neighbour_violations(repository()) == []


def test_no_import_cycles() -> None:
    assert cycles(repository()) == []


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("core/a.py", "from perdure.surfaces import x"),
        ("wire/a.py", "import perdure.services.x"),
        ("engines/a.py", "from perdure.surfaces.x import y"),
        ("surfaces/a.py", "def f():\n    from perdure.engines import open_engine"),
        ("services/a.py", "from perdure.engines import open_engine"),
        ("services/lifecycle.py", "from perdure.frontends import x"),
        ("frontends/http/a.py", "from ...engines import sqlite"),
        ("frontends/cli/serve.py", "from perdure.proving import x"),
        ("__init__.py", "from perdure.engines import open_engine"),
    ],
)
def test_a_planted_import_is_found(tmp_path: Path, path: str, line: str) -> None:
    homes = ("surfaces/x", "services/x", "engines/sqlite", "frontends/x", "proving/x")
    tree = plant(
        tmp_path,
        {f"src/perdure/{home}.py": "" for home in homes}
        | {f"src/perdure/{home.split('/')[0]}/__init__.py": "" for home in homes}
        | {f"src/perdure/{path}": line},
    )
    assert [where.split(" ")[0] for where in layer_violations(tree)] == [
        f"src/perdure/{path}:{line.count(chr(10)) + 1}"
    ]


def test_the_doors_are_open(tmp_path: Path) -> None:
    tree = plant(
        tmp_path,
        {
            "src/perdure/engines/__init__.py": "",
            "src/perdure/proving/crash.py": "",
            "src/perdure/services/lifecycle.py": "from perdure.engines import open_engine",
            "src/perdure/frontends/cli/torture.py": "from perdure.proving import crash",
        },
    )
    assert layer_violations(tree) == []


@pytest.mark.parametrize(
    ("one", "other"),
    [("engines/checked.py", "engines.sqlite"), ("surfaces/files.py", "surfaces.responses")],
)
def test_a_planted_neighbour_is_found(tmp_path: Path, one: str, other: str) -> None:
    target = f"src/perdure/{other.replace('.', '/')}.py"
    tree = plant(tmp_path, {f"src/perdure/{one}": f"import perdure.{other}", target: ""})
    assert len(neighbour_violations(tree)) == 1


def test_a_planted_cycle_is_found(tmp_path: Path) -> None:
    tree = plant(
        tmp_path,
        {
            "src/perdure/core/a.py": "from perdure.core import b",
            "src/perdure/core/b.py": "def f():\n    from perdure.core.a import g",
            "src/perdure/core/__init__.py": "",
        },
    )
    assert len(cycles(tree)) == 1
