"""What must hold between the records and logs of workers, looked at one worker after another, also
while others write.

That each row is as it was written is the engine's to say. Here is what rows say of each other: the
state counts what the logs hold, the events amount to how the worker stands and to what is kept of
them, each input leads to what was said and acknowledged, and an archive is what was archived.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Iterator
from typing import Any, TypeVar

import msgspec

from perdure.core.engine import Engine
from perdure.core.errors import Damaged
from perdure.core.keys import Key, show
from perdure.core.layouts import Log, Records
from perdure.core.paging import every
from perdure.core.values import Entry, Finding, Record, Tip
from perdure.services.worker_objects import fingerprint, plain
from perdure.surfaces.retentions import ARCHIVES, RETENTIONS, Retention
from perdure.surfaces.workers import (
    INPUTS,
    MOVES,
    OVERVIEWS,
    RUNTIMES,
    STATES,
    SUBMISSIONS,
    TRANSCRIPTS,
    USAGES,
    WORKER_EVENTS,
    WORKERS,
    Overview,
    Status,
    Usage,
    Worker,
    WorkerState,
    overviewed,
    used,
)

T = TypeVar("T")

_READ = 500
_TRIES_MAX = 1_000
_OWNED: tuple[tuple[Records[Any], Records[Any]], ...] = (
    *((records, WORKERS) for records in (STATES, OVERVIEWS, USAGES, SUBMISSIONS)),
    (ARCHIVES, RETENTIONS),
    (WORKERS, RUNTIMES),
)
_LOGS: tuple[Log[Any], ...] = (WORKER_EVENTS, TRANSCRIPTS, INPUTS)
_MOVING = {type for moves in MOVES.values() for type in moves}


class _Moment(msgspec.Struct, frozen=True):
    """A worker, and what there is of it, as of one commit."""

    key: Key
    worker: Worker
    state: WorkerState
    tips: dict[str, Tip]
    submissions: int
    overview: Overview | None
    usage: Usage | None


async def check_workers(engine: Engine, within: Key = ()) -> AsyncIterator[Finding]:
    """What does not hold of the workers whose keys begin with `within`: everybody's, a tenant's,
    a runtime's, or one. Nothing is changed."""
    damaged: list[Finding] = []
    if len(within) == len(WORKERS.key):
        for finding in await _check(engine, within):
            yield finding
    else:
        async for held in every(engine, WORKERS, within, damaged=damaged):
            for finding in await _check(engine, held.key):
                yield finding
        async for finding in _strays(engine, within, damaged):
            yield finding
    async for operation in every(engine, RETENTIONS, within[:2], damaged=damaged):
        if within[2:] in ((), (operation.value.worker_id,)):
            for why in await _retained(engine, operation):
                yield Finding(f"operation {show(operation.key)}", why)
    for finding in damaged:
        yield finding


async def _strays(engine: Engine, within: Key, damaged: list[Finding]) -> AsyncIterator[Finding]:
    """What belongs to a worker, an operation or a runtime that is not there."""
    for records, owners in _OWNED:
        last: Key = ()
        async for record in every(engine, records, within, damaged=damaged):
            key = record.key[: len(owners.key)]
            alone = key != last and not await _is_there(engine, owners, key)
            if alone and await _is_there(engine, records, record.key):  # else both were removed
                where = f"{records.name} {show(record.key)}"
                yield Finding(where, f"there is none of {owners.name} that it belongs to")
            last = key
    for log in _LOGS:
        cursor: str | None = None
        while True:
            page = await engine.streams(log, within, limit=_READ, cursor=cursor)
            for key in page.items:
                if not await _is_there(engine, WORKERS, key) and (await engine.tip(log, key)).last:
                    yield Finding(f"{log.name} {show(key)}", "its worker is not there")
            if (cursor := page.cursor) is None:
                break


async def _is_there(engine: Engine, records: Records[Any], key: Key) -> bool:
    try:
        return await engine.get(records, key) is not None
    except Damaged:  # which is told where it is looked at
        return True


async def _check(engine: Engine, key: Key) -> list[Finding]:
    """What does not hold of one worker; nothing if it is removed meanwhile."""
    where = f"worker {show(key)}"
    try:
        moment = await _moment(engine, key)
        if moment is None:
            return []
        found = [Finding(where, why) for why in _counts(moment)]
        if not found:
            found = [Finding(where, why) async for why in _amounts(engine, moment)]
            found += [Finding(where, why) async for why in _answers(engine, moment)]
    except Damaged as damage:
        return [Finding(damage.where, damage.why)]
    tip = await engine.tip(WORKER_EVENTS, key)
    return found if tip.incarnation == moment.tips[WORKER_EVENTS.name].incarnation else []


async def _moment(engine: Engine, key: Key) -> _Moment | None:
    """A worker as of one commit, as each that writes it writes its state."""
    for _ in range(_TRIES_MAX):
        state, held = await engine.get(STATES, key), await engine.get(WORKERS, key)
        tips = {log.name: await engine.tip(log, key) for log in _LOGS}
        submissions = (await engine.count(SUBMISSIONS, key)).get((), 0)
        overview, usage = await engine.get(OVERVIEWS, key), await engine.get(USAGES, key)
        again = await engine.get(STATES, key)
        if (state and state.version) != (again and again.version):
            continue
        if held is None:
            return None
        if state is None:
            raise Damaged(f"worker {show(key)}", "it has no state")
        return _Moment(
            *(key, held.value, state.value, tips, submissions),
            *(overview.value if overview else None, usage.value if usage else None),
        )
    raise Damaged(f"worker {show(key)}", "it changed too often to be looked at. Stop it first")


def _counts(moment: _Moment) -> Iterator[str]:
    """The state counts what there is, from the first of it on."""
    state = moment.state
    for log, count in zip(_LOGS, (state.events, state.transcript, state.inputs), strict=True):
        tip = moment.tips[log.name]
        if (tip.first, tip.last) != (1, count):
            yield f"its state counts {count} of {log.name}, and {tip.first} to {tip.last} are there"
    if state.taken > state.inputs:
        yield f"its state has taken {state.taken} of {state.inputs} inputs"
    if moment.submissions != state.inputs and moment.worker.status is not Status.RETIRED:
        yield f"{moment.submissions} submissions are kept of {state.inputs} inputs"


async def _amounts(engine: Engine, moment: _Moment) -> AsyncIterator[str]:
    """Every event may follow on the one before it, and together they amount to how the worker
    stands, and to the projections that are kept."""
    view, usage, ended_by = Overview(), Usage(), None
    seen, counted = moment.overview, moment.usage
    for ahead in (seen, counted):
        if ahead is not None and ahead.events > moment.state.events:
            yield f"a projection is of {ahead.events} events, and there are {moment.state.events}"
    async for entry in _entries(engine, WORKER_EVENTS, moment.key, moment.state.events):
        before, event = Status(view.status), entry.value
        moves = event.type in MOVES[before]
        if (event.type in _MOVING and not moves) or (event.type == "created") != (entry.seq == 1):
            yield f"event {entry.seq}, {event.type}, does not follow on {before.value}"
        begins = moves and view.generation == 0  # beyond that of all before it that had this id
        if not (event.generation == view.generation + moves or (begins and event.generation > 0)):
            yield f"event {entry.seq} is of generation {event.generation}, not of the one before it"
        view, usage = overviewed(view, entry), used(usage, entry)
        if moves and view.status != "retired":
            ended_by = event.id if Status(view.status).ended else None
        for name, kept, made in (("overview", seen, view), ("usage", counted, usage)):
            if kept is not None and kept.events == entry.seq and kept != made:
                yield f"its {name} is not what its first {entry.seq} events amount to"
    worker, state = moment.worker, moment.state
    told = (view.status, view.generation, ended_by, view.transcript, view.inputs, view.taken)
    stands = (worker.stands, worker.generation, worker.ended_by)
    if told != (*stands, state.transcript, state.inputs, state.taken):
        yield "its events amount to another status, generation, end or count than it has"


async def _answers(engine: Engine, moment: _Moment) -> AsyncIterator[str]:
    """Each input is an entry of the transcript, an event, and an acknowledgement that names both
    and is of this content."""
    key = moment.key
    async for _ in _entries(engine, TRANSCRIPTS, key, moment.state.transcript):
        pass
    if moment.worker.status is Status.RETIRED:
        return  # what was acknowledged is being forgotten
    async for entry in _entries(engine, INPUTS, key, moment.state.inputs):
        queued = entry.value
        said = await _entry(engine, TRANSCRIPTS, key, queued.transcript)
        found = await engine.get(SUBMISSIONS, (*key, queued.submission_id))
        accepted = found.value if found is not None else None
        event = None
        if accepted is not None:
            event = await _entry(engine, WORKER_EVENTS, key, accepted.event)
        if accepted is None or event is None or said is None:
            yield f"input {entry.seq} leads to no event, entry or acknowledgement"
            continue
        digest = fingerprint([said.role, plain(said.content)])
        named = (accepted.number, accepted.transcript, accepted.digest)
        told = (event.type, event.id, event.submission_id)
        if (named, told) != (
            (entry.seq, queued.transcript, digest),
            ("accepted", accepted.event_id, queued.submission_id),
        ):
            yield f"input {entry.seq} is not what was acknowledged of {queued.submission_id}"


async def _retained(engine: Engine, operation: Record[Retention]) -> list[str]:
    """One that is done has an archive if it made one, just as it was, until that is removed; any
    other a worker that waits for it."""
    key, retention = operation.key, operation.value
    parts = (await engine.count(ARCHIVES, key)).get((), 0)
    if not retention.done:
        held = await engine.get(WORKERS, (*key[:2], retention.worker_id))
        if held is not None and held.value.status is Status.RETIRED:
            return []
        again = await engine.get(RETENTIONS, key)
        unchanged = again is not None and again.version == operation.version
        return ["it is not done, and no worker waits for it"] * unchanged
    if retention.removed_at_s is not None:
        return [] if parts <= retention.parts else ["its archive was removed, and a part is there"]
    digest, size_bytes = hashlib.sha256(), 0
    async for part in every(engine, ARCHIVES, key):
        digest.update(part.attachment or b"")
        size_bytes += len(part.attachment or b"")
    expected = (retention.parts, retention.size_bytes, retention.digest)
    made = digest.hexdigest() if retention.digest is not None else None
    return [] if (parts, size_bytes, made) == expected else ["its archive is not what it was"]


async def _entries(engine: Engine, log: Log[T], key: Key, last: int) -> AsyncIterator[Entry[T]]:
    """The entries of a log up to `last`."""
    after = 0
    while page := await engine.read(log, key, after=after, limit=min(_READ, last - after)):
        for entry in page:
            yield entry
        after = page[-1].seq


async def _entry(engine: Engine, log: Log[T], key: Key, seq: int) -> T | None:
    """One of them, if there is such a one."""
    found = await engine.read(log, key, after=max(seq - 1, 0), limit=1)
    return found[0].value if found and found[0].seq == seq else None
