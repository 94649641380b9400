"""Runs what is claimed about failures and writes what came of it (`make evidence`, `make nightly`).

One run: every planted bug, then `perdure torture`, then the crash campaign, in a budget of seconds
and from one seed. What it came to stands in docs/evidence.json; docs/evidence.md is made from that
and from docs/track-record.toml, and neither is written by hand.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import apsw
import msgspec

from perdure import __version__
from perdure.frontends.cli.output import shown_progress
from perdure.proving import crash
from perdure.proving.catching import Caught, catch_all
from perdure.proving.ending import told_as_interrupted
from perdure.proving.torture import Order, Row, torture, undrilled

ROOT = Path(__file__).parents[1]
PAGE = Path("docs/evidence.md")
RUN = Path("docs/evidence.json")
RECORD = Path("docs/track-record.toml")
_FEW = 10
"""Fewer cases than these say nothing about a probability."""

_TORTURE = 0.75
"""The part of the budget that drills get; the crash campaign gets the rest."""


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """One run, on one machine, of one state of the program."""

    at: str
    version: str
    commit: str
    changed: bool
    machine: str
    disk: str
    seed: str
    budget_s: float
    seconds: float
    rows: tuple[Row, ...]
    campaign: crash.Report
    caught: tuple[Caught, ...]

    @property
    def ok(self) -> bool:
        """Whether everything held, and nothing planted slipped through."""
        held = not any(row.violations for row in self.rows) and self.campaign.ok
        return held and all(bug.shown is not None for bug in self.caught)


class Found(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A bug of our own; see docs/track-record.toml."""

    what: str
    by: str
    commit: str
    test: str
    in_proof: bool = False


def read_record(root: Path = ROOT) -> list[Found]:
    """The track record."""
    read = tomllib.loads((root / RECORD).read_text())
    return msgspec.convert(read["found"], type=list[Found])


def read_run(root: Path = ROOT) -> Run:
    """What the last run came to."""
    return msgspec.json.decode((root / RUN).read_bytes(), type=Run)


async def measure(home: Path, seconds: float, seed: str) -> Run:
    """Do all of it. Drills and campaign share `seconds`; planted bugs take what they take."""
    began_s = time.monotonic()
    commit = _git("rev-parse", "--short=12", "HEAD")
    changed = bool(_git("status", "--porcelain", "--untracked-files=no", "--", "src"))
    with shown_progress() as progress:
        caught = await catch_all(home / "planted", progress)
        order = Order(home=home / "torture", seed=seed, seconds=seconds * _TORTURE, thorough=True)
        tortured = await torture(order, progress)
        progress("crash campaign", 0, 0)
        left_s = seconds * (1 - _TORTURE)
        campaign = await crash.run(
            home / "crash", 1_000_000, seed, None, quiet=True, seconds=left_s
        )
    return Run(
        at=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        version=__version__,
        commit=commit,
        changed=changed,
        machine=(
            f"{tortured.machine}, SQLite {apsw.sqlite_lib_version()}, {os.cpu_count()} CPUs, "
            f"{platform.machine()}{', as root' if os.geteuid() == 0 else ''}"
        ),
        disk=_file_system(home),
        seed=seed,
        budget_s=seconds,
        seconds=round(time.monotonic() - began_s),
        rows=tuple(_without_places(row, home) for row in tortured.rows),
        campaign=msgspec.structs.replace(campaign, evidence="", again=""),
        caught=tuple(caught),
    )


def _without_places(row: Row, home: Path) -> Row:
    """A page for everybody names no directory of this machine."""
    shown = tuple(
        msgspec.structs.replace(one, what=one.what.replace(f"{home}/", ""), kept="")
        for one in row.violations
    )
    return msgspec.structs.replace(row, violations=shown)


def _file_system(home: Path) -> str:
    """The kind of file system a directory is on, where the system tells."""
    mounts = Path("/proc/mounts")
    if not mounts.exists():
        return "an unknown file system"
    found = [line.split()[1:3] for line in mounts.read_text().splitlines()]
    above = [(place, kind) for place, kind in found if home.is_relative_to(place)]
    return max(above, key=lambda one: len(one[0]))[1]


def _git(*arguments: str) -> str:
    return subprocess.run(
        ("git", *arguments), cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()


def render(run: Run, record: Sequence[Found]) -> str:
    """The page."""
    total = sum(row.cases for row in run.rows)
    bugs = len(run.caught)
    parts = [
        "# Evidence",
        "Made by `make evidence` from one run; not edited by hand. Each drill judged at least what "
        "every change of the program has to pass (`make proof`). It says what was done to "
        "Perdure, how often, and what came of it, so that you need not believe "
        "[the guarantees](guarantees.md). Do it on your own disk: `perdure torture`.",
        _facts(run),
        f"In short: {total:,} cases of {len(_ran(run.rows))} drills and {run.campaign.cycles} "
        f"lives of a real server, {_violations(run)}; {_caught(run.caught)} of {bugs} planted bugs "
        "caught.",
        "## What was done, and what held",
        "A case is one failure put to one store, which is then opened again and read whole against "
        "what had been acknowledged. *Of* is how many cases there are where they can be counted: "
        "a drill that got through all of them has enumerated its fault, the others are a sample "
        "that the seed chose. More time judges more of them. A store that shows a violation is "
        "kept as it is. Concurrent writers fall into groups as the machine has it, so a case that "
        "is judged again by its number may be a neighbour of the first.",
        _table(("fault", "part", "cases", "of", "seconds", "verdict"), map(_drill, run.rows)),
        *_details(run.rows),
        "### The crash campaign",
        _campaign(run.campaign),
        "## What N cases without a failure mean",
        "If a failure had probability p in a case and cases were independent, N cases without one "
        "say that p < 3/N with 95 % confidence. So:\n\n"
        + _table(("what", "cases", "p below"), _bounds(run))
        + "\n\nThat is about the failures these cases make, as often as they make them, and about "
        "nothing else. Where a drill got through all of its cases, there is no p: none of them "
        "fails, and what a case is the drill says above. A planted bug says more than a small p: "
        "it shows that a failure of its kind would have been seen.",
        "## Planted bugs",
        "A proof that cannot fail proves nothing. Each of these mistakes was put into the program "
        "on purpose, and what is to catch it was run against it.",
        _table(("bug", "in", "judged by", "seconds", "first seen as"), map(_bug, run.caught)),
        "## What is not covered",
        _undrilled(run.rows) + _NOT_COVERED,
        "## Track record",
        f"{len(record)} bugs of our own that proofs, judges and reviews found, each with the test "
        "that holds it since. Those marked *proof* were wrong in the proof and not in the program.",
        _table(("what it was", "found by", "fixed in", "held by"), map(_found, record)),
    ]
    return "\n\n".join(parts) + "\n"


_NOT_COVERED = """\
- **Disks that lie below us.** A disk that says it has synced and has not loses what it said.
  Nothing in software above it can see that; only pulling the plug can, and we did not. A file
  system can lie too: where ext4 finds itself damaged and becomes read-only, we have seen it tell a
  sync that was under way that it worked, to a program of ten lines, and lose what was synced.
- **Plugs.** Our power cuts are made from what SQLite and the disk module wrote and did not sync: a
  model, with torn and dropped writes, stricter than most disks and not every disk. Where a drill
  above shuts a file system down, that is the kernel's own way to forget; still no machine was
  unplugged, and no virtual one was cut off (QEMU).
- **Other systems.** The file system named above, on Linux, is all that was run. XFS, Btrfs, ZFS and
  macOS (where a sync needs F_FULLFSYNC) were not. Windows and NFS are not supported.
- **RAM.** A bit that flips in memory before its checksum is made is stored with a checksum that
  fits.
- **SQLite itself.** Its own tests are far deeper than ours; we rely on it, and look from outside.
- **Databases.** PostgreSQL is killed, cut off and ended above. Two servers over it are killed,
  paused and cut off by `make crash SERVERS=2`, which is not on this page. Failing over, a full
  disk under it and power cuts of its machine are not tried. Shards have tests and no drill.
- **Plain files.** No system call of theirs is failed or killed from outside, no real file system is
  shut down under them, no clock jumps and no disk is slow.
- **ext4 that finds itself damaged** can tell a sync under way that it worked and then lose what was
  synced (seen with ten lines that only sync). Our drill cuts when no sync is under way.
- **Time.** The longest run of this page is the one above. No soak of days has been made.
- **Malice.** Checksums find accidents. Somebody who can write to the store can forge it.
- **The judges.** The histories are ours: a failure that needs an operation they do not make goes
  unseen. The drills are code, and were reviewed like code."""


def _facts(run: Run) -> str:
    return "\n".join(
        (
            f"- perdure {run.version}, commit `{run.commit}`"
            + (" with changes that are not committed" if run.changed else ""),
            f"- {run.machine}, on {run.disk}",
            f"- seed {run.seed}, {run.budget_s:.0f} s for drills and campaign, "
            f"{run.seconds:.0f} s with the planted bugs, {run.at}",
            f"- again: `make evidence SECONDS={run.budget_s:.0f} SEED={run.seed}`",
        )
    )


def _ran(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if row.lacks is None]


def _violations(run: Run) -> str:
    count = sum(len(row.violations) for row in run.rows) + len(run.campaign.violations)
    return "no violation" if not count else f"**{count} violations**"


def _caught(bugs: Iterable[Caught]) -> int:
    return sum(bug.shown is not None for bug in bugs)


def _drill(row: Row) -> tuple[str, ...]:
    of = "" if row.planned is None else f"{row.planned:,}"
    return row.fault, row.subject, f"{row.cases:,}", of, f"{row.seconds:.1f}", row.verdict


def _details(rows: Iterable[Row]) -> Iterable[str]:
    """What each drill does, and what it was not able to do here."""
    for row in rows:
        text = f"**{row.fault} / {row.subject}**: {row.says}."
        if row.notes:
            text += " Among it: " + ", ".join(f"{count:,} {it}" for it, count in row.notes.items())
            text += "."
        if row.lacks is not None:
            text += f" *Not tested here: {row.lacks}*"
        text += "".join(f"\n- VIOLATED, case {it.case}: {it.what}" for it in row.violations)
        yield text + (f"\n- again: `{row.again}`" if row.again else "")


def _undrilled(rows: Iterable[Row]) -> str:
    """The part of the fault model that no drill makes; nothing where drills make all of it."""
    names = undrilled(rows)
    if not names:
        return ""
    lines = "\n".join(f"  - {name}" for name in names)
    says = (
        "- **Faults in no drill yet.** Other tests may make them; this page says nothing of them:"
    )
    return f"{says}\n{lines}\n"


def _campaign(told: crash.Report) -> str:
    judged = _table(("what was judged after a death", "times"), told.judged.items())
    deaths = ", ".join(f"{count} {kind}" for kind, count in told.deaths.items())
    official = ", the official OpenAI client among them" if crash.OFFICIAL in told.surfaces else ""
    wrong = "".join(f"\n- VIOLATED: {one}" for one in told.violations)
    return (
        f"{told.cycles} lives of one server over one data directory, used by clients on every "
        f"surface{official}: {deaths}. Ready again in "
        f"{told.ready_p50_s} s (median), {told.ready_max_s} s at most. Again: "
        f"`make crash CYCLES={told.cycles} SEED={told.seed}`.\n\n{judged}{wrong}"
    )


def _bounds(run: Run) -> Iterable[tuple[object, ...]]:
    counted = [(f"{row.fault} / {row.subject}", row) for row in _ran(run.rows)]
    for name, row in counted:
        if row.cases >= _FEW and row.cases != row.planned and not row.violations:
            yield name, f"{row.cases:,}", f"{3 / row.cases:.2g}"
    if run.campaign.ok and run.campaign.cycles >= _FEW:
        yield "a life of the campaign", run.campaign.cycles, f"{3 / run.campaign.cycles:.2g}"


def _bug(bug: Caught) -> tuple[str, ...]:
    shown = "**not caught**" if bug.shown is None else f"{bug.shown:.110}"
    return bug.says, bug.part, bug.by, f"{bug.seconds:.2f}", shown


def _found(bug: Found) -> tuple[str, ...]:
    proof = " *(proof)*" if bug.in_proof else ""
    return bug.what + proof, bug.by, f"`{bug.commit}`", f"`{bug.test}`"


def _table(head: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(value: object) -> str:
    return " ".join(str(value).replace("|", r"\|").split())


def main() -> None:
    """See the head of this file. Ends with 1 if anything did not hold or was not caught."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=120, help="for drills and campaign")
    parser.add_argument("--seed", default="1")
    parser.add_argument("--render", action="store_true", help="make the page from the last run")
    options = parser.parse_args()
    if not options.render:
        with tempfile.TemporaryDirectory(prefix="perdure-evidence-") as home:
            run = asyncio.run(measure(Path(home), options.seconds, options.seed))
        encoded = msgspec.json.format(msgspec.json.encode(run), indent=1)
        (ROOT / RUN).write_bytes(encoded + b"\n")
    run = read_run()
    (ROOT / PAGE).write_text(render(run, read_record()))
    print(f"{PAGE}: {sum(row.cases for row in run.rows)} cases, {_violations(run)}")
    print(f"{_caught(run.caught)} of {len(run.caught)} planted bugs caught")
    sys.exit(not run.ok)


if __name__ == "__main__":
    with told_as_interrupted():
        main()
