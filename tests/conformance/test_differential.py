"""Any sequence of operations gives the same answers on every engine as on the reference."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from perdure.proving.differential import machine
from perdure.proving.subject import Subject
from perdure.proving.subjects import KNOWN
from tests.conformance.test_conformance import ASKED

THOROUGH = settings(
    max_examples=30,
    phases=[Phase.explicit, Phase.generate],
    stateful_step_count=40,
    deadline=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)
MEMORY = KNOWN["memory"]
EXAMPLES = {"postgres": 8, "sharded": 12}
"""Fewer in the same time where every step is answered by another process or by several stores."""


# proves C20, C21
@pytest.mark.parametrize("subject", ASKED, ids=lambda subject: subject.name)
def test_an_engine_answers_as_the_reference_does(subject: Subject) -> None:
    examples = EXAMPLES.get(subject.name, THOROUGH.max_examples)
    thorough = settings(THOROUGH, max_examples=examples)
    run_state_machine_as_test(machine(MEMORY, subject), settings=thorough)
