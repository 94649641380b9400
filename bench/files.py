"""Files: an upload of 1 GB, beside `cp` and fsync of the same bytes, and the memory it takes.

Answers the floors of streaming uploads. One connection sends one form from the page cache; client
and server share the CPUs and write to the same disk as `cp` does.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

from bench.report import Goal, Section, table
from bench.servers import Server, free_port, perdure
from bench.turns import Sample, of, ratio, scratch, take_turns

SIZE_BYTES = 1_000_000_000
CP, UPLOAD = "cp and fsync", "POST /v1/files"
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
        samples = take_turns((CP, UPLOAD), turns, lambda who: {CASE: _take(who, source)})
    rate = ratio(samples, CASE, "mb_per_s", UPLOAD, CP)
    grown = of(samples, UPLOAD, CASE, "grown_mb")
    goals = [
        Goal("files", "upload of 1 GB: rate over cp and fsync", rate, 0.5),
        Goal("files", "upload of 1 GB: memory the server grows by", grown, 50, True, ".1f", "MB"),
    ]
    rows = [[who, f"{of(samples, who, CASE, 'mb_per_s')}"] for who in (CP, UPLOAD)]
    return Section("Files: one of 1 GB", goals, table(["1 GB", "MB/s"], rows))


def _take(who: str, source: Path) -> Sample:
    with scratch() as name:
        if who == CP:
            return {"mb_per_s": _rate(_copy(source, Path(name) / "copy")), "grown_mb": 0.0}
        return _upload(source, Path(name))


def _copy(source: Path, target: Path) -> float:
    began_s = time.perf_counter()
    subprocess.run([shutil.which("cp") or "cp", str(source), str(target)], check=True)
    with target.open("rb") as file:
        os.fsync(file.fileno())
    return time.perf_counter() - began_s


def _upload(source: Path, directory: Path) -> Sample:
    port = free_port()
    config = directory / "perdure.toml"
    config.write_text(f"[limits]\nfile_bytes_max = {SIZE_BYTES}\n")
    command = perdure(port, directory / "data", "--config", str(config))
    with Server(command, port, directory / "log") as server:
        server.wait_ready()
        server.ask("GET", "/v1/files")
        before_bytes = server.resident_bytes()
        took_s = _send(port, source)
        grown_bytes = server.resident_bytes() - before_bytes
    return {"mb_per_s": _rate(took_s), "grown_mb": grown_bytes / 1e6}


def _send(port: int, source: Path) -> float:
    """Seconds until the answer, which must be a success."""
    named = f'--{_BOUNDARY}\r\ncontent-disposition: form-data; name="'
    head = f'{named}purpose"\r\n\r\nuser_data\r\n{named}file"; filename="source"\r\n\r\n'.encode()
    tail = f"\r\n--{_BOUNDARY}--\r\n".encode()
    length = len(head) + SIZE_BYTES + len(tail)
    began_s = time.perf_counter()
    with socket.create_connection(("127.0.0.1", port)) as connection, source.open("rb") as file:
        connection.sendall(
            b"POST /v1/files HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n"
            b"content-type: multipart/form-data; boundary=%s\r\n\r\n" % (length, _BOUNDARY.encode())
        )
        connection.sendall(head)
        connection.sendfile(file)
        connection.sendall(tail)
        answer = connection.recv(65_536)
    if answer.split(b" ")[1:2] != [b"200"]:
        raise RuntimeError(f"the upload was answered {answer[:500]!r}")
    return time.perf_counter() - began_s


def _rate(took_s: float) -> float:
    return SIZE_BYTES / 1e6 / took_s
