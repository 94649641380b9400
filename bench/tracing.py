"""What a trace of system calls says: how many fsyncs an acknowledgement costs, whether any came
before its fsync returned, and how things go when each fsync takes 4 ms.

The slow regime delays every fsync as it is entered, a stand-in for an ordinary cloud disk. All of
it needs strace.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

DELAY_US = 4_000
_SYNCS = "fsync,fdatasync"
_QUIET = ["strace", "-f", "--seccomp-bpf", "-qq"]

SLOWLY = [
    *_QUIET,
    *("-o", "/dev/null", "-e", f"trace={_SYNCS}"),
    *("-e", f"inject={_SYNCS}:delay_enter={DELAY_US}"),
]
"""Put before a command to run it in the slow regime."""


def available() -> bool:
    """Whether strace is here."""
    return shutil.which("strace") is not None


def counting(trace: Path) -> list[str]:
    """Put before a command to have its fsyncs written to `trace`."""
    return [*_QUIET, "-ttt", "-o", str(trace), "-e", f"trace={_SYNCS}"]


def ordering(trace: Path) -> list[str]:
    """Put before a command to have its writes, with what they say, and its fsyncs written down."""
    calls = f"{_SYNCS},write,pwrite64"
    return [*_QUIET, "-ttt", "-s", "4200", "-o", str(trace), "-e", f"trace={calls}"]


def syncs_between(trace: Path, began_s: float, ended_s: float) -> int:
    """How many fsyncs were called in a span of wall time."""
    return sum(
        call.name != "write" and not call.resumed and began_s <= call.at_s <= ended_s
        for call in _calls(trace)
    )


class Order(NamedTuple):
    """`acknowledged` puts were seen; `early` are those told before a sync that followed the write
    of their key had returned."""

    acknowledged: int
    early: list[str]


def order_of(trace: Path) -> Order:
    """Follow each key through a trace: written, a sync begun after that and returned, told."""
    written: set[str] = set()
    durable: set[str] = set()
    under_way: dict[str, set[str]] = {}
    acknowledged, early = 0, []
    for call in _calls(trace):
        if call.name != "write":
            if not call.resumed:
                under_way[call.thread] = set(written)
            if not call.unfinished:
                covered = under_way.pop(call.thread)
                durable |= covered
                written -= covered
        elif told := _TOLD.search(call.text):
            acknowledged += 1
            if told[1] not in durable:
                early.append(told[1])
        elif not call.unfinished or call.resumed:
            written |= {key for key in _KEY.findall(call.text) if key not in durable}
    return Order(acknowledged, early)


class _Call(NamedTuple):
    thread: str
    at_s: float
    name: str
    text: str
    unfinished: bool
    resumed: bool


_KEY = re.compile(r"k\d{6}-\d{6};")
_TOLD = re.compile(r"acknowledged (k\d{6}-\d{6};)")
_LINE = re.compile(r"(\d+) +(\d+\.\d+) (<\.\.\. )?(fsync|fdatasync|p?write)(?:64)?")


def _calls(trace: Path) -> Iterator[_Call]:
    """The calls of a trace. A write that another thread interrupts is one line when it begins,
    where its bytes stand, and one when it returns; only then has it happened."""
    begun: dict[str, str] = {}
    with trace.open(errors="replace") as lines:
        for line in lines:
            found = _LINE.match(line)
            if found is None:
                continue
            thread, at, resumed, name = found.groups()
            unfinished = "<unfinished ...>" in line[-20:]
            kind = "write" if name.endswith("write") else name
            if unfinished:
                begun[thread] = line
            text = begun.pop(thread, "") if resumed else line
            yield _Call(thread, float(at), kind, text, unfinished, bool(resumed))
