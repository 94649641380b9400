"""A store in a file system that lets nothing be written: from some moment on, or from the start."""

from __future__ import annotations

import asyncio
import errno
import functools
import itertools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import apsw

from perdure.core.clock import SystemClock
from perdure.core.engine import Engine
from perdure.core.errors import PerdureError, StorageFull, Unavailable
from perdure.engines import open_engine
from perdure.engines.files import FilesEngine
from perdure.engines.sqlite import SqliteEngine
from perdure.proving.drills.drill import Subject, Trial, lock_in, path_in, url_in
from perdure.proving.drills.ext4 import Image, image, lacks_images
from perdure.proving.drills.opening import open_in
from perdure.proving.drills.owners import note, owner
from perdure.proving.faults import READ_ONLY
from perdure.proving.file_stories import small_journals
from perdure.proving.refusing import CHANGES, Refusing, Trouble
from perdure.proving.steps import LAYOUTS, Unsound, last_step, step, troubles
from perdure.proving.waiting import wait_until
from perdure.proving.watched import WRITE_FAILED, WatchedDisk, small_checkpoints

_WRITERS = 2
_STEPS = 4
_DEADLINE_S = 20.0
_SAID_MAX = 10_000
"""A writer may have told so much before its pause, and does not go on for long after it."""


class ReadOnlyEngine:
    """See `says`."""

    fault = READ_ONLY
    says = (
        "from each change on that opening, commits, checkpoints and closing make, nothing may be "
        "written: all of it is refused typed, reads go on, who opens the store to look reads all "
        "of it, and where it can be written again everything acknowledged is there"
    )

    def __init__(self, subject: Subject = "engine") -> None:
        self.subject = subject

    def lacks(self) -> str | None:
        return None

    async def run(self, trial: Trial) -> None:
        with small_checkpoints(), small_journals():
            for case in itertools.count(1):
                if trial.over or (trial.case is not None and case > trial.case):
                    return
                if not trial.wants(case):
                    continue
                with trial.place(case) as place:
                    story = _Story(place, self.subject, case)
                    wrong = await story.judge()
                    if not story.reached:
                        return
                    trial.judged(case, (f"from change {case} on: {it}" for it in wrong), place)


class _Story:
    """A store that is opened, written and closed, and can be changed only `n` - 1 times."""

    def __init__(self, place: Path, subject: Subject, n: int) -> None:
        self._place = place
        self._subject = subject
        self._acknowledged = dict.fromkeys(range(_WRITERS), 0)
        self._begun = dict(self._acknowledged)
        self._wrong: list[str] = []
        self._refusing = Refusing(Trouble(calls=CHANGES, n=n, times=None, errno=errno.EROFS))

    @property
    def reached(self) -> bool:
        """Whether anything was refused."""
        return self._refusing.reached

    async def judge(self) -> list[str]:
        """Tell it; what did not hold."""
        engine = await open_in(self._place, self._subject, SystemClock())
        await self._steps(engine, _STEPS)
        await engine.close()
        try:
            engine = await self._opened(read_only=False)
        except (PerdureError, OSError, apsw.Error) as error:
            self._refused(error)
        else:
            await self._steps(engine, _STEPS)
            await self._read(engine, "reading on")
            try:
                await engine.usage()  # brings plain files up to date
            except (PerdureError, OSError, apsw.Error) as error:
                self._refused(error)
            try:
                await engine.close()
            except (PerdureError, OSError, apsw.Error) as error:
                self._refused(error)
        await self._look()
        engine = await open_in(self._place, self._subject, SystemClock())
        self._wrong += await troubles(engine, self._acknowledged, self._begun)
        await engine.close()
        return self._wrong

    async def _look(self) -> None:
        try:
            engine = await self._opened(read_only=True)
        except (PerdureError, OSError, apsw.Error) as error:
            self._wrong.append(f"it cannot be opened to look: {error!r}")
            return
        await self._read(engine, "looking")
        await engine.close()

    async def _opened(self, *, read_only: bool) -> Engine:
        path, clock, refusing = path_in(self._place, self._subject), SystemClock(), self._refusing
        if self._subject == "files":
            return await FilesEngine.open(
                str(path), LAYOUTS, clock=clock, disk=refusing.disk, read_only=read_only
            )
        disk = WatchedDisk(hasty=True)
        disk.errno = errno.EROFS

        def refuse(call: str, suffix: str) -> None:
            if (call == "write" and refusing.meets("sqlite.write")) or (
                call == "truncate" and refusing.meets("sqlite.truncate")
            ):
                raise WRITE_FAILED

        disk.watch = refuse
        return await SqliteEngine.open(
            str(path),
            LAYOUTS,
            clock=clock,
            disk=refusing.disk,
            read_only=read_only,
            vfs=disk.name,
        )

    async def _steps(self, engine: Engine, steps: int) -> None:
        for _ in range(steps):
            await asyncio.gather(*(self._step(engine, writer) for writer in range(_WRITERS)))

    async def _step(self, engine: Engine, writer: int) -> None:
        number = self._acknowledged[writer] + 1
        self._begun[writer] = number
        try:
            await engine.commit(step(writer, number))
            self._acknowledged[writer] = number
        except (PerdureError, OSError, apsw.Error) as error:
            self._refused(error)

    async def _read(self, engine: Engine, how: str) -> None:
        for writer, least in self._acknowledged.items():
            try:
                last = await last_step(engine, writer)
            except (Unsound, PerdureError, OSError, apsw.Error) as error:
                self._wrong.append(f"{how}, writer {writer}: {error!r}")
                continue
            if not least <= last <= self._begun[writer]:
                self._wrong.append(f"{how}, writer {writer}: {least} acknowledged, {last} there")

    def _refused(self, error: Exception) -> None:
        """A refusal says in our words that the store cannot do it now, and not that it is full."""
        if not isinstance(error, Unavailable) or isinstance(error, StorageFull):
            self._wrong.append(f"it is refused with {error!r}")


class LookedAtEngine:
    """See `says`. `program` is what looks; a proof may give one that is wrong."""

    fault = READ_ONLY
    says = (
        "the directory of a store, closed in good order or left by a kill, with its lock file or "
        "without, is mounted read-only: who opens it to write is refused, and who opens it to look "
        "reads every step, and `verify` finds nothing"
    )

    def __init__(
        self,
        program: Sequence[str] = (sys.executable, "-m", "perdure.proving.looker"),
        subject: Subject = "process",
    ) -> None:
        self.subject = subject
        self._program = program

    def lacks(self) -> str | None:
        return _lacks()

    async def run(self, trial: Trial) -> None:
        stores = list(itertools.product((False, True), repeat=2))
        trial.planned = len(stores)
        for case, (killed, unlocked) in enumerate(stores, 1):
            if trial.over:
                return
            if trial.wants(case):
                with trial.place(case) as place:
                    wrong = await self._judge(trial, case, place, killed=killed, unlocked=unlocked)
                    how = f"{'killed' if killed else 'closed'}{', no lock file' * unlocked}"
                    trial.judged(case, (f"{how}: {it}" for it in wrong), place)

    async def _judge(
        self, trial: Trial, case: int, place: Path, *, killed: bool, unlocked: bool
    ) -> list[str]:
        store = place / "store"
        steps = trial.rng(case).randrange(1, 30)
        store.mkdir()
        engine = await open_in(store, self.subject, SystemClock())
        for number in range(1, steps + 1):
            for writer in range(_WRITERS):
                await engine.commit(step(writer, number))
        if killed:  # what lies there while it is open is what a kill leaves
            store = Path(shutil.copytree(store, place / "killed"))
        await engine.close()
        if unlocked:
            trial.disk.remove(lock_in(store, self.subject))
        url = url_in(store, self.subject)
        looking = await asyncio.create_subprocess_exec(
            *mounted_read_only(store, *self._program, url, str(_WRITERS)),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        said = (await looking.communicate())[0].decode().splitlines()
        expected = [f"{writer} {steps}" for writer in range(_WRITERS)]
        wrong = [] if said[1:] == expected else [f"looking at {steps} steps it said {said[1:]}"]
        if not said or not said[0].startswith("refused unavailable: "):
            wrong.append(f"opened to write it said {said[:1]}")
        return wrong


class ReadOnlyExt4:
    """See `says`. `program` is the writer; a proof may give one that is wrong.

    No sync is under way at that moment: Linux has been seen to tell one that it worked, with
    nothing but fdatasync above it, and to have lost what it had synced.
    """

    fault = READ_ONLY
    says = (
        "a real ext4 file system, on an image of its own, finds itself damaged and becomes "
        "read-only under a writer: that is refused typed, who opens the store to look reads all of "
        "it there, and mounted again it is judged by what was acknowledged"
    )

    def __init__(self, *program: str, subject: Subject = "ext4") -> None:
        self.subject = subject
        self._program = program or ("perdure.proving.writer",)

    def lacks(self) -> str | None:
        return lacks_images()

    async def run(self, trial: Trial) -> None:
        with image(trial.home) as ext4:
            for case in itertools.count(1):
                if trial.over or (trial.case is not None and case > trial.case):
                    return
                if trial.wants(case):
                    store = ext4.root / f"store-{case}"
                    trial.judged(case, await self._judge(trial, case, ext4, store), ext4.root)

    async def _judge(self, trial: Trial, case: int, ext4: Image, store: Path) -> list[str]:
        url = url_in(store, self.subject)
        done = dict.fromkeys(range(_WRITERS), 0)
        async with owner(*self._program, url, str(_WRITERS)) as writing:
            wrong = note(
                done, [await writing.line() for _ in range(trial.rng(case).randrange(1, 100))]
            )
            await _rest(writing.pid)
            ext4.become_read_only()
            os.kill(writing.pid, signal.SIGCONT)
            line = b""
            for _ in range(_SAID_MAX):
                line = await writing.line()
                if line.startswith(b"refused") or not line:
                    break
                wrong += note(done, [line])
        if not line.startswith(b"refused"):
            wrong.append(f"the writer did not end by a refusal, but with {line!r}")
        try:
            engine = await open_engine(url, LAYOUTS, clock=SystemClock(), read_only=True)
            for writer, least in done.items():
                if (last := await last_step(engine, writer)) < least:
                    wrong.append(f"looking, writer {writer}: {least} acknowledged, {last} there")
            await engine.close()
        except (PerdureError, Unsound) as error:
            wrong.append(f"it cannot be looked at: {error}")
        ext4.come_back()
        engine = await open_engine(url, LAYOUTS, clock=SystemClock())
        begun = {writer: number + 1 for writer, number in done.items()}
        wrong += await troubles(engine, done, begun)
        await engine.close()
        trial.disk.remove_tree(store)
        return wrong


async def _rest(pid: int) -> None:
    """Pause a process, and see each of its threads out of the kernel."""
    os.kill(pid, signal.SIGSTOP)

    async def rests() -> bool:
        return all(_state(task) == "T" for task in _tasks(pid))

    await wait_until(rests, _DEADLINE_S, "a pause of the writer")


def _tasks(pid: int) -> list[Path]:
    return list(Path(f"/proc/{pid}/task").iterdir())


def _state(task: Path) -> str:
    return (task / "stat").read_text().rpartition(") ")[2][0]


def mounted_read_only(directory: Path, *command: str) -> tuple[str, ...]:
    """The command, as one for which alone that directory is mounted read-only."""
    script = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && exec "$@"'
    return ("unshare", "-Urm", "sh", "-c", script, str(directory), *command)


@functools.cache
def _lacks() -> str | None:
    """Whether a process may have mounts of its own is known only by trying."""
    for tool in ("unshare", "mount"):
        if shutil.which(tool) is None:
            return f"{tool} is not installed: `apt-get install util-linux mount`."
    with tempfile.TemporaryDirectory(prefix="perdure-mount-") as home:
        command = mounted_read_only(Path(home), "true")
        tried = subprocess.run(command, capture_output=True, text=True)
    if tried.returncode:
        return f"a user may not mount anything for itself here: {tried.stderr.strip()}"
    return None
