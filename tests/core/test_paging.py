"""Reading in pages: nothing left out where one page ends and the next begins."""

from __future__ import annotations

import msgspec
import pytest

from perdure.core.batch import delete, join, put
from perdure.core.clock import SystemClock
from perdure.core.engine import Engine
from perdure.core.layouts import Index, Records
from perdure.core.limits import PAGE_MAX
from perdure.core.paging import Slice, every, page_of
from perdure.engines import open_engine


class Note(msgspec.Struct, frozen=True):
    number: int


NOTES = Records("notes", Note, key=("tenant", "name"), indexes=(Index("by_number", ("number",)),))


async def holding(notes: int) -> Engine:
    engine = await open_engine("memory://", (NOTES,), clock=SystemClock())
    await engine.commit(
        join(put(NOTES, ("t", f"{number:06d}"), Note(number)) for number in range(notes))
    )
    return engine


@pytest.mark.parametrize("notes", [0, 1, 63, 64, 65, 64 + PAGE_MAX, 65 + PAGE_MAX])
async def test_every_record_comes_once_and_in_order(notes: int) -> None:
    engine = await holding(notes)
    found = [record.value.number async for record in every(engine, NOTES, ("t",))]
    assert found == list(range(notes))


async def test_records_may_be_deleted_while_they_are_read() -> None:
    engine = await holding(200)
    found = []
    async for record in every(engine, NOTES, ("t",), index="by_number"):
        await engine.commit(delete(NOTES, record.key))
        found.append(record.value.number)
    assert found == list(range(200))


async def test_a_cursor_is_where_it_goes_on_and_a_record_where_there_is_no_cursor_yet() -> None:
    engine = await holding(9)
    sixth = await engine.get(NOTES, ("t", "000005"))
    first = await page_of(engine, NOTES, ("t",), Slice(2, sixth))
    assert [record.value.number for record in first.items] == [6, 7]
    rest = await page_of(engine, NOTES, ("t",), Slice(2, sixth, first.cursor))
    assert [record.value.number for record in rest.items] == [8]
    back = await page_of(engine, NOTES, ("t",), Slice(9, sixth, descending=True), index="by_number")
    assert [record.value.number for record in back.items] == [4, 3, 2, 1, 0]
