"""Damage to a store of files and to its backup: bits that flip, files cut short, sectors zeroed,
swapped, doubled or put into another file, and whole files that are gone, blank, doubled or another,
in every file there is."""

from __future__ import annotations

import itertools
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import msgspec

from perdure.core.batch import append, delete, put
from perdure.core.clock import SystemClock
from perdure.core.engine import Engine
from perdure.core.errors import Damaged, PerdureError
from perdure.core.keys import Key
from perdure.core.layouts import Records
from perdure.core.paging import every
from perdure.core.values import Finding
from perdure.engines.files_backup import restore_steps
from perdure.engines.files_recovery import Place
from perdure.proving.drills.damage import DAMAGED, Harm, Harms, files_in, laid, shuffled
from perdure.proving.drills.drill import Subject, Trial
from perdure.proving.faults import DAMAGE
from perdure.proving.file_stories import opened, small_journals
from perdure.proving.subject import EVENTS, FACTS, LAYOUTS, NOTES, Note
from perdure.proving.watched import HastyDisk

_GOES_ON_EVERY = 10
"""Every so many cases the harmed store is written to as well."""

Files = dict[str, bytes]


class Whole(msgspec.Struct, frozen=True):
    """What happens to a file as a whole: it is `gone`, or `blank`, all its bytes zero; it is
    `doubled` beside itself; or it `becomes` another one."""

    file: str
    what: str
    other: str = ""

    def __str__(self) -> str:
        return f"{self.file} {self.what} {self.other}".rstrip()

    def among(self, files: Files) -> Files:
        """The files as they are then."""
        data = files[self.file]
        match self.what:
            case "gone":
                return {name: it for name, it in files.items() if name != self.file}
            case "blank":
                return files | {self.file: bytes(len(data))}
            case "doubled":
                path = Path(self.file)
                return files | {str(path.with_stem(f"{path.stem}2")): data}
        return files | {self.file: files[self.other]}


def _wholes(files: Files) -> list[Whole]:
    alone = [Whole(name, what) for name in files for what in ("gone", "blank", "doubled")]
    return [*alone, *(Whole(one, "becomes", it) for one, it in itertools.permutations(files, 2))]


class DamagedFiles:
    """See `says`. Of two stores, one closed in order and one whose owner was killed, and of a
    backup."""

    fault = DAMAGE
    subject: Subject = "files"
    says = (
        "three bits of each byte, each length and each sector of every file of two small stores of "
        "files, one closed and one left by a kill, and of a backup, changes, or the file is gone, "
        "blank, doubled or another: the store is refused, or each read is right or says `Damaged` "
        "and `verify` says it too; the backup is refused, or what is made of it is right"
    )

    def lacks(self) -> str | None:
        return None

    async def run(self, trial: Trial) -> None:
        with small_journals(), trial.in_memory() as memory:
            await self._run(trial, memory)

    async def _run(self, trial: Trial, memory: Path) -> None:
        stores = await _stores(memory)
        engine = await opened(laid(stores["closed"], memory / "right"))
        asked = await _questions(engine)
        right = [await ask(engine) for ask in asked]
        await engine.close()
        parts = {kind: Harms(files, partial(trial.rng, kind)) for kind, files in stores.items()}
        wholes = [(kind, it) for kind, files in stores.items() for it in _wholes(files)]
        trial.planned = len(wholes) + sum(map(len, parts.values()))
        for case, number in enumerate(shuffled(trial.planned, trial.rng("order")), 1):
            if trial.over:
                return
            if not trial.wants(case):
                continue
            kind, harm = _chosen(number, wholes, parts)
            if isinstance(harm, Whole):
                hurt = harm.among(stores[kind])
            else:
                hurt = stores[kind] | {harm.file: harm.apply(stores[kind])}
            place = memory / f"case-{case}"
            on = case % _GOES_ON_EVERY == 0 or isinstance(harm, Whole)
            outcome, wrong = await _judge(kind, laid(hurt, place), asked, right, on=on)
            trial.disk.remove_tree(place)
            trial.count(outcome)
            kept = trial.home / f"case-{case}"
            if wrong:
                laid(hurt, kept)
            trial.judged(case, (f"{kind}, {harm}: {it}" for it in wrong), kept)


def _chosen(
    number: int, wholes: list[tuple[str, Whole]], parts: dict[str, Harms]
) -> tuple[str, Harm | Whole]:
    """The harm of a number, and whose it is."""
    if number < len(wholes):
        return wholes[number]
    number -= len(wholes)
    for kind, harms in parts.items():
        if number < len(harms):
            return kind, harms[number]
        number -= len(harms)
    raise IndexError(number)


async def _stores(memory: Path) -> dict[str, Files]:
    """The files of a store with something of each kind, closed in order; of the same one left by a
    kill while its files were behind its journal; and of a backup of it."""
    root, into = memory / "store", memory / "backup"
    kept, stream = ("default", "box", "1"), ("default", "s")
    engine = await opened(root)
    await engine.commit(put(NOTES, kept, Note("open", 1)) + put(NOTES, (*kept[:2], "2"), Note()))
    await engine.commit(put(FACTS, ("T", "1"), Note(rank=2), attachment=b"attached"))
    await engine.commit(append(EVENTS, stream, [Note("one"), Note(body="two\nlines")]))
    await engine.commit(delete(NOTES, (*kept[:2], "2")).named("an operation"))
    await engine.usage()  # flushes
    await engine.commit(put(NOTES, kept, Note("done", 3), attachment=b"too"))
    await engine.commit(
        append(EVENTS, stream, [Note("three")]) + append(EVENTS, kept[:2], [Note()])
    )
    killed = files_in(root)
    into.mkdir()
    await engine.backup(into, lambda done, total: None)
    await engine.close()
    return {"closed": files_in(root), "killed": killed, "backup": files_in(into)}


Question = Callable[[Engine], Awaitable[object]]


async def _questions(engine: Engine) -> list[Question]:
    """Every kind of read of all that is stored."""
    asked: list[Question] = []
    for records in (NOTES, FACTS):
        found = [record.key async for record in every(engine, records, ())]
        asked += [partial(_get, records=records, key=key) for key in found]
        asked.append(partial(_scan, records=records))
        asked.append(partial(_count, records=records))
    for stream in (await engine.streams(EVENTS, (), limit=100)).items:
        tip = await engine.tip(EVENTS, stream)
        asked.append(partial(_tip, stream=stream))
        for after in range(tip.first - 1, tip.last):
            asked.append(partial(_read, stream=stream, after=after))
    asked.append(lambda engine: engine.streams(EVENTS, (), limit=100))
    return asked


async def _get(engine: Engine, *, records: Records[Note], key: Key) -> object:
    return await engine.get(records, key)


async def _count(engine: Engine, *, records: Records[Note]) -> object:
    return await engine.count(records, ())


async def _tip(engine: Engine, *, stream: Key) -> object:
    return await engine.tip(EVENTS, stream)


async def _read(engine: Engine, *, stream: Key, after: int) -> object:
    return await engine.read(EVENTS, stream, after=after, limit=1)


async def _scan(engine: Engine, *, records: Records[Note]) -> object:
    return [record async for record in every(engine, records, ())]


async def _judge(
    kind: str, root: Path, asked: list[Question], right: list[object], *, on: bool
) -> tuple[str, list[str]]:
    """What became of a store or a backup that was harmed, in a word, and what does not hold."""
    try:
        if kind == "backup":
            place = Place(root.with_name(f"{root.name}-made"), SystemClock(), HastyDisk())
            for _ in restore_steps(place, root, LAYOUTS):
                pass
            root = place.root
        engine = await opened(root)
    except PerdureError:
        return "refused", []
    try:
        outcome, wrong = await _asked(engine, asked, right)
        if kind == "backup":
            wrong += [f"it was restored, and is {outcome}"] * (outcome != "not harmed")
        if on:
            fresh = ("new", "1")
            await engine.commit(put(FACTS, fresh, Note()) + append(EVENTS, fresh, [Note()]))
        return outcome, wrong
    except PerdureError as error:
        return "failed", [f"it opened, and then raised {error!r}"]
    finally:
        await engine.close()
        if kind == "backup":
            HastyDisk().remove_tree(root)


async def _asked(
    engine: Engine, asked: list[Question], right: list[object]
) -> tuple[str, list[str]]:
    """The same of an engine that is open."""
    answers: list[object] = []
    for ask in asked:
        try:
            answers.append(await ask(engine))
        except Damaged:
            answers.append(DAMAGED)
    wrong = [
        f"read {at} gave {answer}, and {right[at]} was stored"
        for at, answer in enumerate(answers)
        if answer not in (DAMAGED, right[at])
    ]
    listed: list[Finding] = [finding async for finding in engine.verify()]
    if DAMAGED not in answers:
        return "found by verify" if listed else "not harmed", wrong
    if not any(it.kind == "damaged" for it in listed):
        wrong.append("a read says that it is damaged, and verify finds nothing")
    return "damaged where it was harmed", wrong
