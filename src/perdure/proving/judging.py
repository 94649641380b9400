"""What a campaign knows, whatever becomes of its servers: what was asked and acknowledged, who
judges which surface, and what was found so far."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from perdure.core.promises import Promise
from perdure.proving.actors import actors
from perdure.proving.client import Client, Gone
from perdure.proving.oracle import Check, History, Verdict
from perdure.proving.snapshot import Snapshot
from perdure.proving.workload import Actor, Scene, Start, cover

J = TypeVar("J", bound="Judging")

RUNNER = "server"
"""Under which name the verdict counts what belongs to no surface."""


class Judging:
    """In a directory of its own: `data` is the servers', all else the oracle's. `more` are actors
    beyond those that the promises need. Use it as a context."""

    def __init__(
        self, home: Path, *, seed: str, promises: Sequence[Promise], more: Sequence[Actor]
    ) -> None:
        home.mkdir(parents=True, exist_ok=True)
        self.home = home
        self.data = home / "data"
        self.history = History(home / "history.jsonl")
        self.verdict = Verdict()
        self.actors = [*cover(promises, actors()), *more]
        self.surfaces = tuple(actor.surface for actor in self.actors)
        self.deaths: Counter[str] = Counter()
        self.ready_s: list[float] = []
        self.seed = seed
        self._stopped: set[int] = set()
        self._given_up: set[int] = set()
        self._last: Snapshot | None = None
        self._written: str | None = None

    def __enter__(self: J) -> J:
        return self

    def __exit__(self, *error: object) -> None:
        self.history.close()

    async def judge(self, client: Client, before: Snapshot, start: Start) -> None:
        """Have every actor ask the server that came back, which `client` speaks to."""
        scene = Scene(client, before, start, self.history, self.verdict)
        try:
            if await self._write_at_once(client):
                for actor in self.actors:
                    await actor.judge(scene)
        except Gone as gone:
            self.verdict.holds(Check.LIVE, RUNNER, False, f"it died while it was judged: {gone}")
        finally:
            await client.close()

    async def _write_at_once(self, client: Client) -> bool:
        """The first write after readiness works, and the one of the life before is still there."""
        holds = self.verdict.holds
        op = self.history.intend(RUNNER, "create", creates="conversation")
        body = {"metadata": {"mark": op.mark}}
        first = await client.do(op, "POST", "/v1/conversations", body)
        works = first.status == 200
        if not holds(Check.OPENS, RUNNER, works, f"ready, and a write got {first.status}"):
            return False
        if self._written is not None:
            kept = await client.get(f"/v1/conversations/{self._written}")
            holds(Check.GOES_ON, RUNNER, kept.status == 200, f"{self._written}: {kept.status}")
        self._written = first.json()["id"]
        return True

    def audit(self, store: Snapshot, *, settled: bool) -> Snapshot:
        """Judge what lies in a store that nobody serves."""
        self.verdict.none(Check.SOUND, RUNNER, store.findings)
        leftover = [name for name in store.files if name.endswith(".tmp")]
        self.verdict.holds(Check.CLEAN, RUNNER, not (settled and leftover), f"files {leftover}")
        if self._last is not None:
            self.verdict.none(Check.VERSIONS, RUNNER, list(store.fell_behind(self._last)))
        self._last = store
        for actor in self.actors:
            actor.audit(store, self.history, self.verdict, settled=settled)
        return store
