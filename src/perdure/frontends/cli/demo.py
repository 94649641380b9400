"""`perdure demo`: a server killed in the middle of a sentence, and what comes back.

Nothing here is staged: a real server in a process of its own, a model that speaks slowly to a
script, SIGKILL, and the same stream read on behind the last event that was seen.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import typer

from perdure.core.clock import SystemClock
from perdure.core.disk import Disk
from perdure.core.errors import Unavailable
from perdure.frontends.cli.output import console, recovered, seconds
from perdure.proving.ports import kept_port
from perdure.proving.upstream import ScriptedUpstream
from perdure.proving.waiting import wait_until
from perdure.services.reports import StartupReport

SENTENCE = (
    "Whatever was acknowledged before the lights went out is still here when they come back on, "
    "and so is the end of this sentence."
)
_CONTINUES = "continue_final_message"
_PACE_S = 0.2
_WORDS_BEFORE_DEATH = 11
_PATIENCE_S = 30.0


class _Event(msgspec.Struct):
    type: str
    sequence_number: int
    delta: str = ""
    response: dict[str, Any] = {}


def demo() -> None:
    """Kill a server in mid-sentence and read the sentence to its end. Takes half a minute; leaves
    nothing behind. Exits with 1 if anything acknowledged is gone."""
    disk = Disk()
    home = disk.private_directory()
    try:
        whole = asyncio.run(_play(home / "data"))
    finally:
        disk.remove_tree(home)
    if not whole:
        raise typer.Exit(1)


async def _play(data: Path) -> bool:
    with kept_port() as port:
        return await _play_at(port, data)


async def _play_at(port: int, data: Path) -> bool:
    url = f"http://127.0.0.1:{port}"
    async with ScriptedUpstream() as model, httpx.AsyncClient(base_url=url, timeout=None) as client:
        console.print("[dim]A model that speaks slowly, and Perdure in front of it.[/]\n")
        async with _served(data, port, model.url, client) as server:
            asked = {"model": "any", "input": f"pace {_PACE_S} {SENTENCE}"}
            console.print(f"\n[bold]POST {url}/v1/responses[/]  background: true, stream: true\n")
            request = client.build_request(
                "POST", "/v1/responses", json=asked | {"background": True, "stream": True}
            )
            seen = await _read(client, request, words_max=_WORDS_BEFORE_DEATH)
            os.kill(server.pid, signal.SIGKILL)
            await server.wait()
            console.print(f" [bold red]kill -9 {server.pid}[/]")
        response_id = seen[0].response["id"]
        last = seen[-1].sequence_number
        console.print("\n[dim]The same command again, on the same data.[/]\n")
        async with _served(data, port, model.url, client) as server:
            await _report(client)
            path = f"/v1/responses/{response_id}?stream=true&starting_after={last}"
            console.print(f"\n[bold]GET {path}[/]\n")
            rest = await _read(client, client.build_request("GET", path))
            body = (await client.get(f"/v1/responses/{response_id}")).json()
            whole = _judge(seen, rest, body)
            server.send_signal(signal.SIGTERM)
            await server.wait()
    return whole


@asynccontextmanager
async def _served(
    data: Path, port: int, upstream: str, client: httpx.AsyncClient
) -> AsyncIterator[asyncio.subprocess.Process]:
    """A server that answers; killed at the end if it still runs."""
    options = ("--port", str(port), "--upstream", upstream, "--upstream-continues", _CONTINUES)
    command = ("serve", "--data", str(data), *options)
    console.print(
        f"$ perdure serve --data DIR --port {port} --upstream {upstream} "
        f"--upstream-continues {_CONTINUES}",
        soft_wrap=True,
    )
    began_s = SystemClock().monotonic_s()
    server = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "perdure.frontends.cli.main", *command),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    assert server.stderr is not None
    said = asyncio.create_task(server.stderr.read())
    try:

        async def ready() -> bool:
            if server.returncode is not None:
                why = (await said).decode()[-2_000:]
                raise Unavailable(f"the server ended instead of starting: {why}")
            try:
                return (await client.get("/readyz")).status_code == httpx.codes.OK
            except httpx.TransportError:
                return False

        await wait_until(ready, _PATIENCE_S, "the server's start")
        took = seconds(SystemClock().monotonic_s() - began_s)
        console.print(f"  process {server.pid}, ready in {took}, the interpreter's start included")
        yield server
    finally:
        if server.returncode is None:
            server.kill()
            await server.wait()


async def _read(
    client: httpx.AsyncClient, request: httpx.Request, words_max: int | None = None
) -> list[_Event]:
    """Show a stream as it comes, to its end or until so many words were seen."""
    events: list[_Event] = []
    words = 0
    response = await client.send(request, stream=True)
    response.raise_for_status()
    try:
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = msgspec.json.decode(line[6:], type=_Event)
            events.append(event)
            if event.type.endswith("output_text.delta"):
                console.print(event.delta, end="", markup=False)
                words += 1
            if words == words_max:
                break
    finally:
        await response.aclose()
    return events


async def _report(client: httpx.AsyncClient) -> None:
    """What the start found, as `perdure status` says it."""
    answer = await client.get("/v1/startup")
    report = msgspec.json.decode(answer.content, type=StartupReport)
    for found in report.recovery:
        if done := recovered(found):
            console.print(f"  recovered {found.surface}: {done}")


def _judge(seen: list[_Event], rest: list[_Event], body: dict[str, Any]) -> bool:
    """Whether the events follow one another without a hole and say the answer once, whole."""
    numbers = [event.sequence_number for event in (*seen, *rest)]
    said = [part["text"] for item in body["output"] for part in item.get("content", ())]
    streamed = "".join(event.delta for event in (*seen, *rest))
    whole = numbers == list(range(len(numbers))) and streamed == "".join(said) == SENTENCE
    verdict = "[bold green]whole[/]" if whole else "[bold red]not whole[/]"
    console.print(
        f"\n\nresponse {body['status']}, events 0 to {numbers[-1]} without a hole, "
        f"the answer is {verdict}"
    )
    return whole
