"""Workers as an operator sees them, with the real commands: on a server, followed live across its
events, and in a store that nobody holds."""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path
from typing import Any

import httpx
import msgspec

from perdure import library
from tests.e2e.http_server import STARTS_WITHIN_S, clean_environment, perdure, serving

ONE = "/v1/runtimes/lab/workers/scout"


Follower = asyncio.subprocess.Process


async def following(what: str, *arguments: str) -> Follower:
    """`perdure workers WHAT lab/scout --follow --json`."""
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "perdure.frontends.cli.main"),
        *("workers", what, "lab/scout", "--follow", "--json", *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=clean_environment(),
    )


async def told(follower: Follower, count: int) -> list[Any]:
    assert follower.stdout is not None
    async with asyncio.timeout(STARTS_WITHIN_S):
        return [msgspec.json.decode(await follower.stdout.readline()) for _ in range(count)]


async def make(client: httpx.AsyncClient, *requests: tuple[str, Any]) -> None:
    for path, body in requests:
        answer = await client.post(path, json=body)
        assert answer.status_code == 200, answer.text


# proves W1, W10
async def test_an_operator_lists_shows_and_follows_workers(tmp_path: Path) -> None:
    data = ("--data", str(tmp_path / "data"))
    async with serving(tmp_path / "data") as server, server.client() as client:
        await make(
            client,
            ("/v1/runtimes", {"id": "lab"}),
            ("/v1/runtimes/lab/workers", {"id": "scout"}),
            (f"{ONE}/input", {"content": "look"}),
        )
        listed = await perdure("workers", "ls", "lab", *data, "--json")
        assert [one["id"] for one in listed.json()["data"]] == ["scout"]
        unnamed = await perdure("workers", "events", "scout", *data)
        assert (unnamed.code, "RUNTIME/WORKER" in unnamed.err) == (2, True)
        shown = await perdure("workers", "show", "lab/scout", *data)
        assert shown.json()["overview"]["inputs"] == 1
        for within in ((), ("lab",), ("lab/scout",)):
            verified = await perdure("workers", "verify", *within, *data)
            assert (verified.code, verified.out) == (0, "nothing is damaged\n")
    verified = await perdure("workers", "verify", "lab", *data)
    assert (verified.code, verified.out) == (0, "nothing is damaged\n")
    unknown = await perdure("workers", "verify", "lab/nobody", *data)
    assert (unknown.code, "nobody" in unknown.err) == (3, True)
    said = await perdure("workers", "transcript", "lab/scout", *data)
    assert said.out.endswith("user          look\n")


# proves W10
async def test_followers_go_on_across_servers_and_programs(tmp_path: Path) -> None:
    """A store that nobody holds, a program that embeds it, a server that is killed, another."""
    data, state = tmp_path / "data", tmp_path / "state"
    place = ("--engine", f"file:///{state}", "--data", str(data))

    def embedded(content: str) -> None:
        with library.blocking(f"file:///{state}") as opened:
            opened.workers.create_runtime({"id": "lab"})
            opened.workers.create("lab", {"id": "scout"})
            opened.workers.input("lab", "scout", {"content": content})

    await asyncio.to_thread(embedded, "one")
    events = await following("events", *place)
    said = await following("transcript", *place)
    try:
        assert [one["type"] for one in await told(events, 2)] == ["created", "accepted"]
        assert [one["content"] for one in await told(said, 1)] == ["one"]
        async with serving(data, *place[:2]) as server, server.client() as client:
            await make(client, (f"{ONE}/input", {"content": "two"}))
            assert (await told(events, 1))[0]["number"] == 3
            assert [one["content"] for one in await told(said, 1)] == ["two"]
            assert await server.end(signal.SIGKILL) == -signal.SIGKILL
        await asyncio.to_thread(embedded, "three")
        async with serving(data, *place[:2]) as server, server.client() as client:
            await make(client, (f"{ONE}/input", {"content": "four"}))
            assert [one["number"] for one in await told(events, 2)] == [4, 5]
            assert [one["content"] for one in await told(said, 2)] == ["three", "four"]
            purge = {"operation_id": "op", "mode": "purge"}
            await make(client, (f"{ONE}/stop", {}))
            assert [one["type"] for one in await told(events, 1)] == ["stopped"]
            await make(client, (f"{ONE}/retain", purge))
            async with asyncio.timeout(STARTS_WITHIN_S):  # told of the end, or too late for that
                assert {await events.wait(), await said.wait()} <= {0, 3}
    finally:
        for follower in (events, said):
            if follower.returncode is None:
                follower.kill()
                await follower.wait()
