"""A campaign: lives and deaths of one server over one data directory, each judged from outside.

A life: the server starts, workers use every surface, and it dies: at a counted edge, at a moment,
by a kill or a power cut, or stopped in good order. Its store is read as it lies dead. Then it
starts again, perhaps dying again while it recovers, until it is ready, and is judged by what was
acknowledged before. The state of all earlier lives stays and is judged again.
"""

from __future__ import annotations

import asyncio
import random
import shutil
import signal
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path

import msgspec

from perdure.core.disk import FULL
from perdure.core.errors import PerdureError
from perdure.core.promises import Promise
from perdure.proving.client import Client, Gone, Refused
from perdure.proving.judging import RUNNER, Judging
from perdure.proving.jumping import Jumps
from perdure.proving.launcher import GAVE_UP, Death, Plan, Power
from perdure.proving.oracle import Check
from perdure.proving.ports import kept_port
from perdure.proving.refusing import Trouble
from perdure.proving.snapshot import Snapshot
from perdure.proving.upstream import ScriptedUpstream
from perdure.proving.victim import Nursery, Victim
from perdure.proving.waiting import TooLate, wait_until
from perdure.proving.workload import Actor, Start
from perdure.services.continuing import Continues
from perdure.surfaces.state import PROMISES

_RESUMES_S = 15.0
"""How long writes may be refused when there is space again."""

_LINGER_S = 10.0
"""How long a server may outlive its connections before that is a violation."""


class Life(msgspec.Struct, frozen=True, kw_only=True):
    """How one life goes. Each of `workers` takes `steps`, chosen by the seed from the actors of
    `surfaces` (empty: all), or, with `choices`, the same ones in every life, in that order.

    Without `death` the runner kills the process `kill_after_s` into the work or, where that is
    None, at its end; with `stop` it asks instead. `power` makes planned deaths power cuts.
    `rebirths` are deaths of the starts that follow; `again` restarts a second time. `continues`:
    its servers are told that the upstream can go on with a message. `trouble`: the disk of its
    first server fails as that says, and what it then must do is judged before it is killed.
    `clock`: how the clock of the first server jumps."""

    workers: int = 3
    steps: int = 8
    surfaces: tuple[str, ...] = ()
    choices: str = ""
    death: Death | None = None
    power: bool = False
    kill_after_s: float | None = None
    stop: bool = False
    rebirths: tuple[Death, ...] = ()
    again: bool = False
    continues: bool = False
    trouble: Trouble | None = None
    clock: Jumps = Jumps()

    def __str__(self) -> str:
        if self.trouble is not None:
            how = f"with a disk in trouble ({self.trouble})"
        elif self.death is not None:
            how = f"{'power cut' if self.power else 'killed'} {self.death}"
        elif self.stop:
            how = "stopped"
        elif self.kill_after_s is not None:
            how = f"killed {self.kill_after_s * 1000:.0f} ms into the work"
        else:
            how = "killed at rest"
        born = "".join(f", then {death}" for death in self.rebirths)
        goes_on = ", messages going on" if self.continues else ""
        if self.clock != Jumps():
            how += f", its clock {self.clock}"
        return how + born + (", restarted twice" if self.again else "") + goes_on


class Stage:
    """The processes that campaigns share: the scripted upstream, the launcher, and a port."""

    def __init__(self, home: Path) -> None:
        self.upstream = ScriptedUpstream()
        self.nursery = Nursery(home / "server.log")
        self.port = 0
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Stage:
        await self._stack.enter_async_context(self.upstream)
        await self._stack.enter_async_context(self.nursery)
        self.port = self._stack.enter_context(kept_port())
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._stack.aclose()


class Campaign(Judging):
    """Runs lives of one server. `edges` is where the servers tell which durable edges they come
    by."""

    def __init__(
        self,
        stage: Stage,
        home: Path,
        *,
        seed: str = "1",
        plant: str | None = None,
        promises: Sequence[Promise] = PROMISES,
        more: Sequence[Actor] = (),
        edges: Path | None = None,
    ) -> None:
        super().__init__(home, seed=seed, promises=promises, more=more)
        self.reached = False
        """Whether the planned death of the last life happened, or its disk failed."""
        self._plant = plant
        self._edges = edges
        self._stage = stage
        self._starts = 0
        self._continues: Continues = "no"

    async def live(self, life: Life) -> bool:
        """One life, death and judgement; whether everything has held so far."""
        self.history.cycle += 1
        self.history.stopping = False
        # A slow disk is no reason to refuse anything.
        self.history.failing = life.trouble is not None and not life.trouble.delay_s
        self._continues = "continue_final_message" if life.continues else "no"
        self.history.mark("life", how=str(life))
        try:
            await self._live(life)
        except TooLate as late:
            self.verdict.holds(Check.LIVE, RUNNER, False, str(late))
        except PerdureError as error:
            self.verdict.holds(Check.OPENS, RUNNER, False, f"the dead store: {error}")
        self.verdict.none(Check.LIVE, RUNNER, self.history.complaints)
        self.history.complaints = []
        return not self.verdict.violations

    async def _live(self, life: Life) -> None:
        await self.work(life)
        self.history.failing = False
        for death in life.rebirths:
            victim = await self._start(death, power=life.power)
            await victim.ready()
            await self._die(victim)
        before = await self._snapshot(settled=False)
        await self._rise_and_judge(before)
        after = await self._snapshot(settled=True)
        if life.again:
            victim = await self._start()
            await victim.ready()
            await self._die(victim)
            again = await self._snapshot(settled=True)
            self.verdict.none(Check.REPEATS, RUNNER, list(again.differs(after)))

    async def work(self, life: Life) -> None:
        """Start, use, and end the server as the life says; nobody looks at what it left."""
        told = self.home / "trouble-met"
        told.unlink(missing_ok=True)
        trouble = life.trouble and msgspec.structs.replace(life.trouble, told=str(told))
        victim = await self._start(life.death, power=life.power, trouble=trouble, clock=life.clock)
        if await victim.ready(started=trouble is not None) is None:
            self.reached = True
            await self._die(victim)
            return
        workers = [
            asyncio.create_task(self._labour(victim, life, number))
            for number in range(life.workers)
        ]
        if life.kill_after_s is not None:
            await asyncio.wait(workers, timeout=life.kill_after_s)
            self.history.stopping = life.stop
            victim.signal(signal.SIGTERM if life.stop else signal.SIGKILL)
        await asyncio.gather(*workers)
        if life.death is not None and life.death.at == "moment":
            await victim.death()
        self.reached = (victim.dead and life.death is not None) or told.exists()
        if trouble is not None and told.exists():
            await self._judge_troubled(victim, trouble)
        await self._die(victim, stop=life.stop)

    async def _labour(self, victim: Victim, life: Life, number: int) -> None:
        """One worker: steps chosen by the seed, until the work is done or the server is gone."""
        cycle = self.history.cycle
        choices = life.choices or f"{self.seed}/{cycle}"
        worker = number if not life.choices else 1000 * cycle + number
        rng = random.Random(f"{choices}/{number}")
        used = [actor for actor in self.actors if actor.surface in (life.surfaces or self.surfaces)]
        client = Client(victim.url, self.history, worker, rng)
        try:
            for step in range(life.steps):
                actor = used[step % len(used)] if life.choices else rng.choice(used)
                await actor.act(client)
        except Refused:
            return
        except Gone as gone:
            try:
                await victim.death(_LINGER_S)
            except TooLate:
                self.verdict.holds(Check.LIVE, RUNNER, False, f"it lives, but {gone}")
        finally:
            await client.close()

    async def _judge_troubled(self, victim: Victim, trouble: Trouble) -> None:
        """A server whose disk failed lives and reads. It writes, or refuses by name; a store that
        is latched is not ready, and one that only lacked space is written again."""
        holds = self.verdict.holds
        client = Client(victim.url, self.history, -2, random.Random(self.history.cycle))

        async def writes() -> bool:
            return await self._refused(client) is None

        try:
            alive = await client.status("/livez")
            holds(Check.LIVE, RUNNER, alive == 200, f"its disk failed, and /livez says {alive}")
            if self._written is not None:
                read = await client.status(f"/v1/conversations/{self._written}")
                holds(Check.KEPT, RUNNER, read == 200, f"its disk failed, and reading got {read}")
            refused = await self._refused(client)
            if refused == "latched":
                ready = await client.status("/readyz")
                holds(Check.REPORTED, RUNNER, ready == 503, f"latched, and /readyz says {ready}")
            full = trouble.errno in FULL and trouble.times is not None
            if full and "sqlite.sync" not in trouble.calls:
                await wait_until(writes, _RESUMES_S, "a write, when there was space again,")
        except Gone as gone:
            holds(Check.LIVE, RUNNER, False, f"its disk failed, and {gone}")
        finally:
            await client.close()

    async def _refused(self, client: Client) -> str | None:
        """Write; the code with which that is refused, None where it works."""
        op = self.history.intend(RUNNER, "create", creates="conversation")
        body = {"metadata": {"mark": op.mark}}
        try:
            answer = await client.do(op, "POST", "/v1/conversations", body)
        except Refused as refused:
            return str(refused)
        self.verdict.holds(Check.LIVE, RUNNER, answer.status == 200, f"a write got {answer.status}")
        return None

    async def _die(self, victim: Victim, *, stop: bool = False) -> None:
        """See the process dead, one way or another; where its power was cut, let the disk be what
        survived."""
        died = victim.dead
        victim.signal(signal.SIGTERM if stop else signal.SIGKILL)
        code = await victim.death(30.0)
        if stop:
            clean = self.verdict.holds(Check.CLEAN, RUNNER, code == 0, f"a stop ended with {code}")
            if clean:
                self._stopped.add(victim.pid)
        elif died and code > 0:
            said = code == GAVE_UP
            self.verdict.holds(
                Check.LIVE, RUNNER, said, f"it ended with {code}, and no clear error"
            )
            self._given_up.add(victim.pid)
        plan = victim.plan
        kind = "stopped" if stop else "power cut" if self._restore(plan) else "killed"
        if died and plan.death is not None:
            kind += {"moment": " at a moment", "sending": " at a stream part"}.get(
                plan.death.at.replace("sent", "sending"), " at a commit"
            )
        elif not stop:
            kind += " at a moment"
        self.deaths[kind] += 1
        self.history.mark("death", pid=victim.pid, code=code, kind=kind)

    def _restore(self, plan: Plan) -> bool:
        """Put what survived a power cut in the place of the data, if there was one."""
        if plan.power is None or not Path(plan.power.into).exists():
            return False
        shutil.rmtree(self.data)
        Path(plan.power.into).rename(self.data)
        return True

    async def _rise_and_judge(self, before: Snapshot) -> None:
        victim = await self._start()
        ready_s = await victim.ready()
        opened = self.verdict.holds(
            Check.OPENS, RUNNER, ready_s is not None, f"process {victim.pid} died while starting"
        )
        if opened and ready_s is not None:
            self.ready_s.append(ready_s)
            await self._judge(victim, before)
        await self._die(victim)

    async def _judge(self, victim: Victim, before: Snapshot) -> None:
        rng = random.Random(f"{self.seed}/{self.history.cycle}/judge")
        client = Client(victim.url, self.history, -1, rng)
        start = Start(victim.pid, frozenset(self._stopped), frozenset(self._given_up))
        await self.judge(client, before, start)

    async def _snapshot(self, *, settled: bool) -> Snapshot:
        """Read the dead store, and judge what lies in it."""
        store = await Snapshot.of(self.data, self.home / "copy", verify=settled)
        return self.audit(store, settled=settled)

    async def _start(
        self,
        death: Death | None = None,
        *,
        power: bool = False,
        trouble: Trouble | None = None,
        clock: Jumps = Jumps(),  # noqa: B008 - frozen
    ) -> Victim:
        self._starts += 1
        into = self.home / f"cut-{self._starts}"
        plan = Plan(
            data=str(self.data),
            port=self._stage.port,
            upstream=self._stage.upstream.url,
            continues=self._continues,
            death=death,
            power=Power(str(into), f"{self.seed}/{self._starts}") if power and death else None,
            trouble=trouble,
            clock=clock,
            plant=self._plant,
            edges=None if self._edges is None else str(self._edges),
        )
        began_s = time.monotonic()
        victim = await self._stage.nursery.start(plan)
        self.history.mark("start", pid=victim.pid, after_s=round(time.monotonic() - began_s, 4))
        return victim
