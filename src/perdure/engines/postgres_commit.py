"""The committer: one task that makes groups of batches durable, each in one transaction.

Invariants
- Whoever decides about a record or a stream holds its lock until the transaction has ended, be it
  there or not. The lock is let go after the transaction is visible. So versions and numbers are
  given out in commit order, and a reader cannot see number n + 1 of a stream before n.
- All locks of a transaction are taken in one statement and in one global order, so two groups
  never wait for each other. What is there is read by the next statement, whose snapshot is younger
  than the locks.
- A place of an urgent collection is locked by itself, however many places a batch touches. So
  batches that touch nothing else do without the gate, and with a committer of their own they wait
  for nobody who does something else, here or in a process that was stopped inside a transaction.
- A future is resolved with a result only when the server has confirmed the commit, or has shown
  later that it took place.
- Every commit raises the number in this writer's row. When the answer to a COMMIT is lost, that
  row is asked in a new session, by a write that waits for the old session's transaction to end:
  then the number says what became of it, for good.
- A server whose row is behind what it confirmed has lost commits (it was restored, or a standby
  without them took over). Nothing more is written to it by this engine.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

import asyncpg
import xxhash

from perdure.core import batch as batches
from perdure.core.batch import Check, layout_of
from perdure.core.deciding import Place
from perdure.core.engine import EngineStats
from perdure.core.errors import (
    Closed,
    CommitUnknown,
    Invalid,
    Latched,
    PerdureError,
)
from perdure.core.layouts import Layout, Records
from perdure.core.limits import CLOCK_OFF_S, OPERATION_KEPT_S, TOMBSTONE_KEPT_S
from perdure.core.loading import check_under
from perdure.core.stored import shape_of
from perdure.core.values import Committed, Tip
from perdure.engines.group import Outcome, Request, Settle, decide_group
from perdure.engines.postgres_driver import (
    ANSWER_S,
    DRIVER_ERRORS,
    IDLE_MS,
    RESOLVE_S,
    SQL,
    Database,
    is_lost,
    is_passing,
)
from perdure.engines.postgres_group import (
    PostgresEffects,
    PostgresKnown,
    Statement,
    load,
    remove,
    write_operations,
    write_records,
    write_streams,
)
from perdure.engines.postgres_rows import find_present
from perdure.engines.postgres_schema import STREAM_IDS, Table

if TYPE_CHECKING:
    from perdure.engines.postgres_driver import Connection


GROUP_MAX = 512
GROUP_BYTES = 8 * 1024 * 1024
LOCKS_MAX = 1_000
"""Locks of one transaction. The server has room for some thousands in all, whoever takes them: a
batch that would need more takes the gate for itself, which everybody else shares."""

_SWEEP_EVERY = 1_000
_WRITER_KEPT_S = 365 * 24 * 3600
"""How long the row of a writer that was killed is kept. One that lives writes it now and then."""


class Latch:
    """Why nothing more is written, for all committers of an engine."""

    def __init__(self) -> None:
        self.why: str | None = None

    def close(self, why: str) -> None:
        """Refuse every later write; the first reason stays."""
        self.why = self.why or why


class Committer:
    """`submit` and `stop` are for the engine; the rest is one task. One that is `urgent` takes
    batches that touch nothing but urgent collections."""

    def __init__(
        self,
        database: Database,
        layouts: Sequence[Layout],
        *,
        store_id: str,
        stats: EngineStats,
        settle: Settle,
        latch: Latch,
        urgent: bool = False,
    ) -> None:
        self.id = database.clock.new_id("writer")
        self._database = database
        self._layouts = {layout.name: layout for layout in layouts}
        self._tables = {
            layout.name: Table(layout) for layout in layouts if isinstance(layout, Records)
        }
        self._logs = self._layouts.keys() - self._tables.keys()
        self._salt = store_id
        self._gate = self._number_of("gate")
        self._stats = stats
        self._settle = settle
        self._latch = latch
        self._urgent = urgent
        self._session: Connection | None = None
        self._sent = 0
        self._confirmed = 0
        self._stream_ids: deque[int] = deque()
        self._waiting: deque[Request] = deque()
        self._called = asyncio.Event()
        self._stopping = False
        self._left_to_sweep = 0
        self._task = asyncio.create_task(self._run(), name="perdure-commit")

    async def begin(self, session: Connection) -> None:
        """Take a session over, with a row of our own in it."""
        await self._database.pin_promise(session)
        await session.execute(SQL["set_writer"], self.id, 0)
        await session.execute(SQL["forget_writers"], _WRITER_KEPT_S)
        self._session = session

    def submit(self, request: Request) -> None:
        """Hand a batch over; its future is resolved by and by."""
        if self._stopping or self._task.done():
            raise Closed(f"{self._database.where} was closed.")
        self._waiting.append(request)
        self._called.set()

    async def stop(self) -> None:
        """Finish what was handed over, then leave nothing of ours behind."""
        self._stopping = True
        self._called.set()
        await asyncio.wait((self._task,))
        if self._session is not None:
            try:
                await self._session.execute(SQL["forget_writer"], self.id)
                await self._session.close(timeout=1)
            except DRIVER_ERRORS:
                self._session.terminate()

    async def _run(self) -> None:
        group: list[Request] = []
        try:
            while True:
                await self._called.wait()
                while self._waiting:
                    group = self._gather()
                    for _, alike in groupby(group, key=lambda one: one.load and id(one)):
                        await self._commit(list(alike))  # rows are loaded alone
                    group = []
                    await (self._end_stopped() if self._urgent else self._sweep())
                if self._stopping:
                    return
                self._called.clear()
        except BaseException:
            self._latch.close("the committer stopped by an internal error")
            raise
        finally:
            left = [*group, *self._waiting]
            self._waiting.clear()
            unknown = CommitUnknown(f"{self._database.where}: {self._latch.why}; reopen the store.")
            self._settle([(request.future, unknown) for request in left], {})

    def _gather(self) -> list[Request]:
        """Everything that waits, within bounds: it shares one transaction and one sync."""
        group: list[Request] = []
        size_bytes = ops = 0
        while self._waiting and len(group) < GROUP_MAX:
            batch = self._waiting[0].batch
            size_bytes += batches.size_bytes(batch)
            ops += len(batch.ops)
            if group and (size_bytes > GROUP_BYTES or ops > LOCKS_MAX):
                break
            group.append(self._waiting.popleft())
        if not self._urgent:
            self._stats.queued = len(self._waiting)
        return group

    async def _commit(self, group: list[Request]) -> None:
        """Settle a group. Where it fails as a whole and is known to be undone, each of its batches
        is tried alone, so that one that waits for a lock or touches damage fails alone."""
        tips: dict[Place, Tip] = {}
        try:
            if self._latch.why:
                raise Latched(f"{self._database.where}: {self._latch.why}. Reopen the store.")
            outcomes, tips = await self._patiently(group)
        except PerdureError as error:
            alone = isinstance(error, CommitUnknown | Latched) or self._session is None
            if len(group) > 1 and not alone:
                for request in group:
                    await self._commit([request])
                return
            outcomes = [(request.future, error) for request in group]
        self._settle(outcomes, tips)

    async def _patiently(self, group: list[Request]) -> tuple[list[Outcome], dict[Place, Tip]]:
        """Try until the group is decided; a session that is lost before its COMMIT was sent has
        committed nothing. Raises errors of ours."""

        async def attempt() -> tuple[list[Outcome], dict[Place, Tip]]:
            session = await self._connected()
            try:
                return await self._attempt(session, group)
            except BaseException as error:
                await self._undo(session, error)
                raise

        return await self._database.again(attempt)

    async def _attempt(
        self, session: Connection, group: list[Request]
    ) -> tuple[list[Outcome], dict[Place, Tip]]:
        absent = self._unknown_collections(group)
        if absent:
            raise Invalid(f"the store was opened without the collection {min(absent)}.")
        await session.execute(self._begin(group))
        effects = PostgresEffects()
        if (taken := group[0].load) is not None:
            under = group[0].batch
            known = await load(session, self._tables, group) if under else PostgresKnown()
            check_under(under, known.facts)
            known.shapes = dict(map(tuple, await session.fetch(SQL["shapes"], list(self._tables))))
            self._check_shapes(known)
            present, known.stream_ids = await find_present(session, self._tables, taken.rows)
            effects.take(taken, self._layouts, present)
            outcomes: list[Outcome] = [(group[0].future, Committed(()))]
        else:
            known = await load(session, self._tables, group)
            self._check_shapes(known)
            outcomes = decide_group(group, known, effects, self._stats)
        if not effects:
            await session.execute("ROLLBACK")
            return outcomes, {}
        await self._write(session, effects, known)
        await self._seal(session)
        self._stats.groups += 1
        self._stats.commits += sum(isinstance(done, Committed) for _, done in outcomes)
        self._left_to_sweep += effects.to_forget()
        return outcomes, effects.tips

    async def _seal(self, session: Connection) -> None:
        """Commit, or learn what became of the commit whose answer was lost."""
        clock = self._database.clock
        started_s = clock.monotonic_s()
        number = self._sent
        try:
            # A statement that is given up while the server waits for a synchronous standby counts
            # as committed, standby or not. So this one is not given up there, but here.
            done = await session.execute(
                "SET LOCAL statement_timeout = 0; COMMIT", timeout=ANSWER_S
            )
            if done != "COMMIT":
                raise asyncpg.TransactionRollbackError(f"a COMMIT was answered by {done}")
        except DRIVER_ERRORS as error:
            if not is_lost(error) and not session.is_closed():
                raise  # the server has said no, and has undone it
            session.terminate()
            self._session = None
            if not await self._took_place(number, error):
                raise asyncpg.ConnectionDoesNotExistError(
                    "it was lost before its commit"
                ) from error
        self._confirmed = number
        self._stats.sync_last_s = clock.monotonic_s() - started_s
        self._stats.sync_s += self._stats.sync_last_s

    async def _took_place(self, number: int, lost: BaseException) -> bool:
        """Whether commit `number` is there. Raises `CommitUnknown` where that cannot be learned."""

        async def ask() -> int:
            session = await self._database.connect()
            try:
                found: int = await session.fetchval(SQL["ask_writer"], self.id)
            finally:
                session.terminate()
            return found

        try:
            found = await self._database.again(
                ask,
                patience_s=RESOLVE_S,
                may_pass=lambda error: is_lost(error) or is_passing(error),
            )
        except PerdureError as error:
            raise CommitUnknown(
                f"{self._database.where}: the connection was lost while committing ({lost}), and "
                f"what became of it could not be learned ({error}) "
                "This write may or may not be there. Ask again with its operation id."
            ) from error
        return found == number

    async def _connected(self) -> Connection:
        """The session that writes, a new one where the last was lost."""
        if self._session is not None and not self._session.is_closed():
            return self._session
        session = await self._database.connect(urgent=self._urgent)
        try:
            await self._database.pin_promise(session)
            found = await session.fetchval(SQL["ask_writer"], self.id)
            if found < self._confirmed:
                self._latch.close(
                    f"the database lost what it had confirmed: it knows commit {found} of "
                    f"this process, which had {self._confirmed} confirmed. It was restored, or a "
                    "standby took over that did not have them"
                )
                raise Latched(f"{self._database.where}: {self._latch.why}. Reopen the store.")
        except BaseException:
            session.terminate()
            raise
        self._session = session
        return session

    async def _undo(self, session: Connection, error: BaseException) -> None:
        """After this, nothing of an attempt that failed is under way any more."""
        if session.is_closed() or is_lost(error):
            session.terminate()
            self._session = None
            return
        try:
            if session.is_in_transaction():
                await session.execute("ROLLBACK")
        except DRIVER_ERRORS:
            session.terminate()
            self._session = None

    def _begin(self, group: list[Request]) -> str:
        """The statements that begin a transaction and take its locks: one order for everybody, and
        shared where a place is only looked at."""
        shared: dict[int, bool] = {}
        urgent: set[int] = set()
        for request in group:
            for op in request.batch.ops:
                layout = layout_of(op)
                number = self._number_of(f"{layout.name}\x1e{op.place}")
                shared[number] = shared.get(number, True) and isinstance(op, Check)
                if layout.urgent:
                    urgent.add(number)
            if request.operation is not None:
                shared[self._number_of("\x1e".join(request.operation))] = False
            for row in request.load.rows if request.load else ():
                number = self._number_of(f"{row.at.name}\x1e{row.at.place}")
                shared[number] = False
                if (loaded := self._layouts.get(row.at.name)) is not None and loaded.urgent:
                    urgent.add(number)
        begin = "BEGIN ISOLATION LEVEL READ COMMITTED"
        if len(shared) > LOCKS_MAX:
            begin += f"; SELECT pg_advisory_xact_lock({self._gate})"
            shared = {number: shared[number] for number in urgent}
        elif not self._urgent:
            begin += f"; SELECT pg_advisory_xact_lock_shared({self._gate})"
        return begin + _locks(shared)

    def _number_of(self, name: str) -> int:
        """The lock of a place. Two places may share one, which costs time and nothing else."""
        digest = xxhash.xxh3_64_intdigest(f"{self._salt}\x1e{name}".encode())
        return digest - (1 << 64) if digest >> 63 else digest

    def _check_shapes(self, known: PostgresKnown) -> None:
        """A newer process may have given a collection more indexes, which this one does not fill.
        It cannot do so before a transaction that has read the collection ends."""
        for name, shape in known.shapes.items():
            if shape != shape_of(self._tables[name].records):
                self._latch.close(
                    f"a newer Perdure has given {name} more indexes, which this one would not fill"
                )
                raise Latched(
                    f"{self._database.where}: {self._latch.why}. Replace this process by the newer "
                    "release; meanwhile it reads."
                )

    def _unknown_collections(self, group: list[Request]) -> set[str]:
        named = {layout_of(op).name for request in group for op in request.batch.ops}
        return named - self._tables.keys() - self._logs

    async def _write(
        self, session: Connection, effects: PostgresEffects, known: PostgresKnown
    ) -> None:
        statement = Statement()
        for name in sorted(effects.records):
            write_records(statement, self._tables[name], effects.records[name], known)
        if effects.tips:
            await self._name_streams(session, effects, known)
            write_streams(statement, effects, known.stream_ids)
        if effects.operations:
            write_operations(statement, effects)
        if effects.floors:
            statement.add_rows(SQL["raise_floors"], effects.floors.items())
        if effects.gone:
            remove(statement, self._tables, effects.gone, known)
        if effects.complete:
            statement.add(SQL["forget_fact"], "copy_of")
        self._sent += 1
        statement.add(SQL["set_writer"], self.id, self._sent)
        await statement.write(session)

    async def _name_streams(
        self, session: Connection, effects: PostgresEffects, known: PostgresKnown
    ) -> None:
        """Give every new stream an id that no other was given, even one that was undone."""
        for place in effects.tips:
            if place not in known.stream_ids:
                if not self._stream_ids:
                    first = await session.fetchval(SQL["stream_ids"])
                    self._stream_ids.extend(range(first, first + STREAM_IDS))
                known.stream_ids[place] = self._stream_ids.popleft()

    async def _end_stopped(self) -> None:
        """With every sign of life, end the sessions of processes that were stopped inside a
        transaction, so that nothing is held any more when these are taken for dead."""
        session = self._session
        if session is None:
            return
        try:
            await session.execute(SQL["end_stopped"], IDLE_MS / 1000)
        except DRIVER_ERRORS as error:
            await self._undo(session, error)

    async def _sweep(self) -> None:
        """Forget what is old, faster than it comes, now and then and outside of any commit. Where
        it fails, nothing is wrong but that the next one has more to do."""
        session = self._session
        if self._left_to_sweep < _SWEEP_EVERY or session is None:
            return
        most, self._left_to_sweep = 2 * self._left_to_sweep, 0
        try:
            await session.execute(SQL["sweep_tombstones"], TOMBSTONE_KEPT_S, most)
            await session.execute(SQL["sweep_operations"], OPERATION_KEPT_S + CLOCK_OFF_S, most)
            await self._sweep_streams(session, most)
        except DRIVER_ERRORS as error:
            await self._undo(session, error)

    async def _sweep_streams(self, session: Connection, most: int) -> None:
        """Forget old drops. A log remembers the highest incarnation among them, so that no cursor
        of one fits a stream that is made again. Under the locks of those streams, or somebody who
        has just found one absent would make it again at its beginning."""
        old = await session.fetch(SQL["dropped_streams"], TOMBSTONE_KEPT_S, min(most, LOCKS_MAX))
        if not old:
            return
        numbers = sorted({self._number_of(f"{log}\x1e{key}") for _, log, key, _ in old})
        async with session.transaction():
            await session.execute(
                f"SELECT pg_advisory_xact_lock_shared({self._gate}); SELECT "
                f"pg_advisory_xact_lock(number) FROM unnest('{{{','.join(map(str, numbers))}}}'"
                "::bigint[]) AS place (number)"
            )
            ids, _, _, incarnations = zip(*old, strict=True)
            await session.execute(SQL["forget_streams"], list(ids), list(incarnations))


def _locks(shared: Mapping[int, bool]) -> str:
    """The statement that takes locks, and nothing where there are none."""
    if not shared:
        return ""
    order = sorted(shared)
    numbers = ",".join(map(str, order))
    modes = ",".join("t" if shared[number] else "f" for number in order)
    return (
        "; SELECT CASE WHEN shared "
        "THEN pg_advisory_xact_lock_shared(number) ELSE pg_advisory_xact_lock(number) END "
        f"FROM unnest('{{{numbers}}}'::bigint[], '{{{modes}}}'::boolean[]) "
        "AS place (number, shared)"
    )
