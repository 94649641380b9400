"""A whole server in this process, listening on a real port, over each engine a test asks for."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import pytest

from perdure.core.clock import SystemClock
from perdure.frontends.http.journal import AccessLog
from perdure.frontends.http.server import Application, Listener
from perdure.proving.subjects import postgres_url
from perdure.proving.upstream import ScriptedUpstream
from perdure.services.config import load
from perdure.services.lifecycle import Node


class Served:
    """One server: its parts, a client of it, and what it wrote to its access log."""

    def __init__(self, node: Node, application: Application, port: int, log: BytesIO) -> None:
        self.node = node
        self.application = application
        self.service = application.service
        self.port = port
        self.log = log
        self.client = httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{port}", trust_env=False, verify=False
        )

    async def raw(self, sent: bytes) -> bytes:
        """Send bytes on a new connection and return everything until the server hangs up."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(sent)
        try:
            return await asyncio.wait_for(reader.read(), 20)
        finally:
            writer.close()

    async def json(self, method: str, path: str, body: Any = None, **more: Any) -> Any:
        """The body of an answer that must be a success."""
        answer = await self.client.request(method, path, json=body, **more)
        assert answer.status_code == 200, answer.text
        return answer.json()


SURFACES_ON = "SURFACES_ON"
"""Environment variable: `postgres` runs every test here on PostgreSQL, in place of memory."""


def _engine(directory: Path) -> str:
    return postgres_url(directory) if os.environ.get(SURFACES_ON) == "postgres" else "memory://"


Serve = Callable[..., Awaitable[Served]]


@pytest.fixture
async def upstream() -> AsyncIterator[ScriptedUpstream]:
    async with ScriptedUpstream() as server:
        yield server


@pytest.fixture
async def serve(tmp_path: Path) -> AsyncIterator[Serve]:
    """Starts servers; flags are dotted names with double underscores for dots."""
    async with AsyncExitStack() as stack:

        async def start(
            *, environment: dict[str, str] | None = None, opened: bool = True, **flags: Any
        ) -> Served:
            named = {name.replace("__", "."): value for name, value in flags.items()}
            settings = {"data": str(tmp_path), "engine": _engine(tmp_path)} | named
            config = load(environment={}, flags=settings)
            node = Node(config, environment={})
            log = BytesIO()
            clock = SystemClock()
            application = Application(node, environment or {}, clock, AccessLog(log, clock))
            listener = Listener(application.public, application.service, application.log)
            listening = socket.create_server(("127.0.0.1", 0))
            serving = asyncio.create_task(listener.serve(sockets=[listening]))
            await listener.listening.wait()
            if opened:
                await node.open()
            served = Served(node, application, listening.getsockname()[1], log)

            async def stop() -> None:
                await served.client.aclose()
                listener.should_exit = listener.force_exit = True
                await served.service.streams.end(0)
                await serving
                await node.close()
                application.log.flush()

            stack.push_async_callback(stop)
            return served

        yield start
