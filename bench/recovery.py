"""Restarting: how soon a killed server is ready, whatever it stores, and what it takes at rest.

Answers goal 10 and the floors of size. A store is grown to each number of responses; a server on
it is killed under load; copies of what is left are then opened by a new server, by the engine
alone, and by SQLite alone, in turn.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import threading
import venv
from collections.abc import Sequence
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path

import msgspec

import perdure
from bench.contenders import PERDURE, ROOT, install
from bench.report import Goal, Section, table
from bench.servers import Server, free_port
from bench.servers import perdure as command
from bench.turns import Spread, run_worker, scratch, size_bytes, spread
from perdure.core.batch import join
from perdure.surfaces.responses import Response, Status
from perdure.wire import events as ev
from perdure.wire.responses import CreateResponse, response_body

BATCH = 500
MIB = 1024 * 1024
STORE = "perdure.db"
OPENINGS = ("raw", "checkpointed", "perdure")


class Restart(msgspec.Struct):
    """What was found at one size of the store."""

    responses: int
    stored_bytes: int
    wal_bytes: int
    ready_s: Spread
    opened_s: dict[str, Spread]


def measure(turns: int, sizes: Sequence[int], duration_s: float) -> Section:
    """Everything, in one run."""
    restarts = _restarts(turns, sizes)
    wal = run_worker(PERDURE, "perdure_engine", ["wal:64"], duration_s=max(4.0, duration_s))
    wal_mib = wal["wal:64"]["wal_bytes"] / MIB
    rss_mib, installed_mib = _idle_rss_bytes() / MIB, _installed_bytes() / MIB
    largest, smallest = restarts[-1], restarts[0]
    flat = largest.ready_s.median / smallest.ready_s.median
    over_raw = _over(largest, "raw")
    goals = [
        _most(
            "10",
            f"engine open at {largest.responses:,}, over raw SQLite on the same log",
            over_raw,
            2.0,
            "x",
        ),
        _most(
            "10",
            f"ready at {largest.responses:,} over ready at {smallest.responses:,}",
            spread([flat]),
            1.2,
            "x",
        ),
        _most("10", "largest log under steady writes", spread([wal_mib]), 64, "MiB"),
        _most(
            "ready",
            f"process start to /readyz after SIGKILL, {largest.responses:,} responses",
            largest.ready_s,
            1.5,
            "s",
        ),
        _most("size", "resident memory of an idle server", spread([rss_mib]), 120, "MiB"),
        _most("size", "core install", spread([installed_mib]), 120, "MiB"),
    ]
    title = f"Restarting after SIGKILL under load ({turns} turns)"
    return Section(title, goals, _table(restarts))


def _restarts(turns: int, sizes: Sequence[int]) -> list[Restart]:
    with scratch() as name:
        grown = Path(name) / "grown"
        grown.mkdir()
        found, stored = [], 0
        for responses in sizes:
            asyncio.run(_grow(grown / STORE, stored, responses))
            stored = responses
            killed = Path(name) / "killed"
            _copy(grown, killed)
            _kill_under_load(killed)
            found.append(_restart(killed, Path(name) / "trial", responses, turns))
            shutil.rmtree(killed)
        return found


async def _grow(path: Path, stored: int, wanted: int) -> None:
    """Store finished responses of about 1 KiB, with their events, up to a number."""
    request = CreateResponse(model="bench", input="hello", instructions="x" * 200)
    async with perdure.library.open(f"sqlite:///{path}") as state:
        for start in range(stored, wanted, BATCH):
            batches = []
            for number in range(start, min(start + BATCH, wanted)):
                id = f"resp_{number:048x}"
                body = response_body(request, id=id, created_at=number)
                told = msgspec.json.encode(body)
                event = ev.encode_event(ev.ResponseCreated(response=body))
                response = Response(Status.COMPLETED, number, "bench", runner=None)
                key = ("default", id)
                batches.append(state.responses.create(key, response, told, [event]))
            await state.commit(join(batches))


def _kill_under_load(data: Path) -> None:
    port = free_port()
    with Server(command(port, data), port, data / "log") as server:
        server.wait_ready()
        id = server.ask("POST", "/v1/conversations", {})["id"]
        written = threading.Event()
        loading = threading.Thread(target=_write, args=(server, id, written))
        loading.start()
        written.wait()
        server.kill()
        loading.join()


def _write(server: Server, id: str, written: threading.Event) -> None:
    """Add items until the server is gone; `written` once a good number is acknowledged."""
    item = {"type": "message", "role": "user", "content": "x" * 8_000}
    acknowledged = 0
    with suppress(OSError, HTTPException):
        while True:
            server.ask("POST", f"/v1/conversations/{id}/items", {"items": [item] * 20})
            acknowledged += 1
            if acknowledged == 100:
                written.set()


def _restart(killed: Path, trial: Path, responses: int, turns: int) -> Restart:
    ready_s: list[float] = []
    opened_s: dict[str, list[float]] = {how: [] for how in OPENINGS}
    for turn in range(turns):
        for place in range(len(OPENINGS)):
            how = OPENINGS[(turn + place) % len(OPENINGS)]
            _copy(killed, trial)
            opened_s[how].append(_opening(how, trial / STORE))
        _copy(killed, trial)
        port = free_port()
        with Server(command(port, trial), port, trial / "log") as server:
            ready_s.append(server.wait_ready())
    return Restart(
        responses,
        (killed / STORE).stat().st_size,
        (killed / f"{STORE}-wal").stat().st_size,
        spread(ready_s),
        {how: spread(values) for how, values in opened_s.items()},
    )


def _opening(how: str, path: Path) -> float:
    done = subprocess.run(
        [sys.executable, "-m", "bench.peers.opening", how, str(path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"opening {path} ({how}) failed:\n{done.stderr[-4000:]}")
    return float(done.stdout)


def _copy(source: Path, target: Path) -> None:
    """A copy as it would be found on a disk: synced, and without SQLite's shared memory."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*-shm", "*.sock"))
    os.sync()


def _idle_rss_bytes() -> int:
    with scratch() as name:
        port = free_port()
        with Server(command(port, Path(name) / "data"), port, Path(name) / "log") as server:
            server.wait_ready()
            server.ask("GET", "/v1/models")
            return server.resident_bytes()


def _installed_bytes() -> int:
    """What a plain install adds to an empty environment."""
    with scratch() as name:
        directory = Path(name)
        venv.create(directory, with_pip=True)
        before = size_bytes(directory)
        install(directory / "bin" / "python", "-r", str(ROOT / "requirements.lock"))
        install(directory / "bin" / "python", "--no-deps", str(ROOT))
        return size_bytes(directory) - before


def _over(restart: Restart, how: str) -> Spread:
    ours, theirs = restart.opened_s["perdure"], restart.opened_s[how]
    return Spread(ours.median / theirs.median, ours.low / theirs.high, ours.high / theirs.low)


def _most(number: str, question: str, measured: Spread, floor: float, unit: str) -> Goal:
    return Goal(number, question, measured, floor, at_most=True, unit=unit)


def _table(restarts: Sequence[Restart]) -> str:
    heads = (
        "responses stored",
        "database MiB",
        "log MiB",
        "start to ready, s",
        "engine open, ms",
        "raw SQLite open, ms",
        "raw open and checkpoint, ms",
    )
    rows = [
        (
            f"{restart.responses:,}",
            f"{restart.stored_bytes / MIB:,.1f}",
            f"{restart.wal_bytes / MIB:.1f}",
            f"{restart.ready_s:.3f}",
            *(_ms(restart.opened_s[how]) for how in ("perdure", "raw", "checkpointed")),
        )
        for restart in restarts
    ]
    return table(heads, rows)


def _ms(seconds: Spread) -> str:
    return f"{Spread(*(value * 1e3 for value in seconds)):.1f}"
