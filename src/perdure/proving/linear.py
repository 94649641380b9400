"""Whether what several clients were told of one record could have come from one record, changed
by one operation at a time, each at some moment between its call and its answer.

It is the search of Wing and Gong with the memory of Lowe: try every operation that may have been
next, and never look twice at the same operations done and the same record. An operation without
an answer took effect at any moment after its call, or never.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

OPERATIONS_MAX = 200
"""The search may take time exponential in what goes on at once; more than this is refused."""


class Register(msgspec.Struct, frozen=True):
    """A record: how often it was written, and what was written last."""

    version: int = 0
    value: str | None = None


class Operation(msgspec.Struct, frozen=True, kw_only=True):
    """What one client asked and was told; `called` and `returned` are moments on one clock.

    A read is told `found`. A write of `value` expects a version, or any (None); it is told the
    version it made or, refused, the version that was there. `unknown` is a write without answer.
    """

    told: Literal["found", "written", "refused", "unknown"]
    found: Register = Register()
    value: str | None = None
    expect: int | None = None
    version: int = 0
    called: int = 0
    returned: int | None = None

    def after(self, register: Register) -> Register | None:
        """The record after this operation; None if it cannot have been told so of that record."""
        if self.told == "found":
            return register if self.found == register else None
        fits = self.expect in (None, register.version)
        if self.told == "refused":
            return register if not fits and self.version == register.version else None
        if not fits or (self.told == "written" and self.version != register.version + 1):
            return None
        return Register(register.version + 1, self.value)


def linearizable(history: Sequence[Operation]) -> bool:
    """See the head of this file. Raises `ValueError` for more than `OPERATIONS_MAX`."""
    if len(history) > OPERATIONS_MAX:
        raise ValueError(f"{len(history)} operations are more than {OPERATIONS_MAX}")
    ordered = sorted(history, key=lambda one: one.called)
    needed = sum(1 << at for at, one in enumerate(ordered) if one.returned is not None)
    seen = {(0, Register())}
    left = [(0, Register())]
    while left:
        done, register = left.pop()
        if done & needed == needed:
            return True
        for at in _next(ordered, done):
            after = ordered[at].after(register)
            if after is not None and (state := (done | 1 << at, after)) not in seen:
                seen.add(state)
                left.append(state)
    return False


def _next(ordered: Sequence[Operation], done: int) -> list[int]:
    """Which may come next: those called before any that is left was answered."""
    left = [at for at in range(len(ordered)) if not done >> at & 1]
    ends = (ordered[at].returned for at in left)
    first = min((end for end in ends if end is not None), default=None)
    return [at for at in left if first is None or ordered[at].called < first]
