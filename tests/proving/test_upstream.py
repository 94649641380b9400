"""The scripted upstream, as clients meet it: a server whose every word is predictable."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pytest
import pytest_asyncio
from openai import AsyncOpenAI

from perdure.proving.scripts import Script, script_of
from perdure.proving.upstream import ScriptedUpstream
from perdure.proving.waiting import wait_until


@pytest_asyncio.fixture
async def upstream() -> AsyncIterator[ScriptedUpstream]:
    async with ScriptedUpstream() as running:
        yield running


def client(upstream: ScriptedUpstream, **options: Any) -> AsyncOpenAI:
    return AsyncOpenAI(
        base_url=upstream.url,
        api_key="none",
        _strict_response_validation=True,
        **({"max_retries": 0} | options),
    )


def said(prompt: str) -> list[Any]:
    return [{"role": "user", "content": prompt}]


@pytest.mark.parametrize(
    ("prompt", "script"),
    [
        ("hello there", Script(chunks=("hello", " there"))),
        ("echo two  spaces", Script(chunks=("two", " ", " spaces"))),
        ("count 3", Script(chunks=("1", " 2", " 3"))),
        ("count many", Script(chunks=("count", " many"))),
        ("slow 0.5 2", Script(chunks=("1", " 2"), delay_s=0.5)),
        ("long 12", Script(chunks=("012345678901",))),
        ("gate g 1 2", Script(chunks=("1", " 2"), gate="g", before_gate=1)),
        ("refuse no", Script(refusal="no")),
        ('tool f {"a": 1}', Script(calls=(("f", '{"a": 1}'),), ending="tool_calls")),
        ("fail 429", Script(status=429)),
        ("fail after 2", Script(chunks=("1", " 2"), ending="error")),
        ("cut 1", Script(chunks=("1",), ending="cut")),
        ("hang 1", Script(chunks=("1",), ending="hang")),
        ("linger 0.1 2", Script(chunks=("1", " 2"), delay_s=0.1, lingers=True)),
        ("length 1", Script(chunks=("1",), ending="length")),
    ],
)
def test_prompts_decide_scripts(prompt: str, script: Script) -> None:
    assert script_of(prompt) == script
    assert script_of("", prompt.replace(" ", "-")).status == script.status


def test_a_model_name_is_a_script_where_the_message_is_none() -> None:
    assert script_of("go", "slow-0.01-5").delay_s == 0.01
    assert script_of("count 2", "slow-0.01-5").delay_s == 0
    assert script_of("go", "gpt-5").text == "go"


async def test_both_formats_streamed_and_whole_say_the_same(upstream: ScriptedUpstream) -> None:
    async with client(upstream) as official:
        assert [model.id async for model in official.models.list()] == ["scripted"]
        for prompt in ("count 4", "reasoning so", "long 2500", "length 3"):
            text = script_of(prompt).text
            whole = await official.chat.completions.create(model="m", messages=said(prompt))
            assert whole.choices[0].message.content == text
            chunks = await official.chat.completions.create(
                model="m", messages=said(prompt), stream=True
            )
            pieces = [chunk.choices[0].delta.content or "" async for chunk in chunks]
            assert "".join(pieces) == text
            response = await official.responses.create(model="m", input=prompt)
            assert response.output_text == text
            events = await official.responses.create(model="m", input=prompt, stream=True)
            deltas = [e.delta async for e in events if e.type == "response.output_text.delta"]
            assert "".join(deltas) == text


async def test_tools_are_called_and_their_outputs_echoed(upstream: ScriptedUpstream) -> None:
    async with client(upstream) as official:
        for prompt in ('tool f {"a": [1, 2, 3]}', "parallel f g"):
            whole = await official.chat.completions.create(model="m", messages=said(prompt))
            calls = whole.choices[0].message.tool_calls or []
            made = [(call.function.name, call.function.arguments) for call in calls]  # type: ignore[union-attr]
            assert made == list(script_of(prompt).calls)
            response = await official.responses.create(model="m", input=prompt)
            found = [(item.name, item.arguments) for item in response.output]  # type: ignore[union-attr]
            assert found == made
        longer = [*said("hi"), *said("parallel f g")]
        again = await official.chat.completions.create(model="m", messages=longer)
        later = again.choices[0].message.tool_calls or []
        assert len({call.id for call in (*calls, *later)}) == 4
        output: Any = {"role": "tool", "tool_call_id": "c", "content": "count 3"}
        echoed = await official.chat.completions.create(model="m", messages=[output])
        assert echoed.choices[0].message.content == "count 3"


async def test_failures_are_real(upstream: ScriptedUpstream) -> None:
    async with client(upstream) as official:
        with pytest.raises(openai.RateLimitError):
            await official.chat.completions.create(model="m", messages=said("fail 429"))
        failing = await official.chat.completions.create(
            model="m", messages=said("fail after 2"), stream=True
        )
        with pytest.raises(openai.APIError, match="scripted failure"):
            _ = [chunk async for chunk in failing]
        cut = await official.chat.completions.create(model="m", messages=said("cut 2"), stream=True)
        pieces = [(await anext(cut)).choices[0].delta.content for _ in range(3)]
        assert pieces == ["", "1", " 2"]
        with pytest.raises((httpx.RemoteProtocolError, openai.APIConnectionError)):
            await anext(cut)
    async with client(upstream, max_retries=2) as patient:
        flaky = await patient.chat.completions.create(model="m", messages=said("flaky 1"))
        assert flaky.choices[0].message.content == "flaky 1"


async def test_an_answer_waits_at_its_gate(upstream: ScriptedUpstream) -> None:
    async with client(upstream) as official:
        chat = await official.chat.completions.create(
            model="m", messages=said("gate one 2 4"), stream=True
        )
        pieces = [(await anext(chat)).choices[0].delta.content for _ in range(3)]
        assert pieces == ["", "1", " 2"]
        events = await official.responses.create(model="m", input="gate two 2 4", stream=True)
        heard = [(await anext(events)).type for _ in range(6)]
        assert heard[-2:] == ["response.output_text.delta"] * 2
        whole = asyncio.create_task(official.responses.create(model="m", input="gate two 0 4"))
        await upstream.received(3)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await anext(chat)
        await upstream.open("two")
        assert [e.delta async for e in events if e.type == heard[-1]] == [" 3", " 4"]
        assert (await whole).output_text == "1 2 3 4"


async def test_who_leaves_a_hanging_answer_is_counted(upstream: ScriptedUpstream) -> None:
    async with httpx.AsyncClient() as http:
        body = {"model": "m", "stream": True, "messages": said("hang 2")}
        async with http.stream("POST", f"{upstream.url}/chat/completions", json=body) as answer:
            read = b""
            async for part in answer.aiter_raw():
                read += part
                if b'" 2"' in read:
                    break
        assert await upstream.left_early(1) == 1
        with pytest.raises(TimeoutError):
            await upstream.left_early(2, timeout_s=0.01)


async def test_it_tells_what_it_received_and_ends_with_its_context() -> None:
    async with ScriptedUpstream() as upstream:
        body = {"model": "m", "messages": said("é\u2028"), "unknown": {"kept": [1.5, None]}}
        async with httpx.AsyncClient() as http:
            await http.post(f"{upstream.url}/chat/completions", json=body)
        assert await upstream.received(1) == [body]
        url = upstream.url
    async with httpx.AsyncClient() as http:
        with pytest.raises(httpx.ConnectError):
            await http.get(f"{url}/models")


async def test_a_port_that_is_taken_is_an_error(upstream: ScriptedUpstream) -> None:
    port = int(upstream.url.removesuffix("/v1").rpartition(":")[2])
    with pytest.raises(OSError, match="in use"):
        await ScriptedUpstream(port).__aenter__()


PARENT = """
import asyncio
from perdure.proving.upstream import ScriptedUpstream

async def main():
    async with ScriptedUpstream() as upstream:
        print(upstream.url, flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


async def test_it_ends_with_a_parent_that_is_killed() -> None:
    parent = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", PARENT), stdout=asyncio.subprocess.PIPE
    )
    assert parent.stdout is not None
    url = (await parent.stdout.readline()).decode().strip()
    async with httpx.AsyncClient() as http:
        assert (await http.get(f"{url}/models")).status_code == 200
    parent.send_signal(signal.SIGKILL)
    await parent.wait()

    async def gone() -> bool:
        async with httpx.AsyncClient(verify=False) as http:
            try:
                await http.get(f"{url}/models")
            except httpx.TransportError:
                return True
        return False

    await wait_until(gone, 20, "the end of an upstream without a parent")
