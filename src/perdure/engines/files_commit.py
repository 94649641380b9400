"""The committer: groups of batches, each one frame of the journal and one sync, and the files that
follow behind.

All decisions are made on the event loop, where the state lives. Two threads only write: one the
journal, one the files.

Invariants
- A future is resolved with a result only after the sync of its group's frame has returned, and the
  state holds a group only then.
- The files are written from the state as of one commit. The journal starts over only when that is
  durable and the manifest says so, and keeps the frames of all commits after it.
- What is committed and not in the files is bounded: beyond `OVERLAY_BYTES_MAX`, or so many files
  to be written, a commit waits for them.
- After a sync that failed, of the journal or of a file, nothing is written any more.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from itertools import groupby

from perdure.core import batch as batches
from perdure.core.deciding import Place
from perdure.core.engine import EngineStats
from perdure.core.errors import (
    Closed,
    CommitUnknown,
    Latched,
    PerdureError,
    StorageFull,
    Unavailable,
)
from perdure.core.layouts import Layout
from perdure.core.loading import check_under
from perdure.core.offload import Lane
from perdure.core.values import Committed, Tip
from perdure.engines.files_journal import sealed
from perdure.engines.files_recovery import Store
from perdure.engines.files_rows import find_present
from perdure.engines.files_state import FilesEffects
from perdure.engines.group import Outcome, Request, Settle, decide_group

GROUP_MAX = 512
GROUP_BYTES = 8 * 1024 * 1024
OVERLAY_BYTES_MAX = 64 * 1024 * 1024
"""Of frames that the files do not hold yet. One group may exceed it."""

OVERLAY_FILES_MAX = 4_000
"""The same in files to be written. Each takes a sync, so this bounds how long a stop takes."""

HELD_BYTES_MAX = 4 * OVERLAY_BYTES_MAX
"""The same while a backup keeps the files as they are."""

JOURNAL_BYTES = 16 * 1024 * 1024
"""The journal starts over when it is larger than this, and twice as large as the manifest that has
to be written for it."""

_APPLY_BYTES = 4 * 1024 * 1024
_APPLY_FILES = 256
APPLY_AFTER_S = 0.25
"""How long the files wait for more, so that what changes often is written once."""


class Committer:
    """`submit`, `flush`, `holding` and `stop` are for the engine; the rest is two tasks."""

    def __init__(
        self, store: Store, layouts: Sequence[Layout], stats: EngineStats, settle: Settle
    ) -> None:
        self.latched: str | None = None
        self._store = store
        self._state = store.state
        self._layouts = {layout.name: layout for layout in layouts}
        self._where = str(store.place.root)
        self._stats = stats
        self._settle = settle
        self._journal_lane = Lane("perdure-commit")
        self._files_lane = Lane("perdure-apply")
        self._waiting: deque[Request] = deque()
        self._called = asyncio.Event()
        self._stopping = False
        self._stopped = False
        self._behind = asyncio.Event()
        """Set while the files lack something."""
        self._hurry = asyncio.Event()
        self._round = asyncio.Event()
        """Set, and replaced, at the end of each attempt to write the files."""
        self._kept_behind: Unavailable | None = None
        """What the last attempt to write the files failed with."""
        self._holders = 0
        self._writing_files = asyncio.Lock()
        self._writing_journal = asyncio.Lock()
        self._committing = asyncio.create_task(self._commit_all(), name="perdure-commit")
        self._applying = asyncio.create_task(self._apply_all(), name="perdure-apply")
        self._applying.add_done_callback(self._applying_ended)

    def submit(self, request: Request) -> None:
        """Hand a batch over; its future is resolved by and by."""
        if self._stopping or self._committing.done():
            raise Closed(f"{self._where} was closed.")
        self._waiting.append(request)
        self._called.set()

    def latch(self, why: str) -> None:
        """Refuse every later write; the first reason stays."""
        self.latched = self.latched or why

    async def flush(self) -> None:
        """Return when the files hold all that is committed now. Raises `StorageFull`, `Latched`."""
        number = self._state.number
        while self._state.applied < number:
            await self._next_round()

    @asynccontextmanager
    async def holding(self) -> AsyncIterator[None]:
        """Leave the files as they are, while commits go on."""
        self._holders += 1
        try:
            async with self._writing_files:
                yield
        finally:
            self._holders -= 1

    @property
    def held_too_long(self) -> bool:
        """Whether so much was committed meanwhile that the files must be let go."""
        return self._state.waiting_bytes > HELD_BYTES_MAX

    async def stop(self) -> None:
        """Finish what was handed over, files included. Raises what kept the files behind."""
        self._stopping = True
        self._called.set()
        await asyncio.wait((self._committing,))
        try:
            if not self.latched:
                await self.flush()
        finally:
            async with self._writing_files:
                self._stopped = True
            self._behind.set()
            self._hurry.set()
            await asyncio.wait((self._applying,))
            self._journal_lane.close()
            self._files_lane.close()

    async def _commit_all(self) -> None:
        group: list[Request] = []
        try:
            while True:
                await self._called.wait()
                while self._waiting:
                    group = self._gather()
                    for _, alike in groupby(group, key=lambda one: one.load and id(one)):
                        await self._commit(list(alike))  # rows are loaded alone
                    group = []
                if self._stopping:
                    return
                self._called.clear()
        except BaseException:
            self.latch("the committer stopped by an internal error")
            raise
        finally:
            left = [*group, *self._waiting]
            self._waiting.clear()
            unknown = CommitUnknown(f"{self._where}: {self.latched}; reopen the store.")
            self._settle([(request.future, unknown) for request in left], {})

    def _gather(self) -> list[Request]:
        """Everything that waits, within bounds: it shares one sync."""
        group: list[Request] = []
        size_bytes = 0
        while self._waiting and len(group) < GROUP_MAX and size_bytes < GROUP_BYTES:
            group.append(self._waiting.popleft())
            size_bytes += batches.size_bytes(group[-1].batch)
        self._stats.queued = len(self._waiting)
        return group

    async def _commit(self, group: list[Request]) -> None:
        """Settle a group. Where there is no space for all of it, each of its batches is tried
        alone."""
        tips: dict[Place, Tip] = {}
        try:
            self._check_latch()
            outcomes, tips = await self._attempt(group)
        except PerdureError as error:
            if len(group) > 1 and not self.latched:
                for request in group:
                    await self._commit([request])
                return
            outcomes = [(request.future, error) for request in group]
        self._settle(outcomes, tips)

    async def _attempt(self, group: list[Request]) -> tuple[list[Outcome], dict[Place, Tip]]:
        state, effects = self._state, FilesEffects()
        if (taken := group[0].load) is not None:
            present = find_present(self._store, taken.rows)
            check_under(group[0].batch, state.known(group).facts)
            effects.take(taken, self._layouts, present)
            outcomes: list[Outcome] = [(group[0].future, Committed(()))]
        else:
            outcomes = decide_group(group, state.known(group), effects, self._stats)
        if not effects:
            return outcomes, {}
        frame = effects.frame(state.number + 1, int(self._store.place.clock.now_s()))
        data = sealed(frame, state.store_id)
        await self._make_room()
        async with self._writing_journal:
            try:
                await self._journal_lane.run(self._write, frame.number, data)
            except CommitUnknown as error:
                self.latch(f"a commit failed ({error.__cause__})")
                raise
            state.take(frame, data)
        self._stats.groups += 1
        self._stats.commits += sum(isinstance(done, Committed) for _, done in outcomes)
        self._behind.set()
        if state.waiting_bytes > _APPLY_BYTES or state.waiting_files > _APPLY_FILES:
            self._hurry.set()
        return outcomes, effects.tips

    def _write(self, number: int, data: bytes) -> None:
        """In the journal's thread: write, sync, and note that it is durable before anyone is
        told."""
        journal, mark, clock = self._store.journal, self._store.mark, self._store.place.clock
        assert journal is not None
        assert mark is not None
        started_s = clock.monotonic_s()
        journal.append(data)
        self._stats.sync_last_s = clock.monotonic_s() - started_s
        self._stats.sync_s += self._stats.sync_last_s
        self._stats.log_size_bytes = journal.size_bytes
        try:
            mark.write(number)
        except OSError as error:
            self.latch(f"the mark of the last commit could not be written ({error})")

    async def _make_room(self) -> None:
        """Wait until the files have caught up, if they are far behind."""
        state = self._state
        while state.waiting_bytes > OVERLAY_BYTES_MAX or state.waiting_files > OVERLAY_FILES_MAX:
            if self._holders and not self.held_too_long:
                return
            await self._next_round()

    async def _next_round(self) -> None:
        """Return when another attempt to write the files has ended. Raises what it failed with."""
        self._check_latch()
        ended = self._round
        self._behind.set()
        self._hurry.set()
        await ended.wait()
        self._check_latch()
        if self._kept_behind is not None:
            raise self._kept_behind

    async def _apply_all(self) -> None:
        while True:
            await self._behind.wait()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._hurry.wait(), APPLY_AFTER_S)
            async with self._writing_files:
                if self._stopped:
                    return
                self._behind.clear()
                self._hurry.clear()
                try:
                    await self._apply()
                except Exception as error:
                    self.latch(f"the files stopped by an internal error ({error!r})")
                    raise
                finally:
                    self._round.set()
                    self._round = asyncio.Event()

    def _applying_ended(self, applying: asyncio.Task[None]) -> None:
        """Nobody waits for files that nobody writes any more."""
        if not self._stopped:
            self.latch("nobody writes the files any more")
        self._round.set()

    async def _apply(self) -> None:
        """Bring the files up to date. Where there is no space for that, they stay behind until the
        next commit; the journal has it all."""
        if self.latched:
            return
        work = self._state.work()
        try:
            streams = await self._files_lane.run(self._store.applier.apply, work)
            self._state.done(work, streams)
            journal = self._store.journal
            size_bytes = journal.size_bytes if journal is not None else 0
            if size_bytes > max(JOURNAL_BYTES, 2 * self._store.manifest_bytes):
                await self._start_over()
            self._kept_behind = None
        except StorageFull as full:
            self._kept_behind = full
        except (OSError, Unavailable) as error:
            self._kept_behind = Unavailable(f"{self._where}: a file could not be written: {error}.")
            self.latch(f"a file could not be written ({error})")

    async def _start_over(self) -> None:
        """Write the manifest, then a journal of the commits that the files may lack."""
        state = self._state
        state.sweep(int(self._store.place.clock.now_s()))
        head, rows = state.manifest()
        await self._files_lane.run(self._store.write_manifest, head, rows)
        async with self._writing_journal:
            frames = [data for number, data in state.frames if number > head.applied]
            await self._journal_lane.run(self._store.start_journal, head.applied, frames)

    def _check_latch(self) -> None:
        if self.latched:
            raise Latched(f"{self._where}: {self.latched}. Reopen the store to recover it.")
