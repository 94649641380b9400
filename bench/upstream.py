"""An upstream for measuring streams: each chunk says when it was sent, so that whoever reads it,
through whatever stands between, knows how long it took.

It writes chat completion chunks at fixed times and does nothing else; run as
`python -m bench.upstream PORT`.
"""

from __future__ import annotations

import asyncio
import sys
import time

import uvloop

EVENTS_PER_S = 100
EVENTS = 400

STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
_CHUNK = (
    b'data: {"id":"chatcmpl-bench","object":"chat.completion.chunk","created":0,"model":"bench",'
    b'"choices":[{"index":0,"delta":{"content":" %d"},"finish_reason":null}]}\n\n'
)
LAST = (
    b'data: {"id":"chatcmpl-bench","object":"chat.completion.chunk","created":0,"model":"bench",'
    b'"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'
)
_LISTED = b'{"object":"list","data":[{"id":"bench","object":"model","created":0,"owned_by":"me"}]}'
_PLAIN = (
    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\n"
    b"Content-Length: %d\r\n\r\n%b"
)
MODELS = _PLAIN % (len(_LISTED), _LISTED)


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """One request a connection: a stream to a POST, the models to anything else."""
    head = await reader.readuntil(b"\r\n\r\n")
    if not head.startswith(b"POST"):
        writer.write(MODELS)
        writer.close()
        return
    writer.write(STREAM)
    loop = asyncio.get_running_loop()
    due_s = loop.time()
    for _ in range(EVENTS):
        due_s += 1 / EVENTS_PER_S
        await asyncio.sleep(due_s - loop.time())
        writer.write(_CHUNK % time.monotonic_ns())
    writer.write(LAST)
    writer.close()


async def main(port: int) -> None:
    server = await asyncio.start_server(answer, "127.0.0.1", port)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1])))
