"""Promises compared with what an engine can hold."""

import msgspec
import pytest

from perdure.core.clock import SystemClock
from perdure.core.engine import Survives
from perdure.core.errors import PromiseBroken
from perdure.core.layouts import Records
from perdure.core.promises import Durability, Promise, check_promises
from perdure.engines.memory import MemoryEngine

NOTES = Records("notes", int, key=("tenant", "id"), version=3)

WANTED = Promise(
    surface="notes",
    durability=Durability.SHARED,
    acknowledgement="durable in the engine",
    survives=Survives(process_crash=True, damage=True),
    owner="whoever holds the store",
    recovery="none needed",
    retention="for ever",
    layouts=(NOTES,),
    statements=("C3",),
)


def memory() -> MemoryEngine:
    return MemoryEngine((NOTES,), SystemClock())


async def test_the_local_profile_warns_and_names_surface_class_and_fix() -> None:
    (warning,) = check_promises([WANTED], memory(), "local")
    for part in ("notes", "shared_durable_workflow_state", "process crash", "memory://", "sqlite"):
        assert part in warning


async def test_the_shared_profile_refuses() -> None:
    with pytest.raises(PromiseBroken, match="process crash"):
        check_promises([WANTED], memory(), "shared")


async def test_shared_state_in_the_shared_profile_needs_a_shared_engine() -> None:
    modest = msgspec.structs.replace(WANTED, survives=Survives())
    assert check_promises([modest], memory(), "local") == []
    with pytest.raises(PromiseBroken, match="several processes"):
        check_promises([modest], memory(), "shared")


async def test_ephemeral_state_asks_nothing_of_an_engine() -> None:
    ephemeral = msgspec.structs.replace(WANTED, durability=Durability.EPHEMERAL)
    assert check_promises([ephemeral], memory(), "shared") == []


def test_the_version_is_the_newest_of_the_layouts() -> None:
    assert WANTED.version == 3
    assert msgspec.structs.replace(WANTED, layouts=()).version == 1
