"""Damage to a store of files: bits that flip, files cut short, sectors zeroed, swapped, doubled or
put into another file, and files that are gone, in every file there is."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

from perdure.core.batch import append, put
from perdure.core.engine import Engine
from perdure.core.errors import Damaged, PerdureError
from perdure.core.keys import Key
from perdure.core.layouts import Records
from perdure.core.paging import every
from perdure.core.values import Finding
from perdure.proving.drills.damage import DAMAGED, Harm, Harms, files_in, laid, shuffled
from perdure.proving.drills.drill import Subject, Trial
from perdure.proving.faults import DAMAGE
from perdure.proving.file_stories import history, opened, small_journals
from perdure.proving.subject import EVENTS, FACTS, NOTES, Note

_BATCHES = 12


class DamagedFiles:
    """See `says`. Of two stores, one closed in order and one whose owner was killed."""

    fault = DAMAGE
    subject: Subject = "files"
    says = (
        "each bit, length and sector of every file of two small stores of files, one closed and "
        "one left by a kill, changes, stands in another file's place, or the file is gone: the "
        "store is refused, or each read is right or says `Damaged` and `verify` says it too"
    )

    def lacks(self) -> str | None:
        return None

    async def run(self, trial: Trial) -> None:
        with small_journals():
            await self._run(trial)

    async def _run(self, trial: Trial) -> None:
        stores = await self._stores(trial)
        engine = await opened(laid(stores["closed"], trial.home / "right"))
        asked = await _questions(engine)
        right = [await ask(engine) for ask in asked]
        await engine.close()
        harms = {kind: Harms(files, partial(trial.rng, kind)) for kind, files in stores.items()}
        gone = [(kind, Harm(name, "gone", 0)) for kind, files in stores.items() for name in files]
        closed = len(harms["closed"])
        trial.planned = closed + len(harms["killed"]) + len(gone)
        for case, number in enumerate(shuffled(trial.planned, trial.rng("order")), 1):
            if trial.over:
                return
            if not trial.wants(case):
                continue
            if number < len(gone):
                kind, harm = gone[number]
            else:
                at = number - len(gone)
                kind = "closed" if at < closed else "killed"
                harm = harms[kind][at if at < closed else at - closed]
            with trial.place(case) as place:
                hurt = dict(stores[kind])
                if harm.what == "gone":
                    del hurt[harm.file]
                else:
                    hurt[harm.file] = harm.apply(stores[kind])
                outcome, wrong = await _judge(laid(hurt, place), asked, right)
                trial.count(outcome)
                trial.judged(case, (f"{kind} store, {harm}: {it}" for it in wrong), place)

    async def _stores(self, trial: Trial) -> dict[str, dict[str, bytes]]:
        """The files of a store closed in order, and of the same one left by a kill."""
        told = await history(trial.rng("history"), _BATCHES)
        root = trial.home / "store"
        engine = await opened(root)
        for number, batch in enumerate(told.batches):
            await engine.commit(batch)
            if number == _BATCHES // 2:
                await engine.usage()  # flushes
        killed = files_in(root)
        await engine.close()
        return {"closed": files_in(root), "killed": killed}


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


async def _judge(root: Path, asked: list[Question], right: list[object]) -> tuple[str, list[str]]:
    """What became of a store that was harmed, in a word, and what does not hold."""
    try:
        engine = await opened(root)
    except PerdureError:
        return "refused to open", []
    try:
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
        if DAMAGED in answers and not any(it.kind == "damaged" for it in listed):
            wrong.append("a read says that it is damaged, and verify finds nothing")
        fresh = ("new", "1")
        await engine.commit(put(FACTS, fresh, Note()) + append(EVENTS, fresh, [Note()]))
        if DAMAGED in answers:
            return "damaged where it was harmed", wrong
        return "found by verify" if listed else "not harmed", wrong
    except PerdureError as error:
        return "failed", [f"it opened, and then raised {error!r}"]
    finally:
        await engine.close()
