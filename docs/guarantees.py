"""Joins what is stated, what surfaces promise and what tests prove (`make docs`).

Reads docs/statements.toml, the promises of `perdure.surfaces.state`, the `# proves ID` marks of
tests and the ids that rules of the conformance suite carry (`@chapter.rule("ID")`); writes
docs/guarantees.md for people and src/perdure/surfaces/proofs.json for the running program.
Nothing is written twice by hand, and tests/tidy fails when the results are stale.
"""

from __future__ import annotations

import ast
import json
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from perdure.core.promises import Promise
from perdure.surfaces.state import PROMISES

ROOT = Path(__file__).parents[1]
STATEMENTS = Path("docs/statements.toml")
PAGE = Path("docs/guarantees.md")
PROOFS = Path("src/perdure/surfaces/proofs.json")
MARKED = ("tests", "src/perdure/proving")
"""Where proofs stand: tests, and the suites that tests run and others can import."""

MARK = re.compile(r"^\s*# proves ((?:[A-Z]\d+)(?:, [A-Z]\d+)*)$")
SURVIVES = ("process_crash", "power_cut", "failed_sync", "node_loss", "damage")


class Statement(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One sentence of docs/statements.toml; `open` says why it is not claimed."""

    says: str
    within: str = ""
    open: str = ""


class Mark(NamedTuple):
    """One claim to prove a statement, and the test or rule that does; None where there is none."""

    where: str
    statement: str
    proof: str | None


Statements = Mapping[str, Statement]
Proofs = Mapping[str, Sequence[str]]


def read_statements(root: Path) -> Statements:
    return msgspec.convert(
        tomllib.loads((root / STATEMENTS).read_text()), type=dict[str, Statement]
    )


def read_marks(root: Path) -> Iterator[Mark]:
    """Every mark in the marked folders, with the function it stands above."""
    for folder in MARKED:
        for path in sorted((root / folder).rglob("*.py")):
            yield from _marks_of(path.relative_to(root).as_posix(), path.read_text())


def proofs_of(marks: Iterable[Mark]) -> dict[str, list[str]]:
    """Statement ids to the tests that prove them, both sorted."""
    proofs: dict[str, set[str]] = {}
    for mark in marks:
        if mark.proof is not None:
            proofs.setdefault(mark.statement, set()).add(mark.proof)
    return {statement: sorted(proofs[statement]) for statement in sorted(proofs, key=_natural)}


def disagreements(
    statements: Statements, promises: Sequence[Promise], marks: Sequence[Mark]
) -> list[str]:
    """What is claimed and not proven, proven and not stated, or stated nowhere."""
    proofs = proofs_of(marks)
    found = [
        f"{mark.where} marks {mark.statement}, which docs/statements.toml does not have."
        for mark in marks
        if mark.statement not in statements
    ]
    found += [
        f"{mark.where} marks no test: put it directly above one."
        for mark in marks
        if mark.proof is None
    ]
    found += [
        f"{name} is claimed in docs/statements.toml and no test proves it: mark one with "
        f"`# proves {name}`, or say under `open` why it is not claimed."
        for name, statement in statements.items()
        if not statement.open and name not in proofs
    ]
    found += [
        f"the surface {promise.surface} relies on {name}, which is not claimed."
        for promise in promises
        for name in promise.statements
        if name not in statements or statements[name].open
    ]
    return found


def render_proofs(proofs: Proofs) -> str:
    return json.dumps(proofs, indent=1) + "\n"


def render_page(statements: Statements, promises: Sequence[Promise], proofs: Proofs) -> str:
    """The guarantees page."""
    claimed = {name: it for name, it in statements.items() if not it.open}
    parts = [
        "# Guarantees",
        "Made by `make docs` from docs/statements.toml, the promises in `surfaces/` and the "
        "`# proves` marks in tests; not edited by hand.",
        "## What each surface survives",
        _table(promises),
        *map(_surface, promises),
        "## What is claimed, and the tests that prove it",
        *(_statement(name, it, proofs.get(name, ())) for name, it in claimed.items()),
    ]
    waiting = [f"- **{name}** {it.says} *{it.open}*" for name, it in statements.items() if it.open]
    if waiting:
        parts += ["## What is not claimed yet", "\n".join(waiting)]
    return "\n\n".join(parts) + "\n"


def write(root: Path = ROOT) -> None:
    """Regenerate both files."""
    proofs = proofs_of(read_marks(root))
    (root / PAGE).write_text(render_page(read_statements(root), PROMISES, proofs))
    (root / PROOFS).write_text(render_proofs(proofs))


def _marks_of(path: str, text: str) -> Iterator[Mark]:
    lines = text.splitlines()
    below: dict[int, str] = {}
    for name, node in _functions(ast.parse(text, path), ""):
        proof = f"{path}::{name}"
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        below[first] = proof
        for statement in _rule_of(node):
            yield Mark(f"{path}:{first}", statement, proof)
    for number, line in enumerate(lines, 1):
        if match := MARK.match(line):
            end = number + 1
            while end <= len(lines) and lines[end - 1].lstrip().startswith("#"):
                end += 1
            for statement in match[1].split(", "):
                yield Mark(f"{path}:{number}", statement, below.get(end))


def _functions(
    node: ast.AST, above: str
) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield above + child.name, child
        elif isinstance(child, ast.ClassDef):
            yield from _functions(child, f"{above}{child.name}::")


def _rule_of(node: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    """The statements that `@chapter.rule("C5", ...)` names."""
    for decorator in node.decorator_list:
        if (
            isinstance(decorator, ast.Call)
            and isinstance(decorator.func, ast.Attribute)
            and decorator.func.attr == "rule"
        ):
            yield from (str(ast.literal_eval(argument)) for argument in decorator.args)


def _table(promises: Sequence[Promise]) -> str:
    head = ["surface", "class", *(name.replace("_", " ") for name in SURVIVES)]
    rows = [
        [
            promise.surface,
            promise.durability.value,
            *("yes" if getattr(promise.survives, name) else "no" for name in SURVIVES),
        ]
        for promise in promises
    ]
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _surface(promise: Promise) -> str:
    bound = promise.loss_bound
    rows = {
        "acknowledged": promise.acknowledgement,
        "owner": promise.owner,
        "recovery": promise.recovery,
        "retention": promise.retention,
        "may lose": f"{bound.operations} operations or {bound.milliseconds} ms" if bound else "",
        "schema version": str(promise.version),
        "relies on": ", ".join(promise.statements),
    }
    listed = "\n".join(f"- {what}: {text}" for what, text in rows.items() if text)
    return f"**{promise.surface}**\n{listed}"


def _statement(name: str, statement: Statement, proofs: Sequence[str]) -> str:
    within = f" *Within: {statement.within}*" if statement.within else ""
    listed = "\n".join(f"- `{proof}`" for proof in proofs)
    return f"**{name}** {statement.says}{within}\n{listed}"


def _natural(statement: str) -> tuple[str, int]:
    return statement[0], int(statement[1:])


if __name__ == "__main__":
    write()
