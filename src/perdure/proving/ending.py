"""How proofs end when they are told to: as by Ctrl-C, whoever tells them. They hold mounts, servers
and directories that are to be given back."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def told_as_interrupted() -> Iterator[None]:
    """Take SIGTERM and SIGHUP for SIGINT, which unwinds everything."""
    before = {
        number: signal.signal(number, lambda *_: signal.raise_signal(signal.SIGINT))
        for number in (signal.SIGTERM, signal.SIGHUP)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
