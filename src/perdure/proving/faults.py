"""The fault model: what may happen to a store, and what each part must then do.

This is the specification of the drills: `perdure torture` puts every fault to every part it can
reach on this machine, and the evidence page lists them in this order.
"""

from __future__ import annotations

import msgspec


class Fault(msgspec.Struct, frozen=True, kw_only=True):
    """One class of failure. The texts say what must hold, for people; the drills hold it."""

    name: str
    happens: str
    engine: str
    blobs: str
    surface: str


PROCESS_CRASH = Fault(
    name="process-crash",
    happens="the process is killed at any instruction; the machine and its page cache live on",
    engine="has every acknowledged batch, and all or nothing of one that was under way",
    blobs="have every published blob; half of one is under no name that a reader sees",
    surface="comes back as acknowledged, ends or takes over what was running, and reports it",
)
POWER_CUT = Fault(
    name="power-cut",
    happens="what was written and not synced is lost, kept or torn, in any combination",
    engine="as after a process crash: a sync lies before every acknowledgement",
    blobs="as after a process crash: bytes, name and directory are synced before a row names them",
    surface="as after a process crash",
)
FAILED_SYNC = Fault(
    name="failed-sync",
    happens="the disk refuses to write or sync, once or from then on; what it holds is unknown",
    engine="says that the commit is unknown, latches, refuses writes by name and goes on reading; "
    "reopened, it has all that was acknowledged",
    blobs="refuse the put; what it left is under no name, or whole and needed by nobody",
    surface="refuses writes with a typed error, answers reads, is not ready",
)
FULL_DISK = Fault(
    name="full-disk",
    happens="there is no space for a write, or only for a part of it",
    engine="refuses the batch by name, leaves nothing of it, goes on reading, and takes writes "
    "again by itself when there is space",
    blobs="refuse the put, and give its space back",
    surface="answers 507 without inviting a retry; health and reads stay up",
)
READ_ONLY = Fault(
    name="read-only",
    happens="the file system lets nothing be written any more",
    engine="refuses writes by name, and can be opened to look",
    blobs="refuse the put; stored blobs are read",
    surface="refuses writes with a typed error; `perdure status` and `verify` still work",
)
DAMAGE = Fault(
    name="damage",
    happens="stored bytes change, are cut off, or are those of another place",
    engine="detects it or is not harmed: never another value, never a row left out in silence, "
    "never a crash",
    blobs="are verified block by block before a byte of a block is given out",
    surface="answers with `damaged`, naming what; all else goes on",
)
CLOCK_JUMP = Fault(
    name="clock-jump",
    happens="the clock of the machine goes back an hour, on a day, or stands still",
    engine="orders by version and number, never by time",
    blobs="keep what a claim holds; a claim made in the future ends",
    surface="orders by number; leases and waiting rest on a clock that cannot jump",
)
TWO_OWNERS = Fault(
    name="two-owners",
    happens="a second process opens the store; an owner is paused and wakes up",
    engine="refuses the second by naming the first, and lets it in when the first is dead",
    blobs="are covered by the lock of the store they belong to",
    surface="one owner of a job at a time: one that was replaced cannot write",
)
SLOW_DISK = Fault(
    name="slow-disk",
    happens="every sync takes a large part of a second",
    engine="acknowledges late, never early; what waits is bounded",
    blobs="as the engine",
    surface="answers late, with bounded memory, or refuses with an invitation to retry",
)

FAULTS = (
    PROCESS_CRASH,
    POWER_CUT,
    FAILED_SYNC,
    FULL_DISK,
    READ_ONLY,
    DAMAGE,
    CLOCK_JUMP,
    TWO_OWNERS,
    SLOW_DISK,
)
