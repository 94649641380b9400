"""Histories for a store of files: batches of every kind, and the state after each of them, as the
reference engine has it. So a store that comes back can be held to a prefix of its history.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from perdure.core.batch import Batch, append, delete, drop, put, trim
from perdure.core.clock import SystemClock
from perdure.core.disk import Disk
from perdure.core.engine import Engine
from perdure.core.errors import PerdureError
from perdure.core.values import Committed
from perdure.engines import files_commit
from perdure.engines.files import FilesEngine
from perdure.engines.memory import MemoryEngine
from perdure.proving.subject import EVENTS, FACTS, LAYOUTS, NOTES, Note, stored
from perdure.proving.watched import HastyDisk

_KEYS = 3


class Moment(msgspec.Struct, frozen=True):
    """What a batch was answered, and all that is stored then."""

    committed: Committed
    stored: list[Any]


class History(msgspec.Struct, frozen=True):
    """Batches, and the moments after each of them; the first moment is that of an empty store."""

    batches: tuple[Batch, ...]
    moments: tuple[Moment, ...]


async def history(rng: random.Random, size: int) -> History:
    """`size` batches, each of one to three operations on a few keys."""
    batches: list[Batch] = []
    for number in range(1, size + 1):
        batch = Batch()
        for kind in rng.sample(range(8), rng.randint(1, 3)):
            batch += _operation(kind, rng, number)
        batches.append(batch)
    return await history_of(batches)


async def history_of(batches: Iterable[Batch]) -> History:
    """Batches, each with an operation id of its own."""
    engine = MemoryEngine(LAYOUTS, SystemClock())
    named = tuple(batch.named(f"op {number}") for number, batch in enumerate(batches, 1))
    moments = [Moment(Committed(()), await stored(engine))]
    for batch in named:
        moments.append(Moment(await engine.commit(batch), await stored(engine)))
    return History(named, tuple(moments))


def short_histories(longest: int) -> Iterator[tuple[Batch, ...]]:
    """Every sequence of so many or fewer of the operations that a store of files tells apart, on
    one record with an attachment or without, one stream, and both at once."""
    record, stream = ("default", "box", "1"), ("default", "s")

    def note(number: int) -> Note:
        return Note("open", number, body="x" * 40)

    kinds: tuple[Callable[[int], Batch], ...] = (
        lambda number: put(NOTES, record, note(number)),
        lambda number: put(NOTES, record, note(number), attachment=b"%d" % number),
        lambda number: delete(NOTES, record),
        lambda number: append(EVENTS, stream, [note(number), note(-number)]),
        lambda number: trim(EVENTS, stream, 2),
        lambda number: drop(EVENTS, stream),
        lambda number: put(FACTS, ("T", "1"), note(number)) + append(EVENTS, ("T", "s"), [Note()]),
    )
    for length in range(1, longest + 1):
        for chosen in itertools.product(kinds, repeat=length):
            yield tuple(kind(number) for number, kind in enumerate(chosen, 1))


def _operation(kind: int, rng: random.Random, number: int) -> Batch:
    """No two kinds write one record."""
    tenant = "default" if rng.random() < 0.5 else "T"
    key = (tenant, f"k{rng.randrange(_KEYS)}")
    note = Note("open", number, body="x" * rng.choice((3, 40, 1_200)))
    match kind:
        case 0 | 1:
            attachment = b"\0" * rng.randrange(600) if rng.random() < 0.5 else None
            return put(NOTES, (*key, f"{kind}"), note, attachment=attachment)
        case 2:
            gone = rng.random() < 0.5
            return delete(NOTES, (*key, "2")) if gone else put(NOTES, (*key, "2"), note)
        case 3:
            return put(FACTS, key, note, attachment=b"a" * rng.randrange(9))
        case 4:
            place = (tenant, f"s{rng.randint(5, 5 + _KEYS)}")  # in a directory with a stream's file
            return delete(FACTS, place) if rng.random() < 0.5 else put(FACTS, place, note)
        case 5 | 6:
            entries = [Note(rank=number, body="line\n" * rng.randrange(3)), note]
            return append(EVENTS, ("default", f"s{kind}"), entries)
        case _:
            stream = ("default", "s5" if rng.random() < 0.7 else "s6")
            return drop(EVENTS, stream) if rng.random() < 0.3 else trim(EVENTS, stream, number)


async def opened(root: Path, disk: Disk | None = None) -> FilesEngine:
    """A store of files for proofs."""
    return await FilesEngine.open(str(root), LAYOUTS, clock=SystemClock(), disk=disk or HastyDisk())


async def judge(root: Path, told: History, least: int, most: int) -> list[str]:
    """What does not hold in a store that came back: it is as after one of the batches from `least`
    (the last acknowledged) to `most` (the last begun), no directory is empty, `verify` finds
    nothing, and the history can go on, with the numbers it should have; what came of that is there
    after one more restart."""
    try:
        engine = await opened(root)
    except PerdureError as error:
        return [f"with {least} acknowledged the store does not open: {error}"]
    try:
        wrong = [f"nothing is left in {path}" for path in _empty(root)]
        wrong += await troubles(engine, told, least, most)
        left = await stored(engine) if not wrong else []
    finally:
        await engine.close()
    if wrong:
        return wrong
    engine = await opened(root)
    try:
        return [] if await stored(engine) == left else ["another start found something else"]
    finally:
        await engine.close()


def _empty(root: Path) -> list[Path]:
    return [path for path in root.rglob("*") if path.is_dir() and not any(path.iterdir())]


async def troubles(engine: Engine, told: History, least: int, most: int) -> list[str]:
    """The same of an engine that is open."""
    try:
        found = await stored(engine)
        at = [number for number in range(least, most + 1) if told.moments[number].stored == found]
        if not at:
            return [f"{least} acknowledged, {most} begun, and what is stored is none of them"]
        wrong = [f"verify: {it.where}: {it.why}" async for it in engine.verify()]
        for number in range(at[0], min(at[-1] + 3, len(told.batches))):
            committed = await engine.commit(told.batches[number])
            if committed != told.moments[number + 1].committed:
                wrong.append(f"batch {number + 1} was answered {committed}")
        for number in range(max(least - 2, 0), least):
            if await engine.commit(told.batches[number]) != told.moments[number + 1].committed:
                wrong.append(f"batch {number + 1} was repeated, and not known")
    except PerdureError as error:
        return [f"it opened, and then {error!r}"]
    return wrong


@contextmanager
def small_journals(*, wait_s: float = 600.0) -> Iterator[None]:
    """The journal starts over early, and the files wait until they are asked for."""
    kept = files_commit.JOURNAL_BYTES, files_commit.APPLY_AFTER_S
    files_commit.JOURNAL_BYTES, files_commit.APPLY_AFTER_S = 500, wait_s
    try:
        yield
    finally:
        files_commit.JOURNAL_BYTES, files_commit.APPLY_AFTER_S = kept
