"""Files: an upload of 1 GB, beside `cp` and fsync of the same bytes, and the memory it takes.

Answers the floors of streaming uploads. The bytes come from the page cache, over one connection as
one form, or over four as 16 parts; client and server share the CPUs and write to the same disk as
`cp` does.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec

from bench.report import Goal, Section, table
from bench.servers import Server, free_port, perdure
from bench.turns import Sample, of, ratio, scratch, take_turns

SIZE_BYTES = 1_000_000_000
PARTS, SENDERS = 16, 4
CP, UPLOAD, IN_PARTS = "cp and fsync", "POST /v1/files", f"{PARTS} parts, {SENDERS} at once"
CASE = "1 GB"
_BOUNDARY = "a-boundary-that-random-bytes-do-not-hold"
_PIECE_BYTES = 1_000_000


def measure(turns: int) -> Section:
    """Everything, in one run."""
    with scratch() as name:
        source = Path(name) / "source"
        with source.open("wb") as file:
            for _ in range(SIZE_BYTES // _PIECE_BYTES):
                file.write(os.urandom(_PIECE_BYTES))
        contenders = (CP, UPLOAD, IN_PARTS)
        samples = take_turns(contenders, turns, lambda who: {CASE: _take(who, source)})
    goals = []
    for who, what in ((UPLOAD, "upload of 1 GB"), (IN_PARTS, f"1 GB in {IN_PARTS}")):
        rate = ratio(samples, CASE, "mb_per_s", who, CP)
        grown = of(samples, who, CASE, "grown_mb")
        goals += [
            Goal("files", f"{what}: rate over cp and fsync", rate, 0.5),
            Goal("files", f"{what}: memory the server grows by", grown, 50, True, ".1f", "MB"),
        ]
    rows = [[who, f"{of(samples, who, CASE, 'mb_per_s')}"] for who in contenders]
    return Section("Files: one of 1 GB", goals, table(["1 GB", "MB/s"], rows))


def _take(who: str, source: Path) -> Sample:
    with scratch() as name:
        if who == CP:
            return {"mb_per_s": _rate(_copy(source, Path(name) / "copy")), "grown_mb": 0.0}
        return _upload(source, Path(name), _whole if who == UPLOAD else _in_parts)


def _copy(source: Path, target: Path) -> float:
    began_s = time.perf_counter()
    subprocess.run([shutil.which("cp") or "cp", str(source), str(target)], check=True)
    with target.open("rb") as file:
        os.fsync(file.fileno())
    return time.perf_counter() - began_s


def _upload(source: Path, directory: Path, send: Callable[[Server, Path], None]) -> Sample:
    port = free_port()
    config = directory / "perdure.toml"
    config.write_text(f"[limits]\nfile_bytes_max = {SIZE_BYTES}\n")
    command = perdure(port, directory / "data", "--config", str(config))
    with Server(command, port, directory / "log") as server:
        server.wait_ready()
        server.ask("GET", "/v1/files")
        before_bytes = server.resident_bytes()
        began_s = time.perf_counter()
        send(server, source)
        took_s = time.perf_counter() - began_s
        grown_bytes = server.most_resident_bytes() - before_bytes
    return {"mb_per_s": _rate(took_s), "grown_mb": grown_bytes / 1e6}


def _whole(server: Server, source: Path) -> None:
    field = _named("purpose") + b"\r\n\r\nuser_data\r\n"
    _send(server, "/v1/files", field + _named("file"), source, 0, SIZE_BYTES)


def _in_parts(server: Server, source: Path) -> None:
    announced = {"bytes": SIZE_BYTES, "filename": "source", "purpose": "user_data"}
    announced["mime_type"] = "application/octet-stream"
    path = f"/v1/uploads/{server.ask('POST', '/v1/uploads', announced)['id']}"
    size_bytes = SIZE_BYTES // PARTS

    def part(number: int) -> str:
        at, name = number * size_bytes, _named("data")
        id: str = _send(server, f"{path}/parts", name, source, at, size_bytes)["id"]
        return id

    with ThreadPoolExecutor(SENDERS) as senders:
        ids = list(senders.map(part, range(PARTS)))
    server.ask("POST", f"{path}/complete", {"part_ids": ids})


def _named(field: str) -> bytes:
    return f'--{_BOUNDARY}\r\ncontent-disposition: form-data; name="{field}"'.encode()


def _send(server: Server, path: str, head: bytes, source: Path, start: int, size_bytes: int) -> Any:
    """Send a form that ends in a stretch of the source; its answer, which must be a success."""
    head += b'; filename="source"\r\n\r\n'
    tail = f"\r\n--{_BOUNDARY}--\r\n".encode()
    length = len(head) + size_bytes + len(tail)
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(
            b"POST %s HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n"
            b"content-type: multipart/form-data; boundary=%s\r\nconnection: close\r\n\r\n"
            % (path.encode(), length, _BOUNDARY.encode())
        )
        connection.sendall(head)
        with source.open("rb") as file:
            connection.sendfile(file, start, size_bytes)
        connection.sendall(tail)
        answer = b""
        while received := connection.recv(65_536):
            answer += received
    if answer.split(b" ")[1:2] != [b"200"]:
        raise RuntimeError(f"the upload was answered {answer[:500]!r}")
    return msgspec.json.decode(answer.partition(b"\r\n\r\n")[2])


def _rate(took_s: float) -> float:
    return SIZE_BYTES / 1e6 / took_s
