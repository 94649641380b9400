"""One input of a worker, whose process is killed at every system call that accepting it takes, from
the first to the last of the closing that follows.

Nothing is left between two kills: what lies on the disk changes by system calls only, and whatever
thread makes them, they are counted together. How many there are differs a little from run to run,
as threads wait for each other; a kill that comes too late is counted and judges nothing.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Literal

import msgspec

import perdure
from perdure.core.errors import PerdureError
from perdure.library import Embedded
from perdure.proving.accepting import AT, INPUT
from perdure.proving.drills.drill import Subject, Trial, url_in
from perdure.proving.faults import PROCESS_CRASH
from perdure.proving.stepped import Stepped, lacks
from perdure.proving.waiting import TooLate
from perdure.services.worker_checks import check_workers

_ENDS_S = 60.0


class KilledInput:
    """See `says`. `program` accepts the input; a proof may give one that is wrong."""

    fault = PROCESS_CRASH
    subject: Subject = "workers"

    def __init__(
        self,
        store: Literal["files", "engine"] = "files",
        program: Sequence[str] = (sys.executable, "-m", "perdure.proving.accepting"),
    ) -> None:
        kept = {"files": "plain files", "engine": "SQLite"}[store]
        self.says = (
            f"one input of a worker is accepted on {kept}, and the process killed at every system "
            "call of that: state, event, transcript and queue agree, an acknowledged input is "
            "there, and sent again it is accepted once"
        )
        self._program = program
        self._store: Subject = store

    def lacks(self) -> str | None:
        return lacks()

    async def run(self, trial: Trial) -> None:
        async with self._accepting() as process:
            store = trial.home / "store"
            store.mkdir()
            async with perdure.open(url_in(store, self._store)) as state:
                await state.workers.create_runtime({"id": AT[0]})
                await state.workers.create(AT[0], {"id": AT[1]})
            with trial.place(0) as place:
                whole = await self._accept(process, store, place, 0)
                if whole.status or not whole.said:
                    trial.judged(0, [f"an input that nothing happens to: {whole}"], place)
                    return
            calls = list(range(1, whole.calls + 1))
            trial.rng("order").shuffle(calls)
            trial.planned = len(calls)
            for case, call in enumerate(calls, 1):
                if trial.over:
                    return
                if trial.wants(case):
                    with trial.place(case) as place:
                        ended = await self._accept(process, store, place, call)
                        if ended.killed:
                            wrong = await _judge(url_in(place, self._store), ended)
                            told = (f"killed at call {call} of {whole.calls}: {it}" for it in wrong)
                            trial.judged(case, told, place)
                        else:
                            trial.count("kills that came too late")
                            trial.planned -= 1

    @asynccontextmanager
    async def _accepting(self) -> AsyncIterator[asyncio.subprocess.Process]:
        process = await asyncio.create_subprocess_exec(
            *self._program,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()

    async def _accept(
        self, process: asyncio.subprocess.Process, store: Path, place: Path, call: int
    ) -> Stepped:
        """Let the input be accepted in a copy of the store, up to a call."""
        shutil.copytree(store, place, dirs_exist_ok=True)
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(f"{call} {url_in(place, self._store)}\n".encode())
        try:
            line = await asyncio.wait_for(process.stdout.readline(), _ENDS_S)
        except TimeoutError:
            raise TooLate(f"call {call}: no end within {_ENDS_S:g} s") from None
        return msgspec.json.decode(line, type=Stepped)


async def _judge(url: str, ended: Stepped) -> list[str]:
    """What does not hold in the store as the next process finds it, and after that."""
    try:
        async with perdure.open(url) as state:
            wrong = await _troubles(state, acknowledged=bool(ended.said))
        async with perdure.open(url, read_only=True) as state:
            return wrong + [f"later: {it}" for it in await _troubles(state, acknowledged=True)]
    except PerdureError as error:
        return [f"{error!r}"]


async def _troubles(state: Embedded, *, acknowledged: bool) -> list[str]:
    engine, workers = state.engine, state.workers
    wrong = [f"{it.where}: {it.why}" async for it in engine.verify()]
    wrong += [f"{it.where}: {it.why}" async for it in check_workers(engine)]
    inputs = (await workers.state(*AT)).inputs
    if inputs not in ((1,) if acknowledged else (0, 1)):
        wrong.append(f"{inputs} inputs are there, acknowledged: {acknowledged}")
    try:
        if engine.latched is None:
            again = await workers.input(*AT, INPUT)
            if (again.number, again.event, again.transcript) != (1, 2, 1):
                wrong.append(f"sent again it was accepted as {again}")
        said = [one.content for one in (await workers.transcript(*AT)).data]
        if said != [INPUT["content"]]:
            wrong.append(f"what was said is {said}")
    except PerdureError as error:
        wrong.append(f"sent again: {error!r}")
    return wrong
