"""Background responses: run from a job, taken over from dead processes, cancelled for good. The
death is real in tests/crash; here it is a node that is dropped without a stop."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest

from perdure.core.batch import Append, Batch, put
from perdure.core.errors import CommitUnknown, LimitExceeded
from perdure.core.keys import Key
from perdure.core.limits import VALUE_BYTES_MAX
from perdure.core.values import Committed
from perdure.engines.wrapping import Wrapping
from perdure.proving.scripts import script_of
from perdure.proving.upstream import ScriptedUpstream
from perdure.proving.waiting import wait_until
from perdure.services.background import job_key
from perdure.services.gateway import Started
from perdure.services.stored import Stored
from perdure.surfaces.items import ITEMS
from perdure.surfaces.jobs import JOB_EVENTS, JOB_INPUTS, JOBS, Job, JobInput, Status
from perdure.surfaces.jobs import Held as HeldJob
from perdure.surfaces.responses import EVENTS, RESPONSES
from perdure.wire.errors import ConversationLocked, NotFound, WireError
from tests.services.conftest import Driver, Open, someone
from tests.services.test_recovery import Deaf, die, said
from tests.services.test_retention import prune

WITHIN_S = 10.0


def stored(driver: Driver) -> Stored:
    return Stored(driver.node.state, driver.node.gateway, driver.node.jobs)


async def body(driver: Driver, response_id: str) -> dict[str, Any]:
    return msgspec.json.decode(await stored(driver).get("default", response_id))


async def cancel(driver: Driver, response_id: str) -> dict[str, Any]:
    return msgspec.json.decode(await stored(driver).cancel("default", response_id))


async def job_of(driver: Driver, key: Key) -> HeldJob:
    held = await driver.node.state.responses.get(*key)
    job = await driver.node.state.jobs.find(job_key(key, held.value))
    assert job is not None
    return job


async def heard(
    driver: Driver, started: Started, text: str, *, attempt: int = 1
) -> list[dict[str, Any]]:
    """Follow until that attempt has said so much."""
    seen: list[dict[str, Any]] = []
    async for group in driver.node.gateway.events(started, after=-1):
        seen += [msgspec.json.decode(event) for event in group]
        begins = [at for at, type in enumerate(types(seen)) if type == "in_progress"]
        if len(begins) == attempt and said(seen[begins[-1] :]).startswith(text):
            return seen
    raise AssertionError(f"it ended before it said {text!r}")


async def killed(opened: Open, prompt: str, text: str) -> tuple[Started, list[dict[str, Any]]]:
    """A background response whose process died when it had said `text`."""
    first = await opened(wrap=Deaf)
    started = await first.ask(prompt, background=True)
    seen = await heard(first, started, text)
    await die(first.node)
    return started, seen


def types(events: list[dict[str, Any]]) -> list[str]:
    return [event["type"].removeprefix("response.") for event in events]


# proves R1
async def test_it_is_queued_at_once_and_runs_while_nobody_waits(driver: Driver) -> None:
    started = await driver.ask("count 3", background=True)
    first = msgspec.json.decode(started.accepted or b"")
    assert (first["status"], first["background"], first["output"]) == ("queued", True, [])
    events = await driver.events(started)
    assert types(events)[:4] == ["created", "queued", "in_progress", "output_item.added"]
    assert [event["response"]["status"] for event in events[:3]] == [
        "queued",
        "queued",
        "in_progress",
    ]
    ended = await body(driver, started.id)
    assert (ended["status"], events[-1]["response"]) == ("completed", ended)
    assert ended["output"][0]["content"][0]["text"] == "1 2 3"
    assert "perdure" not in ended
    job = await job_of(driver, started.key)
    assert (job.value.status, job.value.owed, job.value.attempt) == (Status.SUCCEEDED, None, 1)


# proves R5, R12
async def test_a_model_that_is_still_loading_is_waited_for(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("perdure.services.background._LOADING_PAUSE_S", 0.05)
    async with ScriptedUpstream() as somewhere:
        url = somewhere.url
    driver = await opened({"upstream.url": url})
    started = await driver.ask("count 3", background=True)
    upstream = driver.node.upstreams.members[0].upstream

    async def tried() -> bool:
        return upstream.stats.failures > 0

    await wait_until(tried, WITHIN_S, "the model was asked in vain")
    assert (await body(driver, started.id))["status"] in ("queued", "in_progress")
    port = int(url.removesuffix("/v1").rpartition(":")[2])
    async with ScriptedUpstream(port):
        events = await driver.events(started)
    assert events[-1]["response"]["status"] == "completed"
    assert said(events) == "1 2 3"


# proves R5, R12
async def test_an_answer_that_broke_off_is_not_begun_again(driver: Driver) -> None:
    """A stream that had said something is never repeated: whoever reads it has read that."""
    started = await driver.ask("cut 3", background=True)
    async with asyncio.timeout(WITHIN_S):
        events = await driver.events(started)
    assert types(events)[-1] == "failed"
    assert said(events) == "1 2 3"
    assert driver.node.upstreams.members[0].upstream.stats.requests == 1


@pytest.mark.parametrize("engine_url", ["sqlite"], indirect=True)
class TestAfterADeath:
    # proves R5
    async def test_it_is_taken_over_and_no_text_is_repeated_within_an_item(
        self, opened: Open, upstream: ScriptedUpstream
    ) -> None:
        started, seen = await killed(opened, "gate again 3 12", "1 2 3")
        await upstream.open("again")
        driver = await opened()
        events = await driver.events(started)
        assert events[: len(seen)] == seen
        assert [event["sequence_number"] for event in events] == list(range(len(events)))
        over = [at for at, type in enumerate(types(events)) if type == "in_progress"][1]
        assert types(events)[over - 3 : over] == [
            "output_text.done",
            "content_part.done",
            "output_item.done",
        ]
        left = events[over - 1]
        assert (left["output_index"], left["item"]["status"]) == (0, "incomplete")
        assert events[over]["response"]["output"] == [left["item"]], "indexes go on from here"
        assert {event["output_index"] for event in events[over + 1 : -1]} == {1}
        ended = await body(driver, started.id)
        assert events[-1]["response"] == ended
        assert ended["status"] == "completed"
        assert said(events[over:]) == "1 2 3 4 5 6 7 8 9 10 11 12"
        assert [item["content"][0]["text"] for item in ended["output"]] == [said(events[over:])]
        perdure = ended["perdure"]
        assert perdure["abandoned"] == [left["item"]]
        assert said(events[:over]) == left["item"]["content"][0]["text"]
        assert [(one["attempt"], one.get("reason")) for one in perdure["attempts"]] == [
            (1, "process_restart"),
            (2, None),
        ]
        outputs = [item async for item in driver.node.state.items.all(started.key, "output")]
        assert [item.value.id for item in outputs] == [ended["output"][0]["id"]]

    # proves R5
    async def test_what_is_too_large_to_be_taken_over_ends_all_the_same(self, opened: Open) -> None:
        class TakesNoTakeover(Wrapping):
            """Refuses a batch that asks a model anew, as one over a limit is refused."""

            async def commit(self, batch: Batch) -> Committed:
                texts = [op for op in batch.ops if isinstance(op, Append) and op.log is EVENTS]
                if texts and b'"response.in_progress"' in texts[-1].entries[-1]:
                    raise LimitExceeded("the events", VALUE_BYTES_MAX + 1, VALUE_BYTES_MAX)
                return await super().commit(batch)

        started, _ = await killed(opened, "slow 0.02 12", "1 2 3")
        driver = await opened(wrap=TakesNoTakeover)

        async def ended() -> bool:
            return (await body(driver, started.id))["status"] == "failed"

        await wait_until(ended, WITHIN_S, "its end")
        assert (await body(driver, started.id))["perdure"]["reason"] == "output_too_large"
        assert (await job_of(driver, started.key)).value.status is Status.FAILED

    # proves R5
    async def test_an_answer_too_long_to_be_said_again_is_told_in_outline(
        self, opened: Open, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("perdure.services.background._SAID_AGAIN_BYTES_MAX", 100)
        started, _ = await killed(opened, "slow 0.02 12", "1 2 3")
        driver = await opened()
        events = await driver.events(started)
        begins = [event for event in events if event["type"] == "response.in_progress"]
        [outline] = begins[1]["response"]["output"]
        [left] = (await body(driver, started.id))["perdure"]["abandoned"]
        [part] = left["content"]
        assert part["text"]
        assert outline == left | {"content": [part | {"text": ""}]}

    # proves R5, R6
    async def test_what_was_told_of_the_request_is_told_after_a_takeover_too(
        self, opened: Open
    ) -> None:
        first = await opened(wrap=Deaf)
        operators = someone(store_always=True)
        started = await first.ask("slow 0.02 6", caller=operators, background=True, store=False)
        await heard(first, started, "1 2 3")
        await die(first.node)
        driver = await opened()
        await driver.events(started)
        told = (await body(driver, started.id))["perdure"]
        assert told["store"] == "always"
        assert len(told["attempts"]) == 2

    # proves C13, R5
    async def test_the_boot_says_that_it_was_requeued_not_interrupted(self, opened: Open) -> None:
        started, _ = await killed(opened, "hang 3", "1 2 3")
        driver = await opened()
        found = {one.surface: one for one in driver.node.boot.recovery}
        assert (found["jobs"].requeued, found["responses"].interrupted) == (1, 0)
        await heard(driver, started, "1 2 3", attempt=2)
        assert (await body(driver, started.id))["status"] == "in_progress"
        assert (await job_of(driver, started.key)).value.runner == driver.node.boot_id

    # proves R5
    async def test_what_was_queued_simply_starts(self, opened: Open) -> None:
        class DiesOfTheBeginning(Deaf):
            async def commit(self, batch: Batch) -> Committed:
                begins = any(isinstance(op, Append) and op.log is JOB_EVENTS for op in batch.ops)
                self.dead = self.dead or begins
                return await super().commit(batch)

        first = await opened(wrap=DiesOfTheBeginning)
        started = await first.ask("echo late", background=True)
        await die(first.node)
        driver = await opened()
        events = await driver.events(started)
        assert types(events)[:4] == ["created", "queued", "in_progress", "output_item.added"]
        assert types(events).count("in_progress") == 1
        assert "perdure" not in await body(driver, started.id)

    # proves R5
    async def test_a_wish_to_cancel_outlives_the_process_and_wins(
        self, opened: Open, upstream: ScriptedUpstream
    ) -> None:
        class DiesOfTheEnd(Deaf):
            """Dies when the wish is durable and the end of the response is not."""

            async def commit(self, batch: Batch) -> Committed:
                ends = [op for op in batch.ops if isinstance(op, Append) and op.log is EVENTS]
                if ends and b"response.incomplete" in ends[-1].entries[-1]:
                    self.dead = True
                return await super().commit(batch)

        first = await opened(wrap=DiesOfTheEnd)
        started = await first.ask("hang 3", background=True)
        await heard(first, started, "1 2 3")
        with pytest.raises(ConnectionAbortedError):
            await stored(first).cancel("default", started.id)
        await die(first.node)
        asked = len(await upstream.received())
        driver = await opened()
        events = await driver.events(started)
        assert (await body(driver, started.id))["status"] == "cancelled"
        assert types(events).count("in_progress") == 1
        assert len(await upstream.received()) == asked

    # proves R5
    async def test_one_that_kills_its_server_is_given_up(self, opened: Open) -> None:
        started, _ = await killed(opened, "hang 3", "1 2 3")
        for attempt in range(2, 6):
            again = await opened(wrap=Deaf)
            await heard(again, started, "1 2 3", attempt=attempt)
            await die(again.node)
        driver = await opened()
        events = await driver.events(started)
        assert types(events)[-1] == "failed"
        ended = await body(driver, started.id)
        assert ended["error"]["code"] == "server_error"
        assert ended["perdure"]["reason"] == "attempts_exhausted"
        assert len(ended["perdure"]["attempts"]) == 5
        assert {one["reason"] for one in ended["perdure"]["attempts"]} == {"process_restart"}
        texts = [item["content"][0]["text"] for item in ended["perdure"]["abandoned"]]
        assert [*texts, ended["output"][0]["content"][0]["text"]] == ["1 2 3"] * 5

    # proves R5, R7
    async def test_a_conversation_is_held_until_its_end_and_gets_the_turn_once(
        self, opened: Open, upstream: ScriptedUpstream
    ) -> None:
        first = await opened(wrap=Deaf)
        conversation = await first.conversation("hello")
        started = await first.ask("gate end 2 8", background=True, conversation=conversation)
        await heard(first, started, "1 2")
        await die(first.node)
        driver = await opened()
        with pytest.raises(ConversationLocked):
            await driver.ask("echo me", conversation=conversation)
        await upstream.open("end")
        await driver.events(started)
        assert await driver.words(conversation) == ["hello", "gate end 2 8", "1 2 3 4 5 6 7 8"]

    # proves R5
    async def test_its_steps_are_the_items_that_were_finished(self, opened: Open) -> None:
        first = await opened(wrap=Deaf)
        prompt = "ponder 0.02 " + "one by one " * 20
        started = await first.ask(prompt, background=True)
        await heard(first, started, "".join(script_of(prompt).thoughts) + "one")
        await die(first.node)
        driver = await opened()
        events = await driver.events(started)
        done = [event["item"] for event in events if event["type"].endswith("item.done")]
        assert [(item["type"], item.get("status", "completed")) for item in done] == [
            ("reasoning", "completed"),
            ("message", "incomplete"),
            ("reasoning", "completed"),
            ("message", "completed"),
        ]
        jobs = driver.node.state.jobs
        steps = jobs.steps(await jobs.events((await job_of(driver, started.key)).key))
        assert [(step.subject, step.attempt, step.abandoned) for step in steps] == [
            (done[0]["id"], 1, True),
            (done[2]["id"], 2, False),
            (done[3]["id"], 2, False),
        ]

    # proves R5
    async def test_one_whose_events_are_damaged_ends_and_keeps_no_other_from_being_taken_over(
        self, opened: Open
    ) -> None:
        first = await opened(wrap=Deaf)
        started = await first.ask("hang 3", background=True)
        await heard(first, started, "1 2 3")
        held = await first.node.state.responses.get(*started.key)
        job = await job_of(first, started.key)
        orphan, orphans = ("default", "resp_orphan"), ("default", "job_orphan")
        response = msgspec.structs.replace(held.value, job_id="job_orphan")
        makes = Job(job.value.kind, "resp_orphan", job.value.created_at_s, attempts_max=5)
        await first.node.state.commit(
            put(RESPONSES, orphan, response, attachment=held.attachment)
            + put(JOBS, orphans, makes, attachment=job.attachment)
        )
        await die(first.node)
        driver = await opened()
        await heard(driver, started, "1 2 3", attempt=2)

        async def failed() -> bool:
            found = await driver.node.state.jobs.find(orphans)
            return found is not None and found.value.status is Status.FAILED

        await wait_until(failed, WITHIN_S, "the damaged one is set aside")
        (last,) = await driver.events(Started(orphan, stored=True, stream=True))
        assert last["response"]["status"] == "failed"
        assert last["response"]["perdure"] == {"reason": "damaged"}

    # proves R5
    async def test_a_job_that_nobody_can_do_ends_alone(self, opened: Open) -> None:
        first = await opened(wrap=Deaf)
        key = ("default", "job_unknown")
        await first.node.state.commit(put(JOBS, key, Job("unknown", "what", 1, attempts_max=5)))
        await die(first.node)
        node = (await opened()).node

        async def failed() -> bool:
            found = await node.state.jobs.find(key)
            return found is not None and found.value.status is Status.FAILED

        await wait_until(failed, WITHIN_S, "a job of no known kind is set aside")
        assert (await node.state.jobs.get(*key)).value.owed is None

    # proves O2, R5
    async def test_a_stop_lets_it_go_at_no_cost_of_attempts(self, opened: Open) -> None:
        first = await opened()
        started = await first.ask("hang 3", background=True)
        await heard(first, started, "1 2 3")
        await first.node.drain(0.05)
        job = await job_of(first, started.key)
        assert (job.value.status, job.value.runner) == (Status.QUEUED, None)
        assert (job.value.attempt, job.value.attempts_max) == (1, 6)
        assert (await body(first, started.id))["status"] == "in_progress"
        await first.node.close()
        driver = await opened()
        await heard(driver, started, "1 2 3", attempt=2)
        ended = await cancel(driver, started.id)
        assert ended["perdure"]["attempts"][0]["reason"] == "server_stopped"


# proves R1, R5, R7
async def test_cancelling_ends_it_and_twice_gives_the_same(driver: Driver) -> None:
    started = await driver.ask("hang 3", background=True)
    following = asyncio.create_task(driver.events(started))
    await heard(driver, started, "1 2 3")
    ended = await cancel(driver, started.id)
    assert ended["status"] == "cancelled"
    assert ended["output"][0]["status"] == "incomplete"
    events = await following
    assert types(events)[-1] == "incomplete"
    assert events[-1]["response"] == ended
    assert await cancel(driver, started.id) == ended == await body(driver, started.id)
    job = await job_of(driver, started.key)
    assert (job.value.status, job.value.runner) == (Status.CANCELLED, None)
    assert driver.node.gateway.stats.running == 0


# proves R7
async def test_only_background_responses_can_be_cancelled(driver: Driver) -> None:
    foreground = await driver.answer("echo hello")
    with pytest.raises(WireError, match=r"^Cannot cancel a synchronous response\.$"):
        await cancel(driver, foreground["id"])
    with pytest.raises(NotFound):
        await cancel(driver, "resp_nobody")
    done = await driver.ask("echo hello", background=True)
    await driver.events(done)
    assert await cancel(driver, done.id) == await body(driver, done.id)
    assert (await body(driver, done.id))["status"] == "completed"


# proves R6
async def test_what_an_operator_stores_may_run_in_the_background(driver: Driver) -> None:
    caller = someone(store_always=True)
    started = await driver.ask("echo hello", caller=caller, background=True, store=False)
    ended = (await driver.events(started))[-1]["response"]
    assert (ended["status"], ended["store"]) == ("completed", True)


# proves R5, R6
async def test_what_is_not_to_be_stored_cannot_run_in_the_background(driver: Driver) -> None:
    with pytest.raises(WireError) as refused:
        await driver.ask("echo hello", background=True, store=False)
    assert refused.value.param == "background"


# proves R5
async def test_a_replaced_owner_is_refused_and_the_next_one_ends_it(
    driver: Driver, upstream: ScriptedUpstream
) -> None:
    started = await driver.ask("gate on 2 10", background=True)
    await heard(driver, started, "1 2")
    state = driver.node.state
    job = await job_of(driver, started.key)
    await state.commit(state.jobs.requeue(job, "process_restart", at_s=0))
    tip = await state.engine.tip(EVENTS, started.key)
    await upstream.open("on")

    async def refused() -> bool:
        return driver.node.gateway.stats.fenced == 1

    await wait_until(refused, WITHIN_S, "the replaced owner is refused")
    assert await state.engine.tip(EVENTS, started.key) == tip
    driver.node.jobs.enqueue(job.key)
    events = await driver.events(started)
    assert types(events).count("in_progress") == 2
    (item,) = (await body(driver, started.id))["output"]
    assert item["content"][0]["text"] == "1 2 3 4 5 6 7 8 9 10"
    last = [event for event in events if event.get("output_index") == 1]
    assert said(last) == "1 2 3 4 5 6 7 8 9 10"
    assert driver.node.gateway.stats.fenced == 1


# proves R6
async def test_deleting_one_that_runs_cancels_it_and_leaves_nothing(driver: Driver) -> None:
    started = await driver.ask("hang 3", background=True)
    await heard(driver, started, "1 2 3")
    job = await job_of(driver, started.key)
    await stored(driver).delete("default", started.id)
    with pytest.raises(NotFound):
        await body(driver, started.id)
    state = driver.node.state
    assert await state.jobs.find(job.key) is None
    assert await state.engine.read(JOB_EVENTS, job.key, limit=10) == []
    assert await state.engine.read(EVENTS, started.key, limit=10) == []
    assert driver.node.gateway.stats.running == 0


# proves C22
async def test_a_repeat_under_its_key_is_the_same_response(driver: Driver) -> None:
    caller = someone(key="again", digest="same")
    first, second = [
        await driver.ask("slow 0.01 5", caller=caller, background=True) for _ in range(2)
    ]
    assert first.key == second.key
    assert second.accepted is not None
    assert len(await driver.events(second)) > 4


# proves R5
async def test_many_run_at_once_and_those_beyond_wait_their_turn(driver: Driver) -> None:
    crowd = [await driver.ask("hang 1", background=True) for _ in range(64)]
    for started in crowd:
        await heard(driver, started, "1")
    assert driver.node.gateway.stats.running == 64
    waits = await driver.ask("echo at last", background=True)
    assert (await body(driver, waits.id))["status"] == "queued"
    await cancel(driver, crowd[0].id)
    await driver.events(waits)
    assert (await body(driver, waits.id))["output"][0]["content"][0]["text"] == "at last"
    ended = await asyncio.gather(*(cancel(driver, started.id) for started in crowd))
    assert {one["status"] for one in ended} == {"cancelled"}


# proves R5
async def test_one_that_cannot_be_asked_any_more_fails_with_the_reason(driver: Driver) -> None:
    earlier = await driver.answer("echo earlier")
    crowd = [await driver.ask("hang 1", background=True) for _ in range(64)]
    waits = await driver.ask("echo on", background=True, previous_response_id=earlier["id"])
    job = await job_of(driver, waits.key)
    damage = put(JOB_INPUTS, job.key, JobInput(1, 0), attachment=b'{"history":')
    await driver.node.state.commit(damage)
    await asyncio.gather(*(cancel(driver, started.id) for started in crowd))
    events = await driver.events(waits)
    ended = events[-1]["response"]
    assert (ended["status"], ended["perdure"]["reason"]) == ("failed", "damaged")
    assert (await job_of(driver, waits.key)).value.status is Status.FAILED


# proves R5
async def test_an_attempt_that_the_store_failed_is_followed_by_another(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("perdure.services.lifecycle.RETRY_S", 0.1)

    class FailsOnce(Wrapping):
        """Refuses one commit of text, as a store does that cannot tell what became of it."""

        failed = False

        async def commit(self, batch: Batch) -> Committed:
            texts = [op for op in batch.ops if isinstance(op, Append) and op.log is EVENTS]
            if not self.failed and texts and b"text.delta" in texts[0].entries[0]:
                self.failed = True
                raise CommitUnknown("the answer to the commit was lost.")
            return await super().commit(batch)

    driver = await opened(wrap=FailsOnce)
    started = await driver.ask("slow 0.01 10", background=True)

    async def ended() -> bool:
        return (await body(driver, started.id))["status"] == "completed"

    await wait_until(ended, WITHIN_S, "another attempt ends it")
    attempts = (await body(driver, started.id))["perdure"]["attempts"]
    assert [one.get("reason") for one in attempts] == ["attempt_lost", None]


# proves R6
@pytest.mark.parametrize("background", [False, True])
async def test_a_deleted_response_leaves_nothing(driver: Driver, background: bool) -> None:
    state = driver.node.state
    started = await driver.ask("echo word", background=background)
    await driver.events(started)
    assert await state.engine.count(ITEMS, ()) == {(): 2}
    await Stored(state, driver.node.gateway, driver.node.jobs).delete("default", started.id)
    for records in (RESPONSES, ITEMS, JOBS, JOB_INPUTS):
        assert await state.engine.count(records, ()) == {}, records
    for log in (EVENTS, JOB_EVENTS):
        assert (await state.engine.streams(log, (), limit=1)).items == [], log


# proves R6
async def test_what_retention_removes_leaves_no_job(driver: Driver) -> None:
    started = await driver.ask("echo old", background=True)
    await driver.events(started)
    job = await job_of(driver, started.key)
    assert (await prune(driver.node.state)).responses == 1
    assert await driver.node.state.jobs.find(job.key) is None
    assert await driver.node.state.engine.read(JOB_EVENTS, job.key, limit=10) == []
