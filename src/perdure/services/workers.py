"""The worker runtime: what may be asked of runtimes and of the workers in them, by a program that
embeds the library as by clients over HTTP, in the same words and with the same answers.

Every request is decided on what is stored and committed at the versions it was decided on. One
that another writer came between is decided again; one that a run of an earlier generation sends is
refused for good. Damage in one worker is told once, and keeps no other from working.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager, suppress
from typing import Any, Generic, TypeVar

import msgspec

from perdure.core import codec
from perdure.core.batch import Batch
from perdure.core.clock import Clock
from perdure.core.cursors import at_entry, entry_at
from perdure.core.errors import Conflict, Damaged, LimitExceeded, Unavailable
from perdure.core.keys import DEFAULT_TENANT, Key, show
from perdure.core.layouts import Log, Records
from perdure.core.values import Entry, Finding, Record
from perdure.services import listing
from perdure.services.conversations import decided
from perdure.services.listing import Listed
from perdure.services.retiring import Retiring
from perdure.services.tail import Tail
from perdure.services.worker_objects import (
    diagnostic_object,
    event_object,
    fingerprint,
    overview_object,
    plain,
    retention_object,
    runtime_object,
    said_object,
    state_object,
    submission_object,
    usage_object,
    worker_object,
)
from perdure.surfaces import workers as kept
from perdure.surfaces.state import State
from perdure.surfaces.workers import Held, HeldState, Said, Status, Worker, WorkerEvent
from perdure.wire import workers as wire
from perdure.wire.errors import typed
from perdure.wire.lists import ListQuery
from perdure.wire.workers import WorkerEventType

T = TypeVar("T")
E = TypeVar("E", WorkerEvent, Said)
F = TypeVar("F", kept.Runtime, Worker)
V = TypeVar("V", kept.Overview, kept.Usage)

READ_MAX = 100
"""Entries that one read of a log gives unless asked for fewer."""

_FOLDED = 500
"""Events that a projection reads at once."""

Told = tuple[str, wire.Snapshot | wire.WorkerEventObject]
"""What a follower is told, behind the cursor that goes on after it."""


class Shown(msgspec.Struct, Generic[T], frozen=True):
    """A page of objects, and what could not be read on the way; `more` says that it is not the
    last."""

    items: list[T]
    damaged: list[Finding]
    more: bool


class Workers:
    """The runtimes of one tenant and their workers.

    `runner` is the boot that vouches for runs that begin here: once it is dead, they are over.
    `lease` goes with every commit that begins one.
    """

    def __init__(
        self,
        state: State,
        clock: Clock,
        tail: Tail,
        *,
        tenant: str = DEFAULT_TENANT,
        runner: str | None = None,
        lease: Callable[[], Batch] = Batch,
    ) -> None:
        self._state = state
        self._surface = state.runtimes
        self._clock = clock
        self._tail = tail
        self._tenant = tenant
        self._runner = runner
        self._lease = lease
        self._retiring = Retiring(state, clock)

    async def create_runtime(self, asked: Any) -> wire.RuntimeObject:
        """Make a runtime, or find the one of this id that was asked for in the same words. Raises
        `OtherFingerprint` where it was in others."""
        body = typed(asked, wire.CreateBody)
        key, at_s = (self._tenant, body.id), int(self._clock.now_s())
        made = kept.Runtime(at_s, fingerprint(body.config), _raw(body.config))

        async def attempt() -> kept.Runtime:
            found = await self._surface.find_runtime(key)
            if found is not None:
                return _same(key, found.value, made.fingerprint)
            await self._state.commit(self._surface.establish(key, made))
            return made

        return runtime_object(key, await decided(attempt, f"runtime {body.id}"))

    async def runtime(self, runtime_id: str) -> wire.RuntimeObject:
        """A runtime. Raises `NotFound`."""
        key = (self._tenant, runtime_id)
        return runtime_object(key, (await self._surface.runtime(key)).value)

    async def runtimes(self, query: ListQuery) -> Shown[wire.RuntimeObject]:
        """A page of runtimes."""
        found = await listing.runtimes(self._state, self._tenant, query)
        return _shown(found, lambda record: runtime_object(record.key, record.value))

    async def create(self, runtime_id: str, asked: Any) -> wire.WorkerObject:
        """Make a worker, or find the one of this id that was asked for in the same words. Raises
        `OtherFingerprint` where it was in others, and `NotFound` for an unknown runtime."""
        body = typed(asked, wire.CreateBody)
        key, at_s = self._key(runtime_id, body.id), int(self._clock.now_s())
        made = Worker(runtime_id, at_s, fingerprint(body.config), _raw(body.config))

        async def attempt() -> Worker:
            home = await self._surface.runtime(key[:2])
            found = await self._surface.find(key)
            if found is not None:
                return _same(key, found.value, made.fingerprint)
            event_id = self._clock.new_id("evt")
            await self._state.commit(self._surface.create(key, made, event_id, home))
            return made

        async with self._quarantine(key):
            return worker_object(key, await decided(attempt, f"worker {show(key)}"))

    async def get(self, runtime_id: str, worker_id: str) -> wire.WorkerObject:
        """A worker. Raises `NotFound`."""
        key = self._key(runtime_id, worker_id)
        async with self._quarantine(key):
            return worker_object(key, (await self._surface.get(key)).value)

    async def page(
        self, runtime_id: str, query: ListQuery, status: Status | None = None
    ) -> Shown[wire.WorkerObject]:
        """A page of a runtime's workers. Those that cannot be read are told of."""
        await self._surface.runtime((self._tenant, runtime_id))
        found = await listing.workers(self._state, (self._tenant, runtime_id), query, status)
        for finding in found.damaged:
            await self._tell(runtime_id, "damaged", None, finding.where, finding.why)
        return _shown(found, lambda record: worker_object(record.key, record.value))

    async def state(self, runtime_id: str, worker_id: str) -> wire.StateObject:
        """What a worker goes on from. Raises `NotFound`."""
        key = self._key(runtime_id, worker_id)
        async with self._quarantine(key):
            return state_object(await self._surface.state(key))

    async def input(self, runtime_id: str, worker_id: str, asked: Any) -> wire.SubmissionObject:
        """Accept an input; it is acknowledged once it is durable. One that was accepted before
        under the same id, with the same content, gets the same acknowledgement.

        Raises `WorkerEnded`, and `OtherFingerprint` for other content under the same id.
        """
        body = typed(asked, wire.InputBody)
        key = self._key(runtime_id, worker_id)
        submission_id = body.submission_id or self._clock.new_id("sub")
        digest = fingerprint([body.role, body.content])
        said = Said(body.role, int(self._clock.now_s()), _raw(body.content))

        async def attempt() -> kept.Submission:
            held = await self._surface.get(key)
            found = await self._surface.submission(key, submission_id)
            if found is not None:
                _require_same((*key, submission_id), digest, found.value.digest)
                return found.value
            state, event_id = await self._surface.state(key), self._clock.new_id("evt")
            batch, made = self._surface.accept(held, state, submission_id, said, digest, event_id)
            await self._state.commit(batch)
            return made

        async with self._quarantine(key):
            accepted = await decided(attempt, f"worker {show(key)}")
        return submission_object(key, submission_id, accepted)

    async def start(self, runtime_id: str, worker_id: str, asked: Any = None) -> wire.WorkerObject:
        """Begin a run: whoever holds the generation of the answer may write for the worker, until
        it is let go, ended or taken over. Under an `operation_id` it is begun once. Raises
        `NotPossible` for one that is not ready."""
        run_id = typed({} if asked is None else asked, wire.StartBody).operation_id

        def goes_on(worker: Worker) -> bool:
            return worker.status is Status.RUNNING and worker.run_id == run_id is not None

        return await self._move(
            *(runtime_id, worker_id, "started"),
            runner=self._runner,
            run_id=run_id,
            also=self._lease(),
            unless=goes_on,
        )

    async def release(self, runtime_id: str, worker_id: str, asked: Any) -> wire.WorkerObject:
        """End a run; the worker is ready for another. Raises `StaleGeneration`."""
        body = typed(asked, wire.RunBody)
        return await self._move(runtime_id, worker_id, "released", body.generation, body.reason)

    async def fail(self, runtime_id: str, worker_id: str, asked: Any) -> wire.WorkerObject:
        """End a run, and the worker with it. Raises `StaleGeneration`."""
        body = typed(asked, wire.RunBody)
        return await self._move(runtime_id, worker_id, "failed", body.generation, body.reason)

    async def stop(self, runtime_id: str, worker_id: str, asked: Any = None) -> wire.WorkerObject:
        """Stop a worker, whoever runs it. One that has ended stays as it ended."""
        return await self._end(runtime_id, worker_id, "stopped", asked)

    async def cancel(self, runtime_id: str, worker_id: str, asked: Any = None) -> wire.WorkerObject:
        """Cancel a worker for good, whoever runs it. One that has ended stays as it ended."""
        return await self._end(runtime_id, worker_id, "cancelled", asked)

    async def restore(self, runtime_id: str, worker_id: str) -> wire.WorkerObject:
        """Make a worker ready again that was stopped or has failed, or that somebody runs who does
        not answer. Raises `NotPossible` for one that was cancelled."""
        return await self._move(
            runtime_id, worker_id, "restored", unless=lambda worker: worker.status is Status.READY
        )

    async def inputs(self, runtime_id: str, worker_id: str, limit: int = READ_MAX) -> wire.Inputs:
        """The inputs that no run has taken yet, the oldest first."""
        key = self._key(runtime_id, worker_id)
        async with self._quarantine(key):
            state = await self._surface.state(key)
            found = await self._surface.waiting(state, limit=limit)
        return wire.Inputs(
            data=[
                wire.InputObject(
                    submission_id=queued.value.submission_id,
                    number=queued.seq,
                    transcript=said.seq,
                    role=said.value.role,
                    content=plain(said.value.content),
                )
                for queued, said in found
            ]
        )

    async def progress(self, runtime_id: str, worker_id: str, asked: Any) -> wire.StateObject:
        """Commit a step of a run: its state, its part of the transcript, the inputs it has dealt
        with, what it used. The last one again, under its `operation_id`, is found done. Raises
        `StaleGeneration`, and `OtherFingerprint` for another step under that id."""
        body = typed(asked, wire.ProgressBody)
        key, at_s = self._key(runtime_id, worker_id), int(self._clock.now_s())
        said = [Said(one.role, at_s, _raw(one.content)) for one in body.transcript]
        if len(data := _raw(body.data)) > wire.EVENT_DATA_BYTES_MAX:
            raise LimitExceeded("the event's data, in bytes,", len(data), wire.EVENT_DATA_BYTES_MAX)
        event = WorkerEvent(
            "progressed",
            self._clock.new_id("evt"),
            at_s,
            body.generation,
            added=len(said),
            taken=body.taken,
            name=body.name,
            data=data,
            usage=body.usage,
        )
        value = None if body.state is msgspec.UNSET else _raw(body.state)
        id = body.operation_id
        step = None if id is None else (id, fingerprint(msgspec.to_builtins(body)))

        def decide(held: Held, state: HeldState) -> tuple[Batch, HeldState]:
            if step is not None and state.value.step_id == step[0]:
                _require_same((*key, step[0]), step[1], state.value.step_digest)
                return Batch(), state
            return self._surface.progress(held, state, event, said, value, step)

        return state_object(await self._decide(key, decide))

    async def events(
        self, runtime_id: str, worker_id: str, *, after: str | None = None, limit: int = READ_MAX
    ) -> wire.WorkerEvents:
        """What happened to a worker, in order, behind the cursor `after`. Raises `CursorRefused`
        for one of another worker, or of one of the same id that is no more."""
        key = self._key(runtime_id, worker_id)
        found, cursor, more = await self._read(kept.WORKER_EVENTS, key, after, limit)
        return wire.WorkerEvents(
            data=[event_object(one) for one in found], cursor=cursor, has_more=more
        )

    async def transcript(
        self, runtime_id: str, worker_id: str, *, after: str | None = None, limit: int = READ_MAX
    ) -> wire.Transcript:
        """What was said to a worker and by it, in order, behind the cursor `after`."""
        key = self._key(runtime_id, worker_id)
        found, cursor, more = await self._read(kept.TRANSCRIPTS, key, after, limit)
        return wire.Transcript(
            data=[said_object(one) for one in found], cursor=cursor, has_more=more
        )

    async def follow(
        self, runtime_id: str, worker_id: str, *, after: str | None = None
    ) -> AsyncGenerator[list[Told], None]:
        """What happens to a worker, as it becomes durable: behind the cursor `after`, or else all
        that there is now as one snapshot and then what comes. It ends with a worker's retirement.
        """
        key, log, engine = self._key(runtime_id, worker_id), kept.WORKER_EVENTS, self._state.engine
        await self.get(runtime_id, worker_id)
        if after is None:
            incarnation = (await engine.tip(log, key)).incarnation
            snapshot = await self._snapshot(key)
            seq = snapshot.state.events
            yield [(at_entry(engine.store_id, log, key, incarnation, seq), snapshot)]
        else:
            incarnation, seq = entry_at(engine.store_id, log, key, after)
            await engine.read(log, key, after=seq, incarnation=incarnation, limit=0)
        following = self._tail.follow(log, key, after=seq, ended=_is_last, incarnation=incarnation)
        async with self._quarantine(key), aclosing(following) as groups:
            async for group in groups:
                yield [
                    (at_entry(engine.store_id, log, key, incarnation, one.seq), event_object(one))
                    for one in group
                ]

    async def overview(self, runtime_id: str, worker_id: str) -> wire.OverviewObject:
        """A worker at a glance."""
        key = self._key(runtime_id, worker_id)
        async with self._quarantine(key):
            view = await self._view(kept.OVERVIEWS, key, kept.Overview(), kept.overviewed)
        return overview_object(key, view)

    async def usage(self, runtime_id: str, worker_id: str) -> wire.UsageObject:
        """What a worker used."""
        key = self._key(runtime_id, worker_id)
        async with self._quarantine(key):
            view = await self._view(kept.USAGES, key, kept.Usage(), kept.used)
        return usage_object(key, view)

    async def diagnostics(self, runtime_id: str, query: ListQuery) -> Shown[wire.DiagnosticObject]:
        """A page of what operators should know of a runtime's workers."""
        await self._surface.runtime((self._tenant, runtime_id))
        found = await listing.diagnostics(self._state, (self._tenant, runtime_id), query)
        return _shown(found, diagnostic_object)

    async def retain(self, runtime_id: str, worker_id: str, asked: Any) -> wire.RetentionObject:
        """Archive or purge a worker that has ended. Raises `NotPossible` for one that has not, and
        `OtherFingerprint` where the operation is another."""
        key = self._key(runtime_id, worker_id)
        async with self._quarantine(key):
            operation, done = await self._retiring.retain(key, typed(asked, wire.RetainBody))
        return retention_object(operation, done)

    async def retention(self, runtime_id: str, operation_id: str) -> wire.RetentionObject:
        """What such an operation has done. Raises `NotFound`."""
        key = (self._tenant, runtime_id, operation_id)
        return retention_object(key, (await self._state.retentions.get(key)).value)

    async def archive(self, runtime_id: str, operation_id: str) -> AsyncGenerator[bytes, None]:
        """What such an operation archived: lines of JSON, a part at a time."""
        parts = self._retiring.archive((self._tenant, runtime_id, operation_id))
        async with aclosing(parts):
            async for part in parts:
                yield part

    async def remove_archive(self, runtime_id: str, operation_id: str) -> wire.RetentionObject:
        """Remove what such an operation archived, for good; the operation stays. Raises `NotFound`,
        and `NotPossible` before it is done."""
        key = (self._tenant, runtime_id, operation_id)
        return retention_object(key, await self._retiring.remove_archive(key))

    def _key(self, runtime_id: str, worker_id: str) -> Key:
        return self._tenant, runtime_id, worker_id

    async def _decide(self, key: Key, decide: Callable[[Held, HeldState], tuple[Batch, T]]) -> T:
        """Commit what is decided on a worker as it is stored."""

        async def attempt() -> T:
            held, state = await self._surface.get(key), await self._surface.state(key)
            batch, made = decide(held, state)
            await self._state.commit(batch)
            return made

        async with self._quarantine(key):
            return await decided(attempt, f"worker {show(key)}")

    async def _move(
        self,
        runtime_id: str,
        worker_id: str,
        type: WorkerEventType,
        generation: int | None = None,
        reason: str | None = None,
        *,
        runner: str | None = None,
        run_id: str | None = None,
        also: Batch | None = None,
        unless: Callable[[Worker], bool] = lambda worker: False,
    ) -> wire.WorkerObject:
        """Change a worker's status, by its run of `generation` where that is given; one for which
        `unless` holds stays as it is."""
        key, at_s = self._key(runtime_id, worker_id), int(self._clock.now_s())

        def decide(held: Held, state: HeldState) -> tuple[Batch, Worker]:
            if unless(held.value):
                return Batch(), held.value
            if generation is not None:
                self._surface.require_run(held, generation)
            event_id = self._clock.new_id("evt")
            batch, moved = self._surface.move(
                *(held, state, type, event_id),
                at_s=at_s,
                runner=runner,
                reason=reason,
                run_id=run_id,
            )
            return batch + (also or Batch()), moved

        return worker_object(key, await self._decide(key, decide))

    async def _end(
        self, runtime_id: str, worker_id: str, type: WorkerEventType, asked: Any
    ) -> wire.WorkerObject:
        body = typed({} if asked is None else asked, wire.EndBody)
        key, at_s = self._key(runtime_id, worker_id), int(self._clock.now_s())

        def decide(held: Held, state: HeldState) -> tuple[Batch, Worker]:
            if held.value.status.ended:
                return Batch(), held.value
            event_id = self._clock.new_id("evt")
            return self._surface.move(held, state, type, event_id, at_s=at_s, reason=body.reason)

        return worker_object(key, await self._decide(key, decide))

    async def _read(
        self, log: Log[E], key: Key, after: str | None, limit: int
    ) -> tuple[list[Entry[E]], str, bool]:
        engine = self._state.engine
        async with self._quarantine(key):
            await self._surface.get(key)
            tip = await engine.tip(log, key)
            incarnation, seq = tip.incarnation, 0
            if after is not None:
                incarnation, seq = entry_at(engine.store_id, log, key, after)
            found = await engine.read(log, key, after=seq, incarnation=incarnation, limit=limit)
        last = found[-1].seq if found else seq
        return found, at_entry(engine.store_id, log, key, incarnation, last), last < tip.last

    async def _snapshot(self, key: Key) -> wire.Snapshot:
        """A worker, its state and its overview, all of one moment."""

        async def attempt() -> wire.Snapshot:
            before = await self._surface.state(key)
            held = await self._surface.get(key)
            view = await self._view(kept.OVERVIEWS, key, kept.Overview(), kept.overviewed)
            if view.events != before.value.events:
                where = f"the events of worker {show(key)}"
                raise Conflict(where, before.value.events, view.events)
            return wire.Snapshot(
                worker=worker_object(key, held.value),
                state=state_object(before),
                overview=overview_object(key, view),
            )

        async with self._quarantine(key):
            return await decided(attempt, f"worker {show(key)}")

    async def _view(
        self,
        records: Records[V],
        key: Key,
        empty: V,
        fold: Callable[[V, Entry[WorkerEvent]], V],
    ) -> V:
        """A projection, brought up to what its log holds now and kept for the next time. One that
        is damaged is made again: the log is the authority."""
        engine, log = self._state.engine, kept.WORKER_EVENTS
        held = await self._surface.get(key)
        version: int | None
        try:
            found = await engine.get(records, key)
            view, version = (found.value, found.version) if found else (empty, 0)
        except Damaged:
            view, version = empty, None
        before = view
        while entries := await engine.read(log, key, after=view.events, limit=_FOLDED):
            for entry in entries:
                view = fold(view, entry)
        if view.events > before.events or version is None:
            with suppress(Conflict, Unavailable, LimitExceeded):  # made again by the next who asks
                await self._state.commit(self._surface.keep(records, held, view, version))
        return view

    @asynccontextmanager
    async def _quarantine(self, key: Key) -> AsyncIterator[None]:
        """Tell of damage in a worker, once, and let it out."""
        try:
            yield
        except Damaged as damage:
            await self._tell(key[1], "damaged", key[2], damage.where, damage.why)
            raise

    async def _tell(
        self,
        runtime_id: str,
        type: kept.DiagnosticType,
        worker_id: str | None,
        where: str,
        why: str,
    ) -> None:
        found = kept.Diagnostic(type, where, why, int(self._clock.now_s()), worker_id)
        with suppress(Conflict, Unavailable):  # it was told before, or will be when it is met again
            await self._state.commit(self._surface.diagnose(self._tenant, runtime_id, found))


def _is_last(entry: Entry[WorkerEvent]) -> bool:
    return entry.value.type == "retired"


def _raw(value: Any) -> msgspec.Raw:
    codec.check(value)
    return msgspec.Raw(codec.encode(value))


def _same(key: Key, found: F, fingerprint: str) -> F:
    """What was found under an id that is asked for. Raises `OtherFingerprint`."""
    _require_same(key, fingerprint, found.fingerprint)
    return found


def _require_same(key: Key, asked: str, found: str | None) -> None:
    if asked != found:
        raise wire.OtherFingerprint(f"{show(key)}, its fingerprint", asked, found)


def _shown(found: Listed[Any], show_one: Callable[[Record[Any]], T]) -> Shown[T]:
    return Shown([show_one(record) for record in found.items], found.damaged, found.more)
