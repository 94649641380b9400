"""Whether what several clients were told of one thing could have come from one thing, changed by
one operation at a time, each at some moment between its call and its answer.

It is the search of Wing and Gong with the memory of Lowe: try every operation that may have been
next, and never look twice at the same operations done and the same state. An operation without
an answer took effect at any moment after its call, or never.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol, TypeVar

import msgspec

S = TypeVar("S")

OPERATIONS_MAX = 200
"""The search may take time exponential in what goes on at once; more than this is refused."""


class Asked(Protocol[S]):
    """What a client asked of the thing and was told, at moments of one clock; without an answer
    `returned` is None."""

    @property
    def called(self) -> int: ...

    @property
    def returned(self) -> int | None: ...

    def after(self, state: S, /) -> S | None:
        """The state after it; None if it cannot have been told so in that state."""
        ...


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


def linearizable(history: Sequence[Asked[S]], first: S) -> bool:
    """See the head of this file; states are hashable, and `first` is the one before all of it.
    Raises `ValueError` for more than `OPERATIONS_MAX`."""
    if len(history) > OPERATIONS_MAX:
        raise ValueError(f"{len(history)} operations are more than {OPERATIONS_MAX}")
    ordered = sorted(history, key=lambda one: one.called)
    needed = sum(1 << at for at, one in enumerate(ordered) if one.returned is not None)
    seen = {(0, first)}
    left = [(0, first)]
    while left:
        done, now = left.pop()
        if done & needed == needed:
            return True
        for at in reversed(_next(ordered, done)):  # what was called first is tried first
            after = ordered[at].after(now)
            if after is not None and (state := (done | 1 << at, after)) not in seen:
                seen.add(state)
                left.append(state)
    return False


def _next(ordered: Sequence[Asked[S]], done: int) -> list[int]:
    """Which may come next: those called before any that is left was answered."""
    window: list[int] = []
    first: int | None = None
    for at in range((~done & done + 1).bit_length() - 1, len(ordered)):
        if done >> at & 1:
            continue
        one = ordered[at]
        if first is not None and one.called >= first:
            break
        window.append(at)
        if one.returned is not None:
            first = one.returned if first is None else min(first, one.returned)
    return [at for at in window if first is None or ordered[at].called < first]
