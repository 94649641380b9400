"""A suite that cannot fail proves nothing: every planted engine is caught by the rules alone, and
some by comparing them with the reference."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from perdure.core.engine import Engine
from perdure.core.errors import PerdureError
from perdure.engines.checked import Broken
from perdure.engines.wrapping import Wrapping
from perdure.proving import conformance
from perdure.proving.differential import machine
from perdure.proving.planted_engines import (
    PLANTED,
    AppliesInParts,
    ClampsLimits,
    CountsTombstones,
    ForgetsTheLastPage,
    IgnoresExpectations,
    LosesAttachments,
    ReusesNumbers,
    subject_of,
)
from perdure.proving.rules import logs
from perdure.proving.subjects import KNOWN


@pytest.mark.parametrize("planted", PLANTED.values(), ids=lambda planted: planted.__name__)
async def test_the_rules_catch_a_planted_bug(
    planted: Callable[[Engine], Wrapping], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "SOON_S", 0.5)
    with pytest.raises(Broken):
        await conformance.prove(subject_of(planted), tmp_path)


@pytest.mark.parametrize(
    "planted",
    [
        IgnoresExpectations,
        LosesAttachments,
        ClampsLimits,
        ForgetsTheLastPage,
        AppliesInParts,
        ReusesNumbers,
        CountsTombstones,
    ],
)
def test_comparing_with_the_reference_catches_a_planted_bug(
    planted: Callable[[Engine], Wrapping],
) -> None:
    quick = settings(
        max_examples=200,
        stateful_step_count=30,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        derandomize=True,
    )
    with pytest.raises((Broken, PerdureError)):
        run_state_machine_as_test(machine(KNOWN["memory"], subject_of(planted)), settings=quick)
