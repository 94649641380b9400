"""Promises: what each surface declares about its state, and the check that an engine can hold it.

From promises come the check at start, `perdure contract`, `GET /v1/state`, the guarantees page
and the crash tests; nothing about durability is written down a second time.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Literal

import msgspec

from perdure.core.engine import Engine, Survives
from perdure.core.errors import PromiseBroken
from perdure.core.layouts import Layout

Profile = Literal["local", "shared"]


class Durability(enum.Enum):
    """The five classes of state."""

    EPHEMERAL = "ephemeral_request_state"
    RESTART_SAFE = "restart_safe_local_state"
    SHARED = "shared_durable_workflow_state"
    AUDIT = "audit_analytics_telemetry"
    DERIVED = "derived_projection_state"


class LossBound(msgspec.Struct, frozen=True):
    """The most that a crash may take when acknowledgement comes before durability."""

    operations: int
    milliseconds: int


class Promise(msgspec.Struct, frozen=True):
    """What a surface declares. The texts are for operators and go into every listing unchanged.

    `statements` are the ids in docs/statements.toml that this surface relies on; the tests that
    prove them are listed beside it.
    """

    surface: str
    durability: Durability
    acknowledgement: str
    survives: Survives
    owner: str
    recovery: str
    retention: str
    layouts: tuple[Layout, ...]
    statements: tuple[str, ...]
    loss_bound: LossBound | None = None

    @property
    def version(self) -> int:
        """Schema version: the newest among the layouts."""
        return max((layout.version for layout in self.layouts), default=1)


def check_promises(promises: Sequence[Promise], engine: Engine, profile: Profile) -> list[str]:
    """Compare every promise with what the engine can hold.

    In profile `shared` those that do not fit raise `PromiseBroken`, naming surface, class and
    fix. In `local` they come back as warnings, to be shown wherever health is shown.
    """
    without: dict[str, list[str]] = {}
    for promise in promises:
        if lacking := _lacking(promise, engine, profile):
            without.setdefault(lacking, []).append(
                f"{promise.surface} ({promise.durability.value})"
            )
    warnings = [
        f"{', '.join(surfaces)} {'need' if len(surfaces) > 1 else 'needs'} an engine that "
        f"{lacking}; {engine.url} does not. Use --engine sqlite:///PATH for one process, "
        "or postgresql://... for several."
        for lacking, surfaces in without.items()
    ]
    if warnings and profile == "shared":
        raise PromiseBroken(" ".join(warnings))
    return warnings


def _lacking(promise: Promise, engine: Engine, profile: Profile) -> str:
    if promise.durability is Durability.EPHEMERAL:
        return ""
    wanted = [
        name.replace("_", " ")
        for name in ("process_crash", "power_cut", "failed_sync", "damage")
        if getattr(promise.survives, name) and not getattr(engine.survives, name)
    ]
    if wanted:
        return "survives " + ", ".join(wanted)
    if profile == "shared" and promise.durability is Durability.SHARED and not engine.shared:
        return "several processes can share"
    return ""
