"""Responses: one answer of a model, from the moment it was accepted until it ended.

The record is a small envelope with the wire body beside it, verbatim: what GET returns is what
was stored. The events of a response are a log of their own; an event is shown to nobody before
its append is durable, and wire sequence numbers are log numbers less one.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence

import msgspec

from perdure.core import cursors
from perdure.core.batch import Batch, append, check, delete, drop, put
from perdure.core.cursors import Position, Question
from perdure.core.engine import Engine, Survives
from perdure.core.errors import Conflict, Damaged
from perdure.core.keys import Key
from perdure.core.layouts import Index, Log, Records
from perdure.core.paging import Slice, page_of
from perdure.core.promises import Durability, Promise
from perdure.core.values import Page, Record
from perdure.wire.errors import NotFound, previous_response_not_found
from perdure.wire.items import Item
from perdure.wire.responses import output_of


class Status(enum.Enum):
    """Where a response stands; the names are the wire's."""

    QUEUED = "queued"
    IN_PROGRESS = "in_progress"
    COMPLETED = "completed"
    INCOMPLETE = "incomplete"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def terminal(self) -> bool:
        """Whether nothing follows."""
        return not MOVES[self]


MOVES: dict[Status, frozenset[Status]] = {
    Status.QUEUED: frozenset({Status.IN_PROGRESS, Status.FAILED, Status.CANCELLED}),
    Status.IN_PROGRESS: frozenset(
        {
            Status.IN_PROGRESS,
            Status.COMPLETED,
            Status.INCOMPLETE,
            Status.FAILED,
            Status.CANCELLED,
        }
    ),
    Status.COMPLETED: frozenset(),
    Status.INCOMPLETE: frozenset(),
    Status.FAILED: frozenset(),
    Status.CANCELLED: frozenset(),
}
"""Every transition there is. The first terminal state wins; a move needs the version it saw.
`IN_PROGRESS` follows itself where a job that was taken over begins another attempt."""


class Response(msgspec.Struct, frozen=True):
    """The envelope. `runner` is the boot that generates it while its client waits, None once it has
    ended, so that the sparse index `unfinished` holds exactly what a crash leaves without an owner.
    One that was asked for in the background has no runner but the job `job_id`, which has.
    `input_count` is the number of its input items, None where that was not written down;
    `ancestors` are what `ancestors_of` makes of its chain."""

    status: Status
    created_at_s: int
    model: str
    runner: str | None
    previous_response_id: str | None = None
    conversation_id: str | None = None
    job_id: str | None = None
    input_count: int | None = None
    ancestors: tuple[str, ...] = ()

    @property
    def state(self) -> str:
        """The status as indexes hold it."""
        return self.status.value

    @property
    def awaits(self) -> str | None:
        """The job that is to end it."""
        return None if self.status.terminal else self.job_id


RESPONSES = Records(
    "responses",
    Response,
    key=("tenant", "response_id"),
    indexes=(
        Index("unfinished", ("runner",), every_tenant=True),
        Index("in_background", ("awaits",), every_tenant=True),
        Index("by_age", ("created_at_s",)),
        Index("by_state", ("state", "created_at_s")),
        Index("aged", ("created_at_s",), every_tenant=True),
        Index("by_previous", ("previous_response_id",)),
    ),
)


class Expiring(msgspec.Struct, frozen=True):
    """Retention is about to remove the response of this id, unless another continues it."""

    since_s: int


EXPIRING = Records("responses_expiring", Expiring, key=("tenant", "response_id"))
"""While a response stands here, nothing new can continue it: what continued it before can be seen,
and what would continue it afterwards is refused. So none ever loses its ancestor to retention."""

EVENTS = Log("response_events", msgspec.Raw, key=("tenant", "response_id"))

Held = Record[Response]

_ROUND = 200
"""Responses of a chain read at once; each comes with its whole body."""


class Turn(msgspec.Struct, frozen=True):
    """What a response means to those that continue it: whether it has ended, and what was said."""

    key: Key
    status: Status
    input_count: int | None
    previous_response_id: str | None
    output: list[Item]


def ancestors_of(chain: Sequence[Turn]) -> tuple[str, ...]:
    """What a response remembers of the chain it continues, which is given the newest first: the
    ones 2, 4, 8, ... before it. With one step from each, every one of a chain is as few reads
    away as there are ones in the binary number of its distance."""
    return tuple(chain[(1 << bits) - 1].key[-1] for bits in range(1, len(chain).bit_length()))


class Responses:
    """Reads of responses, and the batches that write them."""

    promise = Promise(
        surface="responses",
        durability=Durability.SHARED,
        acknowledgement="an event is durable before a client sees it, the end before the answer",
        survives=Survives(process_crash=True, power_cut=True, failed_sync=True, damage=True),
        owner="the boot that generates it, named in the record, or the job that does",
        recovery="what a dead process was generating ends as failed and keeps its output; "
        "in the background it is taken over",
        retention="until deleted, or retention.responses_days after they were created; never what "
        "a later response continues",
        layouts=(RESPONSES, EVENTS, EXPIRING),
        statements=("C3", "C4", "R2", "R3", "R4", "R5", "R6", "R7", "R13"),
    )

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def get(self, tenant: str, response_id: str) -> Held:
        """The response's record; its attachment is the wire body. Raises `Missing`."""
        record = await self._engine.get(RESPONSES, (tenant, response_id))
        if record is None:
            raise NotFound("Response", response_id)
        return record

    async def chain(self, tenant: str, response_id: str) -> list[Turn]:
        """The response and the ones before it, the newest first.

        Raises `Missing` naming the first that is gone, and `Conflict` on a cycle.
        """
        found = await self._found(tenant, response_id)
        turns: list[Turn] = []
        wanted: str | None = response_id
        while wanted is not None:
            if wanted not in found:
                raise NotFound("Response", wanted)
            if len(turns) == len(found):
                raise Conflict(f"the chain of response {response_id}", "no cycle", wanted)
            turns.append(found[wanted])
            wanted = turns[-1].previous_response_id
        return turns

    async def _found(self, tenant: str, response_id: str) -> dict[str, Turn]:
        """The response and every one before it that is there, in no order."""
        found: dict[str, Turn] = {}
        wanted = [response_id]
        asked: set[str | None] = {None, response_id}
        while wanted:
            keys = [(tenant, id) for id in wanted[:_ROUND]]
            del wanted[:_ROUND]
            for held in await self._engine.get_many(RESPONSES, keys):
                if held is None:
                    continue
                found[held.key[-1]] = _turn(held)
                before = {held.value.previous_response_id, *held.value.ancestors} - asked
                wanted += [id for id in before if id is not None]
                asked |= before
        return found

    async def unfinished(self, *, limit: int, cursor: str | None = None) -> Page[Held]:
        """Responses of every tenant that a boot generates while clients wait. Raises `Damaged`,
        which can resume."""
        return await self._engine.scan(
            RESPONSES, (), index="unfinished", limit=limit, cursor=cursor
        )

    async def in_background(self, *, limit: int, cursor: str | None = None) -> Page[Held]:
        """Responses of every tenant that a job is to end. Raises `Damaged`, which can resume."""
        return await self._engine.scan(
            RESPONSES, (), index="in_background", limit=limit, cursor=cursor
        )

    async def page(
        self,
        tenant: str,
        wanted: Slice[Response],
        *,
        status: Status | None = None,
    ) -> Page[Held]:
        """Responses in the order they were created, of one status where it is given. Raises
        `Damaged`, which can resume."""
        index, where = ("by_age", ()) if status is None else ("by_state", (status.value,))
        return await page_of(self._engine, RESPONSES, (tenant,), wanted, index=index, where=where)

    async def older_than(
        self, created_before_s: int, *, limit: int, cursor: str | None = None
    ) -> Page[Held]:
        """Responses of every tenant created before a time, the newest of them first, so that one
        comes before what it continues. Raises `Damaged`, which can resume."""
        if cursor is None:
            question = Question(self._engine.store_id, RESPONSES.name, (), "aged", (), True)
            cursor = cursors.pack(question, Position((created_before_s,), ""))
        return await self._engine.scan(
            RESPONSES, (), index="aged", limit=limit, cursor=cursor, descending=True
        )

    async def continued_by(self, key: Key, *, limit: int) -> list[Key]:
        """Responses that continue this one directly, at most `limit`."""
        page = await self._engine.scan(
            RESPONSES, key[:1], index="by_previous", where=(key[-1],), limit=limit
        )
        return [record.key for record in page.items]

    async def expiring(self, *, limit: int) -> list[Key]:
        """Responses that a removal had begun with and did not come to an end."""
        page = await self._engine.scan(EXPIRING, (), limit=limit)
        return [record.key for record in page.items]

    def expire(self, key: Key, since_s: int) -> Batch:
        """From here on nothing new continues this response."""
        return put(EXPIRING, key, Expiring(since_s))

    def spare(self, key: Key, marked: int | None) -> Batch:
        """It stays, and may be continued again; or it is gone. `marked` is the version of the
        mark: `Conflict` where somebody else took that away."""
        return delete(EXPIRING, key, expect=marked)

    async def continuing(self, tenant: str, previous_response_id: str) -> Batch:
        """Commit a response that continues another together with this: `Conflict` where that one
        was removed since, or is about to be. Raises `WireError` where it is gone already."""
        try:
            held = await self.get(tenant, previous_response_id)
        except NotFound:
            raise previous_response_not_found(previous_response_id) from None
        return check(RESPONSES, held.key, held.version) + check(EXPIRING, held.key, 0)

    def create(self, key: Key, response: Response, body: bytes, events: Sequence[bytes]) -> Batch:
        """A new response with its first events."""
        return put(RESPONSES, key, response, attachment=body, expect=0) + self.append_events(
            key, events, after=0
        )

    def delete(self, held: Held) -> Batch:
        """Delete a response and its events."""
        return delete(RESPONSES, held.key, expect=held.version) + drop(EVENTS, held.key)

    def append_events(self, key: Key, events: Sequence[bytes], *, after: int) -> Batch:
        """Add wire events. `after` is the last number its writer knows: a writer that was
        replaced meanwhile gets `Conflict`."""
        return append(EVENTS, key, [msgspec.Raw(event) for event in events], after=after)

    def move(self, held: Held, status: Status, body: bytes) -> Batch:
        """Change the status and the wire body.

        Raises `Conflict` for a transition that `MOVES` does not have.
        """
        if status not in MOVES[held.value.status]:
            raise Conflict(f"response {held.key[-1]}", status.value, held.value.status.value)
        runner = None if status.terminal else held.value.runner
        changed = msgspec.structs.replace(held.value, status=status, runner=runner)
        return put(RESPONSES, held.key, changed, attachment=body, expect=held.version)


def _turn(held: Held) -> Turn:
    value = held.value
    output = output_of(wire_body(held))
    return Turn(held.key, value.status, value.input_count, value.previous_response_id, output)


def wire_body(held: Held) -> bytes:
    """The response as it was stored, to be given out unchanged. Raises `Damaged` without one."""
    if held.attachment is None:
        raise Damaged(f"response {held.key[-1]}", "its body is gone")
    return held.attachment
