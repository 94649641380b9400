"""A process that stops at each of its system calls, and is killed at one of them: by ptrace, so
that all threads share one count and nothing is left out.

The child says where counting begins and ends by `marker`, a signal that only the tracer sees. Linux
only. The tracer must have one thread and no other children.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable

import msgspec

_TRACEME, _SYSCALL, _SETOPTIONS = 0, 24, 0x4200
_OPTIONS = 0x1 | 0x8 | 0x100000
"""Calls are told from signals, threads are traced too, and no child outlives its tracer."""

_ALL_THREADS = 0x40000000
_AT_CALL = signal.SIGTRAP | 0x80

_TRIES = "import ctypes, sys; sys.exit(ctypes.CDLL(None).ptrace(0, 0, 0, 0) != 0)"


class Stepped(msgspec.Struct, frozen=True):
    """How many calls were counted, how the process ended, and what it wrote."""

    calls: int
    killed: bool
    status: int
    said: str


def lacks() -> str | None:
    """Why nothing can be traced here; None where it can."""
    if sys.platform != "linux":
        return "system calls are counted by ptrace, which is Linux's."
    tried = subprocess.run((sys.executable, "-S", "-c", _TRIES), capture_output=True, check=False)
    return None if tried.returncode == 0 else "ptrace is not allowed here."


def marker() -> None:
    """Called by the child: counting begins here, or ends."""
    os.kill(os.getpid(), signal.SIGUSR1)


def stepped(work: Callable[[int], None], n: int) -> Stepped:
    """Fork, let the child do its work, and kill it at its `n`th call (0: never). What it writes to
    the descriptor that it is given is kept."""
    ptrace = ctypes.CDLL(None, use_errno=True).ptrace
    heard, told = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(heard)
        ptrace(_TRACEME, 0, 0, 0)
        os.kill(os.getpid(), signal.SIGSTOP)
        status = 1
        try:
            work(told)
            status = 0
        except BaseException:
            traceback.print_exc()
            raise
        finally:
            os._exit(status)
    os.close(told)
    os.waitpid(pid, 0)
    ptrace(_SETOPTIONS, pid, 0, _OPTIONS)
    ptrace(_SYSCALL, pid, 0, 0)
    calls, status = _follow(ptrace, pid, n)
    with os.fdopen(heard) as file:
        return Stepped(calls, os.WIFSIGNALED(status), status, file.read())


def _follow(ptrace: Callable[..., int], pid: int, n: int) -> tuple[int, int]:
    """Let every thread go on from stop to stop until all have ended."""
    calls, ended, counting = 0, 0, False
    within: set[int] = set()
    while True:
        try:
            thread, status = os.waitpid(-1, _ALL_THREADS)
        except ChildProcessError:
            return calls, ended
        if not os.WIFSTOPPED(status):
            within.discard(thread)
            ended = status if thread == pid else ended
            continue
        stopped_by, deliver = os.WSTOPSIG(status), 0
        if stopped_by == _AT_CALL and thread in within:
            within.discard(thread)
        elif stopped_by == _AT_CALL:
            within.add(thread)
            calls += counting
            if counting and calls == n:
                os.kill(pid, signal.SIGKILL)  # before the call does anything
        elif stopped_by == signal.SIGUSR1:
            counting = not counting
        elif stopped_by not in (signal.SIGTRAP, signal.SIGSTOP):  # a thread that begins
            deliver = stopped_by
        ptrace(_SYSCALL, thread, 0, deliver)
