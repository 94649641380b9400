"""Responses as the gateway makes them: stored, streamed, chained, joined, refused."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from perdure.core.batch import Batch
from perdure.core.errors import Unavailable
from perdure.core.layouts import Records
from perdure.core.limits import PAGE_MAX
from perdure.core.values import Committed
from perdure.engines.wrapping import Wrapping
from perdure.proving.upstream import ScriptedUpstream
from perdure.services.requests import ResultLost
from perdure.services.upstream import UpstreamFailed
from perdure.surfaces.state import LAYOUTS
from perdure.wire.errors import ConversationLocked, NotFound, WireError
from tests.services.conftest import Driver, Open, someone


# proves R2
async def test_what_get_returns_is_what_was_stored_and_a_chain_sends_every_turn(
    driver: Driver, upstream: ScriptedUpstream
) -> None:
    first = await driver.answer("echo one")
    second = await driver.answer("echo two", previous_response_id=first["id"])
    await driver.answer("echo three", previous_response_id=second["id"])
    branch = await driver.answer("echo fork", previous_response_id=first["id"])
    held = await driver.node.state.responses.get("default", first["id"])
    assert msgspec.json.decode(held.attachment or b"") == first
    said = [[turn["content"] for turn in asked["messages"]] for asked in await upstream.received()]
    assert said[2] == ["echo one", "one", "echo two", "two", "echo three"]
    assert said[3] == ["echo one", "one", "echo fork"]
    assert branch["output"][0]["content"][0]["text"] == "fork"


# proves R4
async def test_events_are_numbered_from_zero_and_resume_anywhere(driver: Driver) -> None:
    started = await driver.ask("count 20", stream=True)
    events = await driver.events(started)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert [event["type"] for event in events[:2]] == [
        "response.created",
        "response.in_progress",
    ]
    assert events[-1]["type"] == "response.completed"
    for after in (-1, 0, 5, len(events) - 2):
        assert await driver.events(started, after) == events[after + 1 :]
    assert await driver.events(started, len(events) - 1) == []
    assert await driver.events(started, 10_000) == []


# proves R4
async def test_generation_goes_on_when_the_client_leaves(driver: Driver) -> None:
    started = await driver.ask("slow 0.01 10", stream=True)
    async for group in driver.node.gateway.events(started, after=-1):
        assert group
        break
    body = msgspec.json.decode(await driver.node.gateway.finished(started))
    assert body["output"][0]["content"][0]["text"] == "1 2 3 4 5 6 7 8 9 10"


# proves R4
async def test_many_readers_of_one_stream_see_the_same(driver: Driver) -> None:
    started = await driver.ask("slow 0.002 50", stream=True)
    seen = await asyncio.gather(*(driver.events(started, after) for after in (-1, -1, 3, 200)))
    assert seen[0] == seen[1]
    assert seen[2] == seen[0][4:]
    assert seen[3] == []


# proves R8
async def test_a_conversation_gets_the_turn_in_the_commit_that_ends_it(driver: Driver) -> None:
    conversation = await driver.conversation("hello")
    ended = await driver.answer("echo hi", conversation=conversation)
    assert ended["conversation"] == {"id": conversation}
    assert await driver.words(conversation) == ["hello", "echo hi", "hi"]


# proves R7
async def test_a_busy_conversation_is_locked_and_free_again_after_the_end(
    driver: Driver, upstream: ScriptedUpstream
) -> None:
    conversation = await driver.conversation()
    running = await driver.ask("gate end 1 20", conversation=conversation)
    with pytest.raises(ConversationLocked):
        await driver.ask("echo hi", conversation=conversation)
    with pytest.raises(ConversationLocked):
        await driver.node.conversations.add_items(
            someone(), conversation, {"items": [{"role": "user", "content": "x"}]}
        )
    await upstream.open("end")
    await driver.node.gateway.finished(running)
    await driver.answer("echo after", conversation=conversation)
    assert (await driver.words(conversation))[-1] == "after"


# proves R7
async def test_two_requests_racing_for_a_conversation_never_interleave(driver: Driver) -> None:
    conversation = await driver.conversation()
    asked = [driver.ask(f"echo {n}", conversation=conversation) for n in range(5)]
    got = await asyncio.gather(*asked, return_exceptions=True)
    won = [one for one in got if not isinstance(one, BaseException)]
    assert len(won) == 1
    assert all(isinstance(one, ConversationLocked) for one in got if one not in won)
    await driver.node.gateway.finished(won[0])
    words = await driver.words(conversation)
    assert words == [f"echo {words[1]}", words[1]]


# proves R8
async def test_items_of_parallel_requests_keep_their_order(driver: Driver) -> None:
    conversation = await driver.conversation()
    await asyncio.gather(
        *(
            driver.node.conversations.add_items(
                someone(),
                conversation,
                {"items": [{"role": "user", "content": f"{n}.{part}"} for part in range(3)]},
            )
            for n in range(10)
        )
    )
    words = await driver.words(conversation)
    assert sorted(words) == sorted(f"{n}.{part}" for n in range(10) for part in range(3))
    assert all(
        words[at : at + 3] == [f"{words[at][0]}.{p}" for p in range(3)] for at in range(0, 30, 3)
    )


# proves R7
async def test_what_is_gone_from_a_chain_is_said(driver: Driver) -> None:
    first = await driver.answer("echo one")
    second = await driver.answer("echo two", previous_response_id=first["id"])
    with pytest.raises(WireError) as unknown:
        await driver.ask("x", previous_response_id="resp_nobody")
    assert (unknown.value.code, unknown.value.param) == (
        "previous_response_not_found",
        "previous_response_id",
    )
    held = await driver.node.state.responses.get("default", first["id"])
    await driver.node.state.commit(driver.node.state.responses.delete(held))
    with pytest.raises(WireError, match="broken"):
        await driver.ask("x", previous_response_id=second["id"])


# proves C22
async def test_a_key_sent_twice_has_one_effect_and_one_answer(driver: Driver) -> None:
    caller = someone(key="mine")
    asked = [driver.ask("echo once", caller=caller) for _ in range(5)]
    ids = {started.id for started in await asyncio.gather(*asked)}
    assert len(ids) == 1
    with pytest.raises(WireError, match="another body"):
        await driver.ask("echo other", caller=someone(key="mine"))


# proves C22
async def test_only_a_retry_joins_an_equal_request(driver: Driver) -> None:
    first = await driver.ask("echo same", caller=someone(digest="same"))
    again = await driver.ask("echo same", caller=someone(digest="same", retried=True))
    anew = await driver.ask("echo same", caller=someone(digest="same"))
    assert again.id == first.id
    assert anew.id != first.id


# proves C22
async def test_a_retry_sent_before_the_first_is_committed_joins_it(opened: Open) -> None:
    class Slow(Wrapping):
        let = asyncio.Event()

        async def commit(self, batch: Batch) -> Committed:
            await self.let.wait()
            return await super().commit(batch)

    Slow.let.set()
    driver = await opened(wrap=Slow)
    Slow.let.clear()
    sent = [
        asyncio.ensure_future(driver.ask("echo same", caller=someone(digest="d", retried=retried)))
        for retried in (False, True, True)
    ]
    await asyncio.sleep(0)
    Slow.let.set()
    assert len({(await started).id for started in sent}) == 1


# proves C22
async def test_a_conversation_is_created_once_for_a_key(driver: Driver) -> None:
    caller = someone(key="conversation")
    create = driver.node.conversations.create
    bodies = await asyncio.gather(*(create(caller, {"metadata": {"a": "b"}}) for _ in range(5)))
    assert len(set(bodies)) == 1


# proves R6
async def test_what_is_not_to_be_stored_is_nowhere_in_the_store(driver: Driver) -> None:
    hidden = {"store": False, "instructions": "a secret rule", "metadata": {"a": "secret"}}
    ended = await driver.answer("echo secret", caller=someone(key="hidden"), **hidden)
    assert ended["store"] is False
    assert ended["output"][0]["content"][0]["text"] == "secret"
    with pytest.raises(NotFound):
        await driver.node.state.responses.get("default", ended["id"])
    again = await driver.ask("echo secret", store=False, caller=someone(key="hidden2"))
    await driver.node.gateway.finished(again)
    owner = ("default", ended["id"])
    assert [item async for item in driver.node.state.items.all(owner, "input", "output")] == []
    for records in (layout for layout in LAYOUTS if isinstance(layout, Records)):
        page = await driver.node.state.engine.scan(records, (), limit=PAGE_MAX)
        kept = b"".join(records.encode(one.value) + (one.attachment or b"") for one in page.items)
        assert b"secret" not in kept, records


# proves R6
async def test_what_an_operator_always_stores_is_stored_and_says_so(driver: Driver) -> None:
    conversation = await driver.conversation()
    for more in ({}, {"conversation": conversation}):
        kept = someone(store_always=True)
        started = await driver.ask("echo kept", store=False, caller=kept, **more)
        ended = msgspec.json.decode(await driver.node.gateway.finished(started))
        held = await driver.node.state.responses.get("default", ended["id"])
        assert msgspec.json.decode(held.attachment or b"") == ended
        assert (ended["store"], ended["perdure"]) == (True, {"store": "always"})
        assert started.notes == ended["perdure"]
    asked_for = await driver.answer("echo kept", caller=someone(store_always=True))
    assert asked_for["store"] is True
    assert "perdure" not in asked_for


# proves C22
async def test_the_lost_answer_of_a_transient_request_is_a_typed_error(opened: Open) -> None:
    driver = await opened()
    caller = someone(key="hidden", digest="hidden")
    started = await driver.ask("echo secret", store=False, caller=caller)
    assert (await driver.ask("echo secret", store=False, caller=caller)).id == started.id
    await driver.node.drain(1)
    await driver.node.close()
    if driver.node.config.engine_url == "memory://":
        return
    after = await opened()
    with pytest.raises(ResultLost):
        await after.ask("echo secret", store=False, caller=caller)


# proves R12
@pytest.mark.parametrize(("said", "status"), [("fail 400", 400), ("fail 401", 502)])
async def test_an_upstream_that_refuses_is_an_error_and_a_failed_response(
    driver: Driver, said: str, status: int
) -> None:
    started = await driver.ask(said)
    with pytest.raises(UpstreamFailed) as refused:
        await driver.node.gateway.finished(started)
    assert refused.value.status == status
    assert driver.node.upstreams.members[0].upstream.stats.retries == 0
    held = await driver.node.state.responses.get(*started.key)
    assert msgspec.json.decode(held.attachment or b"")["status"] == "failed"
    assert (await driver.events(started))[-1]["type"] == "response.failed"


# proves R12
@pytest.mark.parametrize("stream", [False, True])
async def test_an_upstream_that_does_not_stream_is_read_all_the_same(
    driver: Driver, stream: bool
) -> None:
    started = await driver.ask("whole one two", stream=stream)
    ended = msgspec.json.decode(await driver.node.gateway.finished(started))
    assert ended["output"][0]["content"][0]["text"] == "one two"
    assert ended["usage"]["output_tokens"] > 0
    assert (await driver.events(started))[-1]["type"] == "response.completed"


# proves R12
async def test_an_upstream_that_has_ended_its_answer_and_stays_is_not_waited_for(
    driver: Driver, upstream: ScriptedUpstream
) -> None:
    async with asyncio.timeout(20):
        ended = await driver.answer("linger 0.3 3")
    assert ended["status"] == "completed"
    assert ended["output"][0]["content"][0]["text"] == "1 2 3"
    assert ended["usage"]["output_tokens"] == 3, "what it used came after its end"
    assert await upstream.left_early(1) == 1
    assert driver.node.upstreams.members[0].upstream.stats.failures == 0


# proves R12
async def test_only_the_start_of_a_request_is_retried(
    driver: Driver, upstream: ScriptedUpstream
) -> None:
    flaky = await driver.answer("flaky 2")
    cut = await driver.answer("cut 3")
    assert flaky["status"] == "completed"
    assert cut["status"] == "failed"
    assert cut["output"][0]["status"] == "incomplete"
    assert cut["output"][0]["content"][0]["text"] == "1 2 3"
    assert len(await upstream.received()) == 4


# proves R12
async def test_leaving_an_abandoned_response_stops_the_upstream(
    driver: Driver, upstream: ScriptedUpstream
) -> None:
    started = await driver.ask("hang 2", store=False)
    async for group in driver.node.gateway.events(started, after=-1):
        if b"delta" in b"".join(group):
            break
    await driver.node.gateway.abandon(started, someone())
    ended = (await driver.events(started))[-1]["response"]
    assert ended["perdure"] == {"reason": "client_disconnected"}
    assert ended["output"][0]["content"][0]["text"].startswith("1")


# proves O2
async def test_a_drained_node_ends_what_runs_and_starts_nothing(driver: Driver) -> None:
    started = await driver.ask("hang 2")
    await driver.node.drain(0.1)
    ended = msgspec.json.decode(await driver.node.gateway.finished(started))
    assert ended["perdure"] == {"reason": "server_stopped"}
    with pytest.raises(Unavailable):
        await driver.ask("echo more")
