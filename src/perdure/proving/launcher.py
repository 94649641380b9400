"""The launcher: starts the server that `perdure serve` starts, with faults around it.

A process that has imported everything forks one server after another, so that a start costs a
fork and not an interpreter. Each plan is a line on standard input; the pid, and later how the
process ended, are lines on standard output. The servers die with the launcher, and the launcher
with whoever started it.

Product code holds no fault triggers. What is wrapped here is the engine (every durable edge above
it is a commit), the public application (every event that a client sees is a `send`), and for
power cuts and failing disks the disk.
"""

from __future__ import annotations

import asyncio
import os
import select
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import msgspec
import uvloop
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from perdure.core.disk import Disk
from perdure.core.engine import Engine
from perdure.core.errors import PerdureError
from perdure.engines.failing import Action, Edge, Failing, Fault
from perdure.frontends.http.server import serve
from perdure.proving.edges import Witness
from perdure.proving.jumping import JumpingClock, Jumps
from perdure.proving.planted import PLANTS, Plant
from perdure.proving.powercut import Platter
from perdure.proving.refusing import Refusing, Trouble
from perdure.services.config import load
from perdure.services.continuing import Continues

_LEAVES_S = 0.002
"""What is sent leaves when the loop turns."""

GAVE_UP = 5
"""The exit code of a server that could not go on, and said why in our words."""

At = Literal["before", "after", "sending", "sent", "moment"]


class Death(msgspec.Struct, frozen=True):
    """Where a server dies: before or after commit number `n`, while sending or having sent part
    number `n` of any stream, or `n` milliseconds after its start. All count from the start, so
    that small numbers lie within recovery."""

    at: At
    n: int

    def __str__(self) -> str:
        unit = {"before": "commit", "after": "commit", "moment": "millisecond"}.get(
            self.at, "stream part"
        )
        return f"{self.at} {unit} {self.n}" if self.at != "moment" else f"{self.n} ms after start"


class Power(msgspec.Struct, frozen=True):
    """The death is a power cut: what survives of the data is written to `into`."""

    into: str
    seed: str


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """One start of a server, and how it is to end; without `death` it runs until it is killed. It
    uses the `engine`, which it may share with others, SQLite in its data directory if none. Its
    disk may be in `trouble`, and then no power is cut; its `clock` may jump. Which durable edges it
    comes by is told in the file `edges`."""

    data: str
    port: int
    upstream: str
    engine: str | None = None
    continues: Continues = "no"
    death: Death | None = None
    power: Power | None = None
    trouble: Trouble | None = None
    clock: Jumps = Jumps()
    plant: str | None = None
    edges: str | None = None


class Parts:
    """Counts the parts of streams as they are sent, and dies around one of them."""

    def __init__(self, app: ASGIApp, death: Death, die: Callable[[], None]) -> None:
        self._app = app
        self._death = death
        self._die = die
        self._parts = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counted(message: Message) -> None:
            reached = False
            if message.get("more_body") and message["body"]:
                self._parts += 1
                reached = self._parts == self._death.n
            if reached and self._death.at == "sending":
                self._die()
            await send(message)
            if reached and self._death.at == "sent":
                await asyncio.sleep(_LEAVES_S)
                self._die()

        await self._app(scope, receive, counted)


def run(plan: Plan) -> None:
    """Be the server of a plan, until it is stopped or dies."""
    flags = {
        "data": plan.data,
        "engine": plan.engine,
        "profile": None if plan.engine is None else "shared",
        "port": plan.port,
        "upstream.url": plan.upstream,
        "upstream.continues": plan.continues,
        "log_requests": False,
    }
    config = load(environment={}, flags=flags)
    plant = PLANTS[plan.plant] if plan.plant else Plant("")
    disk, die = _disk(plan)
    plant.patch()
    if plan.edges is not None:
        Witness(Path(plan.edges)).begin()

    def wrap(engine: Engine) -> Engine:
        return plant.engine(Failing(engine, _faults(plan.death, die)))

    def around(app: ASGIApp) -> ASGIApp:
        planted = plant.app(app)
        if plan.death is not None and plan.death.at in ("sending", "sent"):
            return Parts(planted, plan.death, die)
        return planted

    async def main() -> None:
        if plan.death is not None and plan.death.at == "moment":
            asyncio.get_running_loop().call_later(plan.death.n / 1000, die)
        clock = JumpingClock(plan.clock)
        await serve(config, environment={}, wrap=wrap, around=around, disk=disk, clock=clock)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


def _disk(plan: Plan) -> tuple[Disk, Callable[[], None]]:
    """The disk to serve from, and the way to die."""
    if plan.trouble is not None:
        refusing = Refusing(plan.trouble)
        refusing.mount()
        return refusing.disk, _kill
    if plan.power is None:
        return Disk(), _kill
    power = plan.power
    platter = Platter(Path(plan.data))
    platter.mount()

    def cut() -> None:
        platter.cut(Path(power.into), power.seed)
        _kill()

    return platter.disk, cut


def _kill() -> None:
    """As the operating system kills: nothing is flushed, nobody is told."""
    os.kill(os.getpid(), signal.SIGKILL)


def _faults(death: Death | None, die: Callable[[], None]) -> list[Fault]:
    if death is None or death.at not in ("before", "after"):
        return []
    return [Fault(Edge(death.at), _action(die), death.n)]


def _action(die: Callable[[], None]) -> Action:
    async def act() -> None:
        die()

    return act


def main() -> None:
    """Start a server for every plan read from standard input; see the head of this file."""
    told = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    woken, wake = os.pipe()
    for end in (woken, wake):
        os.set_blocking(end, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    decode = msgspec.json.Decoder(Plan).decode
    lines = os.fdopen(sys.stdin.fileno(), "rb", buffering=0)
    while line := lines.readline():
        pid = os.fork()
        if pid == 0:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os._exit(_serve(decode(line)))
        os.write(told, b"%d\n" % pid)
        ended = False
        while not ended:
            ready, _, _ = select.select([lines.fileno(), woken], [], [])
            if lines.fileno() in ready:
                os.kill(pid, signal.SIGKILL)
                return
            os.read(woken, 4096)
            ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        _, status = os.waitpid(pid, 0)
        os.write(told, b"%d\n" % os.waitstatus_to_exitcode(status))


def _serve(plan: Plan) -> int:
    """The exit code of a server; what is no error of ours ends it as it ends Python."""
    try:
        run(plan)
    except PerdureError as error:
        print(f"perdure: {error}", file=sys.stderr, flush=True)
        return GAVE_UP
    return 0


if __name__ == "__main__":
    main()
