"""A run: one response being generated, from its first commit to its last.

A client never sees what is not committed. While a commit is under way, what the upstream says next
waits in the socket; the events of one read are one commit, where deltas of one text become one: the
slower the store, the fewer and longer they are. A run belongs to the server, not to the client that
asked for it.

What a response may amount to is bounded while it is made, so that its end always fits into one
commit: half a value for what the request said and is echoed, half for what the model says.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing, suppress

import msgspec
import structlog

from perdure.core.batch import Batch
from perdure.core.clock import Clock
from perdure.core.errors import (
    Conflict,
    LimitExceeded,
    Missing,
    PerdureError,
    StorageFull,
    Unavailable,
)
from perdure.core.limits import VALUE_BYTES_MAX
from perdure.services.bridge import OUTPUT_ITEMS_MAX
from perdure.services.continuing import NotContinued
from perdure.services.ending import TOO_LARGE, close_open, ending
from perdure.services.recovery import STOPPED
from perdure.services.supervisor import Crashed, contained
from perdure.services.tail import Tail
from perdure.services.upstream import UpstreamFailed
from perdure.surfaces.responses import EVENTS, Held
from perdure.surfaces.state import State
from perdure.wire import events as ev
from perdure.wire.fold import View
from perdure.wire.responses import Outcome, failed

ECHO_BYTES_MAX = VALUE_BYTES_MAX // 2
OUTPUT_BYTES_MAX = VALUE_BYTES_MAX // 2 - 3 * 1024 * 1024
"""Leaves room for one more line of the upstream's, and for what ends a response."""

_GROUP_MAX = 1_000
"""Events in one commit."""

_TOO_LONG = Outcome(
    status="incomplete",
    incomplete_details={"reason": "max_output_tokens"},
    perdure={"reason": "output_too_large"},
)

_PATIENCE_S = 10.0
_RETRY_FIRST_S = 0.1
_RETRY_MAX_S = 5.0

_UPSTREAM_CODES = {400: "invalid_prompt", 429: "rate_limit_exceeded"}
"""OpenAI's error codes for what an upstream may answer; all else is `server_error`."""

_log = structlog.get_logger("perdure.runs")

Source = AsyncGenerator[list[ev.Event] | Outcome, None]
"""What generates: groups of events, which are in the run's view already, then how it ended."""


class RunStats(msgspec.Struct):
    """Counters since start; `running` is how many there are now."""

    started: int = 0
    running: int = 0
    completed: int = 0
    failed: int = 0
    events: int = 0
    lost: int = 0
    calls_repaired: int = 0
    fenced: int = 0


class Owner(msgspec.Struct, frozen=True):
    """In whose name a run writes. `fence` goes with every commit, and refuses those of an owner who
    was replaced; `noted` makes what goes with these events, `end` what goes with the last."""

    fence: Batch
    noted: Callable[[Sequence[ev.Event]], Batch]
    end: Callable[[Outcome], Batch]


NOBODY = Owner(Batch(), lambda events: Batch(), lambda outcome: Batch())
"""A response whose client waits for it has one writer as long as its process lives."""


class Run:
    """Generates one response. `view` holds its first `durable` events, and the source adds to it.
    `clients` is how many requests wait for this one response."""

    def __init__(
        self,
        state: State,
        tail: Tail,
        clock: Clock,
        held: Held,
        view: View,
        durable: int,
        source: Source,
        stats: RunStats,
        forget: Callable[[Run], None],
        owner: Owner = NOBODY,
    ) -> None:
        self.key = held.key
        self.state = state
        self._tail = tail
        self._clock = clock
        self._held = held
        self._view = view
        self._source = source
        self._stats = stats
        self._forget = forget
        self._owner = owner
        self._durable = durable
        self._pending: list[ev.Event] = []
        self._storing = False
        self._output_bytes = sum(len(_encode(item)) for item in (*view.abandoned(), *view.output()))
        self._flush: asyncio.Task[None] | None = None
        self._stop: Outcome | None = None
        self.left: str | None = None
        """Why it was left unfinished, where that was on purpose."""
        self.ended = False
        """Whether the end of the response is durable."""
        self._begun = False
        self._generating = True
        self._halted = False
        self.clients = 1
        self._task = asyncio.create_task(self._run(), name=f"run {held.key[-1]}")

    async def stop(self, outcome: Outcome) -> None:
        """Stop generating; the response ends with `outcome` and keeps what there is."""
        if self._generating:
            self._stop = self._stop or outcome
            if self._begun:  # a task cancelled before its first step would end nothing
                self._halt()
        await self.wait()

    async def release(self) -> None:
        """Stop generating and write nothing more: what is durable waits for the next owner."""
        if self._generating:
            self.left = "server_stopped"
            if self._begun:
                self._halt()
        await self.wait()

    async def heed(self) -> None:
        """Stop where another process has ended, deleted or taken over the response. Whoever writes
        learns of that by being refused; a model that thinks for long gives nothing to write."""
        try:
            current = await self.state.responses.get(*self.key)
        except Missing:
            current = None
        replaced = current is None or current.version != self._held.version
        if replaced and self._generating:
            self.left = "replaced"
            if self._begun:
                self._halt()

    def drop(self) -> None:
        """Give the response up where it stands; the next start goes on with it."""
        self._task.cancel()

    @property
    def stopping(self) -> bool:
        """Whether it was told to stop and has not ended yet."""
        return self._stop is not None

    async def wait(self) -> None:
        """Return once the run is over, however it went."""
        await asyncio.wait([self._task])

    async def _run(self) -> None:
        self._begun = True
        self._stats.started += 1
        self._stats.running += 1
        try:
            outcome = STOPPED if self.left else self._stop or await self._generate()
            self._generating = False
            if self.left:
                await self._flushed()
            else:
                await contained("ending a response", self._end(outcome))
        except PerdureError as error:
            self._give_up(error)
        except asyncio.CancelledError:
            self._give_up(Unavailable("the server stopped before the response could be stored."))
        finally:
            self._stats.running -= 1
            self._forget(self)

    def _give_up(self, error: PerdureError) -> None:
        if isinstance(error, Conflict) and self._owner.fence:  # the next owner goes on with it
            self._stats.fenced += not self.left
            return
        self._stats.lost += 1
        _log.error("a response was given up", response=self.key[-1], code=error.code)
        self._tail.fail(EVENTS, self.key, error)

    def _halt(self) -> None:
        """End generation, once: a second cancellation would meet the end of the response."""
        if self._generating and not self._halted:
            self._halted = True
            self._task.cancel()

    async def _generate(self) -> Outcome:
        """Take what the source yields until it ends, fails, is stopped or cannot be stored."""
        try:
            try:
                return await contained("generating a response", self._pump())
            except asyncio.CancelledError:
                if self._stop is None and self._flush is not None and self._flush.done():
                    self._flush.result()
                return self._stop or STOPPED
        except UpstreamFailed as error:
            return failed(
                str(error),
                code=_UPSTREAM_CODES.get(error.answered, "server_error"),
                perdure={"reason": "upstream_failed", "status": error.answered},
            )
        except NotContinued as error:
            self.left = error.code
            return STOPPED
        except Crashed as error:
            return failed(str(error), perdure={"reason": error.code})
        except StorageFull as error:
            self._tail.fail(EVENTS, self.key, error)
            return failed(str(error), perdure={"reason": error.code})

    async def _pump(self) -> Outcome:
        async with aclosing(self._source) as source:
            async for made in source:
                if isinstance(made, Outcome):
                    return made
                self._gather(made)
                await self._store_meanwhile()
                if self._too_long():
                    return _TOO_LONG
        raise UpstreamFailed("The upstream ended its answer without saying how.")

    def _gather(self, events: list[ev.Event]) -> None:
        for event in events:
            self._output_bytes += _adds_bytes(event)
            if not (self._pending and ev.extend(self._pending[-1], event)):
                self._pending.append(event)
                self._stats.events += 1

    def _too_long(self) -> bool:
        return self._output_bytes > OUTPUT_BYTES_MAX or self._view.next_index > OUTPUT_ITEMS_MAX

    async def _store_meanwhile(self) -> None:
        """See that what has gathered gets stored. It is once the source has no more to say without
        waiting, so one commit takes all of it; while that is under way, wait."""
        if self._flush is not None and self._storing:
            await asyncio.wait([self._flush])
        if self._flush is None or self._flush.done():
            self._flush = asyncio.create_task(contained("storing events", self._store()))
            self._flush.add_done_callback(self._stored)

    def _stored(self, flush: asyncio.Task[None]) -> None:
        """What cannot be stored ends generation at once, however quiet the upstream is."""
        if flush.exception() is not None:
            self._halt()

    async def _store(self) -> None:
        """Commit what is pending; what cannot be, stays pending in order."""
        taken, self._pending = self._pending, []  # what is being stored is not extended any more
        deadline_s = self._clock.monotonic_s() + _PATIENCE_S
        self._storing = True
        try:
            while taken:
                group = taken[:_GROUP_MAX]
                encoded = ev.encode_events(group, after=self._durable)
                try:
                    await self.state.commit(
                        self.state.responses.append_events(self.key, encoded, after=self._durable)
                        + self._owner.noted(group)
                        + self._owner.fence
                    )
                except StorageFull:
                    if self._clock.monotonic_s() > deadline_s:
                        raise
                    await self._clock.sleep(_RETRY_FIRST_S)
                else:
                    self._durable += len(encoded)
                    del taken[: len(encoded)]
        finally:
            self._pending = taken + self._pending
            self._storing = False

    async def _end(self, outcome: Outcome) -> None:
        """The terminal commit, tried for as long as the store is only full."""
        await self._flushed()
        self._pending += close_open(self._view)
        while len(self._pending) > _GROUP_MAX:
            with suppress(StorageFull):
                await self._store()
        pause_s = _RETRY_FIRST_S
        bare = False
        while True:
            try:
                end = await ending(
                    self.state,
                    self._held,
                    self._view,
                    outcome,
                    self._clock,
                    after=self._durable,
                    pending=self._pending,
                    bare=bare,
                )
                noted = self._owner.noted(self._pending)
                await self.state.commit(end.batch + noted + self._owner.end(outcome))
                break
            except LimitExceeded:
                if bare:
                    raise
                bare, outcome, self._pending = True, TOO_LARGE, []
            except StorageFull:
                await self._clock.sleep(pause_s)
                pause_s = min(pause_s * 2, _RETRY_MAX_S)
            except Conflict:  # the conversation may change, but this response has one writer
                current = await self.state.responses.get(*self.key)
                if current.version != self._held.version:
                    raise
                await self.state.commit(self._owner.fence)
        self.ended = True
        self._stats.failed += outcome.status == "failed"
        self._stats.completed += outcome.status != "failed"

    async def _flushed(self) -> None:
        """Wait for a commit of events that is under way. Raises what it failed of, but for a full
        disk: what could not be stored is still pending."""
        if self._flush is not None:
            await asyncio.wait([self._flush])
            broken = self._flush.exception()
            if broken is not None and not isinstance(broken, StorageFull):
                raise broken


def _adds_bytes(event: ev.Event) -> int:
    """How much longer an event makes the response that it ends in."""
    match event:
        case ev.OutputTextDelta(logprobs=list(logprobs)) if logprobs:
            return len(_encode(event.delta)) + len(_encode(logprobs))
        case (
            ev.OutputTextDelta()
            | ev.RefusalDelta()
            | ev.ReasoningTextDelta()
            | ev.FunctionCallArgumentsDelta()
        ):
            return len(_encode(event.delta))
        case ev.OutputItemAdded():
            return len(_encode(event.item))
    return 0


_encode = msgspec.json.encode
