"""Removing responses that are older than they are to be kept, and nothing that somebody needs.

Invariants
- A response goes only if it has ended and no other continues it. The newest are looked at first,
  so a chain that is old as a whole goes from its end, and one that is continued stays as a whole.
- It is marked first, then looked at for what continues it, then removed with its items and events.
  A request that would continue it commits against the mark: it comes before, and is seen, or it
  conflicts. A mark that a crash left is dealt with first by the next sweep.
- A conversation owns copies of its items, so removing a response takes nothing from it.

Every piece is one bounded batch.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import msgspec
import structlog

from perdure.core.batch import Batch, join
from perdure.core.clock import Clock
from perdure.core.errors import Conflict, Damaged, Invalid
from perdure.core.keys import Key
from perdure.core.values import Finding
from perdure.services.background import job_removal
from perdure.surfaces.responses import Held
from perdure.surfaces.state import State

_DAY_S = 24 * 3600
_PIECE = 100
_PIECES_A_SWEEP = 20
_OPS_MAX = 5_000
_LISTED_MAX = 1_000
_CHILDREN_MAX = 100

_log = structlog.get_logger("perdure.retention")

Progress = Callable[[str, int, int], None]


class Pruned(msgspec.Struct, kw_only=True):
    """What was removed, or would be: `dry_run` says which. `ids` are the first of them. `needed`
    are as old and stay because a later response continues them, `running` because they have not
    ended; `damaged` cannot be read."""

    dry_run: bool
    created_before_s: int
    responses: int = 0
    ids: list[str] = []
    needed: int = 0
    running: int = 0
    damaged: list[Finding] = []

    def note(self, damage: Damaged) -> None:
        """Something could not be read, and stays."""
        if len(self.damaged) < _LISTED_MAX:
            self.damaged.append(Finding(damage.where, damage.why))


class Retention:
    """Of one state. `responses_days` is None where responses are kept until they are deleted."""

    def __init__(self, state: State, clock: Clock, responses_days: float | None) -> None:
        self.removed = 0
        self._state = state
        self._clock = clock
        self._days = responses_days
        self._cursor: str | None = None
        self._alone = asyncio.Lock()

    async def sweep(self) -> None:
        """Look at a bounded number of old responses, going on where the last sweep ended."""
        async with self._alone:
            await self._finish_marked()
            if self._days is not None:
                await self._sweep(self._days)

    async def _sweep(self, days: float) -> None:
        pruned = self._begin(days, dry_run=False)
        for _ in range(_PIECES_A_SWEEP):
            self._cursor = await self._step(pruned, self._cursor, set())
            if self._cursor is None:
                break
        if pruned.responses:
            _log.info("responses removed by retention", count=pruned.responses)

    async def prune(self, days: float | None, progress: Progress, *, dry_run: bool) -> Pruned:
        """Remove everything now that is older than `days`, by default what is configured; or only
        say what that would be. Raises `Invalid` where there is no such age."""
        days = self._days if days is None else days
        if days is None:
            raise Invalid(
                "responses are kept until they are deleted: no age is configured. Set "
                "retention.responses_days, or name one with --days."
            )
        async with self._alone:
            return await self._prune(self._begin(days, dry_run=dry_run), progress)

    async def _prune(self, pruned: Pruned, progress: Progress) -> Pruned:
        what = "looking at responses" if pruned.dry_run else "removing responses"
        if not pruned.dry_run:
            await self._finish_marked()
        cursor: str | None = None
        gone: set[Key] = set()
        while True:
            cursor = await self._step(pruned, cursor, gone)
            seen = pruned.responses + pruned.needed + pruned.running
            progress(what, seen, 0)
            if cursor is None:
                return pruned

    def _begin(self, days: float, *, dry_run: bool) -> Pruned:
        return Pruned(dry_run=dry_run, created_before_s=int(self._clock.now_s() - days * _DAY_S))

    async def _step(self, pruned: Pruned, cursor: str | None, gone: set[Key]) -> str | None:
        """One piece; returns where to go on. A dry run remembers in `gone` what it would have
        removed, as that is not gone when what it continues is looked at."""
        responses = self._state.responses
        try:
            page = await responses.older_than(pruned.created_before_s, limit=_PIECE, cursor=cursor)
        except Damaged as damage:
            pruned.note(damage)
            return damage.resume
        ended = [held for held in page.items if held.value.status.terminal]
        pruned.running += len(page.items) - len(ended)
        if pruned.dry_run:
            removed = await self._free(ended, gone)
            gone.update(held.key for held in removed)
        else:
            removed = await self._remove(ended, pruned)
        pruned.responses += len(removed)
        pruned.needed += len(ended) - len(removed)
        room = _LISTED_MAX - len(pruned.ids)
        pruned.ids += [held.key[-1] for held in removed[:room]]
        return page.cursor

    async def _free(self, piece: Sequence[Held], gone: set[Key]) -> list[Held]:
        """Those of a piece that nothing continues but what is gone, or goes with this piece; each
        after what continues it, however those of one second are ordered."""
        continued = [
            (held, await self._state.responses.continued_by(held.key, limit=_CHILDREN_MAX))
            for held in piece
        ]
        free: list[Held] = []
        going = set(gone)
        while True:
            found = [
                held
                for held, children in continued
                if held.key not in going
                and len(children) < _CHILDREN_MAX
                and going.issuperset(children)
            ]
            if not found:
                return free
            free += found
            going.update(held.key for held in found)

    async def _remove(self, piece: Sequence[Held], pruned: Pruned) -> list[Held]:
        """Mark, look, remove. What changed meanwhile stays for the next time."""
        responses = self._state.responses
        wanted = await self._free(piece, set())
        since_s = int(self._clock.now_s())
        marked = await self._state.commit(
            join(responses.expire(held.key, since_s) for held in wanted)
        )
        marks = {
            held.key: responses.spare(held.key, version)
            for held, version in zip(wanted, marked.numbers, strict=True)
        }
        removed: list[Held] = []
        batch, going = Batch(), list[Held]()
        for held in await self._free(wanted, set()):
            try:
                owned = await self._state.items.removal(held.key)
                owned += await job_removal(self._state, held)
            except Damaged as damage:
                pruned.note(damage)
                continue
            batch += responses.delete(held) + marks[held.key] + owned
            going.append(held)
            if len(batch.ops) > _OPS_MAX:
                removed += await self._commit(batch, going)
                batch, going = Batch(), []
        removed += await self._commit(batch, going)
        gone = {held.key for held in removed}
        for key in marks.keys() - gone:
            await self._commit(marks[key], [])
        self.removed += len(removed)
        return removed

    async def _commit(self, batch: Batch, going: list[Held]) -> list[Held]:
        """What went with the batch: all of it, or nothing where a client came between."""
        try:
            await self._state.commit(batch)
        except Conflict:
            return []
        return going

    async def _finish_marked(self) -> None:
        """Marks of a process that died: what they mark may be continued again, or is gone."""
        responses = self._state.responses
        while keys := await responses.expiring(limit=_PIECE):
            await self._state.commit(join(responses.spare(key, None) for key in keys))
