"""The gateway: turns a request into a stored, running response.

Everything that can be refused is refused before the first commit: the request, the chain or
conversation it builds on, and what the upstream cannot be asked. Then one commit makes the
response exist with its first events, and a run generates it, whoever stays to listen.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import msgspec

from perdure.core.batch import Batch, join
from perdure.core.clock import Clock
from perdure.core.errors import LimitExceeded, Unavailable
from perdure.core.keys import Key
from perdure.core.offload import off_loop
from perdure.core.values import Entry, Record
from perdure.services.asking import answering, at_once, told
from perdure.services.background import job_for, job_key
from perdure.services.bridge import ChatReader, chat_request
from perdure.services.context import Context, Given
from perdure.services.continuing import (
    WAYS,
    Continuation,
    NotContinued,
    Partial,
    asked_to_go_on,
    partial_message,
)
from perdure.services.conversations import decided, new_items, resolve_items
from perdure.services.extract import MODEL, answer
from perdure.services.fleet import Fleet, taken_for_dead
from perdure.services.holds import Holds, Past
from perdure.services.jobs import Jobs
from perdure.services.recovery import STOPPED, interrupt
from perdure.services.relay import ResponsesReader, responses_request
from perdure.services.requests import Caller, Requests, result_lost
from perdure.services.runs import ECHO_BYTES_MAX, Run, RunStats, Source
from perdure.services.tail import Tail
from perdure.services.upstream import UpstreamFailed
from perdure.services.upstreams import Offered, Target, Upstreams
from perdure.surfaces.conversations import Conversation, require_free
from perdure.surfaces.items import body
from perdure.surfaces.responses import EVENTS, Held, Response, Status, wire_body
from perdure.surfaces.state import State
from perdure.wire import events as ev
from perdure.wire.errors import NotFound, WireError
from perdure.wire.fold import View, take
from perdure.wire.items import Item, duplicate, sound_items
from perdure.wire.responses import (
    CreateResponse,
    Outcome,
    failed,
    parse_create_response,
    response_body,
)

TRANSIENT_KEPT_S = 300
"""How long a response that is not to be stored stays in memory for a retry to join."""

INPUT_ITEMS_MAX = 10_000
"""In one request. They are written with the response, and once more with the end of its turn."""

ASIDE_BYTES_MAX = 16 * 1024 * 1024
"""Of the events of an answer that becomes no response; its text is about a tenth of them."""

_PIECE = 200
_STOP_WAIT_S = 5.0

ABANDONED = failed(
    "The client disconnected, and this response was not to be generated without one.",
    perdure={"reason": "client_disconnected"},
)

DELETED = failed(
    "The response was deleted while it was being generated.", perdure={"reason": "deleted"}
)


class Started(msgspec.Struct, frozen=True):
    """A response that exists. `stored` says in which state: the durable one or this process's.
    `accepted` is the wire body that answers a request for a background response."""

    key: Key
    stored: bool
    stream: bool
    notes: dict[str, Any] = {}
    """What was done that nobody asked for: the body's `perdure` field as the response began."""
    accepted: bytes | None = None

    @property
    def id(self) -> str:
        return self.key[-1]


class Store(msgspec.Struct, frozen=True):
    """One state with its tail and its remembered requests."""

    state: State
    tail: Tail
    requests: Requests


class Gateway:
    """Creates responses and lets them be followed. `transient` holds those of `store: false`."""

    def __init__(
        self,
        stored: Store,
        transient: Store,
        context: Context,
        upstreams: Upstreams,
        clock: Clock,
        fleet: Fleet,
        jobs: Jobs,
        holds: Holds,
    ) -> None:
        self._stored = stored
        self._transient = transient
        self._context = context
        self._upstreams = upstreams
        self._clock = clock
        self._fleet = fleet
        self._jobs = jobs
        self._holds = holds
        self._runs: dict[Key, Run] = {}
        self._ended: deque[tuple[float, Key]] = deque()
        self._closed = False
        self.stats = RunStats()

    async def create(self, caller: Caller, sent: Any) -> Started:
        """Accept a request, or join what an earlier sending of it started.

        Raises `WireError`, `NotFound`, `ConversationLocked`, `ResultLost`, and what the store
        raises; then nothing was written.
        """
        request = parse_create_response(sent)
        notes: dict[str, Any] = {}
        if caller.store_always and not request.stored:
            request = msgspec.structs.replace(request, store=True)
            notes["store"] = "always"
        if not request.stored and request.conversation_id is not None:
            raise WireError(
                "A response that is not stored cannot belong to a conversation. "
                "Omit 'store', or send the earlier items as input.",
                param="store",
                code="mutually_exclusive_parameters",
            )
        if request.background and not request.stored:
            raise WireError(
                "A background response has to be stored: whoever asked for it reads it later. "
                "Omit 'store', or omit 'background'.",
                param="background",
                code="mutually_exclusive_parameters",
            )

        async def attempt() -> Started:
            seen = await self._recall(caller, request)
            return seen or await self._start(caller, request, notes)

        async def accepted() -> Started:
            async with self._stored.requests.alone(caller):
                return await decided(attempt)

        # Shielded: a client that leaves now must not leave a stored response without its run.
        return await asyncio.shield(asyncio.ensure_future(accepted()))

    async def _start(
        self, caller: Caller, request: CreateResponse, notes: dict[str, Any]
    ) -> Started:
        """One try at making the response exist. Raises `Conflict` where a writer came between."""
        if self._closed:
            raise Unavailable("the server is stopping; send the request again.")
        if self._fleet.lost.is_set():
            raise taken_for_dead()
        if isinstance(request.input, list) and len(request.input) > INPUT_ITEMS_MAX:
            raise LimitExceeded("the number of input items", len(request.input), INPUT_ITEMS_MAX)
        tenant = caller.tenant
        stored = self._stored.state
        items = await resolve_items(stored, tenant, sound_items(request.input or [], self._clock))
        conversation = await self._conversation(tenant, request)
        past = await self._context.past(tenant, request)
        given = await self._context.given(tenant, request, items, past)
        known = {item["id"] for item in given.history}
        for place, item in enumerate(items):
            if item["id"] in known:
                raise duplicate(item["id"], f"input[{place}].id")
        view = View()
        source = await self._source(request, given.history, given.items, view)
        key = (tenant, self._clock.new_id("resp"))
        notes = notes | _notes(given)
        response, first = self._first(request, key[-1], notes, view)
        response = msgspec.structs.replace(
            response, input_count=len(items), ancestors=given.ancestors
        )
        events = ev.encode_events(first, after=0)
        store = self._store(request.stored)
        echo = msgspec.json.encode(view.response)
        if len(echo) > ECHO_BYTES_MAX:
            raise LimitExceeded(
                "what the response would echo, in bytes,", len(echo), ECHO_BYTES_MAX
            )
        batch = (
            store.state.responses.create(key, response, echo, events)
            + store.state.items.add(key, "input", new_items(items))
            + await store.requests.remember(caller, response_id=key[-1])
        )
        if conversation is not None:
            batch += stored.conversations.hold(conversation, key[-1])
        if request.stored and request.previous_response_id is not None:
            batch += await stored.responses.continuing(tenant, request.previous_response_id)
        if not request.stored and caller.key is not None:
            await stored.commit(
                await self._stored.requests.remember(caller, response_id=key[-1], transient=True)
            )
        self.stats.calls_repaired += len(given.orphans)
        if request.background:  # the source told what it refuses; a job makes its own
            job = job_key(key, response)
            taken = await self._holds.take(job, past.history, items)
            most = self._jobs.attempts_max
            batch += job_for(stored, key, response, request, taken, attempts_max=most)
            await stored.commit(batch)
            self._jobs.enqueue(job)
            return Started(key, True, bool(request.stream), notes, echo)
        await store.state.commit(batch + (self._fleet.lease if request.stored else Batch()))
        held = Record(key, 1, response)
        self._runs[key] = Run(
            *(store.state, store.tail, self._clock, held, view, len(first), source),
            *(self.stats, self._forget),
        )
        return Started(key, request.stored, bool(request.stream), notes)

    def _first(
        self, request: CreateResponse, response_id: str, notes: dict[str, Any], view: View
    ) -> tuple[Response, list[ev.Event]]:
        """The envelope of a new response, and its first events."""
        created_at_s = int(self._clock.now_s())
        background = bool(request.background)
        wire = response_body(request, id=response_id, created_at=created_at_s)
        wire |= {"perdure": notes} if notes else {}
        response = Response(
            status=Status(wire["status"]),
            created_at_s=created_at_s,
            model=request.model,
            runner=None if background else self._fleet.boot_id,
            previous_response_id=request.previous_response_id,
            conversation_id=request.conversation_id,
            job_id=self._clock.new_id("job") if background else None,
        )
        follows = ev.ResponseQueued if background else ev.ResponseInProgress
        return response, take(view, ev.ResponseCreated(response=wire), follows(response=wire))

    async def events(self, started: Started, *, after: int) -> AsyncGenerator[list[bytes], None]:
        """Wire events numbered above `after` (a sequence number; -1 for all), in groups as they
        become durable and as they are kept, shared by all who follow, up to the terminal one. Past
        the end of one that has ended: nothing. Raises `Unavailable` for one that nobody generates
        and that has no end."""
        store = self._store(started.stored)
        if (await self._ending(started)).value.status.terminal:
            tip = await store.state.engine.tip(EVENTS, started.key)
            if after + 1 >= tip.last:
                return
        async for entries in store.tail.follow(
            EVENTS, started.key, after=after + 1, ended=_is_last
        ):
            yield [entry.value for entry in entries]

    async def finished(self, started: Started) -> bytes:
        """The terminal wire body, once there is one. Raises `UpstreamFailed` for one that ended
        before its first word because the upstream did not answer: there is nothing to read in it.
        """
        run = self._runs.get(started.key)
        if run is not None:
            await run.wait()
        held = await self._ending(started)
        if not held.value.status.terminal:  # another process generates it
            async for _ in self.events(started, after=-1):
                pass
            held = await self._ending(started)
        answer = wire_body(held)
        if held.value.status is Status.FAILED:
            _raise_refusal(msgspec.json.decode(answer))
        return answer

    async def _ending(self, started: Started) -> Held:
        """A response that has ended, is being generated or will be; `Unavailable` for others."""
        state = self._store(started.stored).state
        held = await state.responses.get(*started.key)
        if held.value.job_id is not None and not held.value.status.terminal:
            job = await state.jobs.find(job_key(held.key, held.value))
            if job is not None and job.value.owed is not None:
                return held
        runner = held.value.runner
        if runner != self._fleet.boot_id and await self._fleet.lives(runner):
            return held
        if not held.value.status.terminal and started.key not in self._runs:
            held = await state.responses.get(*started.key)  # it may have ended in between
        # Asked without a pause before the log is followed, so that a follower is told of a failure.
        if not held.value.status.terminal and started.key not in self._runs:
            raise Unavailable(
                f"response {started.id} could not be stored to its end; what is durable of it "
                "is kept. See /readyz for what is wrong with the store, and /v1/startup for what "
                "was damaged."
            )
        return held

    async def abandon(self, started: Started, caller: Caller) -> None:
        """A client left: stop generating once none is left to listen, here or at a process that
        its request was sent to again."""
        if (run := self._runs.get(started.key)) is None:
            return
        run.clients -= 1
        requests = self._store(started.stored).requests
        async with self._stored.requests.alone(caller):
            if run.clients <= 0 and await requests.let_go(caller, started.id):
                await run.stop(ABANDONED)

    async def heed(self) -> None:
        """Stop generating what other processes have ended, deleted or taken over."""
        for run in list(self._runs.values()):
            if run.state is self._stored.state:
                await run.heed()

    async def interrupt(self, key: Key) -> None:
        """Stop generating a response, whoever listens. Where another process does it, or nobody any
        more, its end is written here, which stops that one."""
        if (run := self._runs.get(key)) is None:
            held = await self._stored.state.responses.get(*key)
            if not held.value.status.terminal:
                await interrupt(self._stored.state, held, DELETED, self._clock)
            return
        try:
            async with asyncio.timeout(_STOP_WAIT_S):
                await run.stop(DELETED)
        except TimeoutError:
            raise Unavailable(
                f"response {key[-1]} is still being generated and its end cannot be stored; "
                "see /readyz for what is wrong with the store."
            ) from None

    async def models(self) -> list[Offered]:
        """The models that can be asked. Raises `UpstreamFailed`."""
        return await self._upstreams.models() if self._upstreams else [Offered(MODEL, "perdure")]

    async def ask_aside(
        self, request: CreateResponse, history: list[Item], items: list[Item]
    ) -> tuple[View, Outcome]:
        """Ask the model something that becomes no response; cancelled with its caller. Raises
        `WireError` for what it cannot be asked, and `UpstreamFailed`."""
        if self._closed:
            raise Unavailable("the server is stopping; send the request again.")
        view = View()
        size_bytes = 0
        async with aclosing(await self._source(request, history, items, view)) as source:
            async for made in source:
                if isinstance(made, Outcome):
                    return view, made
                size_bytes += sum(len(msgspec.json.encode(event)) for event in made)
                if size_bytes > ASIDE_BYTES_MAX:
                    break
        raise UpstreamFailed(
            f"the upstream's answer is longer than {ASIDE_BYTES_MAX} bytes, or has no end."
        )

    async def drain(self, timeout_s: float) -> None:
        """Start nothing more; let runs end within `timeout_s`, then stop those that have not."""
        self._closed = True
        deadline_s = self._clock.monotonic_s() + timeout_s
        while self._runs and self._clock.monotonic_s() < deadline_s:
            await self._clock.sleep(min(0.05, timeout_s))
        await self.close()

    async def close(self) -> None:
        """Stop every run; each ends with what it has, or is left to the next start where the
        store takes nothing."""
        self._closed = True
        runs = list(self._runs.values())
        if not runs:
            return
        stopping = [asyncio.ensure_future(run.stop(STOPPED)) for run in runs]
        await asyncio.wait(stopping, timeout=_STOP_WAIT_S)
        for run in runs:
            if run.key in self._runs:
                run.drop()
        await asyncio.wait(stopping, timeout=_STOP_WAIT_S)

    async def sweep_transient(self) -> int:
        """Forget responses that were not to be stored once no retry can join them any more."""
        before_s = self._clock.monotonic_s() - TRANSIENT_KEPT_S
        state = self._transient.state
        forgotten = 0
        too_old_s = int(self._clock.now_s()) - TRANSIENT_KEPT_S
        while keys := await state.idempotency.older_than(too_old_s, limit=_PIECE):
            await state.commit(join(state.idempotency.forget(key) for key in keys))
        while self._ended and self._ended[0][0] < before_s:
            _, key = self._ended.popleft()
            held = await state.responses.get(*key)
            await state.commit(state.responses.delete(held) + await state.items.removal(key))
            forgotten += 1
        return forgotten

    async def _recall(self, caller: Caller, request: CreateResponse) -> Started | None:
        """The response that an earlier sending of this request started."""
        for store, stored in ((self._transient, False), (self._stored, True)):
            seen = await store.requests.recall(caller)
            if seen is None or seen.value.response_id is None:
                continue
            key = (caller.tenant, seen.value.response_id)
            started = Started(key, stored and not seen.value.transient, bool(request.stream))
            if not await self._abandoned(started, caller):
                if (run := self._runs.get(key)) is not None:
                    run.clients += 1
                held = await self._store(started.stored).state.responses.get(*key)
                if not (run or request.background or held.value.status.terminal):
                    await store.requests.join(seen)
                stands = wire_body(held)
                notes = msgspec.json.decode(stands, type=_Noted).perdure
                accepted = stands if request.background else None
                return msgspec.structs.replace(started, notes=notes, accepted=accepted)
            await store.state.commit(store.state.idempotency.forget(seen.key, expect=seen.version))
        return None

    async def _abandoned(self, started: Started, caller: Caller) -> bool:
        """Whether a response ended only because its client left: one that comes back wants an
        answer. Raises `ResultLost` for one that was not stored and is forgotten by now."""
        run = self._runs.get(started.key)
        if run is not None and run.stopping:
            await run.wait()
        try:
            held = await self._store(started.stored).state.responses.get(*started.key)
        except NotFound:
            if started.stored:
                raise
            raise result_lost() from None
        if held.value.status is not Status.FAILED:
            return False
        reason = msgspec.json.decode(wire_body(held)).get("perdure") or {}
        return bool(reason.get("reason") == "client_disconnected")

    async def _conversation(
        self, tenant: str, request: CreateResponse
    ) -> Record[Conversation] | None:
        """The conversation to build on, free to be held. Raises `ConversationLocked`."""
        if request.conversation_id is None:
            return None
        found = await self._stored.state.conversations.get(tenant, request.conversation_id)
        require_free(found, None)
        return found

    def to_go_on_with(self, request: CreateResponse, view: View) -> Partial | None:
        """The message of a response that was cut short with which its upstream may go on."""
        if not self._upstreams.may_continue(request.model):
            return None
        return partial_message(view, request)

    async def source_again(
        self,
        held: Held,
        request: CreateResponse,
        past: Past,
        view: View,
        partial: Partial | None,
    ) -> Source:
        """What generates a response that is stored, on what it was accepted with, whatever was
        deleted or added since: from its beginning or, where there is a `partial` message, from its
        end. Raises `NotContinued` where it cannot be."""
        stored = [body(item) async for item in self._stored.state.items.all(held.key, "input")]
        items: list[Item] = [msgspec.json.decode(item) for item in stored]
        given = await self._context.given(held.key[0], request, items, past)
        return await self._source(request, given.history, given.items, view, partial)

    async def _source(
        self,
        request: CreateResponse,
        history: list[Item],
        items: list[Item],
        view: View,
        partial: Partial | None = None,
    ) -> Source:
        """What will generate the answer. Raises `WireError` for what it cannot be asked."""
        if self._upstreams:

            async def ask(to: Target) -> Source:
                if await to.upstream.api() == "responses":
                    if partial is not None:
                        raise NotContinued("the upstream is asked by the Responses API.")
                    asked = responses_request(request, history, items, model=to.model)
                    relayed = ResponsesReader(view, self._clock)
                    return told(to.upstream.stream_response(asked), relayed, request)
                asked = chat_request(request, history, items, model=to.model)
                continuation: Continuation | None = None
                if partial is not None:
                    way = WAYS.get(to.continues)
                    if way is None:
                        raise NotContinued("the upstream of the model knows no way to.")
                    asked = asked_to_go_on(asked, partial, way)
                    continuation = Continuation(partial, way)
                reader = ChatReader(view, self._clock, continuation)
                return told(to.upstream.stream_chat(asked), reader, request)

            return await answering(await self._upstreams.resolve(request.model), ask)
        if request.model == MODEL:
            chunks = at_once(await off_loop(answer, request, history, items))
            return told(chunks, ChatReader(view, self._clock), request)
        raise WireError(
            f"The model '{request.model}' does not exist here: no upstream is configured. "
            f"Ask '{MODEL}', or serve with --upstream URL.",
            param="model",
            code="model_not_found",
        )

    def _store(self, stored: bool) -> Store:
        return self._stored if stored else self._transient

    def _forget(self, run: Run) -> None:
        del self._runs[run.key]
        if run.state is self._transient.state:
            self._ended.append((self._clock.monotonic_s(), run.key))


_LAST = tuple(
    f'{{"type":"response.{status}"'.encode() for status in ("completed", "incomplete", "failed")
)


def _is_last(entry: Entry[Any]) -> bool:
    return bytes(entry.value).startswith(_LAST)


def _raise_refusal(ended: dict[str, Any]) -> None:
    """Raises `UpstreamFailed` for a response without output that the upstream is to blame for."""
    reason = ended.get("perdure") or {}
    if reason.get("reason") == "upstream_failed" and not ended["output"]:
        refusal = UpstreamFailed(ended["error"]["message"], answered=reason["status"])
        refusal.should_retry = False
        raise refusal


class _Noted(msgspec.Struct):
    perdure: dict[str, Any] = {}


def _notes(given: Given) -> dict[str, Any]:
    """The `perdure` field of a new response."""
    orphans = [{name: call[name] for name in ("id", "call_id", "name")} for call in given.orphans]
    return {"unanswered_calls": orphans} if orphans else {}
