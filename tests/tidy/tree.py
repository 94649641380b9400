"""The repository as the tidy tests read it: sources with their syntax trees, imports and names.

Rules take a `Tree`, so that each can be shown a planted violation and be seen to fail.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from functools import cache, cached_property
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
FOLDERS = ("src", "tests", "bench", "docs", "examples", ".ci")
TEXT_SUFFIXES = {"", ".lock", ".md", ".py", ".sql", ".toml"}


class Source:
    """One Python file."""

    def __init__(self, path: str, text: str) -> None:
        self.path = path
        self.text = text
        self.syntax = ast.parse(text, path)

    @cached_property
    def module(self) -> str:
        """Dotted name; a package for its `__init__`."""
        parts = Path(self.path).with_suffix("").parts
        parts = parts[1:] if parts[0] == "src" else parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    @cached_property
    def imported(self) -> list[tuple[int, str, str | None]]:
        """Every import wherever it stands: line, absolute module, and the name taken from it."""
        found: list[tuple[int, str, str | None]] = []
        for node in ast.walk(self.syntax):
            if isinstance(node, ast.Import):
                found += [(node.lineno, alias.name, None) for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = self._absolute(node)
                found += [(node.lineno, base, alias.name) for alias in node.names]
        return found

    @cached_property
    def names(self) -> list[tuple[int, str]]:
        """Every name that is read, resolved through this file's imports: line, dotted name."""
        aliases: dict[str, str] = {}
        for node in ast.walk(self.syntax):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    aliases[alias.asname or alias.name.split(".")[0]] = alias.name
            elif isinstance(node, ast.ImportFrom):
                base = self._absolute(node)
                aliases.update((a.asname or a.name, f"{base}.{a.name}") for a in node.names)
        nodes = list(ast.walk(self.syntax))
        inner = {id(node.value) for node in nodes if isinstance(node, ast.Attribute)}
        return [
            (node.lineno, dotted)
            for node in nodes
            if isinstance(node, ast.Name | ast.Attribute)
            and id(node) not in inner
            and (dotted := dotted_name(node, aliases)) is not None
        ]

    def _absolute(self, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        is_package = self.path.endswith("__init__.py")
        parts = self.module.split(".")
        base = parts[: len(parts) - node.level + (1 if is_package else 0)]
        return ".".join([*base, node.module] if node.module else base)


class Text(NamedTuple):
    """One file of any text kind."""

    path: str
    text: str

    def lines(self) -> Iterator[tuple[int, str]]:
        yield from enumerate(self.text.splitlines(), 1)


class Tree:
    """What is under a root and belongs to the project."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @cached_property
    def texts(self) -> list[Text]:
        top = [path for path in self.root.iterdir() if path.is_file() and path.name[0] != "."]
        below = [path for folder in FOLDERS for path in (self.root / folder).rglob("*")]
        return [
            Text(path.relative_to(self.root).as_posix(), path.read_text())
            for path in sorted(top + below)
            if path.is_file() and path.suffix in TEXT_SUFFIXES and "__pycache__" not in path.parts
        ]

    @cached_property
    def sources(self) -> list[Source]:
        return [Source(path, text) for path, text in self.texts if path.endswith(".py")]

    @cached_property
    def product(self) -> list[Source]:
        return [source for source in self.sources if source.path.startswith("src/")]


@cache
def repository() -> Tree:
    """This repository, read once."""
    return Tree(ROOT)


def plant(root: Path, files: Mapping[str, str]) -> Tree:
    """A small tree of the given files, to be judged by a rule."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return Tree(root)


def dotted_name(node: ast.expr, aliases: Mapping[str, str]) -> str | None:
    """`a.b.c` with its first part resolved through `aliases`; None for anything but names."""
    if isinstance(node, ast.Name):
        return aliases.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        base = dotted_name(node.value, aliases)
        return None if base is None else f"{base}.{node.attr}"
    return None
