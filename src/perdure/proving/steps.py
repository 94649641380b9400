"""A history that can be judged in any engine: writers whose every step is known beforehand.

Step n of a writer is one commit: a record of its own, a record that says which step was the last,
and an entry of its stream. So the number of steps that were acknowledged says every byte that
must be there, and one look says whether a commit was split.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from perdure.core.batch import Batch, append, put
from perdure.core.engine import Engine
from perdure.core.errors import PerdureError
from perdure.core.layouts import Index, Log, Records

TENANT = "t"


class Note(msgspec.Struct):
    """What the proofs of engines keep."""

    text: str
    state: str | None = None
    at: int | None = None


NOTES = Records(
    "notes",
    Note,
    key=("tenant", "note"),
    indexes=(Index("by_state", ("state", "at")), Index("due", ("at",), every_tenant=True)),
)
EVENTS = Log("events", Note, key=("tenant", "stream"))
LAYOUTS = (NOTES, EVENTS)


def step(writer: int, number: int) -> Batch:
    """What one acknowledgement covers. Steps are of many sizes, so that pages split and join."""
    note = _note(writer, number)
    return (
        put(NOTES, (TENANT, f"w{writer}-{number}"), note, expect=0)
        + put(NOTES, (TENANT, f"last-{writer}"), note)
        + append(EVENTS, (TENANT, f"w{writer}"), [Note(note.text)], after=number - 1)
    )


def _note(writer: int, number: int) -> Note:
    text = f"{writer}-{number} " + "x" * (number * 37 % 1500)
    return Note(text, "open" if number % 2 else None, number)


async def last_step(engine: Engine, writer: int) -> int:
    """The last step of a writer that is there. Raises `Unsound` unless all before it are, whole
    and equal, and nothing of a later one is."""
    last = (await engine.tip(EVENTS, (TENANT, f"w{writer}"))).last
    for number in range(1, last + 1):
        expected = _note(writer, number)
        record = await engine.get(NOTES, (TENANT, f"w{writer}-{number}"))
        if record is None or record.value != expected:
            raise Unsound(f"record {number} of writer {writer} is not what was committed")
        read = await engine.read(EVENTS, (TENANT, f"w{writer}"), after=number - 1, limit=1)
        if [(one.seq, one.value) for one in read] != [(number, Note(expected.text))]:
            raise Unsound(f"entry {number} of writer {writer} is not what was committed")
    newest = await engine.get(NOTES, (TENANT, f"last-{writer}"))
    if (newest.value.at, newest.version) != (last, last) if newest else last:
        raise Unsound(f"writer {writer} has {last} entries and its last record is {newest}")
    if await engine.get(NOTES, (TENANT, f"w{writer}-{last + 1}")) is not None:
        raise Unsound(f"writer {writer} has {last} entries and a record beyond them")
    return last


async def troubles(
    engine: Engine, acknowledged: Mapping[int, int], begun: Mapping[int, int]
) -> list[str]:
    """What does not hold in a store that came back: every step acknowledged is there, none beyond
    those begun, each whole; `verify` finds nothing, and a new step works. `acknowledged` and
    `begun` are the last step of each writer."""
    wrong: list[str] = []
    for writer, least in acknowledged.items():
        try:
            last = await last_step(engine, writer)
            if not least <= last <= begun[writer]:
                wrong.append(
                    f"writer {writer}: {least} steps acknowledged, {begun[writer]} begun, "
                    f"{last} there"
                )
            await engine.commit(step(writer, last + 1))
            if await last_step(engine, writer) != last + 1:
                wrong.append(f"writer {writer}: a new step is not there")
        except (Unsound, PerdureError) as error:
            wrong.append(f"writer {writer}: {error}")
    wrong += [f"verify: {found.where}: {found.why}" async for found in engine.verify()]
    return wrong


class Unsound(AssertionError):
    """A store holds what nobody committed, or part of a commit."""
