"""Damage: bits that flip, files cut short, sectors zeroed, swapped, doubled or put into another
file, in every file; and values changed in memory before their page got its checksum."""

from __future__ import annotations

import math
import random
import re
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import apsw
import msgspec

from perdure.core.batch import delete, put
from perdure.core.clock import SystemClock
from perdure.core.engine import Engine
from perdure.core.errors import Damaged, Missing, PerdureError
from perdure.core.keys import Key
from perdure.core.values import Record
from perdure.engines.blobs_local import LocalBlobs
from perdure.engines.sqlite import SqliteEngine
from perdure.engines.sqlite_driver import PAGE_BYTES, RESERVE_BYTES
from perdure.proving.drills.drill import Subject, Trial
from perdure.proving.faults import DAMAGE
from perdure.proving.steps import EVENTS, LAYOUTS, NOTES, TENANT, Note, step
from perdure.proving.watched import HastyDisk

_STEPS = 8
_ATTACHED, _GONE = (TENANT, "attached"), (TENANT, "gone")
_BITS = (0, 4, 7)
_SECTOR_BYTES = 512
_EACH_BYTE = (None, *_BITS)
_EACH_SECTOR = ("zero", "swap", "double", "stray")
_NOTED = b"12345\n"
_VALUE = re.compile(rb'\{"text":"[^"]*"')


class Harm(msgspec.Struct, frozen=True):
    """One change of one file. `flip` changes bit `bit` of the byte at `at`, and `alter` does so
    before its page gets its checksum; `cut` ends the file there; `zero`, `swap` and `double` change
    the sector that begins there, the last two with the one at `other`; `stray` puts the sector at
    `other` of another file there."""

    file: str
    what: str
    at: int
    bit: int = 0
    other: int = 0
    other_file: str = ""

    def __str__(self) -> str:
        which = f" bit {self.bit}" if self.what in ("flip", "alter") else ""
        if self.what in ("swap", "double", "stray"):
            which = f" with {self.other_file}{':' if self.other_file else ''}{self.other}"
        return f"{self.what} {self.file}:{self.at}{which}"

    def apply(self, files: dict[str, bytes]) -> bytes:
        """The file as it is then."""
        changed = bytearray(files[self.file])
        sector = slice(self.at, self.at + _SECTOR_BYTES)
        other = slice(self.other, self.other + _SECTOR_BYTES)
        match self.what:
            case "flip":
                changed[self.at] ^= 1 << self.bit
            case "alter":
                changed[self.at] ^= 1 << self.bit
                _seal(changed, self.at // PAGE_BYTES * PAGE_BYTES)
            case "stray":
                changed[sector] = files[self.other_file][other]
            case "cut":
                del changed[self.at :]
            case "zero":
                changed[sector] = bytes(len(changed[sector]))
            case "swap":
                changed[sector], changed[other] = changed[other], changed[sector]
            case "double":
                changed[other] = changed[sector]
        return bytes(changed)


class Harms:
    """All changes of some files, by number, none of them made before it is asked for: three bits of
    each byte flipped, every cut, each sector zeroed, swapped with another, written over another,
    and replaced by one of another file. `values` names a file whose values are altered too."""

    def __init__(
        self, files: dict[str, bytes], rng: Callable[..., random.Random], values: str = ""
    ) -> None:
        self._files = files
        self._rng = rng
        self._parts: list[tuple[int, Callable[[int], Harm]]] = []
        for name, data in files.items():
            self._parts.append((len(data) * len(_EACH_BYTE), partial(_at_byte, name)))
            sectors = len(data) // _SECTOR_BYTES
            self._parts.append((sectors * len(_EACH_SECTOR), partial(self._at_sector, name)))
        found = _VALUE.finditer(files.get(values, b""))
        altered = [at for value in found for at in range(*value.span())]
        self._parts.append(
            (
                len(altered) * len(_BITS),
                lambda n: Harm(values, "alter", altered[n // len(_BITS)], _BITS[n % len(_BITS)]),
            )
        )

    def __len__(self) -> int:
        return sum(count for count, _ in self._parts)

    def __getitem__(self, number: int) -> Harm:
        for count, harm in self._parts:
            if number < count:
                return harm(number)
            number -= count
        raise IndexError(number)

    def _at_sector(self, name: str, number: int) -> Harm:
        sector, which = divmod(number, len(_EACH_SECTOR))
        what, at = _EACH_SECTOR[which], sector * _SECTOR_BYTES
        if what == "zero":
            return Harm(name, what, at)
        chance = self._rng(name, number)
        others = [it for it, data in self._files.items() if len(data) >= _SECTOR_BYTES]
        other_file = chance.choice(others) if what == "stray" else name
        other = chance.randrange(len(self._files[other_file]) // _SECTOR_BYTES) * _SECTOR_BYTES
        return Harm(name, what, at, other=other, other_file=other_file)


def _at_byte(name: str, number: int) -> Harm:
    at, which = divmod(number, len(_EACH_BYTE))
    bit = _EACH_BYTE[which]
    return Harm(name, "cut", at) if bit is None else Harm(name, "flip", at, bit)


def shuffled(count: int, rng: random.Random) -> Iterator[int]:
    """Every number below `count` once, in an order of the seed's, without a list of them."""
    step = rng.randrange(1, count + 1)
    while math.gcd(step, count) != 1:
        step += 1
    start = rng.randrange(count)
    return ((start + step * number) % count for number in range(count))


def _seal(data: bytearray, page: int) -> None:
    """Give a page the checksum that SQLite's checksum VFS would."""
    end = page + PAGE_BYTES - RESERVE_BYTES
    words = struct.unpack_from(f"<{(end - page) // 4}I", data, page)
    first = second = 0
    for one, other in zip(words[::2], words[1::2], strict=True):
        first = (first + one + second) & 0xFFFFFFFF
        second = (second + other + first) & 0xFFFFFFFF
    struct.pack_into("<2I", data, end, first, second)


class DamagedEngine:
    """See `says`. Of two stores, one closed in order and one whose owner was killed."""

    fault = DAMAGE
    subject: Subject = "engine"
    says = (
        "each bit, length and sector of every file of two small stores, one closed and one left "
        "by a kill, changes, or stands in another file's place, and each byte of a value changes "
        "before its page gets its checksum: the store is refused, or each read is right or says "
        "`Damaged` and `verify` says it too"
    )

    def lacks(self) -> str | None:
        return None

    async def run(self, trial: Trial) -> None:
        stores = await self._stores(trial.home)
        right = await answers(
            await _opened(laid(stores["closed"], trial.home / "right") / "state.db")
        )
        cases = {
            kind: Harms(files, partial(trial.rng, kind), "state.db" * (kind == "closed"))
            for kind, files in stores.items()
        }
        trial.planned = sum(map(len, cases.values()))
        order = shuffled(trial.planned, trial.rng("order"))
        for case, number in enumerate(order, 1):
            if trial.over:
                return
            if not trial.wants(case):
                continue
            closed = number < len(cases["closed"])
            kind = "closed" if closed else "killed"
            harm = cases[kind][number if closed else number - len(cases["closed"])]
            with trial.place(case) as place:
                files = stores[kind]
                hurt = files | {harm.file: harm.apply(files)}
                outcome, wrong = await judge(laid(hurt, place) / "state.db", right)
                trial.count(outcome)
                trial.judged(case, (f"{kind} store, {harm}: {it}" for it in wrong), place)

    async def _stores(self, home: Path) -> dict[str, dict[str, bytes]]:
        """The files of a store closed in order, and of the same one left by a kill."""
        path = home / "store" / "state.db"
        path.parent.mkdir()
        engine = await _opened(path)
        for number in range(1, _STEPS + 1):
            await engine.commit(step(0, number).named(f"step {number}"))
        await engine.commit(
            put(NOTES, _ATTACHED, Note("attached"), attachment=bytes(range(200)))
            + put(NOTES, _GONE, Note("gone"))
        )
        await engine.commit(delete(NOTES, _GONE))
        killed = files_in(path.parent)
        await engine.close()
        return {"closed": files_in(path.parent), "killed": killed}


async def judge(path: Path, right: Sequence[object]) -> tuple[str, list[str]]:
    """What became of a store that was harmed, in a word, and what does not hold."""
    try:
        engine = await _opened(path)
    except PerdureError:
        return "refused to open", []
    except (apsw.Error, ValueError) as error:
        return "failed", [f"opening raised {error!r}"]
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
    except (PerdureError, apsw.Error, ValueError) as error:
        return "failed", [f"it opened, and then raised {error!r}"]
    finally:
        await _closed(engine)


async def _written(engine: Engine) -> PerdureError | None:
    """What writes were refused with. Raises `ValueError` where a record that was deleted does not
    go on with its numbers."""
    try:
        await engine.commit(step(1, 1))
        again = await engine.commit(put(NOTES, _GONE, Note("back"), expect=0))
    except PerdureError as error:
        return error
    if again.numbers != (3,):
        raise ValueError(f"a record deleted in version 2 came back in {again.numbers}")
    return None


DAMAGED = "Damaged"


async def answers(engine: Engine) -> list[object]:
    """Every kind of read, each its answer or that it found damage."""
    keys = [(TENANT, f"w0-{number}") for number in range(1, _STEPS + 2)] + [_ATTACHED, _GONE]
    reads: list[Callable[[], Awaitable[object]]] = [
        *(partial(engine.get, NOTES, key) for key in keys),
        lambda: engine.get_many(NOTES, keys),
        lambda: _whole_scan(engine, (TENANT,)),
        lambda: _whole_scan(engine, (TENANT,), index="by_state", where=("open",)),
        lambda: _whole_scan(engine, (), index="due", descending=True),
        lambda: engine.count(NOTES, (TENANT,), index="by_state", group=1),
        lambda: engine.tip(EVENTS, (TENANT, "w0")),
        lambda: engine.read(EVENTS, (TENANT, "w0"), limit=100),
        lambda: engine.streams(EVENTS, (), limit=100),
    ]
    found: list[object] = []
    for read in reads:
        try:
            found.append(await read())
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
        files = files_in(trial.home / "blobs")
        cases = Harms(files, partial(trial.rng, "sectors"))
        trial.planned = len(cases)
        for case, number in enumerate(shuffled(len(cases), trial.rng("order")), 1):
            if trial.over:
                return
            if not trial.wants(case):
                continue
            harm = cases[number]
            with trial.place(case) as place:
                hurt = harm.apply(files)
                laid(files | {harm.file: hurt}, place)
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


def files_in(directory: Path) -> dict[str, bytes]:
    """The files below a directory with their bytes, but not the shared memory of a living owner.
    Who holds a lock is noted alike in every run, as a case is told by how long the files are."""
    return {
        str(path.relative_to(directory)): _NOTED if _is_lock(path) else path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and not path.name.endswith("-shm")
    }


def _is_lock(path: Path) -> bool:
    return path.name.endswith("lock")


def laid(files: dict[str, bytes], place: Path) -> Path:
    """Make a directory hold these files."""
    for name, data in files.items():
        path = place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return place


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
