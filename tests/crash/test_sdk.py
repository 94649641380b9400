"""The unmodified official SDK across a death: what it does by itself is enough."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI

from perdure.proving.launcher import At, Death
from perdure.surfaces.items import ITEMS
from perdure.surfaces.responses import RESPONSES
from tests.crash.conftest import Place

pytestmark = pytest.mark.asyncio(loop_scope="module")

CREATED = 4
"""The number of the commit that creates a response, counted from the start: behind those of the
boot, of the boot that is ready, and of its first sign of life. Its events and its end follow."""


RETRIES = 5
"""The SDK's two would do, were every machine ready again within the second that they wait."""


# proves C22
@pytest.mark.parametrize("at", ["before", "after"])
@pytest.mark.parametrize("n", range(CREATED, CREATED + 3))
async def test_a_turn_that_the_sdk_retries_is_one_turn(
    place: Place, sdk: AsyncOpenAI, at: At, n: int
) -> None:
    await place.start()
    conversation = await sdk.conversations.create()
    place.victim.signal()
    await place.victim.death()
    await place.start(Death(at, n))
    restarting = asyncio.create_task(place.restart_when_dead())
    response = await sdk.responses.create(
        model="scripted", input="echo once", conversation=conversation.id
    )
    if place.victim.plan.death is not None and not place.victim.dead:
        restarting.cancel()  # it ended in fewer commits
    await asyncio.wait([restarting])
    assert (await sdk.responses.retrieve(response.id)) == response
    store = await place.stop()
    assert [key[-1] for key in store.records[RESPONSES.name]] == [response.id]
    turn = len(store.under(ITEMS, "default", conversation.id, "items"))
    if (at, n) == ("before", CREATED):
        assert (response.status, response.output_text) == ("completed", "once")
    if (at, n) == ("after", CREATED):
        assert response.status == "failed"
    assert (response.status, turn) in [("failed", 0), ("completed", 2)]


# proves R4, R5
@pytest.mark.parametrize("n", [1, 4, 9])
async def test_a_stream_goes_on_where_it_was_cut(place: Place, sdk: AsyncOpenAI, n: int) -> None:
    await place.start(Death("sent", n))
    seen: list[Any] = []
    with pytest.raises(openai.APIConnectionError):
        await _listen(sdk, seen)
    await place.restart_when_dead()
    created = seen[0].response
    rest = [
        event
        async for event in await sdk.responses.retrieve(
            created.id, stream=True, starting_after=seen[-1].sequence_number
        )
    ]
    everything = [event async for event in await sdk.responses.retrieve(created.id, stream=True)]
    assert seen + rest == everything
    assert [event.sequence_number for event in everything] == list(range(len(everything)))
    ended = await sdk.responses.retrieve(created.id)
    assert everything[-1].type == "response.failed"
    assert everything[-1].response == ended
    assert ended.status == "failed"
    assert ended.error is not None
    assert (ended.error.code, ended.model_extra["perdure"]) == (
        "server_error",
        {"reason": "process_restart"},
    )
    shown = "".join(event.delta for event in seen if event.type == "response.output_text.delta")
    assert ended.output_text.startswith(shown)
    assert all(item.status == "incomplete" for item in ended.output)


# proves R2
async def test_a_chain_goes_on_after_a_kill(place: Place, sdk: AsyncOpenAI) -> None:
    await place.start()
    chain: list[Any] = []
    for said in ("echo first turn", "echo second turn"):
        chain.append(
            await sdk.responses.create(
                model="scripted",
                input=said,
                previous_response_id=chain[-1].id if chain else openai.NOT_GIVEN,
            )
        )
    raw = [
        (await sdk.responses.with_raw_response.retrieve(response.id)).content for response in chain
    ]
    place.victim.signal()
    await place.restart_when_dead()
    for response, body in zip(chain, raw, strict=True):
        again = await sdk.responses.with_raw_response.retrieve(response.id)
        assert again.content == body
    third = await sdk.responses.create(
        model="scripted", input="echo third turn", previous_response_id=chain[1].id
    )
    assert third.output_text == "third turn"
    branch = await sdk.responses.create(
        model="scripted", input="echo other turn", previous_response_id=chain[0].id
    )
    assert branch.output_text == "other turn"
    *_, to_third, to_branch = await place.stage.upstream.received()
    assert _turns(to_third) == [
        "echo first turn",
        "first turn",
        "echo second turn",
        "second turn",
        "echo third turn",
    ]
    assert _turns(to_branch) == ["echo first turn", "first turn", "echo other turn"]


async def _listen(sdk: AsyncOpenAI, seen: list[Any]) -> None:
    stream = await sdk.responses.create(model="scripted", input="slow 0.1 60", stream=True)
    async for event in stream:
        seen.append(event)


def _turns(request: dict[str, Any]) -> list[str]:
    return [
        message["content"]
        if isinstance(message["content"], str)
        else "".join(part["text"] for part in message["content"])
        for message in request["messages"]
    ]
