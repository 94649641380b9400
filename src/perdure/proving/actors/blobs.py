"""Blobs: the same bytes sent and deleted by several at once; bytes that nobody needs are gone, and
bytes that somebody needs never are."""

from __future__ import annotations

import asyncio
import hashlib
from collections import defaultdict
from collections.abc import Coroutine
from typing import Any

from perdure.proving.actors.files import Sent, bytes_of, delete, judge_files, send
from perdure.proving.client import Client
from perdure.proving.oracle import Check, History, Verdict
from perdure.proving.snapshot import Snapshot
from perdure.proving.workload import Scene
from perdure.services.holds import owner_of_job
from perdure.surfaces.blobs import CLAIMS, REFERENCES
from perdure.surfaces.files import FILES, PARTS, owner_of, owner_of_part
from perdure.surfaces.jobs import JOBS

SURFACE = "blobs"

_CONTENTS = 3
"""How many different contents there are, so that files have the same often."""


class BlobsActor:
    """See `proving.workload.Actor`."""

    surface = SURFACE

    def __init__(self) -> None:
        self._sent: dict[int, list[Sent]] = defaultdict(list)

    async def act(self, client: Client) -> None:
        own = self._sent[client.worker]
        leaving = [sent for sent in own if sent.id and not sent.deletion][-2:]
        coming = []
        for _ in range(client.rng.randint(1, 2)):
            op = client.history.intend(SURFACE, "create", creates="file")
            content = f"content {client.rng.randrange(_CONTENTS)}"
            coming.append(Sent(op, bytes_of(content, 5_000)))
        own += coming
        works: list[Coroutine[Any, Any, object]] = [send(client, sent) for sent in coming]
        if leaving and client.rng.random() < 0.7:
            works.append(delete(client, client.rng.choice(leaving), SURFACE))
        outcomes = await asyncio.gather(*works, return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome

    async def judge(self, scene: Scene) -> None:
        await judge_files(scene, SURFACE, (sent for own in self._sent.values() for sent in own))

    def audit(self, store: Snapshot, history: History, verdict: Verdict, *, settled: bool) -> None:
        files = {
            (key[0], piece.digest, owner_of(key[-1]))
            for key, kept in store.records[FILES.name].items()
            for piece in kept.value.pieces
        }
        parts = {
            (key[0], kept.value.piece.digest, owner_of_part(key[-1]))
            for key, kept in store.records[PARTS.name].items()
        }
        jobs = {
            (key[0], blob.digest, owner_of_job(key))
            for key, kept in store.records[JOBS.name].items()
            for blob in kept.value.blobs
        }
        held = files | parts | jobs
        referred = set(store.records[REFERENCES.name])
        verdict.holds(
            Check.ATOMIC,
            SURFACE,
            held == referred,
            f"what is kept and references are two things: {sorted(held ^ referred)}",
        )
        needed = {digest for _, digest, _ in referred}
        claimed = {kept.value.digest for kept in store.records[CLAIMS.name].values()}
        for digest, data in store.blobs.items():
            whole = hashlib.sha256(data).hexdigest() == digest
            verdict.holds(Check.WHOLE, SURFACE, whole, f"{digest} has other bytes")
            found = digest in needed or digest in claimed or (history.fenced and not settled)
            verdict.holds(Check.CLEAN, SURFACE, found, f"{digest} is there, and nobody knows")
        if settled:
            over = sorted((claimed | store.blobs.keys()) - needed)
            verdict.holds(Check.CLEAN, SURFACE, not over, f"nobody needs {over}")
