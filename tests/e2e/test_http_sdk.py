"""The official SDK against the real server, across kills: what was acknowledged is there."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from perdure.proving.upstream import ScriptedUpstream
from tests.e2e.http_server import Server, serving

TOOL: Any = {
    "type": "function",
    "name": "weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    "strict": False,
}


@pytest.fixture
async def upstream() -> AsyncIterator[ScriptedUpstream]:
    async with ScriptedUpstream() as server:
        yield server


@pytest.fixture
async def server(tmp_path: Path, upstream: ScriptedUpstream) -> AsyncIterator[Server]:
    async with serving(tmp_path / "data", "--upstream", upstream.url) as running:
        yield running


# proves R2
async def test_a_chain_survives_a_kill_word_for_word(
    tmp_path: Path, upstream: ScriptedUpstream
) -> None:
    data, options = tmp_path / "data", ("--upstream", upstream.url)
    ids: list[str] = []
    async with serving(data, *options) as server, server.sdk() as sdk:
        for said in ("echo one", "echo two", "echo three"):
            made = await sdk.responses.create(
                model="m", input=said, previous_response_id=ids[-1] if ids else openai.omit
            )
            ids.append(made.id)
        async with server.client() as client:
            before = [(await client.get(f"/v1/responses/{id}")).content for id in ids]
        assert await server.end(signal.SIGKILL) == -signal.SIGKILL
    async with serving(data, *options) as server, server.sdk() as sdk:
        assert "did not end clean" in server.said
        async with server.client() as client:
            assert [(await client.get(f"/v1/responses/{id}")).content for id in ids] == before
        known = len(await upstream.received())
        await sdk.responses.create(model="m", input="echo four", previous_response_id=ids[2])
        await sdk.responses.create(model="m", input="echo branch", previous_response_id=ids[1])
        sent = (await upstream.received(known + 2))[known:]
        asked = [[message["content"] for message in request["messages"]] for request in sent]
        assert asked[0] == [
            "echo one",
            "one",
            "echo two",
            "two",
            "echo three",
            "three",
            "echo four",
        ]
        assert asked[1] == ["echo one", "one", "echo two", "two", "echo branch"]


# proves R4, R5
async def test_a_stream_that_was_killed_is_resumed_and_ends(
    tmp_path: Path, upstream: ScriptedUpstream
) -> None:
    data, options = tmp_path / "data", ("--upstream", upstream.url)
    seen: list[Any] = []
    async with serving(data, *options) as server, server.sdk() as sdk:
        stream = await sdk.responses.create(model="m", input="slow 0.02 200", stream=True)

        async def follow() -> None:
            async for event in stream:
                seen.append(event)
                if len(seen) == 12:
                    server.process.kill()

        with pytest.raises(openai.APIConnectionError):
            await follow()
        response_id = seen[0].response.id
    async with serving(data, *options) as server, server.sdk() as sdk:
        assert "1 interrupted" in server.said
        rest = [
            event
            async for event in await sdk.responses.retrieve(
                response_id, stream=True, starting_after=seen[-1].sequence_number
            )
        ]
        numbers = [event.sequence_number for event in (*seen, *rest)]
        assert numbers == list(range(len(numbers)))
        assert rest[-1].type == "response.failed"
        ended = await sdk.responses.retrieve(response_id)
        assert ended.status == "failed"
        assert ended.error is not None
        assert ended.error.code == "server_error"
        assert "restarted" in ended.error.message
        assert ended.output[0].status == "incomplete"
        streamed = "".join(e.delta for e in seen if e.type == "response.output_text.delta")
        assert ended.output_text.startswith(streamed)
        whole = [e async for e in await sdk.responses.retrieve(response_id, stream=True)]
        assert [e.model_dump() for e in whole] == [e.model_dump() for e in (*seen, *rest)]


# proves R8
async def test_conversations_from_creation_to_deletion(server: Server) -> None:
    async with server.sdk() as sdk:
        made = await sdk.conversations.create(
            metadata={"topic": "tests"},
            items=[{"type": "message", "role": "user", "content": "first"}],
        )
        await sdk.conversations.update(made.id, metadata={"topic": "proofs"})
        assert (await sdk.conversations.retrieve(made.id)).metadata == {"topic": "proofs"}
        added = await sdk.conversations.items.create(
            made.id,
            items=[{"type": "message", "role": "user", "content": f"{n}"} for n in range(20)],
        )
        assert len(added.data) == 20
        with pytest.raises(openai.BadRequestError) as refused:
            await sdk.conversations.items.create(
                made.id, items=[{"type": "message", "role": "user", "content": "x"}] * 21
            )
        assert refused.value.code == "array_above_max_length"
        newest_first = [item.id async for item in sdk.conversations.items.list(made.id, limit=6)]
        assert len(newest_first) == 21
        assert newest_first[0] == added.data[-1].id
        taken = await sdk.conversations.items.delete(added.data[0].id, conversation_id=made.id)
        assert taken.id == made.id
        with pytest.raises(openai.NotFoundError):
            await sdk.conversations.items.retrieve(added.data[0].id, conversation_id=made.id)
        answered = await sdk.responses.create(model="m", input="echo hello", conversation=made.id)
        assert answered.conversation is not None
        assert answered.conversation.id == made.id
        newest = [item async for item in sdk.conversations.items.list(made.id, limit=2)][:2]
        assert [item.id for item in newest] == [
            answered.output[0].id,
            (await sdk.responses.input_items.list(answered.id)).data[0].id,
        ]
        assert (await sdk.conversations.delete(made.id)).deleted
        with pytest.raises(openai.NotFoundError):
            await sdk.conversations.retrieve(made.id)
        assert (await sdk.responses.retrieve(answered.id)).output_text == "hello"


async def test_function_tools_and_the_stream_helper(server: Server) -> None:
    async with server.sdk() as sdk:
        said = 'tool weather {"city": "Oslo"}'
        async with sdk.responses.stream(model="m", input=said, tools=[TOOL]) as stream:
            kinds = [event.type async for event in stream]
            asked = await stream.get_final_response()
        assert "response.function_call_arguments.delta" in kinds
        call = asked.output[0]
        assert call.type == "function_call"
        assert call.arguments == '{"city": "Oslo"}'
        answered = await sdk.responses.create(
            model="m",
            previous_response_id=asked.id,
            tools=[TOOL],
            input=[{"type": "function_call_output", "call_id": call.call_id, "output": "rain"}],
        )
        assert answered.output_text == "rain"
        items = await sdk.responses.input_items.list(answered.id)
        assert [item.type for item in items.data] == ["function_call_output"]


def test_the_synchronous_sdk_too(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path / "data") as server:
            await asyncio.to_thread(_talk, server)

    def _talk(server: Server) -> None:
        with openai.OpenAI(
            base_url=f"{server.url}/v1",
            api_key="none",
            max_retries=0,
            _strict_response_validation=True,
        ) as sdk:
            assert [model.id for model in sdk.models.list()] == ["perdure-extract"]
            assert sdk.models.retrieve("perdure-extract").owned_by == "perdure"
            first = sdk.responses.create(model="perdure-extract", input="The cellar is cold.")
            with sdk.responses.stream(
                model="perdure-extract",
                input="How is the cellar?",
                previous_response_id=first.id,
            ) as stream:
                stream.until_done()
                assert "The cellar is cold." in stream.get_final_response().output_text

    asyncio.run(scenario())


# proves R7
async def test_errors_are_those_of_openai(server: Server) -> None:
    async with server.sdk() as sdk:
        made = await sdk.responses.create(model="m", input="echo hi")
        conversation = await sdk.conversations.create()
        for ask in (sdk.responses.retrieve, sdk.responses.delete, sdk.responses.cancel):
            with pytest.raises(openai.NotFoundError):
                await ask("resp_unknown")
        with pytest.raises(openai.BadRequestError) as refused:
            await sdk.responses.cancel(made.id)
        assert refused.value.body["message"] == "Cannot cancel a synchronous response."  # type: ignore[index]
        with pytest.raises(openai.BadRequestError) as refused:
            await sdk.responses.create(model="m", input="x", previous_response_id="resp_unknown")
        assert refused.value.code == "previous_response_not_found"
        assert refused.value.param == "previous_response_id"
        with pytest.raises(openai.BadRequestError):
            await sdk.responses.create(
                model="m",
                input="x",
                previous_response_id=made.id,
                conversation=conversation.id,
            )
        running = await sdk.responses.create(
            model="m", input="hang 1", conversation=conversation.id, stream=True
        )
        await anext(aiter(running))
        with pytest.raises(openai.BadRequestError) as locked:
            await sdk.responses.create(model="m", input="x", conversation=conversation.id)
        assert locked.value.code == "conversation_locked"
        assert locked.value.response.headers["x-should-retry"] == "true"
        assert int(locked.value.response.headers["retry-after-ms"]) > 0
        await running.close()


# proves C22
async def test_a_named_request_has_one_effect_also_across_a_kill(
    tmp_path: Path, upstream: ScriptedUpstream
) -> None:
    data, options = tmp_path / "data", ("--upstream", upstream.url)
    named = {"Idempotency-Key": "order-66"}
    async with serving(data, *options) as server, server.sdk() as sdk:
        first = await sdk.responses.create(model="m", input="echo once", extra_headers=named)
        again = await sdk.responses.create(model="m", input="echo once", extra_headers=named)
        assert again.id == first.id
        with pytest.raises(openai.APIStatusError) as refused:
            await sdk.responses.create(model="m", input="echo other", extra_headers=named)
        assert refused.value.code == "idempotency_key_reused"
        await server.end(signal.SIGKILL)
    async with serving(data, *options) as server, server.sdk() as sdk:
        later = await sdk.responses.create(model="m", input="echo once", extra_headers=named)
        assert later.model_dump() == first.model_dump()
        assert len(await upstream.received()) == 1


# proves C22
async def test_a_retry_of_the_unmodified_sdk_joins_its_first_attempt(
    server: Server, upstream: ScriptedUpstream
) -> None:
    """The SDK's own timeout makes it send again while the first attempt is still generated."""
    asked: list[str] = []

    async def asking(request: httpx2.Request) -> None:
        asked.append(request.headers["x-stainless-retry-count"])
        if len(asked) == 2:
            opening.append(asyncio.create_task(upstream.open("on")))

    opening: list[asyncio.Task[None]] = []
    hooked = openai.DefaultAsyncHttpxClient(event_hooks={"request": [asking]})
    async with server.sdk(max_retries=2, timeout=1.0, http_client=hooked) as hasty:
        made = await hasty.responses.create(model="m", input="gate on 3 15")
        assert made.status == "completed"
        assert asked[:2] == ["0", "1"]
        assert len(await upstream.received()) == 1
        await opening[0]
    async with server.sdk() as sdk:
        repeat = await sdk.responses.create(model="m", input="echo same")
        other = await sdk.responses.create(model="m", input="echo same")
        assert repeat.id != other.id, "the same words may be said twice"
