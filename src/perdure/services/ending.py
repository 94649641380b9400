"""How a response ends: one commit that holds everything its end means.

The same code ends a response whose upstream finished, one whose upstream failed and one whose
process died; they differ in the outcome only. Its events, the body, the output items and what the
conversation gains and lets go of are durable together or not at all.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from perdure.core.batch import Batch
from perdure.core.clock import Clock
from perdure.core.errors import Missing
from perdure.services.conversations import append_items, new_items
from perdure.surfaces.items import NewItem
from perdure.surfaces.responses import Held, Status
from perdure.surfaces.state import State
from perdure.wire import events as ev
from perdure.wire.fold import View, interrupting, take
from perdure.wire.responses import Outcome, failed, finished

_KEEPS_TURN = {Status.COMPLETED, Status.INCOMPLETE}
"""Ends after which a conversation has had the turn; after others the client may say it again."""


TOO_LARGE = failed(
    "The answer is too large to be stored as a whole. The events that were shown are kept.",
    perdure={"reason": "output_too_large"},
)


class Ending(msgspec.Struct, frozen=True):
    """The batch that ends a response, and the wire body it stores."""

    batch: Batch
    body: bytes


def close_open(view: View) -> list[ev.Event]:
    """Close every open item as incomplete, in the view too; returns the events, to be stored."""
    return take(view, *interrupting(view))


async def ending(
    state: State,
    held: Held,
    view: View,
    outcome: Outcome,
    clock: Clock,
    *,
    after: int,
    pending: Sequence[ev.Event],
    bare: bool = False,
) -> Ending:
    """The end of the response `held`, whose events amount to `view`, with nothing open.

    `after` is the number of the last entry that is durable, `pending` are the events behind it.
    `bare` leaves the output out, for one that is too large to be stored. Only reads, so it can be
    asked for again when its commit meets a `Conflict`.
    """
    assert view.response is not None, f"response {held.key[-1]} has no created event"
    output = [] if bare else view.output()
    if not bare and (abandoned := view.abandoned()):
        told = (outcome.perdure or {}) | {"abandoned": abandoned}
        outcome = msgspec.structs.replace(outcome, perdure=told)
    body = finished(view.response, outcome, output, completed_at=int(clock.now_s()))
    events = ev.encode_events([*pending, ev.terminal(body)], after=after)
    status = Status(outcome.status)
    encoded = msgspec.json.encode(body)
    outputs = new_items(output)
    batch = (
        state.responses.append_events(held.key, events, after=after)
        + state.responses.move(held, status, encoded)
        + state.items.add(held.key, "output", outputs)
    )
    if held.value.conversation_id is not None:
        batch += await _leave_conversation(
            state, held, held.value.conversation_id, outputs if status in _KEEPS_TURN else None
        )
    return Ending(batch, encoded)


async def _leave_conversation(
    state: State, held: Held, conversation_id: str, outputs: Sequence[NewItem] | None
) -> Batch:
    """Let go of the conversation; with `outputs`, add the turn to it first."""
    tenant = held.key[0]
    try:
        conversation = await state.conversations.get(tenant, conversation_id)
    except Missing:
        return Batch()
    if conversation.value.held_by != held.key[-1]:
        return Batch()
    turn: list[NewItem] = []
    if outputs is not None:
        turn = [
            NewItem(item.value.id, item.value.type, item.attachment or b"{}")
            async for item in state.items.all(held.key, "input")
        ]
        turn += outputs
    return append_items(state, conversation, turn, release=held.key[-1])
