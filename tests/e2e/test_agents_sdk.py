"""openai-agents as a judge: its runner, its tools and its conversations session, across a kill."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from agents import (
    Agent,
    OpenAIConversationsSession,
    OpenAIResponsesModel,
    RunConfig,
    Runner,
    function_tool,
)

from perdure.proving.upstream import ScriptedUpstream
from tests.e2e.http_server import Server, serving

UNTRACED = RunConfig(tracing_disabled=True)


@function_tool
def weather(city: str) -> str:
    """The weather of a city."""
    return f"sunny in {city}"


async def run(server: Server, session: OpenAIConversationsSession, said: str) -> str:
    async with server.sdk() as sdk:
        agent = Agent(name="judge", model=OpenAIResponsesModel("scripted", sdk), tools=[weather])
        result = await Runner.run(agent, said, session=session, run_config=UNTRACED)
    return str(result.final_output)


# proves R2
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
async def test_an_agent_goes_on_in_its_session_after_a_kill(tmp_path: Path) -> None:
    async with ScriptedUpstream() as upstream:
        options = ("--upstream", upstream.url)
        async with serving(tmp_path / "data", *options) as server, server.sdk() as sdk:
            session = OpenAIConversationsSession(openai_client=sdk)
            assert await run(server, session, 'tool weather {"city": "Oslo"}') == "sunny in Oslo"
            before = await session.get_items()
            conversation = await session._get_session_id()
            assert await server.end(signal.SIGKILL) == -signal.SIGKILL
        async with serving(tmp_path / "data", *options) as server, server.sdk() as sdk:
            session = OpenAIConversationsSession(conversation_id=conversation, openai_client=sdk)
            assert await session.get_items() == before
            assert await run(server, session, "echo and then") == "and then"
            after = await session.get_items()
            assert after[: len(before)] == before
            assert [item.get("type") for item in after] == [
                *("message", "function_call", "function_call_output", "message"),
                *("message", "message"),
            ]
            last = await session.pop_item()
            assert last is not None
            assert await session.get_items() == after[:-1]
            await session.clear_session()
