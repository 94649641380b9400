"""A function over 70 lines or a file over 600 needs a line in exceptions.toml saying why."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

from tests.tidy.tree import Tree, plant, repository

FUNCTION_LINES_MAX = 70
FILE_LINES_MAX = 600
EXCEPTIONS = Path(__file__).with_name("exceptions.toml")


def long_files(tree: Tree) -> Iterator[tuple[str, int]]:
    for source in tree.sources:
        lines = source.text.count("\n")
        if lines > FILE_LINES_MAX:
            yield source.path, lines


def long_functions(tree: Tree) -> Iterator[tuple[str, int]]:
    for source in tree.sources:
        for name, node in _functions(source.syntax, ()):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > FUNCTION_LINES_MAX:
                yield f"{source.path}:{name}", lines


def violations(tree: Tree, excused: dict[str, dict[str, str]]) -> list[str]:
    found = []
    for kind, long, limit in (
        ("files", dict(long_files(tree)), FILE_LINES_MAX),
        ("functions", dict(long_functions(tree)), FUNCTION_LINES_MAX),
    ):
        reasons = excused.get(kind, {})
        found += [
            f"{where} has {lines} lines, over {limit}: split it by meaning, or say in "
            "tests/tidy/exceptions.toml why it is one thought."
            for where, lines in long.items()
            if not reasons.get(where, "").strip()
        ]
        found += [
            f"{where} is excused in tests/tidy/exceptions.toml and need not be: delete the line."
            for where in reasons
            if where not in long
        ]
    return found


def _functions(
    node: ast.AST, above: tuple[str, ...]
) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield ".".join((*above, child.name)), child
            yield from _functions(child, (*above, child.name))
        elif isinstance(child, ast.ClassDef):
            yield from _functions(child, (*above, child.name))
        else:
            yield from _functions(child, above)


def test_functions_and_files_are_short_or_say_why() -> None:
    assert violations(repository(), tomllib.loads(EXCEPTIONS.read_text())) == []


def test_planted_long_things_are_found(tmp_path: Path) -> None:
    body = "    x = 1\n" * FUNCTION_LINES_MAX
    tree = plant(
        tmp_path,
        {
            "src/perdure/long.py": f"class C:\n  async def f(self):\n{body}",
            "src/perdure/huge.py": "x = 1\n" * (FILE_LINES_MAX + 1),
        },
    )
    reasons = {
        "files": {"src/perdure/huge.py": "one table"},
        "functions": {"src/perdure/long.py:C.f": "one thought"},
    }
    assert len(violations(tree, {})) == 2
    assert violations(tree, reasons) == []
    assert len(violations(tree, {"files": {**reasons["files"], "gone.py": "x"}})) == 2
    assert len(violations(tree, {"files": {"src/perdure/huge.py": " "}})) == 2
