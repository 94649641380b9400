"""A writer whose system calls fail, from outside: what an engine, Python and the disk module really
ask of the kernel, and not what the seams above it show.

One run that is only watched counts the calls on each file of its store. Then each of them is put
to a run of its own: strace lets the N-th of its kind fail, or kills the process at it, on that
file alone. It counts for each thread, and the first that comes to its N-th call is hit; so a store
that is made and one that is gone on with are two lives, whose threads do different work.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from perdure.core.clock import SystemClock
from perdure.core.errors import PerdureError
from perdure.engines import open_engine
from perdure.proving.drills.drill import Subject, Trial, url_in
from perdure.proving.faults import FAILED_SYNC, FULL_DISK, PROCESS_CRASH, Fault
from perdure.proving.steps import LAYOUTS, troubles
from perdure.proving.waiting import TooLate

_LIFE: dict[Subject, tuple[int, int]] = {"process": (2, 5), "files-process": (1, 3)}
"""Writers and steps of a life. Plain files take many more calls for a step."""

_ENDS_S = 30.0
_STRACE = ("strace", "-f", "-qq")

_CALLS = {
    "write": "write",
    "pwrite64": "pwrite64",
    "fsync": "fsync",
    "fdatasync": "fdatasync",
    "rename": "?rename,?renameat,?renameat2",
    "openat": "openat",
    "ftruncate": "ftruncate",
    "unlink": "?unlink,?unlinkat",
    "mkdir": "?mkdir,?mkdirat",
    "rmdir": "?rmdir",
}
"""Calls and what strace is told for them: a machine has some of their forms and not others."""

_INTERRUPTED = ("write", "pwrite64", "fsync", "fdatasync", "openat", "ftruncate")
"""Those that a signal may end before they did anything."""

_KILL = "signal=SIGKILL"
_EIO = "error=EIO"
_EINTR = "error=EINTR"
_ENOSPC = "error=ENOSPC"
_KILLED = (-signal.SIGKILL, 128 + signal.SIGKILL)


class Injection(msgspec.Struct, frozen=True):
    """What happens at the `n`th call of a kind on a file, and with `for_ever` at all after it.
    `kept` says that the store was there before."""

    kept: bool
    call: str
    name: str
    n: int
    what: str
    for_ever: bool

    def __str__(self) -> str:
        where = f"{self.call} {self.n} of {self.name or 'the directory'}"
        return f"{self.what} at {where}" + (" and after it" if self.for_ever else "")

    def misjudged(self, subject: Subject, word: str) -> str | None:
        """What is wrong with the last word of a writer that it happened to."""
        refused = word.startswith("refused")
        if self.what == _EINTR:
            again = subject == "files-process" and self.call != "openat"
            # SQLite gives up some calls, and whoever lists a directory; both say so
            return f"a call was interrupted, and the writer {word}" if refused and again else None
        if self.what != _KILL and self._hangs_on(subject) and not refused:
            return f"a sync failed, and the writer was told {word!r}"
        return None

    def _hangs_on(self, subject: Subject) -> bool:
        """Whether it is a sync that somebody's acknowledgement waits for. SQLite syncs the
        directory too, and does not look at what comes of it; the engine does so itself, by
        fsync. Of plain files it is the journal's alone."""
        if subject == "files-process":
            return self.call == "fsync" and self.name.endswith("/journal")
        return self.call == "fsync" or (self.call == "fdatasync" and self.name != "")

    def told(self, place: Path) -> tuple[str, ...]:
        """The same in strace's words."""
        when = f"{self.n}{'+' * self.for_ever}"
        inject = f"inject={_CALLS[self.call]}:{self.what}:when={when}"
        return ("-P", str(place / self.name), "-e", inject)


class Ended(msgspec.Struct, frozen=True):
    """What a writer acknowledged, its last word, how it ended, and what it complained of."""

    acknowledged: dict[int, int]
    word: str
    status: int
    complaint: str

    @property
    def wrong(self) -> list[str]:
        """A writer ends when it is done, refused by name, or killed: with no other error."""
        if self.status in (0, *_KILLED):
            return []
        return [f"the writer ended with {self.status}: {self.complaint}"]


class KilledCalls:
    """See `says`. `program` is the writer; a proof may give one that is wrong, and ask for calls
    on one file only, by the end of its name."""

    fault: Fault = PROCESS_CRASH
    says = (
        "a writer is killed at each of its system calls on the files of its store, from the "
        "making of the store to its closing"
    )
    what: tuple[str, ...] = (_KILL,)
    for_ever = False

    def __init__(
        self,
        program: Sequence[str] = (sys.executable, "-m", "perdure.proving.writer"),
        subject: Subject = "process",
        file: str = "",
    ) -> None:
        self.subject = subject
        self._program = program
        self._file = file
        self._writers, self._steps = _LIFE[subject]

    def lacks(self) -> str | None:
        if shutil.which("strace") is None:
            return "strace is not installed: `apt-get install strace`."
        tried = subprocess.run(
            (*_STRACE, "-o", os.devnull, "true"), capture_output=True, text=True, check=False
        )
        if tried.returncode:
            return f"strace may not trace processes here: {tried.stderr.strip()}"
        return None

    async def run(self, trial: Trial) -> None:
        store = trial.home / "store"
        found = [
            Injection(kept, call, name, n, what, self.for_ever)
            for kept in (False, True)
            for (call, name), count in sorted((await self._watched(trial, store, kept)).items())
            for n in range(1, count + 1)
            for what in self.what
            if name.endswith(self._file) and (what != _EINTR or call in _INTERRUPTED)
        ]
        trial.rng("order").shuffle(found)
        trial.planned = len(found)
        for case, injection in enumerate(found, 1):
            if trial.over:
                return
            if trial.wants(case):
                with trial.place(case) as place:
                    if injection.kept:
                        shutil.copytree(store, place, dirs_exist_ok=True)
                    wrong = await self._judge(trial, injection, place)
                    if wrong is None:
                        trial.count("writers that did not come to it")
                    else:
                        trial.judged(case, (f"{injection}: {it}" for it in wrong), place)

    async def _watched(self, trial: Trial, store: Path, kept: bool) -> Counter[tuple[str, str]]:
        """How often each call is made on each file, by the thread that makes it most often, while
        the store is made, or gone on with: it stays as the first of these leaves it."""
        log = trial.home / "calls"
        with trial.place(0) as place:
            if kept:
                shutil.copytree(store, place, dirs_exist_ok=True)
            ended = await self._write(place, kept, ("-y", "-o", str(log)))
            if not kept:
                shutil.copytree(place, store)
            within = re.escape(str(place.resolve()))
        last = self._steps * (1 + kept)
        if ended.wrong or ended.acknowledged != dict.fromkeys(range(self._writers), last):
            trial.judged(0, [f"a writer that nothing happens to: {ended}"], store)
        made: Counter[tuple[str, str, str]] = Counter()
        for line in log.read_text(errors="replace").splitlines():
            call = re.match(r"(\d+) +([a-z0-9]+)\(", line)
            if call is not None:
                kind = next(kind for kind in _CALLS if call[2].startswith(kind))
                for name in set(re.findall(rf"{within}/?([^\">]*)[\">]", line)):
                    made[call[1], kind, name] += 1
        trial.disk.remove(log)
        most: Counter[tuple[str, str]] = Counter()
        for (_, kind, name), count in made.items():
            most[kind, name] = max(most[kind, name], count)
        return most

    async def _judge(self, trial: Trial, injection: Injection, place: Path) -> list[str] | None:
        """What does not hold after it; None where the writer did not come to that call."""
        log = trial.home / "calls"
        ended = await self._write(place, injection.kept, ("-o", str(log), *injection.told(place)))
        hit = ended.status in _KILLED or "(INJECTED)" in log.read_text(errors="replace")
        trial.disk.remove(log)
        if not hit:
            return None
        wrong = ended.wrong
        if (misjudged := injection.misjudged(self.subject, ended.word)) is not None:
            wrong.append(misjudged)
        try:
            url = url_in(place, self.subject)
            engine = await open_engine(url, LAYOUTS, clock=SystemClock())
        except PerdureError as error:
            return [*wrong, f"the store does not open: {error}"]
        last = self._steps * (1 + injection.kept)
        begun = {who: min(number + 1, last) for who, number in ended.acknowledged.items()}
        wrong += await troubles(engine, ended.acknowledged, begun)
        await engine.close()
        return wrong

    async def _write(self, place: Path, kept: bool, options: Sequence[str]) -> Ended:
        """One run of the writer under strace."""
        url = url_in(place, self.subject)
        process = await asyncio.create_subprocess_exec(
            *(*_STRACE, "-e", f"trace={','.join(_CALLS.values())}", *options, "--"),
            *(*self._program, url, str(self._writers), str(self._steps * (1 + kept))),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
        try:
            told, complaint = await asyncio.wait_for(process.communicate(), _ENDS_S)
        except TimeoutError:
            raise TooLate(f"{options[-1]}: no end within {_ENDS_S:g} s") from None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        assert process.returncode is not None
        acknowledged = dict.fromkeys(range(self._writers), self._steps * kept)
        word = ""
        for line in told.decode().splitlines():
            who, _, number = line.partition(" ")
            if number.isdecimal():
                acknowledged[int(who)] = int(number)
            else:
                word = line
        last = complaint.decode(errors="replace").strip().rpartition("\n")[2]
        return Ended(acknowledged, word, process.returncode, last)


class FailedSystemCalls(KilledCalls):
    """See `says`."""

    fault = FAILED_SYNC
    says = (
        "each system call of a writer on the files of its store fails once with EIO, or is "
        "interrupted: it is refused by name, or goes on, and what it had acknowledged is there"
    )
    what = (_EIO, _EINTR)


class FullSystem(KilledCalls):
    """See `says`."""

    fault = FULL_DISK
    says = (
        "from each system call of a writer on the files of its store, all of its kind get ENOSPC: "
        "it is refused by name, and what it had acknowledged is there"
    )
    what = (_ENOSPC,)
    for_ever = True
