"""Background responses: the kind of job that makes a response while nobody waits for it.

An attempt begins with one commit: the job has an owner, what the attempt before left open is closed
as `incomplete`, and a `response.in_progress` says that the model is asked anew. What stands before
it leaves the output and is told in the field `perdure`. Where the upstream can go on with the
message that was open, it stays open, and what comes is more of it. Nothing is said twice within an
item.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing

import msgspec

from perdure.core.batch import Batch
from perdure.core.clock import Clock
from perdure.core.errors import (
    Conflict,
    Damaged,
    Invalid,
    LimitExceeded,
    Missing,
    PerdureError,
    Unavailable,
)
from perdure.core.keys import Key, show
from perdure.core.values import Record
from perdure.services.continuing import NOT_CONTINUED, NotContinued, Partial
from perdure.services.ending import TOO_LARGE, close_open
from perdure.services.fleet import Fleet
from perdure.services.holds import Holds, Past, Taken
from perdure.services.recovery import interrupt, replay
from perdure.services.runs import Owner, Run, RunStats, Source
from perdure.services.tail import Tail
from perdure.services.upstream import UpstreamFailed
from perdure.surfaces.jobs import JOBS, Attempt, Job
from perdure.surfaces.jobs import Held as HeldJob
from perdure.surfaces.jobs import Status as JobStatus
from perdure.surfaces.responses import Held, Response, Status
from perdure.surfaces.state import State
from perdure.wire import events as ev
from perdure.wire.fold import View, take
from perdure.wire.items import Item
from perdure.wire.responses import CreateResponse, Outcome, failed

KIND = "background_response"

_RELEASE_WAIT_S = 5.0
_REQUEUE_PAUSE_S = 1.0

_LOADING = frozenset({0, 503})
"""What a model server answers that is not there yet: nothing, or that it is unavailable."""

_LOADING_PAUSE_S = 1.0

_SAID_AGAIN_BYTES_MAX = 1024 * 1024

CANCELLED = Outcome(status="cancelled")

Partials = Callable[[CreateResponse, View], Partial | None]
"""The message of a response that was cut short with which its upstream may go on."""

Sources = Callable[[Held, CreateResponse, Past, View, Partial | None], Awaitable[Source]]
"""What generates a response that is stored already, on what its job holds: from its beginning, or
on from a message."""

_ENDS = {
    "completed": JobStatus.SUCCEEDED,
    "incomplete": JobStatus.SUCCEEDED,
    "failed": JobStatus.FAILED,
    "cancelled": JobStatus.CANCELLED,
}

encode = msgspec.json.encode


def job_for(
    state: State,
    key: Key,
    response: Response,
    request: CreateResponse,
    taken: Taken,
    *,
    attempts_max: int,
) -> Batch:
    """The job that makes a response, to be committed with it, and what it holds. Its parameters are
    the request, but for the input, which is stored as the response's items."""
    job = Job(KIND, key[-1], response.created_at_s, attempts_max, blobs=taken.blobs)
    parameters = msgspec.structs.replace(request, input=None)
    return state.jobs.create(job_key(key, response), job, encode(parameters)) + taken.batch


def job_key(key: Key, response: Response) -> Key:
    """Where the job of a response is."""
    assert response.job_id is not None, f"response {key[-1]} is not made in the background"
    return (key[0], response.job_id)


async def job_removal(state: State, held: Held) -> Batch:
    """The batch that deletes the job of a response that has one."""
    if held.value.job_id is None:
        return Batch()
    key = job_key(held.key, held.value)
    try:
        job = await state.jobs.find(key)
    except Damaged:
        return state.jobs.remove(key)
    return Batch() if job is None else state.jobs.delete(job)


class BackgroundResponses:
    """See `services.jobs.Kind`."""

    def __init__(
        self,
        state: State,
        tail: Tail,
        clock: Clock,
        fleet: Fleet,
        partials: Partials,
        sources: Sources,
        holds: Holds,
        stats: RunStats,
        *,
        upstream_wait_s: float,
    ) -> None:
        self._state = state
        self._tail = tail
        self._clock = clock
        self._fleet = fleet
        self._partials = partials
        self._sources = sources
        self._holds = holds
        self._stats = stats
        self._runs: dict[Key, Run] = {}
        self._upstream_wait_s = upstream_wait_s
        self._released = False

    async def run(self, held: HeldJob) -> bool:
        """One attempt, and at once another where the first could not go on with what there was."""
        while (left := await self._attempt(held)) == NOT_CONTINUED:
            found = await self._state.jobs.find(held.key)
            if found is None:
                return False
            held = found
        return left is not None

    async def _attempt(self, held: HeldJob) -> str | None:
        """Generate until the response ends, this run is let go, or the store fails. Why the
        attempt ended before the response did."""
        request = _request(held)
        response = await self._state.responses.get(held.key[0], held.value.subject)
        view, after = await replay(self._state, response)
        attempts = await self._state.jobs.attempts(held.key)
        partial: Partial | None = None
        if attempts and attempts[-1].reason != NOT_CONTINUED:
            partial = self._partials(request, view)
        at_s, goes_on = self._now_s(), partial is not None
        boot_id = self._fleet.boot_id
        write, begun = self._state.jobs.begin(held, boot_id, at_s=at_s, continued=goes_on)
        events = [] if goes_on else close_open(view)
        body = (view.response or {}) | {"status": "in_progress"}
        if attempts:
            attempts.append(Attempt(begun.value.attempt, at_s, continued=goes_on))
            told = {"attempts": msgspec.to_builtins(attempts)}
            body["perdure"] = body.get("perdure", {}) | told
        shown = body | {"output": _so_far(view)}
        events += take(view, ev.ResponseInProgress(response=shown))
        try:
            await self._state.commit(
                write
                + self._fleet.lease
                + self._state.responses.move(response, Status.IN_PROGRESS, encode(body))
                + self._state.responses.append_events(
                    response.key, ev.encode_events(events, after=after), after=after
                )
            )
        except LimitExceeded:
            await self._end(held, TOO_LARGE)
            return None
        leaving, let_go = self._holds.leave(begun)
        moved = msgspec.structs.replace(response.value, status=Status.IN_PROGRESS)
        run = self._runs[held.key] = Run(
            self._state,
            self._tail,
            self._clock,
            Record(response.key, response.version + 1, moved),
            view,
            after + len(events),
            self._told(begun, response, request, view, partial),
            self._stats,
            lambda run: None,
            Owner(
                self._state.jobs.owned(begun),
                lambda events: self._state.jobs.finish(begun, _steps(events), at_s=self._now_s()),
                lambda outcome: self._ended(begun, outcome) + let_go,
            ),
        )
        if self._released:
            await run.release()
        await run.wait()
        del self._runs[held.key]
        if run.ended:
            await self._holds.forget(leaving)
            return None
        await self._requeue(begun, run.left)
        return run.left or "attempt_lost"

    async def _requeue(self, begun: HeldJob, left: str | None) -> None:
        """Write that an attempt is over, which costs one unless it was `left` on purpose."""
        reason, free = left or "attempt_lost", left is not None
        again = self._state.jobs.requeue(begun, reason, at_s=self._now_s(), free=free)
        while True:  # until it is written, the record says that this attempt still runs
            try:
                await self._state.commit(again)
                return
            except Conflict:  # written, or fenced: the record says what is next
                return
            except Unavailable:
                if self._released:
                    raise
            await self._clock.sleep(_REQUEUE_PAUSE_S)

    async def cancel(self, held: HeldJob) -> None:
        await self._end(held, CANCELLED)

    async def give_up(self, held: HeldJob) -> None:
        tried = held.value.attempt
        message = (
            f"This response was begun {tried} times, and each time the server went down or its "
            "store failed, so it is not tried again. What had been generated is kept."
        )
        await self._end(held, failed(message, perdure={"reason": "attempts_exhausted"}))

    async def fail(self, held: HeldJob, error: PerdureError) -> None:
        message = f"This response cannot be made any more: {error}"
        await self._end(held, failed(message, perdure={"reason": error.code}))

    async def heed(self) -> None:
        for run in list(self._runs.values()):
            await run.heed()

    async def release(self, key: Key | None = None) -> None:
        if key is None:
            self._released = True
        chosen = [run for at, run in self._runs.items() if key in (None, at)]
        if chosen:
            stopping = [asyncio.ensure_future(run.release()) for run in chosen]
            _, stuck = await asyncio.wait(stopping, timeout=_RELEASE_WAIT_S)
            if stuck:  # in an end that the store does not take
                for run in chosen:
                    run.drop()
                await asyncio.wait(stopping)

    async def _end(self, held: HeldJob, outcome: Outcome) -> None:
        """End a response that nobody generates now."""
        try:
            attempts = await self._state.jobs.attempts(held.key)
        except Damaged:
            attempts = []
        if len(attempts) > 1:
            told = {"attempts": msgspec.to_builtins(attempts)}
            outcome = msgspec.structs.replace(outcome, perdure=(outcome.perdure or {}) | told)
        response = await self._state.responses.get(held.key[0], held.value.subject)
        leaving, let_go = self._holds.leave(held)
        also = self._ended(held, outcome) + let_go
        await interrupt(self._state, response, outcome, self._clock, also)
        await self._holds.forget(leaving)

    def _ended(self, held: HeldJob, outcome: Outcome) -> Batch:
        reason = (outcome.perdure or {}).get("reason")
        return self._state.jobs.end(held, _ENDS[outcome.status], at_s=self._now_s(), reason=reason)

    async def _told(
        self,
        job: HeldJob,
        held: Held,
        request: CreateResponse,
        view: View,
        partial: Partial | None,
    ) -> Source:
        """What the model says. After a start of the whole machine it may still be loading: as long
        as it has said nothing, one that cannot be reached is asked again for a while. One that
        refuses to go on with a message may yet answer from the beginning."""
        deadline_s = self._clock.monotonic_s() + self._upstream_wait_s
        said = False
        while True:
            try:
                async with aclosing(self._asked(job, held, request, view, partial)) as source:
                    async for made in source:
                        said = True
                        yield made
                return
            except UpstreamFailed as error:
                loading = error.answered in _LOADING
                if not said and not loading and partial is not None:
                    raise NotContinued(str(error)) from error
                if said or not loading or self._clock.monotonic_s() > deadline_s:
                    raise
            await self._clock.sleep(_LOADING_PAUSE_S)

    async def _asked(
        self,
        job: HeldJob,
        held: Held,
        request: CreateResponse,
        view: View,
        partial: Partial | None,
    ) -> Source:
        """One asking of the model; a request that can no longer be asked is an outcome too."""
        try:
            past = await self._holds.past(job)
            source = await self._sources(held, request, past, view, partial)
        except (Invalid, Missing, Damaged) as error:
            yield failed(
                f"The request cannot be carried out any more: {error}",
                code="server_error" if isinstance(error, Damaged) else "invalid_prompt",
                perdure={"reason": error.code},
            )
            return
        async with aclosing(source):
            async for made in source:
                yield made

    def _now_s(self) -> int:
        return int(self._clock.now_s())


def _steps(events: Sequence[ev.Event]) -> list[tuple[str, str]]:
    """The steps of a response: the items that the model has brought to their end."""
    return [
        (event.item["type"], event.item["id"])
        for event in events
        if isinstance(event, ev.OutputItemDone)
        and event.item.get("status", "completed") == "completed"
    ]


def _so_far(view: View) -> list[Item]:
    """Every item that was begun, for the body that begins an attempt: a client that takes each body
    as it comes counts the next items from there, and goes on with what is open. Where they are too
    much to be said again, it gets their outlines."""
    items = [*view.abandoned(), *view.output("in_progress")]
    if len(encode(items)) <= _SAID_AGAIN_BYTES_MAX:
        return items
    return [_outline(item) for item in items]


def _outline(item: Item) -> Item:
    """An item without its texts."""
    left = item | dict.fromkeys(item.keys() & {"text", "refusal", "arguments"}, "")
    for name in item.keys() & {"content", "summary"}:
        left[name] = [_outline(part) for part in item[name] or ()]
    return left


def _request(held: HeldJob) -> CreateResponse:
    """The request that led to a job. Raises `Damaged` where it cannot be read."""
    try:
        return _decode(held.attachment or b"")
    except msgspec.MsgspecError as error:
        raise Damaged(f"{JOBS.name} {show(held.key)}", f"no request: {error}") from None


_decode: Callable[[bytes], CreateResponse] = msgspec.json.Decoder(CreateResponse).decode
