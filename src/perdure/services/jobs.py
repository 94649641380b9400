"""The jobs service: who runs the durable work that waits, how much of it at once, and what becomes
of it when this process stops.

The queue here holds keys only. When the turn of one comes, its record is looked up and decides what
is done. Every step is a commit that expects the record as it was read, so it does not matter how
often, or in how many processes, a key is queued.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

import msgspec
import structlog

from perdure.core.clock import Clock
from perdure.core.errors import Conflict, Damaged, Invalid, Missing, PerdureError, Unavailable
from perdure.core.keys import Key, show
from perdure.core.values import Finding
from perdure.services.conversations import decided
from perdure.services.holds import Holds
from perdure.services.recovery import end_orphans, unfinished
from perdure.services.supervisor import contained
from perdure.surfaces.jobs import JOBS, Held, Status
from perdure.surfaces.state import State

RETRY_S = 5.0
"""How soon a job that could not be begun or ended is looked at again."""

_log = structlog.get_logger("perdure.jobs")


class JobCounts(msgspec.Struct, frozen=True):
    """Jobs of this process that have not ended: `queued` wait for their turn, `waiting` for another
    try. The age is that of the longest in the queue, 0 where it is empty."""

    queued: int = 0
    running: int = 0
    waiting: int = 0
    oldest_queued_age_s: float = 0.0


class Kind(Protocol):
    """How one kind of job is done. Everything raises `Conflict` where another writer changed the
    job meanwhile, and what the store raises."""

    async def run(self, held: Held) -> bool:
        """Begin an attempt; return once the job has ended, waits again, or has another owner.
        Whether it waits again."""
        ...

    async def cancel(self, held: Held) -> None:
        """End a job that is to be cancelled."""
        ...

    async def give_up(self, held: Held) -> None:
        """End a job that has used up its attempts."""
        ...

    async def fail(self, held: Held, error: PerdureError) -> None:
        """End a job that cannot be done, what it needs being damaged or gone."""
        ...

    async def heed(self) -> None:
        """Stop working on jobs that other processes have ended or taken over."""
        ...

    async def release(self, key: Key | None = None) -> None:
        """Stop working on one job, or on all and for good, and end none."""
        ...


class Jobs:
    """Runs the jobs of one state, at most `running_max` at once."""

    def __init__(
        self, state: State, holds: Holds, clock: Clock, *, running_max: int, attempts_max: int
    ) -> None:
        self.attempts_max = attempts_max
        self._state = state
        self._holds = holds
        self._clock = clock
        self._kinds: dict[str, Kind] = {}
        self._queue: asyncio.Queue[Key] = asyncio.Queue()
        self._queued_since_s: dict[Key, float] = {}
        self._room = asyncio.Semaphore(running_max)
        self._tasks: set[asyncio.Task[None]] = set()
        self._later: set[Key] = set()
        self._closed = False

    def register(self, name: str, kind: Kind) -> None:
        """Say how jobs of a kind are done."""
        self._kinds[name] = kind

    def enqueue(self, key: Key, since_s: float | None = None) -> None:
        """Let a job that was committed have its turn, for which it waits since then or from now."""
        since_s = self._clock.now_s() if since_s is None else since_s
        self._queued_since_s.setdefault(key, since_s)
        self._queue.put_nowait(key)

    def counts(self) -> JobCounts:
        """How many jobs are under way here, and how."""
        now_s = self._clock.now_s()
        oldest_s = min(self._queued_since_s.values(), default=now_s)
        return JobCounts(
            queued=len(self._queued_since_s),
            running=len(self._tasks),
            waiting=len(self._later),
            oldest_queued_age_s=round(max(0.0, now_s - oldest_s), 3),
        )

    async def adopt(self) -> None:
        """Queue everything unfinished that nobody runs, or is to stop running: cancellations first,
        then the oldest. Recovery has reported what is damaged."""
        findings: list[Finding] = []
        async for held in unfinished(self._state.jobs.unfinished, findings):
            waits = held.value.runner is None or held.value.owed == "cancel"
            if waits and held.key not in self._queued_since_s and held.key not in self._later:
                self.enqueue(held.key, held.value.created_at_s)

    async def heed(self) -> None:
        """See what other processes have done: stop what is theirs, queue what waits."""
        for kind in self._kinds.values():
            await kind.heed()
        await self.adopt()

    async def take(self) -> None:
        """Wait for a job and for room to run it, and start it."""
        key = await self._queue.get()
        await self._room.acquire()
        if self._closed:
            self._room.release()
            return
        self._queued_since_s.pop(key, None)
        task = asyncio.create_task(self._work(key), name=f"job {key[-1]}")
        self._tasks.add(task)
        task.add_done_callback(self._done)

    async def retry(self) -> None:
        """Queue once more what could not be done."""
        later, self._later = self._later, set()
        for key in later:
            self.enqueue(key)

    async def cancel(self, key: Key) -> None:
        """Cancel a job for good and return once it has ended, one way or the other. First the wish
        is made to last, which fences whoever runs it; a death from then on changes nothing."""

        async def wish() -> bool:
            try:
                held = await self._state.jobs.find(key)
            except Damaged:
                await end_orphans(self._state, self._clock, [])
                return False
            if held is not None and held.value.owed == "run":
                await self._state.commit(self._state.jobs.cancel(held))
            return held is not None and held.value.owed is not None

        if not await decided(wish):
            return
        self._later.add(key)  # should this request not come to the end of it

        async def settle() -> None:
            held = await self._state.jobs.find(key)
            if held is not None and held.value.owed is not None:
                kind = self._kinds[held.value.kind]
                await kind.release(key)
                await kind.cancel(held)

        await decided(settle)
        self._queued_since_s.pop(key, None)
        self._later.discard(key)

    async def drain(self, timeout_s: float) -> None:
        """Start nothing more; let what runs end within `timeout_s`; let go of what does not."""
        self._closed = True
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=timeout_s)
        await self.close()

    async def close(self) -> None:
        """Let go of what runs; the next boot goes on with it."""
        self._closed = True
        for kind in self._kinds.values():
            await kind.release()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._room.release()

    async def _work(self, key: Key) -> None:
        try:
            await contained("running a job", self._advance(key))
        except Conflict:
            self._later.add(key)
        except (Damaged, Invalid, Missing) as error:
            _log.error("a job cannot be done", job=key[-1], error=str(error))
            await self._fail(key, error)
        except PerdureError as error:
            _log.warning("a job has to wait", job=key[-1], error=str(error))
            self._later.add(key)

    async def _advance(self, key: Key) -> None:
        """Do what the record says is next."""
        held = await self._state.jobs.find(key)
        if held is None or held.value.owed is None:
            return
        kind = self._kinds.get(held.value.kind)
        if kind is None:
            raise Damaged(f"{JOBS.name} {show(key)}", f"nobody does a {held.value.kind!r}")
        if held.value.owed == "cancel":
            await kind.cancel(held)
        elif held.value.runner is not None:
            return
        elif held.value.attempt >= held.value.attempts_max:
            await kind.give_up(held)
        elif await kind.run(held):
            self._later.add(key)

    async def _fail(self, key: Key, error: PerdureError) -> None:
        """End a job that can never be done, and what waits for it."""
        try:
            try:
                held = await self._state.jobs.find(key)
            except Damaged:
                await end_orphans(self._state, self._clock, [])
                return
            if held is not None and held.value.owed is not None:
                await self._end(held, error)
        except (Conflict, Unavailable):
            self._later.add(key)
        except PerdureError as again:
            _log.error("a job cannot be ended", job=key[-1], error=str(again))

    async def _end(self, held: Held, error: PerdureError) -> None:
        """End a job with what it is done to or, where that cannot be read, without it."""
        if kind := self._kinds.get(held.value.kind):
            try:
                await kind.fail(held, error)
                return
            except (Damaged, Invalid, Missing) as damage:
                _log.error("a job ends alone", job=held.key[-1], error=str(damage))
        at_s = int(self._clock.now_s())
        leaving, let_go = self._holds.leave(held)
        end = self._state.jobs.end(held, Status.FAILED, at_s=at_s, reason=error.code)
        await self._state.commit(end + let_go)
        await self._holds.forget(leaving)
