"""Engines with one planted bug each: the checks that nobody asks for must see it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import msgspec
import pytest

from perdure.core.batch import Batch, append, delete, drop, put
from perdure.core.clock import SystemClock
from perdure.core.errors import Closed
from perdure.core.keys import Key
from perdure.core.layouts import Log, Records
from perdure.core.values import Committed, Entry, Finding, Page, Record, Tip
from perdure.engines.checked import Broken, Checked
from perdure.engines.memory import MemoryEngine
from perdure.engines.wrapping import Wrapping
from perdure.proving.subject import EVENTS, FACTS, LAYOUTS, NOTES, Note

A = ("t", "a")
B = ("t", "b")


class SkipsAVersion(Wrapping):
    async def commit(self, batch: Batch) -> Committed:
        committed = await super().commit(batch)
        return Committed(tuple(number + 1 for number in committed.numbers))


class ForgetsANumber(Wrapping):
    async def commit(self, batch: Batch) -> Committed:
        committed = await super().commit(batch)
        return Committed(committed.numbers[:-1])


class RepeatsAVersion(Wrapping):
    async def commit(self, batch: Batch) -> Committed:
        await super().commit(batch)
        return Committed((1,) * len(batch.ops))


class AcknowledgesWithoutWriting(Wrapping):
    async def commit(self, batch: Batch) -> Committed:
        return Committed((1,) * len(batch.ops))


class WritesAnotherValue(Wrapping):
    async def commit(self, batch: Batch) -> Committed:
        op: Any = batch.ops[0]
        spoiled: Any
        if hasattr(op, "entries"):
            spoiled = msgspec.structs.replace(op, entries=(b'{"rank":999}',) * len(op.entries))
        else:
            spoiled = msgspec.structs.replace(op, value=b'{"rank":999}')
        return await super().commit(Batch((spoiled, *batch.ops[1:])))


class ReadsOldVersions(Wrapping):
    async def get(self, records: Records[Any], key: Key) -> Record[Any] | None:
        record = await super().get(records, key)
        return record and msgspec.structs.replace(record, version=record.version - 1)


class AnswersWithAnotherKey(Wrapping):
    async def get(self, records: Records[Any], key: Key) -> Record[Any] | None:
        record = await super().get(records, key)
        return record and msgspec.structs.replace(record, key=("t", "other"))


class ScansBackwards(Wrapping):
    async def scan(self, *args: Any, **named: Any) -> Page[Any]:
        page = await super().scan(*args, **named)
        return Page(page.items[::-1], page.cursor)


class ScansTwice(Wrapping):
    async def scan(self, *args: Any, **named: Any) -> Page[Any]:
        page = await super().scan(*args, **named)
        return Page([item for item in page.items for _ in range(2)], page.cursor)


class ScansEverything(Wrapping):
    async def scan(self, records: Records[Any], prefix: Key, **named: Any) -> Page[Any]:
        return await super().scan(records, (), **named)


class IgnoresWhere(Wrapping):
    async def scan(self, *args: Any, where: Sequence[Any] = (), **named: Any) -> Page[Any]:
        return await super().scan(*args, **named)


class SkipsAnEntry(Wrapping):
    async def read(self, *args: Any, **named: Any) -> list[Entry[Any]]:
        return (await super().read(*args, **named))[1:]


class TipGoesBack(Wrapping):
    asked = 0

    async def tip(self, log: Log[Any], stream: Key) -> Tip:
        self.asked += 1
        return await super().tip(log, stream) if self.asked < 2 else Tip()


class FindsSomething(Wrapping):
    async def verify(self) -> AsyncIterator[Finding]:
        yield Finding("facts a", "as planned")


async def use(engine: Checked) -> None:
    """Something of everything."""
    await engine.commit(put(FACTS, A, Note(rank=1)) + append(EVENTS, A, [Note(rank=1)] * 3))
    await engine.commit(put(FACTS, A, Note(rank=2), expect=1) + put(FACTS, ("u", "a"), Note()))
    await engine.commit(put(FACTS, B, Note()))
    for number in range(4):
        status = ("open", "done")[number % 2]
        await engine.commit(put(NOTES, ("t", "box", f"{number}"), Note(status)))
    await engine.get(FACTS, A)
    await engine.get_many(FACTS, [A, B])
    await engine.scan(FACTS, ("t",), limit=9)
    await engine.scan(NOTES, ("t",), index="by_status", where=("open",), limit=9)
    await engine.read(EVENTS, A, limit=9)
    await engine.tip(EVENTS, A)
    await engine.commit(delete(FACTS, A) + drop(EVENTS, A) + append(EVENTS, A, [Note()]))
    await engine.streams(EVENTS, ("t",), limit=9)
    await engine.close()


def memory() -> MemoryEngine:
    return MemoryEngine(LAYOUTS, SystemClock())


async def test_a_sound_engine_passes() -> None:
    await use(Checked(memory()))


@pytest.mark.parametrize(
    "planted",
    [
        SkipsAVersion,
        ForgetsANumber,
        RepeatsAVersion,
        AcknowledgesWithoutWriting,
        WritesAnotherValue,
        ReadsOldVersions,
        AnswersWithAnotherKey,
        ScansBackwards,
        ScansTwice,
        ScansEverything,
        IgnoresWhere,
        SkipsAnEntry,
        TipGoesBack,
        FindsSomething,
    ],
)
async def test_a_planted_bug_is_seen(planted: Callable[..., Wrapping]) -> None:
    with pytest.raises(Broken):
        await use(Checked(planted(memory())))


async def test_closing_verifies_once_and_closes_all_the_same() -> None:
    engine = Checked(FindsSomething(memory()))
    with pytest.raises(Broken, match="as planned"):
        await engine.close()
    await engine.close()
    asked: Awaitable[object] = engine.get(FACTS, A)
    with pytest.raises(Closed):
        await asked
