"""A server whose disk fails: syncs and writes, SQLite's and all others, one after another."""

from __future__ import annotations

import errno
import itertools
from collections.abc import Sequence

from perdure.proving.campaign import Campaign, Life, Stage
from perdure.proving.drills.drill import Subject, Trial
from perdure.proving.faults import FAILED_SYNC, FULL_DISK, READ_ONLY, Fault
from perdure.proving.refusing import CHANGES, Call, Trouble

_CALLS_MAX = 60
"""The start of a server and the work of a life make about so many calls of a kind."""

_OTHER_CALLS_MAX = 12

_SPACE_AFTER = 3
"""So many writes find no space, and then there is some."""


def failed_syncs() -> list[Trouble]:
    """Every call of each kind, failing once or from then on."""
    kinds: list[tuple[Call, int]] = [
        ("sqlite.sync", _CALLS_MAX),
        ("sqlite.write", _CALLS_MAX),
        ("disk.sync", _OTHER_CALLS_MAX),
        ("disk.write", _OTHER_CALLS_MAX),
        ("disk.replace", _OTHER_CALLS_MAX),
        ("disk.names", _OTHER_CALLS_MAX),
    ]
    return [
        Trouble(calls=(call,), n=n, times=times)
        for call, most in kinds
        for n, times in itertools.product(range(1, most + 1), (1, None))
    ]


def no_space() -> list[Trouble]:
    """No space, or too large a file, for a while or for ever; half of the bytes are written."""
    kinds: list[tuple[Call, int]] = [
        ("sqlite.write", _CALLS_MAX),
        ("disk.write", _OTHER_CALLS_MAX),
        ("disk.sync", _OTHER_CALLS_MAX),
    ]
    return [
        Trouble(calls=(call,), n=n, times=times, errno=code)
        for call, most in kinds
        for n, times, code in itertools.product(
            range(1, most + 1), (_SPACE_AFTER, None), (errno.ENOSPC, errno.EFBIG)
        )
    ]


def read_only() -> list[Trouble]:
    """Nothing may be changed any more, from some call on."""
    return [
        Trouble(calls=CHANGES, n=n, times=None, errno=errno.EROFS)
        for n in range(1, 2 * _CALLS_MAX + 1)
    ]


class FailingServer:
    """A server lives with each trouble in turn, and is judged while it does and when it came back.
    A server that cannot start ends instead."""

    subject: Subject = "server"

    def __init__(self, fault: Fault, says: str, troubles: Sequence[Trouble]) -> None:
        self.fault = fault
        self.says = says
        self.plant: str | None = None
        self._troubles = troubles

    def lacks(self) -> str | None:
        return None

    async def run(self, trial: Trial) -> None:
        troubles = list(self._troubles)
        trial.rng("order").shuffle(troubles)
        trial.planned = len(troubles)
        async with Stage(trial.home) as stage:
            with Campaign(stage, trial.home, seed=trial.seed, plant=self.plant) as campaign:
                for case, trouble in enumerate(troubles, 1):
                    if trial.over:
                        break
                    if trial.wants(case):
                        await campaign.live(Life(trouble=trouble))
                        trial.judged(case, map(str, campaign.verdict.violations), campaign.data)
                        campaign.verdict.violations.clear()
                        trial.count("met", campaign.reached)
                trial.count("judgements", sum(campaign.verdict.judged.values()))


FAILING_SERVERS = (
    FailingServer(
        FAILED_SYNC,
        "each sync, write and rename under the server fails in turn, SQLite's and all others, once "
        "or from then on: writes are refused typed, reads go on, what is latched is not ready, and "
        "after a restart everything acknowledged is there",
        failed_syncs(),
    ),
    FailingServer(
        FULL_DISK,
        "each write under the server finds no space or too large a file, half of it written: it is "
        "refused typed, reads go on, and when there is space writes work again by themselves",
        no_space(),
    ),
    FailingServer(
        READ_ONLY,
        "from some call on nothing under the server may be changed: writes are refused typed, "
        "reads go on, and after a restart on a disk that can be written all that was acknowledged "
        "is there",
        read_only(),
    ),
)
