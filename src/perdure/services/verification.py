"""Verification: everything that is stored against what was written, the same whether a server holds
the store or nobody does.

Rows, bytes, rows against bytes, and the rows of workers against each other. Bytes that no row names
are no damage: they are what a crash or a deletion left over, and the next sweep frees them.
Files that somebody put among those of a store are none either: they are named, and left alone.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from functools import partial
from typing import Literal

import msgspec

from perdure.core.engine import Engine
from perdure.core.errors import Damaged
from perdure.core.keys import Key
from perdure.core.values import Finding
from perdure.services.blobs import BlobKeeper
from perdure.services.worker_checks import check_workers
from perdure.surfaces.state import State

FINDINGS_MAX = 1_000


class Reclaimable(msgspec.Struct, frozen=True, kw_only=True):
    """What is stored that nothing needs: whole blobs, and bytes that never became one."""

    blobs: int = 0
    size_bytes: int = 0
    leftovers: int = 0


class Verified(msgspec.Struct, frozen=True, kw_only=True):
    """What a walk over everything stored has found. `more` says that the list was cut off, and the
    walk with it. `strays` are files that are none of the store's; of more, the first are listed.
    `accepted` is what was taken before the walk for what is stored, as somebody asked for that."""

    object: Literal["perdure.verification"] = "perdure.verification"
    ok: bool
    findings: list[Finding]
    more: bool
    reclaimable: Reclaimable
    strays: list[Finding] = []
    accepted: list[Finding] = []


async def verify(engine: Engine, keeper: BlobKeeper, *, workers: bool = True) -> Verified:
    """Walk everything. Nothing is changed."""
    stored = (engine.verify, keeper.blobs.verify, keeper.verify)
    found = await _walk((*stored, partial(check_workers, engine)) if workers else stored)
    if found.more:
        return found
    sizes = [blob.size_bytes async for blob in keeper.reclaimable()]
    left = msgspec.structs.replace(found.reclaimable, blobs=len(sizes), size_bytes=sum(sizes))
    return msgspec.structs.replace(found, reclaimable=left)


async def verify_workers(state: State, within: Key) -> Verified:
    """Walk the workers of a tenant, of a runtime, or one. Nothing is changed. Raises `NotFound`."""
    with suppress(Damaged):  # it is there, and told of
        if len(within) > 1:
            await state.runtimes.runtime(within[:2])
        if len(within) > 2:
            await state.runtimes.get(within)
    return await _walk((partial(check_workers, state.engine, within),))


async def _walk(sources: tuple[Callable[[], AsyncIterator[Finding]], ...]) -> Verified:
    findings: dict[Finding, None] = {}  # what several meet is told once
    strays: list[Finding] = []
    leftovers, more = 0, False
    for source in sources:
        async for finding in source():
            more = len(findings) == FINDINGS_MAX and finding not in findings
            if more:
                break
            if finding.kind == "leftover":
                leftovers += 1
            elif finding.kind == "stray":
                strays += [finding] if len(strays) < FINDINGS_MAX else []
            else:
                findings[finding] = None
    left = Reclaimable(leftovers=0 if more else leftovers)
    return Verified(
        ok=not findings, findings=list(findings), more=more, reclaimable=left, strays=strays
    )
