"""The server that is going to be killed, as the one who kills it sees it."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

import httpx
import msgspec

from perdure.proving.launcher import Plan
from perdure.proving.waiting import TooLate, wait_until

DEATH_S = 10.0
READY_S = 15.0


class Victim:
    """One server process."""

    def __init__(self, pid: int, plan: Plan, ended: asyncio.Future[int]) -> None:
        self.pid = pid
        self.plan = plan
        self.url = f"http://127.0.0.1:{plan.port}"
        self._ended = ended

    @property
    def dead(self) -> bool:
        """Whether the process is gone, and reaped."""
        return self._ended.done()

    async def ready(self, *, started: bool = False) -> float | None:
        """Seconds until `/readyz` says yes, or, with `started`, until its start is done, as nobody
        is welcome where the disk fails; None where the process died before. Raises `TooLate` where
        it does neither."""
        async with httpx.AsyncClient(
            base_url=self.url, trust_env=False, verify=False, timeout=5
        ) as client:

            async def answers() -> bool:
                if self.dead:
                    return True
                try:
                    if started:
                        return bool((await client.get("/v1/startup")).json()["done"])
                    return (await client.get("/readyz")).status_code == 200
                except httpx.TransportError:
                    return False

            taken_s = await wait_until(answers, READY_S, "a server that is ready or dead")
        return None if self.dead else taken_s

    def signal(self, number: int = signal.SIGKILL) -> None:
        """Send a signal, unless it is dead already."""
        if not self.dead:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    async def death(self, deadline_s: float = DEATH_S) -> int:
        """The exit code, negative for a signal, once it is dead. Raises `TooLate`."""
        try:
            return await asyncio.wait_for(asyncio.shield(self._ended), deadline_s)
        except TimeoutError:
            raise TooLate(f"process {self.pid} did not end within {deadline_s:g} s") from None


class Nursery:
    """The launcher process, for as long as the context lasts. It runs one server at a time; what
    they write to standard error goes to `log`."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._process: asyncio.subprocess.Process | None = None
        self._victim: Victim | None = None

    async def __aenter__(self) -> Nursery:
        with self._log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "perdure.proving.launcher"),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
            )
        return self

    async def __aexit__(self, *error: object) -> None:
        process, stdin, _ = self._running()
        stdin.close()
        await process.wait()

    async def start(self, plan: Plan) -> Victim:
        """Start a server; the one before must be dead."""
        assert self._victim is None or self._victim.dead, "one server at a time"
        _, stdin, stdout = self._running()
        stdin.write(msgspec.json.encode(plan) + b"\n")
        await stdin.drain()
        pid = int(await stdout.readline())

        async def end() -> int:
            return int(await stdout.readline() or -signal.SIGKILL)

        self._victim = Victim(pid, plan, asyncio.ensure_future(end()))
        return self._victim

    def _running(
        self,
    ) -> tuple[asyncio.subprocess.Process, asyncio.StreamWriter, asyncio.StreamReader]:
        assert self._process is not None, "the nursery is entered first"
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        return self._process, self._process.stdin, self._process.stdout
