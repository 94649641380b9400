"""The oracle: what was asked of the server, what it acknowledged, and what is judged by that.

It lives in the process of the client, which nobody kills, and keeps its history in a directory of
its own. An operation is written down before it is sent and again when its answer is complete; an
answer that was cut off acknowledges nothing. What the server says about itself is not believed.
"""

from __future__ import annotations

import enum
import re
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import msgspec

Outcome = Literal["unknown", "acknowledged", "refused"]

_MARK = re.compile(r"\bm(\d+)\b")


class Check(enum.Enum):
    """What is judged after every death, in this order."""

    OPENS = "opens again, in time, and is not ready before it works"
    KEPT = "what was acknowledged is there, byte for byte"
    WHOLE = "what was not acknowledged is wholly there or wholly absent"
    INTENDED = "nothing is there that was never asked for, or there twice"
    ATOMIC = "what belongs to one commit is there together"
    DENSE = "numbers have no holes, and what clients saw is a prefix of what is stored"
    VERSIONS = "versions never fall, and one version has one value"
    RESUMES = "a stream resumes after any event, each exactly once"
    REPEATS = "a second restart changes nothing but the boot record"
    GOES_ON = "a new write works, and the same request has one effect and one answer"
    CLEAN = "nothing is left over: no lock, no work without an owner, no file"
    REPORTED = "the boot record says how the last one ended and what was recovered"
    SOUND = "verify finds nothing"
    LIVE = "every answer comes in time and none is an internal error"


class Violation(msgspec.Struct, frozen=True):
    """One thing that should have held."""

    check: Check
    surface: str
    what: str

    def __str__(self) -> str:
        return f"{self.surface}: {self.what} (so it does not hold that {self.check.value})"


class Verdict:
    """How often each check was made for each surface, and every violation."""

    def __init__(self) -> None:
        self.judged: Counter[tuple[Check, str]] = Counter()
        self.violations: list[Violation] = []

    def holds(self, check: Check, surface: str, condition: bool, what: str) -> bool:
        """Judge one thing; `what` is said if it does not hold."""
        self.judged[(check, surface)] += 1
        if not condition:
            self.violations.append(Violation(check, surface, what))
        return condition

    def none(self, check: Check, surface: str, troubles: list[str]) -> None:
        """Judge a list of troubles, which should be empty."""
        self.judged[(check, surface)] += 1
        self.violations += [Violation(check, surface, trouble) for trouble in troubles]

    def of(self, surface: str) -> int:
        """How often anything was judged for a surface."""
        return sum(count for (_, judged), count in self.judged.items() if judged == surface)


class Op(msgspec.Struct, kw_only=True):
    """One operation. `outcome` says what the client may rely on: `refused` had no effect."""

    number: int
    cycle: int
    surface: str
    verb: str
    detail: dict[str, Any]
    outcome: Outcome = "unknown"
    status: int = 0

    @property
    def mark(self) -> str:
        """A word that stands in everything the operation wrote, and nowhere else."""
        return f"m{self.number}"


class History:
    """Every operation of a campaign, also as lines in a file, for whoever looks into a failure."""

    def __init__(self, path: Path) -> None:
        self.ops: list[Op] = []
        self.cycle = 0
        self.stopping = False
        """Whether the server was asked to stop, so that it may refuse work."""
        self.failing = False
        """Whether its disk fails, so that it may refuse to write."""
        self.fenced = False
        """Whether one was taken for dead that was not: the bytes of what it could not commit any
        more are left to the next sweep."""
        self.harmed: tuple[str, ...] = ()
        """What is damaged in its store, by the names it must use when it says so."""
        self.complaints: list[str] = []
        """Internal errors and hangs that clients met; each is a violation."""
        self._file = path.open("ab", buffering=0)

    def intend(self, surface: str, verb: str, **detail: Any) -> Op:
        """Write down what is about to be sent."""
        op = Op(
            number=len(self.ops) + 1,
            cycle=self.cycle,
            surface=surface,
            verb=verb,
            detail=detail,
        )
        self.ops.append(op)
        self._write(op)
        return op

    def settle(self, op: Op, outcome: Outcome, status: int = 0) -> None:
        """Write down what became of it."""
        op.outcome, op.status = outcome, status
        self._write(op)

    def mark(self, event: str, **detail: Any) -> None:
        """Write down what happened to the server."""
        self._file.write(
            msgspec.json.encode({"event": event, "cycle": self.cycle} | detail) + b"\n"
        )

    def named_in(self, text: str) -> list[Op]:
        """The operations whose marks stand in a text, each once, in order of appearance."""
        numbers = dict.fromkeys(int(found) for found in _MARK.findall(text))
        return [self.ops[number - 1] for number in numbers if 0 < number <= len(self.ops)]

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, op: Op) -> None:
        self._file.write(msgspec.json.encode(op) + b"\n")
