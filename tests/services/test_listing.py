"""Lists of what is stored: order, pages, filters, tenants, and damage."""

from __future__ import annotations

from pathlib import Path

import apsw
import pytest

from perdure import library
from perdure.core.batch import Batch
from perdure.core.clock import SystemClock
from perdure.engines import open_engine
from perdure.services import listing
from perdure.surfaces.conversations import Conversation
from perdure.surfaces.jobs import Job
from perdure.surfaces.jobs import Status as JobStatus
from perdure.surfaces.responses import Response, Status
from perdure.surfaces.state import LAYOUTS, State
from perdure.wire.errors import WireError
from perdure.wire.lists import ListQuery


def response(number: int) -> Response:
    status = (Status.COMPLETED, Status.FAILED, Status.IN_PROGRESS)[number % 3]
    return Response(status, number // 2, "m", None)


def fill(state: State, count: int, tenant: str = "t") -> Batch:
    batch = Batch()
    for number in range(count):
        name = f"{number * 7919 % count:03}"
        key = (tenant, f"resp_{name}")
        batch += state.responses.create(key, response(number), b"{}", [b'{"type":"x"}'])
        batch += state.conversations.create((tenant, f"conv_{name}"), Conversation(number, {}))
    return batch


async def pages(state: State, status: Status | None, order: str, limit: int) -> list[str]:
    """Ids in the order listed, page by page by the id of the last one."""
    found: list[str] = []
    after: str | None = None
    while True:
        query = ListQuery(limit, "asc" if order == "asc" else "desc", after)
        page = await listing.responses(state, "t", query, status)
        found += [record.key[-1] for record in page.items]
        if not page.more:
            return found
        after = found[-1]


# proves R13
@pytest.mark.parametrize("status", [None, Status.FAILED, Status.QUEUED])
async def test_pages_hold_everything_once_in_order(status: Status | None) -> None:
    state = State(await open_engine("memory://", LAYOUTS))
    await state.commit(fill(state, 50) + fill(state, 5, "other"))
    everything = (await listing.responses(state, "t", ListQuery(100), None)).items
    wanted = [record for record in everything if status in (None, record.value.status)]
    assert len(everything) == 50
    created = [record.value.created_at_s for record in everything]
    assert created == sorted(created, reverse=True)
    ids = [record.key[-1] for record in wanted]
    for limit in (1, 7, 100):
        assert await pages(state, status, "desc", limit) == ids
        assert await pages(state, status, "asc", limit) == ids[::-1]


# proves R13
async def test_a_page_goes_on_where_it_was_though_things_change() -> None:
    state = State(await open_engine("memory://", LAYOUTS))
    await state.commit(fill(state, 20))
    first = await listing.responses(state, "t", ListQuery(5), Status.IN_PROGRESS)
    last = first.items[-1]
    rest = await listing.responses(state, "t", ListQuery(100, after=last.key[-1]), None)
    await state.commit(
        state.responses.move(last, Status.COMPLETED, b"{}")
        + state.responses.create(("t", "resp_new"), response(99), b"{}", [b"{}"])
    )
    again = await listing.responses(state, "t", ListQuery(100, after=last.key[-1]), None)
    assert again.items == rest.items
    with pytest.raises(WireError, match="to list after"):
        await listing.responses(state, "t", ListQuery(5, after="resp_gone"), None)
    with pytest.raises(WireError, match="to list after"):
        await listing.conversations(state, "other", ListQuery(5, after="conv_001"))


# proves R13, C7
async def test_damage_is_named_and_the_list_goes_on(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'a.db'}"
    async with library.open(url) as state:
        await state.commit(fill(state, 30))
    connection = apsw.Connection(str(tmp_path / "a.db"), vfs="cksmvfs")
    for name in ("003", "004", "017"):
        connection.execute(
            "UPDATE records_responses SET value = ? WHERE key = ?", (b"{}", f"t\x1fresp_{name}")
        )
    connection.close()
    state = State(await open_engine(url, LAYOUTS, clock=SystemClock()))
    listed, damaged = [], set()
    after: str | None = None
    while True:
        page = await listing.responses(state, "t", ListQuery(4, after=after), None)
        listed += [record.key[-1] for record in page.items]
        damaged |= {finding.where for finding in page.damaged}
        if not page.more:
            break
        after = listed[-1]
    assert len(listed) == len(set(listed)) == 27
    assert damaged == {f"responses t/resp_{name}" for name in ("003", "004", "017")}
    await state.engine.close()


# proves R13
@pytest.mark.parametrize("limit", [1, 4, 100])
async def test_jobs_are_found_by_status_and_kind(limit: int) -> None:
    state = State(await open_engine("memory://", LAYOUTS))
    batch = Batch()
    kinds, statuses = ("ingestion", "response"), (JobStatus.QUEUED, JobStatus.FAILED)
    for number in range(24):
        job = Job(kinds[number % 2], "s", number, 3, statuses[number // 2 % 2])
        batch += state.jobs.create(("t", f"job_{number * 7 % 24}"), job, b"{}")
    await state.commit(batch + state.jobs.create(("u", "job_x"), Job(kinds[0], "s", 1, 3), b"{}"))

    async def made(status: JobStatus | None, kind: str | None) -> list[int]:
        found: list[int] = []
        after: str | None = None
        while True:
            query = ListQuery(limit, after=after)
            page = await listing.jobs(state, "t", query, status=status, kind=kind)
            found += [record.value.created_at_s for record in page.items]
            if not page.more:
                return found
            after = page.items[-1].key[-1]

    for status in (None, *statuses):
        for kind in (None, *kinds, "nobody's"):
            assert await made(status, kind) == [
                number
                for number in reversed(range(24))
                if kind in (None, kinds[number % 2]) and status in (None, statuses[number // 2 % 2])
            ]
