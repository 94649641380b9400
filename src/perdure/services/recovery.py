"""Recovery: what a start does about the work that the last process left unfinished.

Every step is a commit that finishes the thing it found, so a crash in the middle of recovery, or
a second restart, finds what is left and nothing else. What is damaged is reported, by name, and
does not keep the rest from recovering.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import suppress
from typing import TypeVar

import msgspec
import structlog

from perdure.core.batch import Batch
from perdure.core.clock import Clock
from perdure.core.engine import Recovered
from perdure.core.errors import Conflict, Damaged, Invalid, LimitExceeded, Missing
from perdure.core.keys import Key, show
from perdure.core.limits import PAGE_MAX
from perdure.core.values import Finding, Page
from perdure.services.ending import TOO_LARGE, close_open, ending
from perdure.services.fleet import Fleet
from perdure.surfaces.boots import SurfaceRecovery
from perdure.surfaces.jobs import Held as HeldJob
from perdure.surfaces.responses import EVENTS, Held, wire_body
from perdure.surfaces.state import State
from perdure.surfaces.workers import Diagnostic
from perdure.surfaces.workers import Held as Worker
from perdure.wire.events import Event
from perdure.wire.fold import View, apply
from perdure.wire.responses import Body, Outcome, failed

T = TypeVar("T")

_PAGE = 100
_TRIES_MAX = 8
_NOTHING = Batch()

_log = structlog.get_logger("perdure.recovery")

RESTARTED = failed(
    "The server was restarted while this response was being generated. "
    "What had been generated is kept; send the request again to get a whole answer.",
    perdure={"reason": "process_restart"},
)
STOPPED = failed(
    "The server was stopped while this response was being generated. "
    "What had been generated is kept; send the request again to get a whole answer.",
    perdure={"reason": "server_stopped"},
)

ORPHANED = failed(
    "The record of the work that was to make this response is damaged or gone. "
    "What had been generated is kept; send the request again to get a whole answer.",
    perdure={"reason": "job_lost"},
)


def engine_recovery(recovered: Recovered) -> SurfaceRecovery:
    """The engine's own part of the report."""
    return SurfaceRecovery(
        surface="engine",
        replayed=recovered.replayed,
        cut=len(recovered.cut),
        damaged=len(recovered.findings),
        duration_s=recovered.duration_s,
        findings=recovered.cut + recovered.findings,
    )


class Recovery:
    """Recovers the surfaces of one state."""

    def __init__(self, state: State, clock: Clock, fleet: Fleet) -> None:
        self._state = state
        self._clock = clock
        self._fleet = fleet

    async def run(self, progress: Callable[[str], None]) -> list[SurfaceRecovery]:
        """Recover surface by surface; `progress` is told how far it is."""
        return [
            await self._recover_responses(progress),
            await self._recover_jobs(progress),
            await self._recover_workers(progress),
        ]

    async def _recover_responses(self, progress: Callable[[str], None]) -> SurfaceRecovery:
        """A response that has not ended and whose runner is not alive was left by it."""
        began_s = self._clock.monotonic_s()
        interrupted = 0
        findings: list[Finding] = []
        async for held in unfinished(self._state.responses.unfinished, findings):
            if await self._fleet.lives(held.value.runner):
                continue
            interrupted += await _interrupted(self._state, held, RESTARTED, self._clock, findings)
            progress(f"responses: {interrupted} interrupted, {len(findings)} damaged")
        return self._told("responses", findings, began_s, interrupted=interrupted)

    async def _recover_jobs(self, progress: Callable[[str], None]) -> SurfaceRecovery:
        """A job is taken from a runner that is not alive, to wait for another."""
        began_s = self._clock.monotonic_s()
        requeued = 0
        stuck: set[Key] = set()
        findings: list[Finding] = []
        async for held in unfinished(self._state.jobs.unfinished, findings):
            if await self._fleet.lives(held.value.runner):
                continue
            if held.value.runner is not None:
                try:
                    await self._requeue(held)
                except Damaged as damage:
                    findings.append(Finding(damage.where, damage.why))
                    stuck.add(held.key)
                    continue
            requeued += 1
            progress(f"jobs: {requeued} requeued, {len(findings)} damaged")
        lost = await end_orphans(self._state, self._clock, findings, stuck)
        return self._told("jobs", findings, began_s, requeued=requeued, interrupted=lost)

    async def _recover_workers(self, progress: Callable[[str], None]) -> SurfaceRecovery:
        """A worker is taken from a runner that is not alive, to be ready for another."""
        began_s = self._clock.monotonic_s()
        interrupted = 0
        findings: list[Finding] = []
        async for held in unfinished(self._state.runtimes.vouched_for, findings):
            if await self._fleet.lives(held.value.runner):
                continue
            interrupted += await free(self._state, held, self._clock, findings)
            progress(f"workers: {interrupted} interrupted, {len(findings)} damaged")
        return self._told("workers", findings, began_s, interrupted=interrupted)

    async def _requeue(self, held: HeldJob) -> None:
        at_s = int(self._clock.now_s())
        with suppress(Conflict):  # another process was here
            await self._state.commit(self._state.jobs.requeue(held, "process_restart", at_s=at_s))

    def _told(
        self, surface: str, findings: list[Finding], began_s: float, **counts: int
    ) -> SurfaceRecovery:
        for finding in findings:
            _log.error("damaged", where=finding.where, why=finding.why)
        return SurfaceRecovery(
            surface=surface,
            loaded=sum(counts.values()) + len(findings),
            damaged=len(findings),
            duration_s=round(self._clock.monotonic_s() - began_s, 6),
            findings=tuple(findings),
            **counts,
        )


async def free(state: State, held: Worker, clock: Clock, findings: list[Finding]) -> int:
    """Take a worker from a run whose process is dead, or note what of it is damaged; tell of
    either. How many were freed."""
    surface, at_s = state.runtimes, int(clock.now_s())
    tenant, runtime_id, worker_id = held.key
    try:
        counts = await surface.state(held.key)
        batch, _ = surface.move(
            held, counts, "interrupted", clock.new_id("evt"), at_s=at_s, reason="process_restart"
        )
    except Missing:  # another process has removed it
        return 0
    except Damaged as damage:
        findings.append(Finding(damage.where, damage.why))
        told = Diagnostic("damaged", damage.where, damage.why, at_s, worker_id)
        batch, freed = surface.diagnose(tenant, runtime_id, told), 0
    else:
        where = f"worker {show(held.key)}, generation {held.value.generation}"
        why = "the process that vouched for its run is dead; start it to go on"
        told = Diagnostic("interrupted", where, why, at_s, worker_id)
        batch, freed = batch + surface.diagnose(tenant, runtime_id, told, expect=None), 1
    try:
        await state.commit(batch)
    except Conflict:  # another process is at it, or this was told before
        return 0
    return freed


async def unfinished(
    page: Callable[..., Awaitable[Page[T]]], findings: list[Finding]
) -> AsyncIterator[T]:
    """Everything that a scan of unfinished work yields; what is damaged goes to `findings`."""
    cursor: str | None = None
    while True:
        try:
            found = await page(limit=_PAGE, cursor=cursor)
        except Damaged as damage:
            findings.append(Finding(damage.where, damage.why))
            if damage.resume is None:
                return
            cursor = damage.resume
            continue
        for held in found.items:
            yield held
        cursor = found.cursor
        if cursor is None:
            return


async def end_orphans(
    state: State, clock: Clock, findings: list[Finding], stuck: Collection[Key] = ()
) -> int:
    """End every response whose job is gone, cannot be read, or is `stuck` as its events are
    damaged; how many there were."""
    ended = 0
    async for held in unfinished(state.responses.in_background, findings):
        assert held.value.job_id is not None
        job = held.key[0], held.value.job_id
        try:
            if job not in stuck and await state.jobs.find(job) is not None:
                continue
        except Damaged:
            pass
        ended += await _interrupted(state, held, ORPHANED, clock, findings)
    return ended


async def _interrupted(
    state: State, held: Held, outcome: Outcome, clock: Clock, findings: list[Finding]
) -> int:
    """End one and note what of it is damaged; how many were ended whole."""
    try:
        damage = await interrupt(state, held, outcome, clock)
    except (Conflict, Missing):  # another process is at it, or has deleted it
        return 0
    except Damaged as error:
        damage = error
    except Invalid as error:  # its end cannot be written; the others must start
        findings.append(Finding(f"responses {show(held.key)}", str(error)))
        return 0
    if damage is None:
        return 1
    findings.append(Finding(damage.where, damage.why))
    return 0


async def interrupt(
    state: State, held: Held, outcome: Outcome, clock: Clock, also: Batch = _NOTHING
) -> Damaged | None:
    """End a response that nobody generates, keeping what its events amount to, in one commit with
    `also`. Where they cannot be read it ends as failed without them, and the damage is returned.
    Raises `Conflict` where other writers keep coming between, or `also` does not fit."""
    bare = False
    damage: Damaged | None = None
    for _ in range(_TRIES_MAX):
        try:
            view, after = await replay(state, held)
        except Damaged as unread:
            damage, bare = unread, True
            view, after = View(), (await state.engine.tip(EVENTS, held.key)).last
            view.response = _decode_body(wire_body(held))
            if outcome.status != "cancelled":
                outcome = failed(
                    f"What had been generated of this response cannot be read: {damage}",
                    perdure={"reason": damage.code},
                )
        pending = [] if bare else close_open(view)
        try:
            end = await ending(
                state, held, view, outcome, clock, after=after, pending=pending, bare=bare
            )
            await state.commit(end.batch + also)
            return damage
        except LimitExceeded:
            if bare:
                raise
            bare, outcome = True, TOO_LARGE
        except Conflict:
            held = await state.responses.get(*held.key)
            if held.value.status.terminal:
                return damage
    raise Conflict(f"the end of response {held.key[-1]}", "no other writer", "another writer")


async def replay(state: State, held: Held) -> tuple[View, int]:
    """What the stored events of a response amount to, and the number of the last one.

    Raises `Damaged` for a log that does not tell of a response from its beginning.
    """
    where = f"{EVENTS.name} {show(held.key)}"
    view = View()
    after = 0
    while True:
        entries = await state.engine.read(EVENTS, held.key, after=after, limit=PAGE_MAX)
        for entry in entries:
            try:
                apply(view, _decode(bytes(entry.value)))
            except (msgspec.MsgspecError, KeyError) as error:
                why = f"it does not follow from those before ({error})"
                raise Damaged(f"{where} entry {entry.seq}", why) from error
            after = entry.seq
        if len(entries) < PAGE_MAX:
            break
    if view.response is None:
        raise Damaged(where, "there is no event that created the response")
    return view, after


_decode = msgspec.json.Decoder(Event).decode
_decode_body: Callable[[bytes], Body] = msgspec.json.Decoder(Body).decode
