"""Two servers on one database, used by the same clients: one of them, both, the database or the
network between is struck, and whoever is left takes over in time.

A server that was killed, stopped or cut off for longer than a lease loses what it ran to the other.
While it is cut off it acknowledges nothing and says that it is not ready; when it wakes it ends
itself. Where the pause is short nobody is taken for dead. Everything is judged as a campaign of one
server is: when both are dead, the store is read; both start again; what was acknowledged is there.
"""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import msgspec

from perdure.core.clock import SystemClock
from perdure.core.errors import PerdureError
from perdure.core.keys import Key
from perdure.core.limits import PAGE_MAX
from perdure.core.promises import Promise
from perdure.engines import open_blobs, open_engine
from perdure.proving.actors import jobs
from perdure.proving.client import Client, Gone, Refused
from perdure.proving.judging import RUNNER, Judging
from perdure.proving.launcher import GAVE_UP, Death, Plan
from perdure.proving.oracle import Check
from perdure.proving.ports import kept_port
from perdure.proving.postgres import Server, make_server
from perdure.proving.proxy import Proxy, proxied
from perdure.proving.snapshot import Snapshot
from perdure.proving.upstream import ScriptedUpstream
from perdure.proving.victim import Nursery, Victim
from perdure.proving.waiting import TooLate, wait_until
from perdure.proving.workload import Actor, Start
from perdure.services.blobs import BlobKeeper
from perdure.surfaces.state import LAYOUTS, PROMISES, State

TAKEN_OVER_S = 10.0
"""From the moment of a death to the moment at which nothing is the dead one's any more."""

_SHORT_S = 2.0
"""A pause for which nobody is taken for dead."""

_JOBS_OFTEN = 6
"""How much more often than anything else jobs are asked for: it is they that move."""

_DEADLINE_S = 45.0
_SCHEMA = "pair"

Strike = Literal[
    "kill",
    "edge",
    "kill both",
    "stop",
    "pause",
    "short pause",
    "partition",
    "short partition",
    "database stopped",
    "database killed",
]
STRIKES: tuple[Strike, ...] = get_args(Strike)


class PairLife(msgspec.Struct, frozen=True, kw_only=True):
    """How one life of the two goes. Each of `workers` takes `steps`, chosen by the seed from the
    actors of `surfaces` (empty: all); the strike falls `after_s` into the work, with an edge where
    the first server comes to commit number `edge`."""

    strike: Strike
    workers: int = 4
    steps: int = 10
    surfaces: tuple[str, ...] = ()
    after_s: float = 0.3
    edge: Death = Death("before", 20)

    def __str__(self) -> str:
        when = str(self.edge) if self.strike == "edge" else f"{self.after_s * 1000:.0f} ms in"
        return f"{self.strike}, {when}"


def life_of(rng: random.Random, cycle: int) -> PairLife:
    """A life at random; every strike has its turn."""
    return PairLife(
        strike=STRIKES[(cycle - 1) % len(STRIKES)],
        after_s=rng.uniform(0.05, 1.0),
        edge=Death(rng.choice(("before", "after")), rng.randint(5, 60)),
    )


class Served:
    """One of the two: its process, its network to the database, and the clients that use it."""

    def __init__(self, victim: Victim, proxy: Proxy) -> None:
        self.victim = victim
        self.proxy = proxy
        self.boot_id = ""
        self.clients: list[Client] = []
        self.left = False
        """Whether clients have given it up."""

    def excuse(self) -> None:
        """It was struck: from now on it need not answer."""
        for client in self.clients:
            client.excused = True


class PairStage:
    """What lives share: the upstream, the database with a network to each server, and a launcher
    and a port for each. Enter it in the main thread."""

    def __init__(self, home: Path) -> None:
        self.upstream = ScriptedUpstream()
        self.nurseries = [Nursery(home / f"server-{number}.log") for number in (1, 2)]
        self.ports: list[int] = []
        self.proxies: list[Proxy] = []
        self.database: Server
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> PairStage:
        self.database = make_server()
        self._stack.callback(self.database.remove)
        await self._stack.enter_async_context(self.upstream)
        for nursery in self.nurseries:
            await self._stack.enter_async_context(nursery)
            self.ports.append(self._stack.enter_context(kept_port()))
            proxy = await self._stack.enter_async_context(proxied(self.database.socket))
            self.proxies.append(proxy)
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._stack.aclose()


class Pair(Judging):
    """Runs lives of two servers; `taken_s` is how long each takeover took, `moved` what the dead
    had left unfinished. A takeover has to be done within `patience_s`, which is for a machine that
    has time for it."""

    def __init__(
        self,
        stage: PairStage,
        home: Path,
        *,
        seed: str = "1",
        plant: str | None = None,
        promises: Sequence[Promise] = PROMISES,
        more: Sequence[Actor] = (),
        patience_s: float = TAKEN_OVER_S,
    ) -> None:
        super().__init__(home, seed=seed, promises=promises, more=more)
        self.taken_s: list[float] = []
        self.moved: set[Key] = set()
        self._patience_s = patience_s
        self._struck_s = 0.0
        self._stage = stage
        self._plant = plant
        self._schema = f"{_SCHEMA}_{abs(hash(home))}"
        self._url = f"{stage.database.dsn}&schema={self._schema}"

    async def live(self, life: PairLife) -> bool:
        """One life of both and its judgement; whether everything has held so far."""
        self.history.cycle += 1
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

    async def _live(self, life: PairLife) -> None:
        async with self._both(life.edge if life.strike == "edge" else None) as pair:
            workers = [
                asyncio.create_task(self._labour(pair, life, number))
                for number in range(life.workers)
            ]
            try:
                await asyncio.wait(workers, timeout=life.after_s)
                await self._strike(life.strike, *pair)
                await asyncio.gather(*workers)
            finally:
                await _over(*workers)
        before = await self._snapshot(settled=False)
        async with self._both() as pair:
            rng = random.Random(f"{self.seed}/{self.history.cycle}/judge")
            first, other = rng.sample(pair, 2)
            start = Start(
                first.victim.pid,
                frozenset(self._stopped),
                frozenset(self._given_up),
                frozenset({other.victim.pid}),
            )
            client = Client(first.victim.url, self.history, -1, rng)
            await self.judge(client, before, start)
        if self.history.fenced:
            await self._sweep()
            self.history.fenced = False
        await self._snapshot(settled=True)

    @asynccontextmanager
    async def _both(self, edge: Death | None = None) -> AsyncIterator[list[Served]]:
        """Both servers, ready; dead at the end."""
        pair = []
        for number, nursery in enumerate(self._stage.nurseries):
            proxy = self._stage.proxies[number]
            at = f"postgresql://perdure@127.0.0.1:{proxy.port}/postgres?schema={self._schema}"
            plan = Plan(
                data=str(self.data),
                port=self._stage.ports[number],
                upstream=self._stage.upstream.url,
                engine=at,
                death=None if number else edge,
                plant=self._plant,
            )
            pair.append(Served(await nursery.start(plan), proxy))
        try:
            for served in pair:
                await self._rise(served)
            yield pair
        finally:
            for served in pair:
                served.proxy.refusing = False
                served.proxy.passing.set()
                await self._end(served)
            await self._left_alone()

    async def _rise(self, served: Served) -> None:
        """Wait until it is ready, or has died where it was to."""
        ready_s = await served.victim.ready()
        if ready_s is None:
            meant = served.victim.plan.death is not None
            what = f"process {served.victim.pid} died while starting"
            self.verdict.holds(Check.OPENS, RUNNER, meant, what)
            served.left = True
            return
        self.ready_s.append(ready_s)
        client = Client(served.victim.url, self.history, -2, random.Random())
        served.clients.append(client)
        try:
            served.boot_id = (await client.get("/v1/startup")).json()["boot_id"]
        except Gone:
            served.left = True

    async def _labour(self, pair: list[Served], life: PairLife, number: int) -> None:
        """One worker, who goes to either, and to the other where one is gone."""
        rng = random.Random(f"{self.seed}/{self.history.cycle}/{number}")
        used = [actor for actor in self.actors if actor.surface in (life.surfaces or self.surfaces)]
        used += [actor for actor in used if actor.surface == jobs.SURFACE] * _JOBS_OFTEN
        clients = [Client(served.victim.url, self.history, number, rng) for served in pair]
        for served, client in zip(pair, clients, strict=True):
            served.clients.append(client)
        for _ in range(life.steps):
            there = [place for place, served in enumerate(pair) if not served.left]
            if not there:
                break
            place = rng.choice(there)
            try:
                await rng.choice(used).act(clients[place])
            except Refused:
                continue
            except Gone as gone:
                await self._gone(pair[place], clients[place], gone)
        for client in clients:
            await client.close()

    async def _gone(self, served: Served, client: Client, gone: Gone) -> None:
        """A connection ended: the server is dead, or was struck; else that is a violation."""
        served.left = True
        if client.excused:
            return
        try:
            await served.victim.death()
        except TooLate:
            self.verdict.holds(Check.LIVE, RUNNER, False, f"it lives, but {gone}")

    async def _strike(self, strike: Strike, first: Served, second: Served) -> None:
        self.history.mark("strike", how=strike)
        self._struck_s = time.monotonic()
        match strike:
            case "kill" | "edge" | "stop":
                await self._strike_dead(strike, first, second)
            case "kill both":
                for served in (first, second):
                    served.excuse()
                    served.victim.signal()
            case "pause" | "short pause":
                await self._strike_still(first, second, long=strike == "pause")
            case "partition" | "short partition":
                await self._strike_apart(first, second, long=strike == "partition")
            case "database stopped" | "database killed":
                killed = strike == "database killed"
                self._stage.database.stop(signal.SIGKILL if killed else signal.SIGQUIT)
                self._stage.database.start()
        self.deaths[strike] += 1

    async def _strike_dead(self, strike: Strike, first: Served, second: Served) -> None:
        """It is killed, comes to its edge, or is stopped in good order."""
        if strike != "edge":
            first.excuse()
            first.victim.signal(signal.SIGTERM if strike == "stop" else signal.SIGKILL)
        elif not first.victim.dead:
            await asyncio.wait((asyncio.ensure_future(first.victim.death()),), timeout=_SHORT_S)
            if not first.victim.dead:
                first.victim.signal()
        code = await first.victim.death(_DEADLINE_S)
        if strike == "edge":
            self._struck_s = time.monotonic()
        if strike == "stop":
            self.verdict.holds(Check.CLEAN, RUNNER, code == 0, f"a stop ended with {code}")
            self._stopped.add(first.victim.pid)
        await self._taken_over(first, second)

    async def _strike_still(self, first: Served, second: Served, *, long: bool) -> None:
        """It stands still, and wakes."""
        if long:
            first.excuse()
        first.victim.signal(signal.SIGSTOP)
        if long:
            await self._taken_over(first, second)
        else:
            await SystemClock().sleep(_SHORT_S)
        first.victim.signal(signal.SIGCONT)
        await self._wakes(first, long=long)

    async def _strike_apart(self, first: Served, second: Served, *, long: bool) -> None:
        """Nothing passes between it and the database, for a while."""
        if long:
            first.excuse()
        first.proxy.passing.clear()
        if long:
            await self._silenced(first)
            await self._taken_over(first, second)
        else:
            await SystemClock().sleep(_SHORT_S)
        first.proxy.passing.set()
        await self._wakes(first, long=long)

    async def _silenced(self, served: Served) -> None:
        """Who is cut off is not ready, lives, and acknowledges nothing."""
        holds = self.verdict.holds
        client = Client(served.victim.url, self.history, -2, random.Random())
        client.excused = True
        served.clients.append(client)

        async def unready() -> bool:
            return await client.status("/readyz") == 503

        op = self.history.intend(RUNNER, "create", creates="conversation")
        body = {"metadata": {"mark": op.mark}}
        writing = asyncio.create_task(client.do(op, "POST", "/v1/conversations", body))
        try:
            await wait_until(unready, self._patience_s, "a server that is cut off and says so")
            alive = await client.status("/livez")
            holds(Check.LIVE, RUNNER, alive == 200, f"it is cut off, and /livez says {alive}")
            done = writing.done() and writing.exception() is None
            holds(Check.KEPT, RUNNER, not done, "it is cut off, and acknowledges a write")
        except Gone as gone:
            holds(Check.LIVE, RUNNER, False, f"it is cut off, and {gone}")
        finally:
            await _over(writing)
            await client.close()

    async def _taken_over(self, dead: Served, living: Served) -> None:
        """Nothing is the dead one's any more, in time; the other is well all the while."""
        engine = await open_engine(self._url, LAYOUTS, read_only=True)
        state = State(engine)

        async def taken() -> bool:
            leases = {lease.value.boot_id async for lease in state.boots.leases()}
            responses = await state.responses.unfinished(limit=PAGE_MAX)
            waiting = await state.jobs.unfinished(limit=PAGE_MAX)
            left = {held.key for held in responses.items if held.value.runner == dead.boot_id}
            left |= {held.key for held in waiting.items if held.value.runner == dead.boot_id}
            self.moved |= left
            return not left and dead.boot_id not in leases

        try:
            left_s = self._struck_s + self._patience_s - time.monotonic()
            await wait_until(taken, left_s, f"taking over within {self._patience_s:g} s")
            self.taken_s.append(time.monotonic() - self._struck_s)
        except TooLate as late:
            self.verdict.holds(Check.CLEAN, RUNNER, False, str(late))
        finally:
            await engine.close()
        well = not living.victim.dead
        self.verdict.holds(Check.LIVE, RUNNER, well, "the one that takes over is dead")

    async def _wakes(self, served: Served, *, long: bool) -> None:
        """Who was taken for dead ends itself and says why; who was not goes on."""
        if not long:
            alive = not served.victim.dead
            self.verdict.holds(Check.LIVE, RUNNER, alive, "it ended over a short pause")
            return
        self.history.fenced = True
        try:
            code = await served.victim.death(_DEADLINE_S)
        except TooLate:
            self.verdict.holds(Check.LIVE, RUNNER, False, "it was replaced, and goes on")
            return
        what = f"it was replaced, and ended with {code}"
        self.verdict.holds(Check.LIVE, RUNNER, code == GAVE_UP, what)

    async def _end(self, served: Served) -> None:
        """See it dead."""
        if not served.victim.dead:
            served.victim.signal(signal.SIGCONT)
            served.victim.signal()
        code = await served.victim.death(_DEADLINE_S)
        if code == GAVE_UP:
            self._given_up.add(served.victim.pid)
        for client in served.clients:
            await client.close()
        self.history.mark("death", pid=served.victim.pid, code=code)

    async def _left_alone(self) -> None:
        """Wait until nothing of the dead is under way in the database."""
        import asyncpg

        session = await asyncpg.connect(self._stage.database.dsn)
        count = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'perdure'"

        async def alone() -> bool:
            return not await session.fetchval(count)

        try:
            await wait_until(alone, _DEADLINE_S, "the end of the sessions of dead servers")
        finally:
            await session.close()

    async def _sweep(self) -> None:
        """Do what every server does now and then."""
        clock = SystemClock()
        engine = await open_engine(self._url, LAYOUTS, clock=clock)
        blobs = await open_blobs(f"file:///{self.data / 'blobs'}", clock=clock, shared=True)
        keeper, boots = BlobKeeper(engine, blobs, clock, "boot_sweeper"), State(engine).boots
        await engine.commit(boots.take_lease("boot_sweeper"))
        try:
            await keeper.sweep()
        finally:
            await engine.commit(boots.end_lease("boot_sweeper"))
            await blobs.close()
            await engine.close()

    async def _snapshot(self, *, settled: bool) -> Snapshot:
        store = await Snapshot.of(self.data, self.home / "copy", verify=settled, url=self._url)
        return self.audit(store, settled=settled)


async def _over(*tasks: asyncio.Task[Any]) -> None:
    """End what may still go on; how it ends is known elsewhere, or of no interest."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
