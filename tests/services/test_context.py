"""What a request builds on: long chains in few reads, and what is gone from one said."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import pytest

from perdure.core.errors import Conflict, Damaged
from perdure.core.keys import Key
from perdure.core.layouts import Records
from perdure.core.values import Record
from perdure.engines import open_engine
from perdure.engines.wrapping import Wrapping
from perdure.proving.upstream import ScriptedUpstream
from perdure.surfaces.items import ITEMS, NewItem
from perdure.surfaces.responses import Response, Status, Turn, ancestors_of
from perdure.surfaces.state import LAYOUTS, State
from perdure.wire.errors import NotFound, WireError
from tests.services.conftest import Driver


class Counting(Wrapping):
    """Notes the keys of each read of many."""

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        self.reads: list[Sequence[Key]] = []

    async def get_many(self, records: Records[Any], keys: Sequence[Key]) -> list[Any]:
        self.reads.append(keys)
        return await super().get_many(records, keys)


def named(number: int) -> str:
    return f"resp_{number:05}"


async def grow(
    state: State, turns: int, *, tenant: str = "default", remembered: bool = True
) -> list[Turn]:
    """A chain of so many turns, each of two messages asked and one answered; the newest first.
    Without `remembered`, only the response before is written down, as if nothing else were."""
    chain: list[Turn] = []
    for number in range(turns):
        key = (tenant, named(number))
        said = [message("user", f"{number}.{place}") for place in range(2)]
        told = message("assistant", f"answer {number}")
        response = Response(
            Status.COMPLETED,
            created_at_s=number,
            model="m",
            runner=None,
            previous_response_id=chain[0].key[-1] if chain else None,
            input_count=len(said) if remembered else None,
            ancestors=ancestors_of(chain) if remembered else (),
        )
        body = msgspec.json.encode({"id": key[-1], "output": [told]})
        await state.commit(
            state.responses.create(key, response, body, [b'{"type":"x"}'])
            + state.items.add(key, "input", [stored(item) for item in said])
            + state.items.add(key, "output", [stored(told)])
        )
        before = response.previous_response_id
        chain.insert(0, Turn(key, response.status, response.input_count, before, [told]))
    return chain


def message(role: str, text: str) -> dict[str, Any]:
    kind = "input_text" if role == "user" else "output_text"
    content = [{"type": kind, "text": text}]
    return {
        "id": f"msg_{text.replace(' ', '_')}",
        "type": "message",
        "role": role,
        "status": "completed",
        "content": content,
    }


def stored(item: dict[str, Any]) -> NewItem:
    return NewItem(item["id"], item["type"], msgspec.json.encode(item))


# proves R2
async def test_a_chain_of_a_thousand_turns_is_few_reads() -> None:
    engine = Counting(await open_engine("memory://", LAYOUTS))
    state = State(engine)
    chain = await grow(state, 1_000)
    for length in (1, 2, 3, 64, 65, 511, 512, 513, 1_000):
        engine.reads = []
        assert await state.responses.chain("default", named(length - 1)) == chain[-length:]
        assert sum(map(len, engine.reads)) == length
        assert len(engine.reads) <= length.bit_length() + 1 + length // 200 * 2


# proves R2
async def test_a_chain_that_remembers_only_the_turn_before_is_the_same() -> None:
    state = State(await open_engine("memory://", LAYOUTS))
    assert await grow(state, 40, remembered=False) == await state.responses.chain(
        "default", named(39)
    )


# proves R6 R7
@pytest.mark.parametrize("gone", [0, 1, 5, 8, 9])
async def test_the_first_that_is_gone_is_named(gone: int) -> None:
    state = State(await open_engine("memory://", LAYOUTS))
    await grow(state, 10)
    await state.commit(state.responses.delete(await state.responses.get("default", named(gone))))
    with pytest.raises(NotFound) as refused:
        await state.responses.chain("default", named(9))
    assert refused.value.id == named(gone)


async def test_a_cycle_is_refused() -> None:
    state = State(await open_engine("memory://", LAYOUTS))
    for number in range(3):
        looped = Response(
            Status.COMPLETED, 0, "m", None, previous_response_id=named((number + 1) % 3)
        )
        await state.commit(
            state.responses.create(("default", named(number)), looped, b"{}", [b"{}"])
        )
    with pytest.raises(Conflict, match="no cycle"):
        await state.responses.chain("default", named(0))


# proves R2
async def test_what_was_said_is_sent_in_order_and_what_comes_remembers_it(
    driver: Driver, upstream: ScriptedUpstream
) -> None:
    state = driver.node.state
    chain = await grow(state, 300)
    first = await driver.answer("echo first", previous_response_id=named(299))
    then = await driver.answer("echo second", previous_response_id=first["id"])
    asked = (await upstream.received())[-1]["messages"]
    said = [text for n in range(300) for text in (f"{n}.0", f"{n}.1", f"answer {n}")]
    assert [turn["content"] for turn in asked] == [*said, "echo first", "first", "echo second"]
    held = (await state.responses.get("default", then["id"])).value
    assert held.input_count == 1
    assert held.ancestors == tuple(chain[n].key[-1] for n in (0, 2, 6, 14, 30, 62, 126, 254))


# proves R2
async def test_input_of_unknown_length_is_sent_too(
    driver: Driver, upstream: ScriptedUpstream
) -> None:
    await grow(driver.node.state, 2, remembered=False)
    await driver.answer("echo x", previous_response_id=named(1))
    asked = (await upstream.received())[-1]["messages"]
    said = ["0.0", "0.1", "answer 0", "1.0", "1.1", "answer 1", "echo x"]
    assert [turn["content"] for turn in asked] == said


# proves R6
async def test_input_that_is_gone_is_damage_unless_its_response_went_with_it(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = driver.node.state
    await grow(state, 3)
    engine = state.engine

    async def deleting(records: Records[Any], keys: Sequence[Key]) -> list[Record[Any] | None]:
        if records is ITEMS:
            held = await state.responses.get("default", named(1))
            removal = await state.items.removal(held.key)
            await state.commit(state.responses.delete(held) + removal)
        return await read(records, keys)

    read = engine.get_many
    with monkeypatch.context() as patched:
        patched.setattr(engine, "get_many", deleting)
        with pytest.raises(WireError, match=f"broken.*{named(1)}"):
            await driver.ask("x", previous_response_id=named(2))
    await state.commit(state.items.remove([("default", named(0), "input", f"{1:010d}")]))
    with pytest.raises(Damaged, match=named(0)):
        await driver.ask("x", previous_response_id=named(0))
