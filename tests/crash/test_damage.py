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
from perdure.proving.drills.damaged_server import Left, Patients, Wound, patients
from perdure.surfaces.state import PROMISES

pytestmark = pytest.mark.asyncio(loop_scope="module")

SEED = "ci"
CLAIMS = [promise for promise in PROMISES if promise.survives.damage]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def hurt(stage: Stage, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Patients]:
    async with patients(stage, tmp_path_factory.mktemp("life"), SEED) as hurt:
        assert hurt.troubles == []
        yield hurt


def one_of_each(left: Left, surface: str) -> list[Wound]:
    """Of different things, where there are several."""
    return [kind[at % len(kind)] for at, kind in enumerate(left.kinds[surface])]


# proves C7
@pytest.mark.parametrize("promise", CLAIMS, ids=lambda promise: promise.surface)
async def test_a_surface_survives_damage_as_it_promises(
    hurt: Patients, promise: Promise, tmp_path: Path
) -> None:
    wounds = one_of_each(hurt.rest, promise.surface)
    assert wounds
    assert await hurt.judge(hurt.rest, wounds, tmp_path, SEED) == []


# proves C7
async def test_a_server_starts_and_works_where_all_that_one_killed_at_work_has_left_is_damaged(
    hurt: Patients, tmp_path: Path
) -> None:
    wounds = [
        wound
        for kinds in hurt.killed.kinds.values()
        for kind in kinds
        for wound in kind
        if wound.part != "entry"  # which nobody looks at behind a damaged tip
    ]
    assert len(wounds) > 50
    assert await hurt.judge(hurt.killed, wounds, tmp_path, SEED) == []


@pytest.mark.parametrize(
    ("plant", "seen"), [("trusts-rows", "is not what"), ("hides-damage", "and is gone")]
)
async def test_a_server_that_answers_anything_else_is_caught(
    hurt: Patients, tmp_path: Path, plant: str, seen: str
) -> None:
    kinds = hurt.rest.kinds["responses"]
    bodies = [wound for kind in kinds for wound in kind if wound.part == "attachment"]
    found = await hurt.judge(hurt.rest, bodies, tmp_path, SEED, plant)
    assert any(seen in what for what in found), found
