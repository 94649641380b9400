"""Workers as an operator sees them, with the real commands: on a server, followed live across its
events, and in a store that nobody holds."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import msgspec

from tests.e2e.http_server import STARTS_WITHIN_S, clean_environment, perdure, serving

ONE = "/v1/runtimes/lab/workers/scout"


# proves W1, W10
async def test_an_operator_lists_shows_and_follows_workers(tmp_path: Path) -> None:
    data = ("--data", str(tmp_path / "data"))
    async with serving(tmp_path / "data") as server, server.client() as client:
        for path, body in (
            ("/v1/runtimes", {"id": "lab"}),
            ("/v1/runtimes/lab/workers", {"id": "scout"}),
            (f"{ONE}/input", {"content": "look"}),
        ):
            assert (await client.post(path, json=body)).status_code == 200
        listed = await perdure("workers", "ls", "lab", *data, "--json")
        assert [one["id"] for one in listed.json()["data"]] == ["scout"]
        unnamed = await perdure("workers", "events", "scout", *data)
        assert (unnamed.code, "RUNTIME/WORKER" in unnamed.err) == (2, True)
        follower = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "perdure.frontends.cli.main"),
            *("workers", "events", "lab/scout", "--follow", "--json", *data),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=clean_environment(),
        )
        assert follower.stdout is not None
        async with asyncio.timeout(STARTS_WITHIN_S):
            first = [msgspec.json.decode(await follower.stdout.readline()) for _ in range(2)]
            await client.post(f"{ONE}/stop", json={"reason": "enough"})
            last = msgspec.json.decode(await follower.stdout.readline())
        told = [(one["number"], one["type"]) for one in (*first, last)]
        assert told == [(1, "created"), (2, "accepted"), (3, "stopped")]
        for within in ((), ("lab",), ("lab/scout",)):
            verified = await perdure("workers", "verify", *within, *data)
            assert (verified.code, verified.out) == (0, "nothing is damaged\n")
        shown = await perdure("workers", "show", "lab/scout", *data)
        assert shown.json()["overview"]["reason"] == "enough"
    async with asyncio.timeout(STARTS_WITHIN_S):
        assert await follower.wait() == 5  # its server has stopped
    verified = await perdure("workers", "verify", "lab", *data)
    assert (verified.code, verified.out) == (0, "nothing is damaged\n")
    unknown = await perdure("workers", "verify", "lab/nobody", *data)
    assert (unknown.code, "nobody" in unknown.err) == (3, True)
    said = await perdure("workers", "transcript", "lab/scout", *data)
    assert said.out.endswith("user          look\n")
