"""Recovery: what a start does about the work that the last process left unfinished.

Every step is a commit that finishes the thing it found, so a crash in the middle of recovery, or
a second restart, finds what is left and nothing else. What is damaged is reported, by name, and
does not keep the rest from recovering.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import structlog

from perdure.core.clock import Clock
from perdure.core.engine import Recovered
from perdure.core.errors import Conflict, Damaged, Invalid, LimitExceeded
from perdure.core.keys import show
from perdure.core.limits import PAGE_MAX
from perdure.core.values import Finding
from perdure.services.ending import TOO_LARGE, close_open, ending
from perdure.surfaces.boots import SurfaceRecovery
from perdure.surfaces.responses import EVENTS, Held
from perdure.surfaces.state import State
from perdure.wire.events import Event
from perdure.wire.fold import View, apply
from perdure.wire.responses import Outcome, failed

_PAGE = 100
_TRIES_MAX = 8

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

    def __init__(self, state: State, clock: Clock) -> None:
        self._state = state
        self._clock = clock

    async def run(self, progress: Callable[[str], None]) -> list[SurfaceRecovery]:
        """Recover surface by surface; `progress` is told how far it is."""
        return [await self._recover_responses(progress)]

    async def interrupt(self, held: Held, outcome: Outcome) -> None:
        """End a response that nobody generates any more, keeping what its events amount to."""
        bare = False
        for _ in range(_TRIES_MAX):
            view, after = await self._replay(held)
            try:
                end = await ending(
                    self._state,
                    held,
                    view,
                    outcome,
                    self._clock,
                    after=after,
                    pending=[] if bare else close_open(view),
                    bare=bare,
                )
                await self._state.commit(end.batch)
                return
            except LimitExceeded:
                if bare:
                    raise
                bare, outcome = True, TOO_LARGE
            except Conflict:
                held = await self._state.responses.get(*held.key)
                if held.value.status.terminal:
                    return
        raise Conflict(f"the end of response {held.key[-1]}", "no other writer", "another writer")

    async def _recover_responses(self, progress: Callable[[str], None]) -> SurfaceRecovery:
        """Every response that has not ended belonged to a process that is gone."""
        began_s = self._clock.monotonic_s()
        interrupted = 0
        findings: list[Finding] = []
        cursor: str | None = None
        while True:
            try:
                page = await self._state.responses.unfinished(limit=_PAGE, cursor=cursor)
            except Damaged as damage:
                findings.append(Finding(damage.where, damage.why))
                if damage.resume is None:
                    break
                cursor = damage.resume
                continue
            for held in page.items:
                try:
                    await self.interrupt(held, RESTARTED)
                    interrupted += 1
                except Damaged as damage:
                    findings.append(Finding(damage.where, damage.why))
                except Invalid as error:  # its end cannot be written; the others must start
                    findings.append(Finding(f"responses {show(held.key)}", str(error)))
                progress(f"responses: {interrupted} interrupted, {len(findings)} damaged")
            cursor = page.cursor
            if cursor is None:
                break
        for finding in findings:
            _log.error("damaged", where=finding.where, why=finding.why)
        return SurfaceRecovery(
            surface="responses",
            loaded=interrupted + len(findings),
            interrupted=interrupted,
            damaged=len(findings),
            duration_s=round(self._clock.monotonic_s() - began_s, 6),
            findings=tuple(findings),
        )

    async def _replay(self, held: Held) -> tuple[View, int]:
        """What the stored events of a response amount to, and the number of the last one.

        Raises `Damaged` for a log that does not tell of a response from its beginning.
        """
        where = f"{EVENTS.name} {show(held.key)}"
        view = View()
        after = 0
        while True:
            entries = await self._state.engine.read(EVENTS, held.key, after=after, limit=PAGE_MAX)
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
