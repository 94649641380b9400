"""Retention: what is old goes, what somebody needs stays, whoever comes between."""

from __future__ import annotations

import asyncio

import pytest

from perdure.core.batch import Batch, Put, put
from perdure.core.clock import SystemClock
from perdure.core.engine import Engine
from perdure.core.errors import Invalid
from perdure.core.values import Committed
from perdure.engines import open_engine
from perdure.engines.wrapping import Wrapping
from perdure.services import retention
from perdure.services.retention import Pruned, Retention
from perdure.surfaces.responses import EVENTS, EXPIRING, RESPONSES, Response, Status
from perdure.surfaces.state import LAYOUTS, State
from perdure.wire.errors import WireError
from tests.services.conftest import Driver, Open

DAY_S = 24 * 3600


class Later(SystemClock):
    """Two days from now."""

    def now_s(self) -> float:
        return super().now_s() + 2 * DAY_S


def ignored(what: str, done: int, total: int) -> None:
    pass


async def prune(state: State, *, dry_run: bool = False) -> Pruned:
    return await Retention(state, Later(), 1).prune(None, ignored, dry_run=dry_run)


async def there(state: State, *ids: str) -> list[bool]:
    found = await state.engine.get_many(RESPONSES, [("default", name) for name in ids])
    return [record is not None for record in found]


async def make_young(state: State, response_id: str) -> None:
    """As if it had been created two days from now."""
    held = await state.responses.get("default", response_id)
    value = Response(
        held.value.status,
        held.value.created_at_s + 2 * DAY_S,
        held.value.model,
        None,
        held.value.previous_response_id,
    )
    await state.commit(put(RESPONSES, held.key, value, attachment=held.attachment))


# proves R8
async def test_only_what_nobody_needs_goes_and_a_dry_run_says_the_same(driver: Driver) -> None:
    state = driver.node.state
    first = (await driver.answer("echo one"))["id"]
    second = (await driver.answer("echo two", previous_response_id=first))["id"]
    alone = (await driver.answer("echo alone"))["id"]
    young = (await driver.answer("echo three", previous_response_id=second))["id"]
    await make_young(state, young)
    for _ in range(2):
        planned = await prune(state, dry_run=True)
        assert await there(state, first, second, alone, young) == [True] * 4
        assert (planned.ids, planned.responses, planned.needed) == ([alone], 1, 2)
    done = await prune(state)
    assert (done.ids, done.responses, done.needed) == ([alone], 1, 2)
    assert await there(state, first, second, alone, young) == [True, True, False, True]
    assert (await state.engine.tip(EVENTS, ("default", alone))).last == 0
    assert [item async for item in state.items.all(("default", alone), "input", "output")] == []
    await driver.answer("echo four", previous_response_id=young)
    assert await state.engine.count(EXPIRING, ()) in ({}, {(): 0})


# proves R8
async def test_an_old_chain_goes_as_a_whole(driver: Driver) -> None:
    state = driver.node.state
    ids: list[str] = []
    for turn in range(4):
        known = {"previous_response_id": ids[-1]} if ids else {}
        ids.append((await driver.answer(f"echo {turn}", **known))["id"])
    assert (await prune(state, dry_run=True)).responses == 4  # all of one second, in any order
    assert (await prune(state)).responses == 4
    assert await there(state, *ids) == [False] * 4


# proves R8
async def test_a_conversation_keeps_every_item(driver: Driver) -> None:
    conversation = await driver.conversation("hello")
    answer = await driver.answer("echo there", conversation=conversation)
    before = await driver.words(conversation)
    assert (await prune(driver.node.state)).ids == [answer["id"]]
    assert await driver.words(conversation) == before == ["hello", "echo there", "there"]
    await driver.answer("echo more", conversation=conversation)
    found = await driver.node.state.items.find("default", answer["output"][0]["id"])
    assert found.value.id == answer["output"][0]["id"]


async def test_what_runs_stays(driver: Driver) -> None:
    started = await driver.ask("hang 1")
    pruned = await prune(driver.node.state)
    assert (pruned.responses, pruned.running) == (0, 1)
    assert await there(driver.node.state, started.id) == [True]


class Meanwhile(Wrapping):
    """Somebody continues a response right before or after it is marked, or while it is removed."""

    driver: Driver
    parent = ""
    when = ""
    outcome: asyncio.Task[object] | None = None

    async def commit(self, batch: Batch) -> Committed:
        marks = any(isinstance(op, Put) and op.records is EXPIRING for op in batch.ops)
        removes = any(op.key == ("default", self.parent) for op in batch.ops) and not marks
        if self.when == "before" and marks:
            await self._continue()
        if self.when == "removing" and removes and not self.outcome:
            self.outcome = asyncio.create_task(self._continue())
            await asyncio.sleep(0)
        committed = await super().commit(batch)
        if self.when == "after" and marks:
            self.outcome = asyncio.create_task(self._continue())
        return committed

    async def _continue(self) -> object:
        self.when = "done"
        return await self.driver.answer("echo next", previous_response_id=self.parent)


# proves R8
@pytest.mark.parametrize("when", ["before", "after", "removing"])
async def test_whoever_continues_a_response_meanwhile_keeps_it_or_is_refused(
    opened: Open, when: str
) -> None:
    made: list[Meanwhile] = []

    def wrap(engine: Engine) -> Engine:
        made.append(Meanwhile(engine))
        return made[-1]

    driver = await opened(wrap=wrap)
    state = driver.node.state
    parent = (await driver.answer("echo first"))["id"]
    (engine,) = made
    engine.driver, engine.parent, engine.when = driver, parent, when
    pruned = await prune(state)
    if engine.outcome is not None:
        with pytest.raises(WireError, match="not found"):
            await engine.outcome
    children = await state.responses.continued_by(("default", parent), limit=9)
    assert await there(state, parent) == [bool(children)]
    assert pruned.responses == (0 if children else 1)
    assert bool(children) == (when == "before")


# proves R8
async def test_a_mark_that_a_crash_left_is_taken_away(driver: Driver) -> None:
    state = driver.node.state
    first = (await driver.answer("echo one"))["id"]
    await state.commit(state.responses.expire(("default", first), 1))
    await Retention(state, SystemClock(), None).sweep()
    await driver.answer("echo two", previous_response_id=first)


async def test_a_sweep_is_bounded_and_goes_on_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retention, "_PIECE", 5)
    monkeypatch.setattr(retention, "_PIECES_A_SWEEP", 2)
    state = State(await open_engine("memory://", LAYOUTS))
    for number in range(33):
        value = Response(Status.COMPLETED, number, "m", None)
        await state.commit(state.responses.create(("t", f"r{number}"), value, b"{}", [b"{}"]))
    sweeping = Retention(state, Later(), 1)
    for left in (23, 13, 3, 0):
        await sweeping.sweep()
        assert (await state.engine.count(RESPONSES, ())).get((), 0) == left
    assert sweeping.removed == 33
    with pytest.raises(Invalid, match="no age is configured"):
        await Retention(state, Later(), None).prune(None, ignored, dry_run=True)
