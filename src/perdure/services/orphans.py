"""Tool calls whose output never came, because the program that was to run them died.

A model cannot be given a call without an output, so one such call would end its chain or
conversation for good. Here the past is told as it was: right after the turn that called, an output
says that there was none; an output that comes after the model has gone on without it is a message.
Nothing of this is stored, and the same past is always told in the same words, so that a model
server's prefix cache stays good.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from perdure.wire.items import Item, text_of

UNANSWERED = (
    "This call was never answered: the program that was to run it ended before it gave an output. "
    "Whether it took effect is not known."
)
LATE = "The output of the call {call_id}, which came only now:\n\n"

_ID_CHARS_MAX = 64


class Told(msgspec.Struct, frozen=True):
    """The past as it can be told, and the calls that were given an output to make it so."""

    history: list[Item]
    items: list[Item]
    orphans: list[Item]


class _Turn(msgspec.Struct):
    """Calls of one turn of the model: their places, by id, until each is answered; and where the
    turn ended, once its client has spoken."""

    awaited: dict[str, int]
    end: int | None = None


def repaired(history: Sequence[Item], items: Sequence[Item]) -> Told:
    """Give an output to every call of `history` that was left without one. Calls in `items` are
    their sender's to answer, who can still send the request again."""
    everything = [*history, *items]
    told: dict[int, list[Item]] = {}
    orphans: dict[int, Item] = {}
    abandoned: set[str] = set()
    turn = _Turn({})

    def leave(turn: _Turn) -> None:
        for call_id, place in turn.awaited.items():
            if place < len(history):
                orphans[place] = everything[place]
                abandoned.add(call_id)
                end = len(history) if turn.end is None else turn.end
                told.setdefault(end, []).append(_unanswered(everything[place]))

    for place, item in enumerate(everything):
        if _by_model(item):
            if turn.end is not None:
                leave(turn)
                turn = _Turn({})
            if item["type"] == "function_call" and item["status"] == "completed":
                turn.awaited[item["call_id"]] = place
            continue
        turn.end = place if turn.end is None else turn.end
        if item["type"] != "function_call_output":
            continue
        if turn.awaited.pop(item["call_id"], None) is None and item["call_id"] in abandoned:
            everything[place] = _late(item)
    leave(turn)
    if not orphans:
        return Told(list(history), list(items), [])
    past = [
        it
        for place in range(len(history) + 1)
        for it in (*told.get(place, ()), *everything[place : min(place + 1, len(history))])
    ]
    return Told(past, everything[len(history) :], list(orphans.values()))


def _by_model(item: Item) -> bool:
    return item.get("role") == "assistant" or item["type"] in ("function_call", "reasoning")


def _unanswered(call: Item) -> Item:
    return {
        "id": f"{call['id']}_unanswered"[-_ID_CHARS_MAX:],
        "type": "function_call_output",
        "call_id": call["call_id"],
        "status": "completed",
        "output": UNANSWERED,
    }


def _late(output: Item) -> Item:
    text = LATE.format(call_id=output["call_id"]) + text_of(output)
    return {
        "id": output["id"],
        "type": "message",
        "role": "user",
        "status": "completed",
        "content": [{"type": "input_text", "text": text}],
    }
