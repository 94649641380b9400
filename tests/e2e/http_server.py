"""The server as people run it: `perdure serve` in a process of its own."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import openai

STARTS_WITHIN_S = 20.0
STOPS_WITHIN_S = 20.0

_URL = re.compile(rb"listening on (http://\S+)")


def clean_environment(**more: str) -> dict[str, str]:
    """This process's environment without any setting of the server's."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PERDURE_")}
    return kept | {"NO_PROXY": "127.0.0.1", "COLUMNS": "200"} | more


class Finished(msgspec.Struct, frozen=True):
    """How a command ended."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        return msgspec.json.decode(self.out)


async def perdure(*arguments: str, cwd: Path | None = None, **environment: str) -> Finished:
    """Run a command to its end."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "perdure.frontends.cli.main", *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=clean_environment(**environment),
        cwd=cwd,
    )
    try:
        out, err = await asyncio.wait_for(process.communicate(), STARTS_WITHIN_S)
    finally:
        if process.returncode is None:
            process.kill()
    assert process.returncode is not None
    return Finished(process.returncode, out.decode(), err.decode())


class Server:
    """A running `perdure serve`. `said` is what it printed when it was ready."""

    def __init__(self, process: asyncio.subprocess.Process, log: Path) -> None:
        self.process = process
        self.log = log
        self.said = ""
        self.url = ""

    @property
    def pid(self) -> int:
        return self.process.pid

    async def listen(self) -> None:
        """Wait for it to say that it is ready."""
        assert self.process.stdout is not None
        while "try" not in self.said:
            line = await asyncio.wait_for(self.process.stdout.readline(), STARTS_WITHIN_S)
            assert line, self.log.read_text()
            self.said += line.decode()
            if found := _URL.search(line):
                self.url = found.group(1).decode()

    async def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and return the exit code, negative for a signal that killed it."""
        self.process.send_signal(number)
        return await asyncio.wait_for(self.process.wait(), STOPS_WITHIN_S)

    def client(self, **more: Any) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            base_url=self.url, trust_env=False, verify=False, timeout=20, **more
        )

    def sdk(self, **more: Any) -> openai.AsyncOpenAI:
        """The official client, told to check every answer."""
        return openai.AsyncOpenAI(
            base_url=f"{self.url}/v1",
            **{
                "api_key": "none",
                "max_retries": 0,
                "_strict_response_validation": True,
                **more,
            },
        )


@asynccontextmanager
async def serving(
    data: Path, *arguments: str, around: tuple[str, ...] = (), **environment: str
) -> AsyncIterator[Server]:
    """A server on `data`, on a port of its own choice; killed at the end if it still runs.
    `around` is a command that runs it."""
    log = data.parent / f"{data.name}.log"
    with log.open("ab") as err:
        process = await asyncio.create_subprocess_exec(
            *(*around, sys.executable, "-m", "perdure.frontends.cli.main", "serve"),
            *("--data", str(data), "--port", "0", *arguments),
            stdout=asyncio.subprocess.PIPE,
            stderr=err,
            env=clean_environment(**environment),
            cwd=data.parent,
        )
    server = Server(process, log)
    try:
        await server.listen()
        yield server
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
