"""Servers as real processes: started on a free port, asked until they answer, killed or ended."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

from bench.contenders import ROOT

READY_S = 60.0
_ASK_EVERY_S = 0.002
_READY = b"GET /readyz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
_ANY = _READY.replace(b"/readyz", b"/")
_ENVIRONMENT = os.environ | {"PERDURE_LOG_REQUESTS": "false"}


class Server:
    """A process that listens; a context manager that ends it, and says why it did not come up."""

    def __init__(self, command: Sequence[str], port: int, log: Path) -> None:
        self.port = port
        self._log = log
        self.started_s = time.perf_counter()
        with log.open("wb") as out:
            self._process = subprocess.Popen(
                command, cwd=ROOT, env=_ENVIRONMENT, stdout=out, stderr=out, start_new_session=True
            )

    def wait_ready(self) -> float:
        """Seconds from the start of the process until `/readyz` is answered 200."""
        return self._wait(_READY)

    def wait_listening(self) -> float:
        """The same for a server that says nothing of readiness: until it answers anything 200."""
        return self._wait(_ANY)

    def _wait(self, asked: bytes) -> float:
        while time.perf_counter() - self.started_s < READY_S:
            if self._answers(asked):
                return time.perf_counter() - self.started_s
            if self._process.poll() is not None:
                break
            time.sleep(_ASK_EVERY_S)
        raise RuntimeError(f"the server did not become ready:\n{self._log.read_text()[-4000:]}")

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        """One request, which must succeed; its answer's JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=READY_S)
        try:
            sent = None if body is None else msgspec.json.encode(body)
            connection.request(method, path, sent, {"content-type": "application/json"})
            response = connection.getresponse()
            told = response.read()
        finally:
            connection.close()
        if response.status != 200:
            raise RuntimeError(f"{method} {path} was answered {response.status}: {told[:500]!r}")
        return msgspec.json.decode(told)

    def resident_bytes(self) -> int:
        """Memory the process holds now."""
        return self._memory_bytes("VmRSS")

    def most_resident_bytes(self) -> int:
        """The most memory the process has held since it started."""
        return self._memory_bytes("VmHWM")

    def _memory_bytes(self, name: str) -> int:
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith(name))
        return int(line.split()[1]) * 1024

    def kill(self) -> None:
        """SIGKILL, to it and what it runs under."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGTERM)
            try:
                self._process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                self.kill()

    def _answers(self, asked: bytes) -> bool:
        """Whether it is answered 200; a refused connection is not an answer yet."""
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=5) as connection:
                connection.sendall(asked)
                return connection.recv(16).split(b" ")[1:2] == [b"200"]
        except OSError:
            return False


def perdure(port: int, data: Path, *flags: str) -> list[str]:
    """The command of `perdure serve` on its own data."""
    command = [sys.executable, "-m", "perdure.frontends.cli.main", "serve"]
    return [*command, "--port", str(port), "--data", str(data), *flags]


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
