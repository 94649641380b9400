"""Statements, promises, proofs and their pages agree; each way to disagree is planted once."""

from __future__ import annotations

from pathlib import Path

import msgspec

from docs import guarantees
from docs.guarantees import ROOT, Statement
from perdure.surfaces.proofs import proofs_of
from perdure.surfaces.state import PROMISES
from tests.tidy.tree import plant

PROVEN = {"C1": Statement("It is so.")}


# proves C1
def test_statements_promises_and_marks_agree() -> None:
    marks = list(guarantees.read_marks(ROOT))
    assert guarantees.disagreements(guarantees.read_statements(ROOT), PROMISES, marks) == []


# proves C1
def test_generated_files_are_current() -> None:
    found = guarantees.proofs_of(guarantees.read_marks(ROOT))
    made = {
        guarantees.PAGE: guarantees.render_page(guarantees.read_statements(ROOT), PROMISES, found),
        guarantees.PROOFS: guarantees.render_proofs(found),
    }
    stale = [f"{path}: run `make docs`" for path in made if (ROOT / path).read_text() != made[path]]
    assert stale == []


def test_the_program_lists_the_proofs_of_every_promise() -> None:
    for promise in PROMISES:
        assert all(proofs_of(promise).values()), promise.surface
        assert set(proofs_of(promise)) == set(promise.statements)


def test_marks_name_the_test_below(tmp_path: Path) -> None:
    test = (
        "# proves C1, C5\n# more words\n@decorated\ndef test_a(): ...\n\n\n"
        "class TestB:\n    # proves C5\n    async def test_b(self): ...\n\n\n"
        "# proves C9\n\ndef test_c(): ...\n"
    )
    plant(
        tmp_path,
        {
            "tests/test_x.py": test,
            "src/perdure/proving/y.py": '@chapter.rule("C7", "C5")\ndef z(): ...',
        },
    )
    marks = list(guarantees.read_marks(tmp_path))
    assert guarantees.proofs_of(marks) == {
        "C1": ["tests/test_x.py::test_a"],
        "C5": [
            "src/perdure/proving/y.py::z",
            "tests/test_x.py::TestB::test_b",
            "tests/test_x.py::test_a",
        ],
        "C7": ["src/perdure/proving/y.py::z"],
    }
    assert [mark.statement for mark in marks if mark.proof is None] == ["C9"]


def test_planted_disagreements_are_found(tmp_path: Path) -> None:
    plant(tmp_path, {"tests/test_x.py": "# proves C1\ndef test_a(): ...\n"})
    marks = list(guarantees.read_marks(tmp_path))
    promise = msgspec.structs.replace(PROMISES[0], surface="s", statements=("C1", "C2"))

    def found(statements: dict[str, Statement], *promises: object) -> list[str]:
        return guarantees.disagreements(statements, promises, marks)

    assert found(PROVEN) == []
    assert "does not have" in found({})[0]
    assert "no test proves it" in found({**PROVEN, "C2": Statement("Not proven.")})[0]
    assert found({**PROVEN, "C2": Statement("Not proven.", open="Not built.")}) == []
    assert "relies on C2" in found(PROVEN, promise)[0]
    assert "relies on C2" in found({**PROVEN, "C2": Statement("x", open="y")}, promise)[0]
    unattached = [mark._replace(proof=None) for mark in marks]
    assert "marks no test" in guarantees.disagreements(PROVEN, (), unattached)[0]


def test_the_page_separates_what_is_claimed_from_what_is_not() -> None:
    statements = {**PROVEN, "C2": Statement("It may be so.", open="Not built.")}
    page = guarantees.render_page(statements, PROMISES[:1], {"C1": ["tests/a.py::test"]})
    claimed, waiting = page.split("## What is not claimed yet")
    assert "It is so.\n- `tests/a.py::test`" in claimed
    assert "It may be so. *Not built.*" in waiting
    assert f"| {PROMISES[0].surface} | {PROMISES[0].durability.value} | yes |" in claimed
