"""Every durable edge of the program where its code has it, and which of them a process came by.

An edge is a place that names `commit` or a method of the disk module that changes something. What
counts is the line: it also stands for a method that is handed on to be called in another thread.
"""

from __future__ import annotations

import ast
import inspect
import os
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from io import FileIO
from pathlib import Path
from types import FrameType
from typing import Any

import msgspec

import perdure
from perdure.core.disk import Disk, Lock, Writer

ROOT = Path(perdure.__file__).parent
_READS = {"read_chunks", "free_bytes"}
_OWNERS = {"disk": Disk, "writer": Writer, "lock": Lock}
"""The disk module's classes, by the name under which their objects are held."""

_COMMON = {"lock", "note", "release"} | {
    name for kind in (str, bytes, list, set, dict, Path, FileIO) for name in dir(kind)
}
"""Words that other objects have too: they count where the object is held under its usual name."""


def changes(kind: type) -> set[str]:
    """The methods of one of the disk module's classes that change something."""
    return {
        name
        for name, _ in inspect.getmembers(kind, inspect.isfunction)
        if not name.startswith("_") and name not in _READS
    }


_ANYWHERE = {"commit"} | {
    name for kind in _OWNERS.values() for name in changes(kind) if name not in _COMMON
}


class Edge(msgspec.Struct, frozen=True):
    """A place in the code. `name` stays when lines move: the file, the function, what is called,
    and which one of several of these."""

    name: str
    file: str
    line: int


def edges() -> list[Edge]:
    """All there are, outside of the proofs themselves."""
    found: list[Edge] = []
    for path in sorted(ROOT.rglob("*.py")):
        file = str(path.relative_to(ROOT))
        if file.startswith("proving/"):
            continue
        seen: Counter[str] = Counter()
        for where, node in _attributes(ast.parse(path.read_text()), ()):
            if _is_edge(node, where):
                name = f"{file} {'.'.join(where)} {node.attr}"
                seen[name] += 1
                if seen[name] > 1:
                    name += f" {seen[name]}"
                found.append(Edge(name, file, node.end_lineno or node.lineno))
    return found


def _attributes(
    tree: ast.AST, where: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], ast.Attribute]]:
    for node in ast.iter_child_nodes(tree):
        inner = where
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            inner = (*where, node.name)
        if isinstance(node, ast.Attribute):
            yield where, node
        yield from _attributes(node, inner)


def _is_edge(node: ast.Attribute, where: tuple[str, ...]) -> bool:
    if node.attr in _ANYWHERE:
        return True
    held = node.value.func if isinstance(node.value, ast.Call) else node.value
    name = held.attr if isinstance(held, ast.Attribute) else getattr(held, "id", "")
    if name == "self" and where:
        name = where[0].lower()
    kind = _OWNERS.get(name.removeprefix("_"))
    return kind is not None and node.attr in changes(kind)


class Witness:
    """Tells of each edge that this process comes by from `begin` on, as a line `FILE:LINE` of a
    file, at once: a process that is killed has told."""

    def __init__(self, into: Path) -> None:
        self._fd = os.open(into, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._left: dict[str, dict[int, str]] = {}
        for edge in edges():
            lines = self._left.setdefault(str(ROOT / edge.file), {})
            lines[edge.line] = f"{edge.file}:{edge.line}\n"

    def begin(self) -> None:
        """Look at every frame of this thread and of those that it starts."""
        threading.settrace(self._called)
        sys.settrace(self._called)

    def _called(self, frame: FrameType, event: str, of: Any) -> Callable[..., Any] | None:
        return self._at if frame.f_code.co_filename in self._left else None

    def _at(self, frame: FrameType, event: str, of: Any) -> Callable[..., Any]:
        told = self._left[frame.f_code.co_filename].pop(frame.f_lineno, None)
        if told is not None:
            os.write(self._fd, told.encode())
        return self._at


def seen(into: Path) -> set[str]:
    """The names of the edges that processes with this file came by."""
    told = set(into.read_text().split())
    return {edge.name for edge in edges() if f"{edge.file}:{edge.line}" in told}
