"""Jobs as records: what may follow what, who is refused, and what a boot finds."""

from __future__ import annotations

import pytest

from perdure.core.batch import Batch, put
from perdure.core.errors import Conflict
from perdure.core.layouts import Records
from perdure.core.limits import PAGE_MAX
from perdure.engines import open_engine
from perdure.engines.checked import Checked
from perdure.surfaces.jobs import JOB_EVENTS, MOVES, Attempt, Held, Job, Jobs, Status, Step

NOTES = Records("notes", str, key=("tenant", "id"))
KEY = ("t", "job_1")


class Place:
    """An engine with jobs in it."""

    def __init__(self, engine: Checked) -> None:
        self.engine = engine
        self.jobs = Jobs(engine)

    async def add(self, number: int = 1, *, at_s: int = 100) -> Held:
        key = ("t", f"job_{number}")
        job = Job("test", f"subject_{number}", at_s, attempts_max=2)
        await self.engine.commit(self.jobs.create(key, job, b'{"say": "hello"}'))
        return await self.read(key)

    async def read(self, key: tuple[str, ...] = KEY) -> Held:
        held = await self.jobs.find(key)
        assert held is not None
        return held

    async def commit(self, batch: Batch) -> Held:
        await self.engine.commit(batch)
        return await self.read()

    async def begin(self, held: Held, runner: str, at_s: int = 0) -> Held:
        batch, begun = self.jobs.begin(held, runner, at_s=at_s)
        read = await self.commit(batch)
        assert read == begun
        return read


@pytest.fixture
async def place() -> Place:
    return Place(Checked(await open_engine("memory://", (*Jobs.promise.layouts, NOTES))))


def note(said: str) -> Batch:
    return put(NOTES, ("t", "note"), said)


# proves C23
async def test_an_owner_that_was_replaced_writes_nothing_more(place: Place) -> None:
    jobs = place.jobs
    first = await place.begin(await place.add(), "boot_1")
    await place.engine.commit(note("first") + jobs.owned(first))
    waiting = await place.commit(jobs.requeue(first, "process_restart", at_s=1))
    second = await place.begin(waiting, "boot_2")
    for late in (
        note("late") + jobs.owned(first),
        note("late") + jobs.end(first, Status.SUCCEEDED, at_s=2),
        note("late") + jobs.requeue(first, "server_stopped", at_s=2),
    ):
        with pytest.raises(Conflict):
            await place.engine.commit(late)
    await place.engine.commit(note("second") + jobs.owned(second))
    kept = await place.engine.get(NOTES, ("t", "note"))
    assert kept is not None
    assert kept.value == "second"


async def test_two_that_want_the_same_job_do_not_both_get_it(place: Place) -> None:
    waiting = await place.add()
    (one, _), (other, _) = (place.jobs.begin(waiting, f"boot_{n}", at_s=0) for n in (1, 2))
    await place.engine.commit(one)
    with pytest.raises(Conflict):
        await place.engine.commit(other)
    assert (await place.read()).value.runner == "boot_1"


async def test_the_wish_to_cancel_fences_the_runner_and_lets_nobody_begin(place: Place) -> None:
    begun = await place.begin(await place.add(), "boot_1")
    wished = await place.commit(place.jobs.cancel(begun))
    with pytest.raises(Conflict):
        await place.engine.commit(note("late") + place.jobs.owned(begun))
    waiting = await place.commit(place.jobs.requeue(wished, "process_restart", at_s=1))
    assert waiting.value.owed == "cancel"
    with pytest.raises(Conflict):
        place.jobs.begin(waiting, "boot_2", at_s=2)
    ended = await place.commit(place.jobs.end(waiting, Status.CANCELLED, at_s=3))
    assert (ended.value.status, ended.value.owed) == (Status.CANCELLED, None)


@pytest.mark.parametrize("status", [status for status in Status if not MOVES[status]])
async def test_what_has_ended_moves_no_more(place: Place, status: Status) -> None:
    held = await place.add()
    if status is Status.SUCCEEDED:
        held = await place.begin(held, "boot_1")
    ended = await place.commit(place.jobs.end(held, status, at_s=1))
    assert ended.value.runner is None
    assert ended.attachment == b'{"say": "hello"}'
    for move in (
        lambda: place.jobs.end(ended, Status.FAILED, at_s=2),
        lambda: place.jobs.requeue(ended, "process_restart", at_s=2),
        lambda: place.jobs.begin(ended, "boot_2", at_s=2),
    ):
        with pytest.raises(Conflict):
            move()


async def test_a_boot_finds_what_is_unfinished_cancellations_first_then_the_oldest(
    place: Place,
) -> None:
    for number, at_s in ((1, 300), (2, 100), (3, 200), (4, 400), (5, 50)):
        held = await place.add(number, at_s=at_s)
        if number == 4:
            await place.engine.commit(place.jobs.cancel(held))
        if number == 5:
            await place.engine.commit(place.jobs.end(held, Status.CANCELLED, at_s=60))
    page = await place.jobs.unfinished(limit=10)
    assert [held.key[-1] for held in page.items] == ["job_4", "job_2", "job_3", "job_1"]


async def test_steps_stand_until_an_attempt_begins_anew(place: Place) -> None:
    jobs = place.jobs
    waiting = await place.add()
    for attempt, (continued, made) in enumerate(
        [(False, ["a", "b"]), (False, ["c"]), (True, ["d"])], start=1
    ):
        batch, begun = jobs.begin(waiting, f"boot_{attempt}", at_s=attempt, continued=continued)
        await place.engine.commit(batch)
        await place.engine.commit(jobs.finish(begun, [("part", one) for one in made], at_s=9))
        waiting = await place.commit(jobs.requeue(begun, "process_restart", at_s=9))
    assert not jobs.finish(begun, [], at_s=9)
    assert jobs.steps(await jobs.events(KEY)) == [
        Step("part", "a", 1, 9, abandoned=True),
        Step("part", "b", 1, 9, abandoned=True),
        Step("part", "c", 2, 9),
        Step("part", "d", 3, 9),
    ]


# proves R5
async def test_events_beyond_one_page_are_all_read(place: Place) -> None:
    begun = await place.begin(await place.add(), "boot_1")
    steps = [("part", str(number)) for number in range(2 * PAGE_MAX)]
    await place.engine.commit(place.jobs.finish(begun, steps, at_s=1))
    events = await place.jobs.events(KEY)
    assert [(step.name, step.subject) for step in place.jobs.steps(events)] == steps


async def test_what_became_of_each_attempt_can_be_read(place: Place) -> None:
    begun = await place.begin(await place.add(), "boot_1", 10)
    waiting = await place.commit(place.jobs.requeue(begun, "process_restart", at_s=20))
    begun = await place.begin(waiting, "boot_2", 21)
    stopped = await place.commit(place.jobs.requeue(begun, "server_stopped", at_s=30, free=True))
    assert (begun.value.attempts_max, stopped.value.attempts_max) == (2, 3)
    begun = await place.begin(stopped, "boot_3", 31)
    assert await place.jobs.attempts(KEY) == [
        Attempt(1, 10, 20, "process_restart"),
        Attempt(2, 21, 30, "server_stopped"),
        Attempt(3, 31),
    ]
    ended = await place.commit(place.jobs.end(begun, Status.SUCCEEDED, at_s=40))
    await place.engine.commit(place.jobs.delete(ended))
    assert await place.jobs.find(KEY) is None
    assert await place.engine.read(JOB_EVENTS, KEY, limit=10) == []
