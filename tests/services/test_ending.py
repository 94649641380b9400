"""How a response ends: what its last commit holds, seen from below the services."""

from __future__ import annotations

from perdure.core.batch import Append, Batch, Put
from perdure.core.values import Committed
from perdure.engines.wrapping import Wrapping
from perdure.services.lifecycle import Node
from perdure.surfaces.conversations import CONVERSATIONS
from perdure.surfaces.items import ITEMS
from perdure.surfaces.responses import EVENTS, RESPONSES
from tests.services.conftest import Driver, Open


class Recording(Wrapping):
    """Remembers every batch that was committed, in order."""

    batches: list[Batch]

    async def commit(self, batch: Batch) -> Committed:
        committed = await self.engine.commit(batch)
        self.batches.append(batch)
        return committed


def recording(engine: object) -> Recording:
    wrapper = Recording(engine)
    wrapper.batches = []
    return wrapper


def batches_of(node: Node, response_id: str) -> list[Batch]:
    engine = node.state.engine
    assert isinstance(engine, Recording)
    return [batch for batch in engine.batches if any(response_id in op.key for op in batch.ops)]


# proves R3
async def test_one_commit_holds_everything_that_an_end_means(opened: Open) -> None:
    driver: Driver = await opened(wrap=recording)
    conversation = await driver.conversation("hello")
    ended = await driver.answer("slow 0.01 5", conversation=conversation)
    *earlier, last = batches_of(driver.node, ended["id"])
    written = {(op.records.name, op.key[1]) for op in last.ops if isinstance(op, Put)}
    assert written == {
        (RESPONSES.name, ended["id"]),
        (ITEMS.name, ended["id"]),
        (ITEMS.name, conversation),
        (CONVERSATIONS.name, conversation),
    }
    assert b"response.completed" in last_event(last)
    assert not any(terminal(batch) for batch in earlier)
    assert terminal(last)


# proves R3
async def test_earlier_events_precede_the_end(opened: Open) -> None:
    driver: Driver = await opened(wrap=recording)
    ended = await driver.answer("slow 0.01 5")
    appended = [
        (op.after, len(op.entries))
        for batch in batches_of(driver.node, ended["id"])
        for op in batch.ops
        if isinstance(op, Append) and op.log is EVENTS
    ]
    assert len(appended) > 2
    number = 0
    for after, count in appended:
        assert after == number
        number += count


def last_event(batch: Batch) -> bytes:
    return next(op.entries[-1] for op in batch.ops if isinstance(op, Append))


def terminal(batch: Batch) -> bool:
    """Whether a batch moves a response to its end."""
    return any(
        RESPONSES.decode(op.key, op.value).status.terminal
        for op in batch.ops
        if isinstance(op, Put) and op.records is RESPONSES
    )
