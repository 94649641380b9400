"""The worker runtime, by the same tests on every engine that carries it."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing
from pathlib import Path
from typing import Any

import apsw
import msgspec
import pytest

import perdure
from perdure.core import layouts
from perdure.core.batch import Batch, Drop, delete
from perdure.core.clock import SystemClock
from perdure.core.engine import Engine
from perdure.core.errors import CursorRefused, Damaged, Invalid, Latched, LimitExceeded, Missing
from perdure.core.layouts import Records
from perdure.engines import open_engine
from perdure.engines.checked import Checked
from perdure.engines.wrapping import Wrapping
from perdure.library import Embedded
from perdure.proving.subjects import postgres_url
from perdure.services.worker_checks import check_workers
from perdure.surfaces.retentions import ARCHIVES
from perdure.surfaces.state import LAYOUTS
from perdure.surfaces.workers import (
    MOVES,
    OVERVIEWS,
    STATES,
    SUBMISSIONS,
    TRANSCRIPTS,
    USAGES,
    WORKER_EVENTS,
    WORKERS,
    Status,
)
from perdure.wire.lists import ListQuery
from perdure.wire.workers import (
    NotPossible,
    OtherFingerprint,
    Snapshot,
    StaleGeneration,
    WorkerEnded,
)

KEY = ("default", "lab", "scout")
AT = ("lab", "scout")
DEADLINE_S = 60.0


class Place:
    """A store that is there as long as the test, opened one time after another."""

    def __init__(self, name: str, directory: Path) -> None:
        self._urls = {
            "memory": "memory://",
            "sqlite": f"sqlite:///{directory / 'state.db'}",
            "files": f"file:///{directory / 'state'}",
            "postgres": postgres_url(directory) if name == "postgres" else "",
        }
        self.name = name
        self.url = self._urls[name]
        self.stack = AsyncExitStack()
        self._memory: Engine | None = None

    async def open(self) -> Embedded:
        """The state as a process finds it that comes after another. One in memory stays open."""
        if self.name != "memory":
            await self.stack.aclose()
            return await self.stack.enter_async_context(perdure.open(self.url))
        if self._memory is None:
            self._memory = await open_engine(self.url, LAYOUTS)
        return Embedded(Checked(self._memory), SystemClock())


@pytest.fixture(params=["memory", "sqlite", "files", "postgres"])
async def place(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Place]:
    made = Place(request.param, tmp_path)
    yield made
    await made.stack.aclose()


@pytest.fixture
async def state(place: Place) -> Embedded:
    opened = await place.open()
    await opened.workers.create_runtime({"id": "lab", "config": {"model": "m"}})
    await opened.workers.create("lab", {"id": "scout", "config": {"goal": "look"}})
    return opened


async def agree(state: Embedded) -> None:
    """What the state counts is what the logs hold, and what the overview made of them."""
    counts = await state.workers.state(*AT)
    events = await state.engine.tip(WORKER_EVENTS, KEY)
    said = await state.engine.tip(TRANSCRIPTS, KEY)
    view = await state.workers.overview(*AT)
    assert (counts.events, counts.transcript) == (events.last, said.last)
    seen = (view.events, view.transcript, view.inputs, view.taken)
    assert seen == (counts.events, counts.transcript, counts.inputs, counts.taken)
    worker = await state.workers.get(*AT)
    assert (view.status, view.generation) == (worker.status, worker.generation)
    assert [one async for one in check_workers(state.engine)] == []


# proves W1, W2, W4
async def test_an_input_is_one_commit_and_a_run_goes_on_from_it(state: Embedded) -> None:
    workers = state.workers
    assert (await workers.runtime("lab")).config == {"model": "m"}
    commits = state.engine.stats.commits
    asked = {"content": {"say": "hi"}, "submission_id": "s1"}
    first = await workers.input(*AT, asked)
    assert state.engine.stats.commits == commits + 1
    assert (first.id, first.number, first.event, first.transcript) == ("s1", 1, 2, 1)
    assert await workers.input(*AT, asked) == first
    with pytest.raises(OtherFingerprint):
        await workers.input(*AT, asked | {"content": "something else"})
    await workers.input(*AT, {"content": "and again"})
    await agree(state)

    run = await workers.start(*AT)
    waiting = (await workers.inputs(*AT)).data
    assert [one.content for one in waiting] == [{"say": "hi"}, "and again"]
    step = {
        "generation": run.generation,
        "taken": 1,
        "state": {"turn": 1, "part": 0.5},
        "transcript": [{"role": "assistant", "content": "hello"}],
        "name": "turn",
        "data": "any value",
        "usage": {"tokens": 7},
    }
    after = await workers.progress(*AT, step)
    assert (after.value, after.taken, after.transcript) == ({"turn": 1, "part": 0.5}, 1, 3)
    assert after == await workers.state(*AT)
    assert [one.content for one in (await workers.inputs(*AT)).data] == ["and again"]
    with pytest.raises(NotPossible, match="at most 2"):
        await workers.progress(*AT, {"generation": run.generation, "taken": 2})
    await workers.progress(*AT, {"generation": run.generation, "usage": {"tokens": 5}})
    assert (await workers.usage(*AT)).counted == {"tokens": 12}
    await agree(state)

    page = await workers.events(*AT, limit=2)
    assert [one.type for one in page.data] == ["created", "accepted"]
    rest = await workers.events(*AT, after=page.cursor)
    types = ["accepted", "started", "progressed", "progressed"]
    assert ([one.type for one in rest.data], rest.has_more) == (types, False)
    assert [one.data for one in rest.data] == [None, None, "any value", None]
    told = await workers.transcript(*AT)
    assert [one.role for one in told.data] == ["user", "user", "assistant"]
    assert (await workers.transcript(*AT, after=told.cursor)).data == []
    assert (await workers.events(*AT, limit=0)).data == []
    with pytest.raises(LimitExceeded):
        await workers.events(*AT, limit=1_001)


# proves W1
async def test_every_kind_of_value_comes_back_as_it_was_given(state: Embedded) -> None:
    workers, run = state.workers, (await state.workers.start(*AT)).generation
    for given in (None, True, 2**62, -1.5, "\0é", [], {}, {"a": [1, {"b": None}]}):
        await workers.input(*AT, {"content": given})
        said = [{"role": "assistant", "content": given}]
        step = {"generation": run, "taken": 1, "state": given, "data": given, "transcript": said}
        assert (await workers.progress(*AT, step)).value == given
        assert (await workers.state(*AT)).value == given
        assert (await workers.events(*AT)).data[-1].data == given
        assert [one.content for one in (await workers.transcript(*AT)).data[-2:]] == [given] * 2


# proves W9, W10
async def test_what_a_step_tells_is_bounded_and_what_was_used_is_told_however_much_it_is(
    state: Embedded, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = {"generation": (await state.workers.start(*AT)).generation}
    await state.workers.progress(*AT, run | {"data": "x" * 65_534})
    with pytest.raises(LimitExceeded, match="65537, over the limit of 65536"):
        await state.workers.progress(*AT, run | {"data": "x" * 65_535})
    used = {f"name{number}": number for number in range(64)}
    with pytest.raises(Invalid, match="usage"):
        await state.workers.progress(*AT, run | {"usage": used | {"one more": 1}})
    await state.workers.progress(*AT, run | {"usage": used})
    monkeypatch.setattr(layouts, "VALUE_BYTES_MAX", 500)
    assert (await state.workers.usage(*AT)).counted == used
    await agree(state)


# proves W4, W7
async def test_a_run_and_its_last_step_may_be_sent_again(place: Place, state: Embedded) -> None:
    workers = state.workers
    begun = await workers.start(*AT, {"operation_id": "run1"})
    assert await workers.start(*AT, {"operation_id": "run1"}) == begun
    for other in (None, {"operation_id": "run2"}):
        with pytest.raises(NotPossible):
            await workers.start(*AT, other)
    step = {"generation": begun.generation, "transcript": [{"role": "assistant", "content": 1}]}
    done = await workers.progress(*AT, step | {"operation_id": "step1"})
    await workers.input(*AT, {"content": "in between"})
    again = await workers.progress(*AT, step | {"operation_id": "step1"})
    assert (done.transcript, again.transcript, again.inputs) == (1, 2, 1)
    with pytest.raises(OtherFingerprint):
        await workers.progress(*AT, step | {"operation_id": "step1", "taken": 1})
    await workers.stop(*AT)
    assert (await workers.progress(*AT, step | {"operation_id": "step1"})).transcript == 2
    with pytest.raises(StaleGeneration):
        await workers.progress(*AT, step | {"operation_id": "step2"})
    await workers.restore(*AT)
    assert (await workers.start(*AT, {"operation_id": "run1"})).generation > begun.generation
    await agree(state)


# proves W4, C4
async def test_many_writers_at_once_are_one_after_another(state: Embedded) -> None:
    sent = [{"content": number, "submission_id": f"s{number % 6}"} for number in range(8)]
    done = await asyncio.gather(
        *(state.workers.input(*AT, one) for one in sent), return_exceptions=True
    )
    refused = [one for one in done if isinstance(one, OtherFingerprint)]
    accepted = [one for one in done if not isinstance(one, BaseException)]
    assert (len(accepted), len(refused)) == (6, 2)
    assert sorted(one.number for one in accepted) == [1, 2, 3, 4, 5, 6]
    await agree(state)


# proves W5
async def test_what_ended_stays_as_it_ended(place: Place, state: Embedded) -> None:
    await state.workers.start(*AT)
    stopped = await state.workers.stop(*AT, {"reason": "enough"})
    assert (stopped.status, stopped.reason) == ("stopped", "enough")
    last = (await state.workers.events(*AT)).data[-1]
    assert (last.type, last.id) == ("stopped", stopped.ended_by)
    for again in (False, True):
        state = await place.open() if again else state
        assert await state.workers.cancel(*AT) == stopped
        assert await state.workers.stop(*AT) == stopped
        assert await state.workers.get(*AT) == stopped
        with pytest.raises(NotPossible):
            await state.workers.start(*AT)
        with pytest.raises(WorkerEnded):
            await state.workers.input(*AT, {"content": "more"})
        await agree(state)
    restored = await state.workers.restore(*AT)
    assert (restored.status, restored.ended_by, restored.reason) == ("ready", None, None)
    assert await state.workers.restore(*AT) == restored
    assert (await state.workers.cancel(*AT)).status == "cancelled"
    with pytest.raises(NotPossible):
        await state.workers.restore(*AT)


# proves W6
async def test_an_id_stands_for_what_was_asked_for_first(state: Embedded) -> None:
    workers = state.workers
    worker = await workers.get(*AT)
    assert await workers.create("lab", {"id": "scout", "config": {"goal": "look"}}) == worker
    with pytest.raises(OtherFingerprint, match=worker.fingerprint):
        await workers.create("lab", {"id": "scout", "config": {"goal": "other"}})
    with pytest.raises(OtherFingerprint):
        await workers.create_runtime({"id": "lab"})
    for refused in ({"id": "a/b"}, {"id": ".."}, {"id": "a", "config": {"x": float("nan")}}):
        with pytest.raises(Invalid):
            await workers.create("lab", refused)
    with pytest.raises(Missing):
        await workers.create("nowhere", {"id": "scout"})
    assert [one.id for one in (await workers.page("lab", ListQuery())).items] == ["scout"]
    assert (await state.engine.streams(WORKER_EVENTS, (), limit=9)).items == [KEY]
    made = await asyncio.gather(*(workers.create("lab", {"id": "one"}) for _ in range(4)))
    assert made == [made[0]] * 4
    assert (await state.engine.tip(WORKER_EVENTS, ("default", "lab", "one"))).last == 1


# proves W7
async def test_a_stale_run_writes_nothing(place: Place, state: Embedded) -> None:
    workers, seen = state.workers, []

    async def refused(run: int) -> None:
        before = await workers.state(*AT)
        for late in (workers.progress, workers.release, workers.fail):
            with pytest.raises(StaleGeneration):
                await late(*AT, {"generation": run})
        assert await workers.state(*AT) == before

    for over in (workers.stop, workers.restore, None):
        seen.append((await workers.start(*AT)).generation)
        if over is not None:
            await over(*AT)
        else:
            await workers.release(*AT, {"generation": seen[-1]})
        await refused(seen[-1])
        await workers.restore(*AT)
    seen.append((await workers.start(*AT)).generation)
    state = await place.open()  # nobody let go of it
    workers = state.workers
    if place.name in ("memory", "postgres"):
        await workers.restore(*AT)  # nobody vouched for it, or it never ended
    else:
        (told,) = (await workers.diagnostics("lab", ListQuery())).items
        assert (told.type, told.worker_id) == ("interrupted", "scout")
        assert (await workers.get(*AT)).reason == "process_restart"
    await refused(seen[-1])
    seen.append((await workers.start(*AT)).generation)
    assert seen == sorted(set(seen))
    await agree(state)


class Between(Wrapping):
    """An engine in whose readers' way somebody stops the worker: after its record, before its
    state."""

    def __init__(self, state: Embedded) -> None:
        super().__init__(state.engine)
        self._stop: Any = state.workers.stop

    async def get(self, records: Records[Any], key: tuple[str, ...]) -> Any:
        if records is STATES and self._stop is not None:
            stop, self._stop = self._stop, None
            await stop(*AT)
        return await super().get(records, key)


# proves W5, W7
async def test_what_was_read_before_a_worker_ended_decides_nothing(state: Embedded) -> None:
    run = (await state.workers.start(*AT)).generation
    with pytest.raises(StaleGeneration):
        await Embedded(Between(state), SystemClock()).workers.progress(*AT, {"generation": run})
    await state.workers.restore(*AT)
    with pytest.raises(WorkerEnded):
        await Embedded(Between(state), SystemClock()).workers.input(*AT, {"content": "late"})
    await agree(state)


def test_the_table_leads_everywhere_and_out_of_every_end() -> None:
    assert set(MOVES) == set(Status)
    reached = {status for moves in MOVES.values() for status in moves.values()}
    assert reached == set(Status)
    assert [status for status in Status if not MOVES[status]] == [Status.RETIRED]
    started = [status for status in Status if "started" in MOVES[status]]
    assert started == [Status.READY]


class Harmed(Wrapping):
    """An engine in which one record is damaged."""

    async def get(self, records: Records[Any], key: tuple[str, ...]) -> Any:
        if records is WORKERS and key == KEY:
            raise Damaged("workers lab/scout", "its checksum does not match")
        return await super().get(records, key)


# proves W8
async def test_one_damaged_worker_is_told_once_and_the_others_work(
    place: Place, state: Embedded
) -> None:
    await state.workers.create("lab", {"id": "other"})
    for again in (False, True):
        state = await place.open() if again else state
        harmed = Embedded(Harmed(state.engine), SystemClock())
        for _ in range(2):
            with pytest.raises(Damaged):
                await harmed.workers.get(*AT)
            with pytest.raises(Damaged):
                await harmed.workers.input(*AT, {"content": "hi"})
            await harmed.workers.input("lab", "other", {"content": "hi"})
        (told,) = (await state.workers.diagnostics("lab", ListQuery())).items
        assert (told.type, told.worker_id) == ("damaged", "scout")
        assert (told.where, told.why) == ("workers lab/scout", "its checksum does not match")


# proves W8
async def test_a_changed_byte_is_damage_of_one_worker(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'state.db'}"
    async with perdure.open(url) as state:
        await state.workers.create_runtime({"id": "lab"})
        for name in ("scout", "other"):
            await state.workers.create("lab", {"id": name})
    connection = apsw.Connection(str(tmp_path / "state.db"), vfs="cksmvfs")
    changed = ("UPDATE records_workers SET value = ? WHERE key = ?", (b"{}", "\x1f".join(KEY)))
    connection.execute(*changed)
    connection.close()
    for _ in range(2):
        async with perdure.open(url) as state:
            with pytest.raises(Damaged):
                await state.workers.start(*AT)
            page = await state.workers.page("lab", ListQuery())
            assert [one.id for one in page.items] == ["other"]
            assert [one.where for one in page.damaged] == ["workers lab/scout"]
            (told,) = (await state.workers.diagnostics("lab", ListQuery())).items
            assert (told.worker_id, told.where) == ("scout", "workers lab/scout")
            await state.workers.input("lab", "other", {"content": "hi"})


# proves W9
async def test_projections_are_made_again_byte_for_byte(state: Embedded) -> None:
    workers = state.workers
    await workers.input(*AT, {"content": "hi"})
    run = await workers.start(*AT)
    for number in range(4):
        step = {"generation": run.generation, "name": f"n{number}", "usage": {"b": 2, "a": number}}
        await workers.progress(*AT, step)
        await workers.overview(*AT), await workers.usage(*AT)  # a step at a time
    found = [await state.engine.get(records, KEY) for records in (OVERVIEWS, USAGES)]
    kept = [msgspec.json.encode(one.value) for one in found if one is not None]
    assert len(kept) == 2
    for records in (OVERVIEWS, USAGES):
        await state.commit(delete(records, KEY))
    shown = await workers.overview(*AT), await workers.usage(*AT)
    again = [await state.engine.get(records, KEY) for records in (OVERVIEWS, USAGES)]
    assert [msgspec.json.encode(one.value) for one in again if one is not None] == kept
    assert (shown[0].last_progress, shown[1].counted) == ("n3", {"a": 6, "b": 8})


# proves W10, C19, C23
async def test_a_follower_misses_nothing_and_resumes(place: Place, state: Embedded) -> None:
    await state.workers.input(*AT, {"content": "before"})

    def number(what: Any) -> int:
        return int(what.state.events if isinstance(what, Snapshot) else what.number)

    async def told(state: Embedded, after: str | None = None, *, until: int) -> list[Any]:
        found: list[Any] = []
        async with (
            asyncio.timeout(DEADLINE_S),
            aclosing(state.workers.follow(*AT, after=after)) as groups,
        ):
            async for group in groups:
                found += group
                if number(group[-1][1]) >= until:
                    break
        return found

    following = asyncio.create_task(told(state, until=5))
    for content in range(3):
        await asyncio.sleep(0)
        await state.workers.input(*AT, {"content": content})
    (cursor, first), *live = await following
    began = number(first)
    assert isinstance(first, Snapshot)
    assert first.overview.events == began
    assert [number(one) for _, one in live] == list(range(began + 1, 6))

    state = await place.open()
    assert await told(state, cursor, until=5) == live if live else began == 5
    start = (await state.workers.events(*AT, limit=1)).cursor
    assert [number(one) for _, one in await told(state, start, until=5)] == [2, 3, 4, 5]
    await state.workers.create("lab", {"id": "other"})
    with pytest.raises(CursorRefused):
        await state.workers.events("lab", "other", after=cursor)
    with pytest.raises(CursorRefused):
        await state.workers.transcript(*AT, after=cursor)


# proves W1, W10, C23
async def test_an_ended_worker_is_archived_and_gone_and_its_id_is_free(
    place: Place, state: Embedded
) -> None:
    workers = state.workers
    for number in range(3):
        await workers.input(*AT, {"content": number, "submission_id": f"s{number}"})
    asked = {"operation_id": "op1", "mode": "archive"}
    with pytest.raises(NotPossible, match="found ready"):
        await workers.retain(*AT, asked)
    await workers.stop(*AT)
    cursor = (await workers.events(*AT)).cursor
    events, said = await workers.events(*AT), await workers.transcript(*AT)
    done = await workers.retain(*AT, asked)
    assert (done.done, done.lines) == (True, 2 + len(events.data) + 1 + len(said.data))
    state = await place.open()
    workers = state.workers
    assert await workers.retain(*AT, asked) == done
    with pytest.raises(OtherFingerprint):
        await workers.retain(*AT, asked | {"mode": "purge"})
    with pytest.raises(Missing):
        await workers.get(*AT)
    for records in (STATES, SUBMISSIONS):
        assert (await state.engine.scan(records, KEY[:2], limit=9)).items == []
    assert (await state.engine.streams(TRANSCRIPTS, (), limit=9)).items == []
    data = b"".join([part async for part in workers.archive("lab", "op1")])
    assert (len(data), hashlib.sha256(data).hexdigest()) == (done.size_bytes, done.digest)
    lines = [msgspec.json.decode(line) for line in data.splitlines()]
    kept = [one["value"]["content"] for one in lines if one["collection"] == TRANSCRIPTS.name]
    assert kept == [0, 1, 2]

    await workers.create("lab", {"id": "scout"})
    await workers.input(*AT, {"content": "new", "submission_id": "s0"})
    with pytest.raises(CursorRefused):
        await workers.events(*AT, after=cursor)
    with pytest.raises(CursorRefused):
        async with asyncio.timeout(DEADLINE_S):
            await anext(workers.follow(*AT, after=cursor))
    await workers.cancel(*AT)
    purged = await workers.retain(*AT, {"operation_id": "op2", "mode": "purge"})
    assert (purged.done, purged.digest) == (True, None)
    with pytest.raises(Missing):
        await anext(workers.archive("lab", "op2"))


# proves W7
async def test_a_run_of_a_worker_that_was_purged_writes_nothing_for_its_namesake(
    place: Place, state: Embedded
) -> None:
    stale = (await state.workers.start(*AT)).generation
    await state.workers.stop(*AT)
    await state.workers.retain(*AT, {"operation_id": "op1", "mode": "purge"})
    state = await place.open()
    await state.workers.create("lab", {"id": "scout"})
    run = (await state.workers.start(*AT)).generation
    assert run > stale
    with pytest.raises(StaleGeneration):
        await state.workers.progress(*AT, {"generation": stale})
    await state.workers.progress(*AT, {"generation": run})
    await agree(state)


class Forgetful(Wrapping):
    """An engine that hands back another archive than it was given, or dies at its last commit."""

    lies = True

    async def get(self, records: Records[Any], key: tuple[str, ...]) -> Any:
        found = await super().get(records, key)
        if records is ARCHIVES and found is not None and self.lies:
            return msgspec.structs.replace(found, attachment=b"other")
        return found

    async def commit(self, batch: Batch) -> Any:
        if not self.lies and any(isinstance(op, Drop) for op in batch.ops):
            raise Latched("the disk failed")
        return await super().commit(batch)


# proves W1
async def test_nothing_is_removed_before_its_archive_is_whole(state: Embedded) -> None:
    await state.workers.input(*AT, {"content": "hi"})
    await state.workers.stop(*AT)
    harmed = Forgetful(state.engine)
    workers = Embedded(harmed, SystemClock()).workers
    asked = {"operation_id": "op1", "mode": "archive"}
    with pytest.raises(Damaged, match="the archive lab/op1"):
        await workers.retain(*AT, asked)
    harmed.lies = False
    with pytest.raises(Latched):
        await workers.retain(*AT, asked)
    assert (await workers.get(*AT)).status == "retired"
    assert [one.content for one in (await workers.transcript(*AT)).data] == ["hi"]
    with pytest.raises(NotPossible):
        await workers.retain(*AT, asked | {"operation_id": "op2"})
    assert (await state.workers.retain(*AT, asked)).done
