"""The example of an agent: killed at every event of its run, it says in the end what it says when
nothing kills it, calls no tool twice that had finished, and pays for no answer twice."""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec

from examples.agent.agent import told
from perdure.proving.upstream import ScriptedUpstream
from perdure.wire.workers import SaidObject
from tests.e2e.http_server import clean_environment, serving

WITHIN_S = 300.0
ROOT = Path(__file__).parents[2]


def said(role: str, content: Any) -> SaidObject:
    return SaidObject(number=1, role=role, at=1, content=content)


def plain(transcript: list[Any]) -> list[Any]:
    """What was said, without the ids that the gateway gave and the time."""
    return [
        (one["role"], one["content"])
        if isinstance(one["content"], str | dict)
        else (one["role"], [{**item, "id": None} for item in one["content"]])
        for one in transcript
    ]


# proves W1, W4, W7
async def test_an_agent_killed_at_any_event_of_its_run_ends_as_one_that_lives(
    tmp_path: Path,
) -> None:
    lives = (sys.executable, "-m", "tests.crash.agent_lives", str(tmp_path))
    async with (
        ScriptedUpstream() as upstream,
        serving(tmp_path / "data", "--upstream", upstream.url) as server,
    ):
        process = await asyncio.create_subprocess_exec(
            *(*lives, f"{server.url}/v1", upstream.url.removesuffix("/v1")),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=clean_environment(),
            cwd=ROOT,
        )
        try:
            out, _ = await asyncio.wait_for(process.communicate(), WITHIN_S)
        finally:
            if process.returncode is None:
                process.kill()
        asked = await upstream.received()
    lines = [line for line in out.decode().splitlines() if line.startswith('{"case"')]
    unkilled, *cases = [msgspec.json.decode(line) for line in lines]
    last = cases.pop()
    assert [one["case"] for one in cases] == list(range(1, len(cases) + 1)), out.decode()
    assert (unkilled["event"], last["event"]) == (None, None), out.decode()
    assert Counter(one["event"] for one in cases) == {
        "before a commit": 8,
        "after a commit": 8,
        "before the model is asked": 2,
        "while the model answers": 2,
        "with the model's answer": 2,
        "before the tool": 1,
        "in the tool, before its effect": 1,
        "in the tool, after its effect": 1,
    }
    for one in (*cases, last):
        assert plain(one["transcript"]) == plain(unkilled["transcript"]), one
        assert len(one["notes"]) == 1, one
        assert (one["overview"]["status"], one["overview"]["taken"]) == ("ready", 1), one
    assert len(asked) == 1 + 2 * (len(cases) + 2)


def test_an_input_that_comes_in_the_middle_of_a_turn_is_told_behind_it() -> None:
    call = {"type": "function_call", "name": "note", "call_id": "c1"}
    result = {"type": "function_call_output", "call_id": "c1", "output": "1"}
    answer = {"type": "message", "content": []}
    begun = [said("user", "one"), said("assistant", [call]), said("user", "two")]
    one, two = ({"role": "user", "content": text} for text in ("one", "two"))
    assert told(begun) == ([one, call], call)
    assert told([*begun, said("tool", result)]) == ([one, call, result], None)
    over = [*begun, said("tool", result), said("assistant", [answer])]
    assert told(over) == ([one, call, result, answer, two], None)
