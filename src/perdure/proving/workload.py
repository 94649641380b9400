"""The workload: for every surface an actor that uses it, and that judges it after a death.

Promises are the input. A surface that promises to survive something and has no actor fails by
name, so a new surface adds one actor and nothing is rewritten.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Protocol, TypeVar

import msgspec

from perdure.core.engine import Survives
from perdure.core.promises import Promise
from perdure.proving.client import Client
from perdure.proving.oracle import History, Op, Verdict
from perdure.proving.snapshot import Snapshot

T = TypeVar("T")

OLDER = 6
"""How many things of earlier cycles an actor looks at again after each death."""


class Start(msgspec.Struct, frozen=True):
    """What the runner itself knows: the process that was started, and the pids of those before it
    that were asked to stop and did. Those `given_up` ended by themselves, as their disk failed or
    others took them for dead, and may have closed their store or not. Those `beside` serve the same
    store at the same time, and do some of the work of a start."""

    pid: int
    stopped: frozenset[int]
    given_up: frozenset[int] = frozenset()
    beside: frozenset[int] = frozenset()


class Scene:
    """A server that is ready again. `before` is the store as it lay dead; `client` speaks to the
    server; what is found goes to `verdict`."""

    def __init__(
        self, client: Client, before: Snapshot, start: Start, history: History, verdict: Verdict
    ) -> None:
        self.client = client
        self.before = before
        self.start = start
        self.history = history
        self.verdict = verdict

    def chosen(self, things: Sequence[tuple[Op, T]]) -> Iterator[T]:
        """Everything of this cycle, and some of the earlier ones."""
        fresh = [thing for op, thing in things if op.cycle == self.history.cycle]
        older = [thing for op, thing in things if op.cycle != self.history.cycle]
        yield from fresh
        yield from self.rng.sample(older, min(OLDER, len(older)))

    @property
    def rng(self) -> random.Random:
        return self.client.rng


class Actor(Protocol):
    """Uses one surface and judges it. One object serves a whole campaign and keeps in mind what
    it was told; what it chooses in `act` depends on the client's worker and random source only."""

    surface: str

    async def act(self, client: Client) -> None:
        """One step of work, several requests at most. Raises `Gone` when the server dies."""
        ...

    async def judge(self, scene: Scene) -> None:
        """Ask the server that came back for what was acknowledged before."""
        ...

    def audit(self, store: Snapshot, history: History, verdict: Verdict, *, settled: bool) -> None:
        """Look through everything of this surface in a dead store. `settled`: recovery was done
        and nothing has been asked for since."""
        ...


def cover(promises: Sequence[Promise], actors: Sequence[Actor]) -> list[Actor]:
    """The actors that these promises need. Raises `Uncovered` naming surfaces without one."""
    known = {actor.surface: actor for actor in actors}
    wanted = [promise.surface for promise in promises if promise.survives != Survives()]
    if missing := [surface for surface in wanted if surface not in known]:
        raise Uncovered(
            f"{', '.join(missing)} promises to survive something, and no actor in "
            "perdure.proving.actors uses and judges it: write one."
        )
    return [known[surface] for surface in wanted]


class Uncovered(AssertionError):
    """A promise that nobody proves."""
