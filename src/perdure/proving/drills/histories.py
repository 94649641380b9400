"""Clients that contend for the same records while their process is killed: one history a record,
over several lives, in which every answer must be explained."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import msgspec

from perdure.core.clock import SystemClock
from perdure.core.errors import PerdureError
from perdure.engines import open_engine
from perdure.proving.contender import CLIENTS, KEYS, TURNS, Told, read
from perdure.proving.drills.drill import Subject, Trial
from perdure.proving.faults import PROCESS_CRASH
from perdure.proving.linear import Operation, Register, linearizable
from perdure.proving.steps import LAYOUTS

_LIVES = 3


class Histories:
    """The history of each record, from the lines of contenders: their order is the clock."""

    def __init__(self) -> None:
        self.of: dict[str, list[Operation]] = {key: [] for key in KEYS}
        self._now = 0
        self._asked: dict[int, tuple[int, Told]] = {}

    def note(self, line: bytes) -> None:
        """Take down a call or an answer; a line that was cut off says nothing."""
        if not line.endswith(b"\n"):
            return
        told = msgspec.json.decode(line, type=Told)
        self._now += 1
        if told.client in self._asked:
            called, _ = self._asked.pop(told.client)
            self._keep(told, called, self._now)
        else:
            self._asked[told.client] = (self._now, told)

    def died(self) -> None:
        """Who has no answer yet gets none any more."""
        for called, told in self._asked.values():
            self._keep(told, called, None)
        self._asked.clear()

    def _keep(self, told: Told, called: int, returned: int | None) -> None:
        if told.what is not None:
            if told.what.told == "unknown":
                returned = None
            whole = msgspec.structs.replace(told.what, called=called, returned=returned)
            self.of[told.key].append(whole)

    def last(self, key: str, found: Register) -> None:
        """What a record is in the end, when nothing is under way."""
        self._now += 2
        self._keep(Told(0, key, Operation(told="found", found=found)), self._now - 1, self._now)


class ContendingClients:
    """See `says`. `program` is the contender; a proof may give one that is wrong."""

    fault = PROCESS_CRASH
    subject: Subject = "history"
    says = (
        "clients read and compare-and-set the same records at once, some answers are lost, and "
        "their process is killed at random: what all of them were told over several lives has an "
        "order that explains it (linearizability, a record at a time)"
    )

    def __init__(
        self, program: Sequence[str] = (sys.executable, "-m", "perdure.proving.contender")
    ) -> None:
        self._program = program

    def lacks(self) -> str | None:
        return None

    async def run(self, trial: Trial) -> None:
        await trial.each(partial(self._judge, trial))

    async def _judge(self, trial: Trial, case: int, place: Path) -> list[str]:
        histories = Histories()
        url = f"sqlite:///{place}/state.db"
        for life in range(1, _LIVES + 1):
            rng = trial.rng("contend", case, life)
            contender = await asyncio.create_subprocess_exec(
                *(*self._program, url, f"{trial.seed}-{case}-{life}"),
                stdout=asyncio.subprocess.PIPE,
            )
            assert contender.stdout is not None
            for _ in range(rng.randrange(2 * CLIENTS * TURNS)):
                histories.note(await contender.stdout.readline())
            with suppress(ProcessLookupError):
                contender.kill()
            while line := await contender.stdout.readline():
                histories.note(line)
            if await contender.wait() not in (0, -signal.SIGKILL):
                return [f"life {life}: the clients ended with {contender.returncode}"]
            histories.died()
        try:
            engine = await open_engine(url, LAYOUTS, clock=SystemClock())
            for key in KEYS:
                histories.last(key, await read(engine, key))
            await engine.close()
        except PerdureError as error:
            return [f"the store does not open: {error}"]
        trial.count("operations", sum(map(len, histories.of.values())))
        trial.count(
            "unknown", sum(one.told == "unknown" for key in KEYS for one in histories.of[key])
        )
        return [
            f"no order of its {len(history)} operations explains what was told of record {key}"
            for key, history in histories.of.items()
            if not linearizable(history, Register())
        ]
