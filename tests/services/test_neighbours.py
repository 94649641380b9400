"""Model servers on this machine are found, and nothing else is taken for one."""

from __future__ import annotations

import asyncio
import socket
from contextlib import closing

from perdure.proving.upstream import ScriptedUpstream
from perdure.services.neighbours import Neighbour, neighbours


async def test_only_what_answers_like_a_model_server_is_found() -> None:
    async def nonsense(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello")
        writer.close()

    other = await asyncio.start_server(nonsense, "127.0.0.1", 0)
    with closing(socket.create_server(("127.0.0.1", 0))) as silent:
        async with ScriptedUpstream() as upstream, other:
            port = int(upstream.url.split(":")[2].split("/")[0])
            asked = {
                other.sockets[0].getsockname()[1]: "web server",
                port: "scripted",
                silent.getsockname()[1]: "silent",
                1: "nobody",
            }
            found = await neighbours(asked)
    assert [Neighbour(one.url, one.usually, 0) for one in found] == [
        Neighbour(upstream.url, "scripted", 0)
    ]
    assert found[0].models >= 1
