"""The public conformance suite on every engine of this repository, and proof that it can fail."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from perdure.core.errors import Invalid
from perdure.engines.checked import Broken
from perdure.proving import conformance
from perdure.proving.conformance import RULES
from perdure.proving.rules import Rule
from perdure.proving.subject import Subject
from perdure.proving.subjects import KNOWN
from tests.conftest import PROVEN_ON

ASKED = conformance.asked_for(KNOWN, os.environ)


# proves C21
@pytest.mark.parametrize("subject", ASKED, ids=lambda subject: subject.name)
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name.replace(" ", "_"))
async def test_rule(
    rule: Rule,
    subject: Subject,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    if not await conformance.applies(rule, subject, tmp_path / "asked"):
        pytest.skip(f"not a rule for {subject.name}")
    await conformance.run(rule, subject, tmp_path)
    record_property(PROVEN_ON, subject.name)


def test_every_statement_about_engines_has_a_rule() -> None:
    proven = {statement for rule in RULES for statement in rule.statements}
    assert proven >= {"C3", "C4", "C5", "C6", "C7", "C8", "C18", "C19", "C20", "C22", "C23"}


def test_rules_have_distinct_names() -> None:
    names = [rule.name for rule in RULES]
    assert len(names) == len(set(names))


def test_an_engine_that_is_asked_for_and_absent_fails_the_run() -> None:
    assert conformance.asked_for(KNOWN, {}) == list(KNOWN.values())
    assert conformance.asked_for(KNOWN, {conformance.ENGINES: "memory"}) == [KNOWN["memory"]]
    with pytest.raises(Invalid, match="asks for 'mongo'"):
        conformance.asked_for(KNOWN, {conformance.ENGINES: "memory,mongo"})


async def test_proving_prints_what_ran_and_names_what_is_broken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    memory = KNOWN["memory"]
    await conformance.prove(memory, tmp_path / "sound", RULES[:3])
    assert "memory: 3 of 3 rules hold" in capsys.readouterr().out

    async def broken(store: object) -> None:
        raise Broken("as planned")

    with pytest.raises(Broken, match="never holds"):
        await conformance.prove(
            memory, tmp_path / "broken", (*RULES[:1], Rule("never holds", (), broken))
        )
    assert "BROKEN never holds: Broken: as planned" in capsys.readouterr().out
