"""Every promise to survive damage is put to the test: a bit of each kind of thing that a surface
keeps changes while no server runs, and the next one names it, answers nothing else than before, and
goes on; and servers that trust what they read, or hide what they cannot, are caught."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from perdure.core.promises import Promise
from perdure.proving.campaign import Stage
from perdure.proving.drills.damaged_server import Patient, Wound, patient
from perdure.surfaces.state import PROMISES

pytestmark = pytest.mark.asyncio(loop_scope="module")

SEED = "ci"
CLAIMS = [promise for promise in PROMISES if promise.survives.damage]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def hurt(stage: Stage, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Patient]:
    async with patient(stage, tmp_path_factory.mktemp("life"), SEED) as hurt:
        assert hurt.troubles == []
        yield hurt


def one_of_each(hurt: Patient, surface: str) -> list[Wound]:
    """Of different things, where there are several."""
    return [kind[at % len(kind)] for at, kind in enumerate(hurt.kinds[surface])]


# proves C7
@pytest.mark.parametrize("promise", CLAIMS, ids=lambda promise: promise.surface)
async def test_a_surface_survives_damage_as_it_promises(
    hurt: Patient, promise: Promise, tmp_path: Path
) -> None:
    wounds = one_of_each(hurt, promise.surface)
    assert wounds
    assert await hurt.judge(wounds, tmp_path, SEED) == []


@pytest.mark.parametrize(
    ("plant", "seen"), [("trusts-rows", "is not what"), ("hides-damage", "and is gone")]
)
async def test_a_server_that_answers_anything_else_is_caught(
    stage: Stage, tmp_path: Path, plant: str, seen: str
) -> None:
    async with patient(stage, tmp_path / "life", SEED, plant) as hurt:
        assert hurt.troubles == []
        bodies = [it for kind in hurt.kinds["responses"] for it in kind if it.part == "attachment"]
        found = await hurt.judge(bodies, tmp_path, SEED)
    assert any(seen in what for what in found), found
