"""Verification: everything that is stored against what was written, the same whether a server holds
the store or nobody does.

Rows, bytes, and rows against bytes. Bytes that no row names are no damage: they are what a crash or
a deletion left over, and the next sweep frees them.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from perdure.core.engine import Engine
from perdure.core.values import Finding
from perdure.services.blobs import BlobKeeper

FINDINGS_MAX = 1_000


class Reclaimable(msgspec.Struct, frozen=True, kw_only=True):
    """What is stored that nothing needs: whole blobs, and bytes that never became one."""

    blobs: int = 0
    size_bytes: int = 0
    leftovers: int = 0


class Verified(msgspec.Struct, frozen=True, kw_only=True):
    """What a walk over everything stored has found. `more` says that the list was cut off, and the
    walk with it."""

    object: Literal["perdure.verification"] = "perdure.verification"
    ok: bool
    findings: list[Finding]
    more: bool
    reclaimable: Reclaimable


async def verify(engine: Engine, keeper: BlobKeeper) -> Verified:
    """Walk everything. Nothing is changed."""
    findings: list[Finding] = []
    leftovers = 0
    for source in (engine.verify, keeper.blobs.verify, keeper.verify):
        async for finding in source():
            if finding.kind == "leftover":
                leftovers += 1
            elif len(findings) == FINDINGS_MAX:
                nothing = Reclaimable()
                return Verified(ok=False, findings=findings, more=True, reclaimable=nothing)
            else:
                findings.append(finding)
    sizes = [blob.size_bytes async for blob in keeper.reclaimable()]
    left = Reclaimable(blobs=len(sizes), size_bytes=sum(sizes), leftovers=leftovers)
    return Verified(ok=not findings, findings=findings, more=False, reclaimable=left)
