"""What no client and no upstream can make of the gateway: a response without an end, a list that
cannot be paged, an answer that nobody waited for given to somebody who does."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from perdure.core.batch import Batch, Put, put
from perdure.core.errors import LimitExceeded
from perdure.core.layouts import Records
from perdure.core.values import Committed
from perdure.engines.wrapping import Wrapping
from perdure.proving.upstream import ScriptedUpstream
from perdure.services.gateway import INPUT_ITEMS_MAX
from perdure.services.requests import ResultLost
from perdure.services.runs import ECHO_BYTES_MAX, OUTPUT_BYTES_MAX
from perdure.surfaces.conversations import CONVERSATIONS
from perdure.surfaces.responses import RESPONSES
from perdure.surfaces.state import LAYOUTS
from perdure.wire.errors import WireError
from tests.services.conftest import Driver, Open, someone

_CONFLICTS = 20


class Contended(Wrapping):
    """Lets somebody describe the conversation just before each of the first tries to end."""

    left = _CONFLICTS

    async def commit(self, batch: Batch) -> Committed:
        ends = any(
            isinstance(op, Put)
            and op.records is RESPONSES
            and RESPONSES.decode(op.key, op.value).status.terminal
            for op in batch.ops
        )
        if ends and self.left:
            self.left -= 1
            for op in batch.ops:
                if isinstance(op, Put) and op.records is CONVERSATIONS:
                    held = await self.engine.get(CONVERSATIONS, op.key)
                    assert held is not None
                    await self.engine.commit(put(CONVERSATIONS, held.key, held.value))
        return await self.engine.commit(batch)


# proves R5
async def test_an_answer_too_long_to_keep_ends_incomplete_and_the_store_reopens(
    opened: Open,
) -> None:
    driver = await opened()
    ended = await driver.answer(f"long {2 * OUTPUT_BYTES_MAX + 6 * 2**20}")
    assert (ended["status"], ended["perdure"]) == ("incomplete", {"reason": "output_too_large"})
    assert ended["incomplete_details"] == {"reason": "max_output_tokens"}
    said = ended["output"][0]["content"][0]["text"]
    assert abs(OUTPUT_BYTES_MAX - len(said)) < 2**20
    again = await driver.answer("echo on", previous_response_id=ended["id"])
    assert again["status"] == "completed"
    unfinished = await driver.node.state.responses.unfinished(limit=1)
    assert unfinished.items == []


# proves R1
async def test_what_could_not_be_written_again_at_its_end_is_refused_at_once(
    driver: Driver, upstream: ScriptedUpstream
) -> None:
    with pytest.raises(LimitExceeded):
        await driver.ask("echo hi", instructions="x" * ECHO_BYTES_MAX)
    item = {"role": "user", "content": "x"}
    with pytest.raises(LimitExceeded):
        await driver.ask("", input=[item] * (INPUT_ITEMS_MAX + 1))
    assert await upstream.received() == []


# proves R5
async def test_writers_of_metadata_cannot_keep_a_response_from_its_end(opened: Open) -> None:
    driver = await opened(wrap=Contended)
    conversation = await driver.conversation("hello")
    ended = await driver.answer("echo hi", conversation=conversation)
    assert ended["status"] == "completed"
    assert await driver.words(conversation) == ["hello", "echo hi", "hi"]


# proves R8
async def test_an_item_is_in_a_conversation_once_so_its_id_can_be_paged_by(driver: Driver) -> None:
    conversation = await driver.conversation()
    body = {"items": [{"id": "msg_mine", "role": "user", "content": "hello"}]}
    caller = someone(key="named")
    first = await driver.node.conversations.add_items(caller, conversation, body)
    assert await driver.node.conversations.add_items(caller, conversation, body) == first
    with pytest.raises(WireError, match="Duplicate item found") as refused:
        await driver.node.conversations.add_items(someone(), conversation, body)
    assert refused.value.param == "items[0].id"
    reference = {"type": "item_reference", "id": "msg_mine"}
    with pytest.raises(WireError, match="Duplicate item found"):
        await driver.ask("", input=[reference], conversation=conversation)
    assert await driver.words(conversation) == ["hello"]


# proves C22
@pytest.mark.parametrize("key", [None, "named"])
async def test_who_comes_back_after_leaving_is_answered_anew(
    driver: Driver, key: str | None
) -> None:
    sent = {"digest": "same", "key": key, "retried": False}
    started = await driver.ask("slow 0.02 10", caller=someone(**sent), store=False)
    await driver.node.gateway.abandon(started, someone(**sent))
    sent["retried"] = True
    again = await driver.ask("slow 0.02 10", caller=someone(**sent), store=False)
    assert again.id != started.id
    body = msgspec.json.decode(await driver.node.gateway.finished(again))
    assert body["status"] == "completed"


# proves C22
async def test_who_leaves_does_not_stop_what_another_sending_of_it_waits_for(
    driver: Driver,
) -> None:
    started = await driver.ask("slow 0.02 10", caller=someone(digest="same"), store=False)
    joined = await driver.ask(
        "slow 0.02 10", caller=someone(digest="same", retried=True), store=False
    )
    assert joined.id == started.id
    await driver.node.gateway.abandon(started, someone(digest="same"))
    body = msgspec.json.decode(await driver.node.gateway.finished(joined))
    assert body["status"] == "completed"


# proves C22
async def test_a_key_whose_answer_was_forgotten_says_so(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    caller = someone(key="named")
    await driver.node.gateway.finished(await driver.ask("echo hi", caller=caller, store=False))
    monkeypatch.setattr("perdure.services.gateway.TRANSIENT_KEPT_S", -10)
    assert await driver.node.gateway.sweep_transient() == 1
    with pytest.raises(ResultLost):
        await driver.ask("echo hi", caller=caller, store=False)


# proves R6
async def test_what_was_not_stored_leaves_nothing_in_memory_either(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    await driver.node.gateway.finished(await driver.ask("echo hi", store=False))
    monkeypatch.setattr("perdure.services.gateway.TRANSIENT_KEPT_S", -10)
    await driver.node.gateway.sweep_transient()
    engine = driver.node.gateway._transient.state.engine
    for layout in LAYOUTS:
        if isinstance(layout, Records):
            assert await engine.count(layout, ()) == {}, layout.name


# proves O2
async def test_a_run_that_is_stopped_before_its_first_step_still_ends(driver: Driver) -> None:
    gateway = driver.node.gateway

    async def stop_at_once() -> None:
        for _ in range(100_000):
            if gateway._runs:
                break
            await asyncio.sleep(0)
        await gateway.close()

    stopping = asyncio.create_task(stop_at_once())
    started = await driver.ask("slow 0.01 10")
    await stopping
    held = await driver.node.state.responses.get(*started.key)
    assert held.value.status.value == "failed"
    assert gateway._runs == {}


# proves C22
async def test_describing_a_conversation_under_one_key_has_one_effect(driver: Driver) -> None:
    conversation = await driver.conversation()
    update = driver.node.conversations.update
    caller = someone(key="named")
    first = await update(caller, conversation, {"metadata": {"at": "one"}})
    await update(someone(), conversation, {"metadata": {"at": "two"}})
    assert await update(caller, conversation, {"metadata": {"at": "one"}}) == first
    held = await driver.node.state.conversations.get("default", conversation)
    assert held.value.metadata == {"at": "two"}
