"""Damage: bits that flip, files cut short, sectors zeroed, swapped or doubled, in every file."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from perdure.core.clock import SystemClock
from perdure.core.engine import Engine
from perdure.core.errors import Damaged, Missing, PerdureError
from perdure.core.keys import Key
from perdure.core.values import Record
from perdure.engines.blobs_local import LocalBlobs
from perdure.engines.sqlite import SqliteEngine
from perdure.proving.drills.drill import Subject, Trial
from perdure.proving.faults import DAMAGE
from perdure.proving.steps import EVENTS, LAYOUTS, NOTES, TENANT, Note, step
from perdure.proving.watched import HastyDisk

_STEPS = 8
_BITS = (0, 4, 7)
_SECTOR_BYTES = 512


class Harm(msgspec.Struct, frozen=True):
    """One change of one file. `flip` changes bit `bit` of the byte at `at`; `cut` ends the file
    there; `zero`, `swap` and `double` change the sector that begins there, the last two with the
    one at `other`."""

    file: str
    what: str
    at: int
    bit: int = 0
    other: int = 0

    def __str__(self) -> str:
        which = {"flip": f" bit {self.bit}", "swap": f" with {self.other}"}.get(self.what, "")
        return f"{self.what} {self.file}:{self.at}{which}"

    def apply(self, data: bytes) -> bytes:
        """The file as it is then."""
        changed = bytearray(data)
        sector = slice(self.at, self.at + _SECTOR_BYTES)
        other = slice(self.other, self.other + _SECTOR_BYTES)
        match self.what:
            case "flip":
                changed[self.at] ^= 1 << self.bit
            case "cut":
                del changed[self.at :]
            case "zero":
                changed[sector] = bytes(len(changed[sector]))
            case "swap":
                changed[sector], changed[other] = changed[other], changed[sector]
            case "double":
                changed[other] = changed[sector]
        return bytes(changed)


def harms(files: dict[str, bytes], chance: Any) -> Iterator[Harm]:
    """Every flip of three bits of each byte, every cut, every zeroed sector, and each sector
    swapped with another and written over it."""
    for name, data in files.items():
        sectors = range(0, len(data) - _SECTOR_BYTES + 1, _SECTOR_BYTES)
        for at in range(len(data)):
            yield Harm(name, "cut", at)
            for bit in _BITS:
                yield Harm(name, "flip", at, bit)
        for at in sectors:
            yield Harm(name, "zero", at)
            if len(sectors) > 1:
                other = chance.choice([it for it in sectors if it != at])
                yield Harm(name, "swap", at, other=other)
                yield Harm(name, "double", at, other=other)


class DamagedEngine:
    """See `says`. Of two stores, one closed in order and one whose owner was killed."""

    fault = DAMAGE
    subject: Subject = "engine"
    says = (
        "each bit, length and sector of every file of two small stores, one closed and one left "
        "by a kill, changes: the store is refused, or each read is right or says `Damaged` and "
        "`verify` says it too"
    )

    def lacks(self) -> str | None:
        return None

    async def run(self, trial: Trial) -> None:
        stores = await self._stores(trial.home)
        right = await answers(await _opened(_laid(stores["closed"], trial.home / "right")))
        cases = [
            (kind, harm) for kind, files in stores.items() for harm in harms(files, trial.rng(kind))
        ]
        trial.rng("order").shuffle(cases)
        trial.planned = len(cases)
        for case, (kind, harm) in enumerate(cases, 1):
            if trial.over:
                return
            if not trial.wants(case):
                continue
            with trial.place(case) as place:
                files = stores[kind]
                hurt = files | {harm.file: harm.apply(files[harm.file])}
                outcome, wrong = await judge(_laid(hurt, place), right)
                trial.count(outcome)
                trial.judged(case, (f"{kind} store, {harm}: {it}" for it in wrong), place)

    async def _stores(self, home: Path) -> dict[str, dict[str, bytes]]:
        """The files of a store closed in order, and of the same one left by a kill."""
        path = home / "store" / "state.db"
        path.parent.mkdir()
        engine = await _opened(path)
        for number in range(1, _STEPS + 1):
            await engine.commit(step(0, number).named(f"step {number}"))
        killed = _files(path.parent)
        await engine.close()
        return {"closed": _files(path.parent), "killed": killed}


async def judge(path: Path, right: Sequence[object]) -> tuple[str, list[str]]:
    """What became of a store that was harmed, in a word, and what does not hold."""
    try:
        engine = await _opened(path)
    except PerdureError:
        return "refused to open", []
    try:
        found = await answers(engine)
        wrong = [
            f"read {at} gave {answer}, and {right[at]} was stored"
            for at, answer in enumerate(found)
            if answer not in (DAMAGED, right[at])
        ]
        listed = [finding async for finding in engine.verify()]
        if DAMAGED in found and not listed:
            wrong.append("a read says that it is damaged, and verify finds nothing")
        written = await _written(engine)
        if isinstance(written, Damaged) and not listed:
            wrong.append(f"a write says that it is damaged, and verify finds nothing: {written}")
        elif written is not None and not isinstance(written, Damaged):
            wrong.append(f"a write got {written!r}")
        if DAMAGED in found:
            return "damaged where it was harmed", wrong
        return "found by verify" if listed else "not harmed", wrong
    except PerdureError as error:
        return "failed", [f"it opened, and verify raised {error!r}"]
    finally:
        await _closed(engine)


async def _written(engine: Engine) -> PerdureError | None:
    """What a write was refused with."""
    try:
        await engine.commit(step(1, 1))
    except PerdureError as error:
        return error
    return None


DAMAGED = "Damaged"


async def answers(engine: Engine) -> list[object]:
    """Every kind of read, each its answer or that it found damage."""
    keys = [(TENANT, f"w0-{number}") for number in range(1, _STEPS + 2)]
    reads: list[Awaitable[object]] = [
        *(engine.get(NOTES, key) for key in keys),
        engine.get_many(NOTES, keys),
        _whole_scan(engine, (TENANT,)),
        _whole_scan(engine, (TENANT,), index="by_state", where=("open",)),
        _whole_scan(engine, (), index="due", descending=True),
        engine.count(NOTES, (TENANT,), index="by_state", group=1),
        engine.tip(EVENTS, (TENANT, "w0")),
        engine.read(EVENTS, (TENANT, "w0"), limit=100),
        engine.streams(EVENTS, (), limit=100),
    ]
    found: list[object] = []
    for read in reads:
        try:
            found.append(await read)
        except Damaged:
            found.append(DAMAGED)
    return found


async def _whole_scan(engine: Engine, prefix: Key, **asked: Any) -> list[Record[Note]]:
    """All pages of a scan; a page ends before damage, and the next one raises it."""
    page = await engine.scan(NOTES, prefix, limit=100, **asked)
    items = list(page.items)
    while page.cursor is not None:
        page = await engine.scan(NOTES, prefix, limit=100, cursor=page.cursor, **asked)
        items += page.items
    return items


class DamagedBlobs:
    """See `says`."""

    fault = DAMAGE
    subject: Subject = "blobs"
    says = (
        "each bit, length and sector of stored blobs changes: a read gives all bytes or says "
        "`Damaged`, the other blobs are read, and `verify` names what was harmed"
    )
    stored = (b"", b"a few bytes", bytes(range(256)) * 9)

    def lacks(self) -> str | None:
        return None

    async def run(self, trial: Trial) -> None:
        blobs = await _blobs(trial.home / "blobs")
        digests = [
            (await blobs.put(_chunks(data), size_bytes_max=10_000)).digest for data in self.stored
        ]
        await blobs.close()
        files = _files(trial.home / "blobs")
        cases = list(harms(files, trial.rng("sectors")))
        trial.rng("order").shuffle(cases)
        trial.planned = len(cases)
        for case, harm in enumerate(cases, 1):
            if trial.over:
                return
            if not trial.wants(case):
                continue
            with trial.place(case) as place:
                hurt = harm.apply(files[harm.file])
                _laid(files | {harm.file: hurt}, place)
                blob = harm.file.rpartition("/")[2] in digests
                wrong = await self._judge(place, digests, harmed=blob and hurt != files[harm.file])
                trial.judged(case, (f"{harm}: {it}" for it in wrong), place)

    async def _judge(self, place: Path, digests: list[str], *, harmed: bool) -> list[str]:
        blobs = await _blobs(place)
        wrong = []
        lost = set()
        for digest, data in zip(digests, self.stored, strict=True):
            try:
                if b"".join([chunk async for chunk in blobs.read(digest)]) != data:
                    wrong.append(f"other bytes than were stored as {digest}")
            except (Damaged, Missing):
                lost.add(digest)
        listed = " ".join([finding.where async for finding in blobs.verify()])
        await blobs.close()
        wrong += [
            f"{digest} is not read, and verify does not name it"
            for digest in lost
            if digest not in listed
        ]
        if len(lost) != harmed:
            wrong.append(f"{len(lost)} blobs cannot be read, and {harmed:d} was harmed")
        return wrong


def _files(directory: Path) -> dict[str, bytes]:
    """The files below a directory with their bytes, but not the shared memory of a living owner."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and not path.name.endswith("-shm")
    }


def _laid(files: dict[str, bytes], place: Path) -> Path:
    """Make a directory hold these files; the path of the store in it."""
    for name, data in files.items():
        path = place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return place / "state.db"


async def _opened(path: Path) -> SqliteEngine:
    return await SqliteEngine.open(str(path), LAYOUTS, clock=SystemClock(), disk=HastyDisk())


async def _closed(engine: SqliteEngine) -> None:
    try:
        await engine.close()
    except PerdureError:
        return  # what it says of the end of a damaged store is not what is judged


async def _blobs(path: Path) -> LocalBlobs:
    return await LocalBlobs.open(path, disk=HastyDisk(), clock=SystemClock())


async def _chunks(data: bytes) -> AsyncIterator[bytes]:
    yield data
