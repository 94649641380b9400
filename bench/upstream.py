"""An upstream for measuring streams: each chunk says when it was sent, so that whoever reads it,
through whatever stands between, knows how long it took.

It writes chat completion chunks at fixed times and does nothing else; run as
`python -m bench.upstream PORT`, or an `Upstream` in the process that measures.
"""

from __future__ import annotations

import asyncio
import sys
import time
from contextlib import suppress

import uvloop

EVENTS_PER_S = 100
EVENTS = 400
ASKED_S = 60.0

_STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
_CHUNK = (
    b'data: {"id":"chatcmpl-bench","object":"chat.completion.chunk","created":0,"model":"bench",'
    b'"choices":[{"index":0,"delta":{"content":" %d"},"finish_reason":null}]}\n\n'
)
_LAST = (
    b'data: {"id":"chatcmpl-bench","object":"chat.completion.chunk","created":0,"model":"bench",'
    b'"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'
)
_LISTED = b'{"object":"list","data":[{"id":"bench","object":"model","created":0,"owned_by":"me"}]}'
_PLAIN = (
    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\n"
    b"Content-Length: %d\r\n\r\n%b"
)
_MODELS = _PLAIN % (len(_LISTED), _LISTED)


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """One request a connection: a stream to a POST, the models to anything else."""
    head = await reader.readuntil(b"\r\n\r\n")
    if not head.startswith(b"POST"):
        writer.write(_MODELS)
        writer.close()
        return
    writer.write(_STREAM)
    loop = asyncio.get_running_loop()
    due_s = loop.time()
    for _ in range(EVENTS):
        due_s += 1 / EVENTS_PER_S
        await asyncio.sleep(due_s - loop.time())
        writer.write(_CHUNK % time.monotonic_ns())
    writer.write(_LAST)
    writer.close()


class Upstream:
    """One in this process, answering `events` chunks at a pace; a context manager. It knows when
    it was asked, which is when it had the head of a question, and how many it answers at once."""

    def __init__(self, events: int = 0, events_per_s: float = EVENTS_PER_S) -> None:
        self.asked_s: list[float] = []
        self.most = 0
        self._events = events
        self._pause_s = 1 / events_per_s
        self._running = 0
        self._asked = asyncio.Condition()

    @property
    def url(self) -> str:
        """What to give to `--upstream`."""
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/v1"

    async def asked(self, times: int) -> None:
        """Wait until it has been asked so often."""
        async with asyncio.timeout(ASKED_S), self._asked:
            await self._asked.wait_for(lambda: len(self.asked_s) >= times)

    async def __aenter__(self) -> Upstream:
        self._server = await asyncio.start_server(self._answer, "127.0.0.1", 0, backlog=1024)
        return self

    async def __aexit__(self, *error: object) -> None:
        self._server.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        if not head.startswith(b"post"):
            writer.write(_MODELS)
            writer.close()
            return
        self.asked_s.append(time.perf_counter())
        async with self._asked:
            self._asked.notify_all()
        self._running += 1
        self.most = max(self.most, self._running)
        with suppress(ConnectionError):  # a killed server
            size_bytes = int(head.partition(b"content-length:")[2].split(b"\r")[0])
            await reader.readexactly(size_bytes)
            writer.write(_STREAM)
            for _ in range(self._events):
                await asyncio.sleep(self._pause_s)
                writer.write(_CHUNK % time.monotonic_ns())
                await writer.drain()
            writer.write(_LAST)
        self._running -= 1
        writer.close()


async def main(port: int) -> None:
    server = await asyncio.start_server(answer, "127.0.0.1", port)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1])))
