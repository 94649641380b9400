"""A real server that speaks S3, for proofs of blobs in an object store: started, killed and started
again on one port, with its objects as files, so that a byte can be flipped in one.

It comes from the package nanio, holds requests to their signatures, and ends with this process.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from perdure.proving.ports import kept_port
from perdure.proving.waiting import TooLate

BUCKET = "blobs"
REGION = "here"

_KEY, _SECRET = "perdure", "of-no-one-in-particular"
KEYS = {"AWS_ACCESS_KEY_ID": _KEY, "AWS_SECRET_ACCESS_KEY": _SECRET}
"""What a client of it has in its environment."""

_STARTS_WITHIN_S = 60.0
_PAUSE_S = 0.02
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


class Server:
    """One server with its objects under `directory`."""

    def __init__(self, directory: Path, port: int) -> None:
        self.directory = directory
        self.port = port
        self._process: subprocess.Popen[bytes] | None = None

    def url(self, prefix: str = "", port: int | None = None, **options: str) -> str:
        """Where blobs are kept in its bucket; through a proxy where its `port` is given."""
        more = "".join(f"&{name}={option}" for name, option in options.items())
        endpoint = f"http://127.0.0.1:{port or self.port}"
        return f"s3://{BUCKET}/{prefix}?endpoint={endpoint}&region={REGION}{more}"

    def path(self, object: str) -> Path:
        """The file that holds an object."""
        return self.directory / BUCKET / object

    def start(self) -> None:
        """Start it and wait until it listens."""
        (self.directory / BUCKET).mkdir(parents=True, exist_ok=True)
        ours = {"NANIO_ACCESS_KEY": _KEY, "NANIO_SECRET_KEY": _SECRET, "NANIO_REGION": REGION}
        with (self.directory / "log").open("ab") as log:
            self._process = subprocess.Popen(
                (
                    *(sys.executable, "-m", "nanio", "serve", "--host", "127.0.0.1"),
                    *("--port", f"{self.port}", "--data-dir", str(self.directory)),
                    "--no-access-log",
                ),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=os.environ | ours,
                preexec_fn=_die_with_parent,
            )
        deadline_s = time.monotonic() + _STARTS_WITHIN_S
        while not self._listens():
            if self._process.poll() is not None or time.monotonic() > deadline_s:
                raise TooLate(f"the S3 server does not start: {self._said()}")
            time.sleep(_PAUSE_S)

    def kill(self) -> None:
        """End it with nothing finished."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def _said(self) -> str:
        return (self.directory / "log").read_text(errors="replace")[-2_000:]

    def _listens(self) -> bool:
        with socket.socket() as asking:
            return asking.connect_ex(("127.0.0.1", self.port)) == 0


@contextmanager
def serving_s3(directory: Path) -> Iterator[Server]:
    """A running server, killed at the end."""
    with ExitStack() as held:
        server = Server(directory, held.enter_context(kept_port()))
        held.callback(server.kill)
        server.start()
        yield server


def _die_with_parent() -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
