"""Retiring workers: one that has ended is archived, or purged, under the id of an operation.

The operation's record is written with the worker's last change of status, so nothing is written for
the worker from then on. The source is removed in the last commit, and only once the archive was
read back and is what was to be kept, byte for byte. A crash leaves the source, or the whole
archive; the next boot goes on with it, or whoever sends the operation again. Several may do so at
once: they write the same, and the last commit is that of one of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import msgspec

from perdure.core import codec
from perdure.core.batch import join
from perdure.core.clock import Clock
from perdure.core.errors import Conflict, Damaged
from perdure.core.keys import Key, show
from perdure.core.layouts import Log
from perdure.core.values import Finding
from perdure.services.conversations import decided
from perdure.services.recovery import unfinished
from perdure.surfaces.retentions import Held, Retention
from perdure.surfaces.state import State
from perdure.surfaces.workers import TRANSCRIPTS, WORKER_EVENTS, Diagnostic
from perdure.wire.errors import NotFound
from perdure.wire.workers import NotPossible, OtherFingerprint, RetainBody

PART_BYTES = 4 * 1024 * 1024
"""A part of an archive has at least so many, but for the last."""

_READ = 100
_REMOVED = 1_000


class _Part(msgspec.Struct, frozen=True):
    lines: int
    data: bytes


class Retiring:
    """Archives and purges workers of one state."""

    def __init__(self, state: State, clock: Clock) -> None:
        self._state = state
        self._workers = state.runtimes
        self._retentions = state.retentions
        self._clock = clock

    async def retain(self, key: Key, asked: RetainBody) -> tuple[Key, Retention]:
        """Archive or purge a worker. The same operation again goes on with it, or finds it done."""
        operation = (*key[:2], asked.operation_id)

        async def begin() -> None:
            found = await self._retentions.find(operation)
            if found is None:
                held, counts = await self._workers.get(key), await self._workers.state(key)
                at_s, event_id = int(self._clock.now_s()), self._clock.new_id("evt")
                begun = Retention(key[-1], asked.mode, at_s)
                moved, _ = self._workers.move(held, counts, "retired", event_id, at_s=at_s)
                await self._state.commit(moved + self._retentions.keep(operation, begun, expect=0))
            elif (found.value.worker_id, found.value.mode) != (key[-1], asked.mode):
                where = f"operation {show(operation)}"
                was = f"{found.value.mode} {found.value.worker_id}"
                raise OtherFingerprint(where, f"{asked.mode} {key[-1]}", was)

        await decided(begin, f"worker {show(key)}")
        return operation, await self._complete(operation)

    async def archive(self, operation: Key) -> AsyncGenerator[bytes, None]:
        """What an operation archived, a line an entry. Raises `Damaged` where it is not what it
        was."""
        found = await self._retentions.get(operation)
        if found.value.digest is None or found.value.removed_at_s is not None:
            raise NotFound("Archive", operation[-1])
        digest = hashlib.sha256()
        for number in range(found.value.parts):
            data = await self._retentions.part(operation, number)
            digest.update(data)
            yield data
        _require_same(operation, found.value.digest, digest.hexdigest())

    async def remove_archive(self, operation: Key) -> Retention:
        """Remove what an operation archived, for good. One that is removed already stays so.
        Raises `NotFound` where nothing was archived, `NotPossible` before that is done."""

        async def begin() -> None:
            found = await self._retentions.get(operation)
            if found.value.mode != "archive":
                raise NotFound("Archive", operation[-1])
            if not found.value.done:
                raise NotPossible(f"operation {show(operation)}", "done", "under way")
            if found.value.removed_at_s is None:
                at_s = int(self._clock.now_s())
                removed = msgspec.structs.replace(found.value, removed_at_s=at_s)
                await self._state.commit(
                    self._retentions.keep(operation, removed, expect=found.version)
                )

        await decided(begin, f"operation {show(operation)}")
        return await self._complete(operation)

    async def sweep(self) -> None:
        """Go on with every operation of which something is left. What is damaged is told once, and
        keeps no other from being completed."""
        findings: list[Finding] = []
        async for held in unfinished(self._retentions.waiting, findings):
            try:
                await self._complete(held.key)
            except Damaged as damage:
                at_s, (tenant, runtime_id, _) = int(self._clock.now_s()), held.key
                told = Diagnostic("damaged", damage.where, damage.why, at_s, held.value.worker_id)
                try:
                    await self._state.commit(self._workers.diagnose(tenant, runtime_id, told))
                except Conflict:  # it was told before
                    continue

    async def _complete(self, operation: Key) -> Retention:
        """Do what is left of an operation, whoever else is at it."""

        async def attempt() -> Retention:
            held = await self._retentions.get(operation)
            if held.value.waits is None:
                return held.value
            if held.value.done:
                return await self._remove_archive(held)
            try:
                return await self._remove_worker(held)
            except NotFound as gone:
                where = f"operation {show(operation)}"
                again = await self._retentions.find(operation)
                if again is not None and again.version == held.version:
                    raise Damaged(where, "it is not done, and its worker is not there") from gone
                raise Conflict(where, "not done", "done") from gone  # another was faster

        return await decided(attempt, f"operation {show(operation)}")

    async def _remove_archive(self, held: Held) -> Retention:
        for first in range(0, held.value.parts, _REMOVED):
            numbers = range(first, min(first + _REMOVED, held.value.parts))
            removed = self._retentions.remove_parts(held.key, numbers)
            await self._state.commit(self._retentions.unchanged(held) + removed)
        gone = msgspec.structs.replace(held.value, parts=0)
        await self._state.commit(self._retentions.keep(held.key, gone, expect=held.version))
        return gone

    async def _remove_worker(self, found: Held) -> Retention:
        key, done = (*found.key[:2], found.value.worker_id), found.value
        if done.mode == "archive":
            done = await self._archived(key, found)
        while page := await self._workers.submissions(key, limit=_REMOVED):
            removed = join(map(self._workers.forget, page))
            await self._state.commit(self._retentions.unchanged(found) + removed)
        done = msgspec.structs.replace(done, done=True)
        held = await self._workers.get(key)
        last = self._retentions.keep(found.key, done, expect=found.version)
        await self._state.commit(self._workers.remove(held) + last)
        return done

    async def _archived(self, key: Key, found: Held) -> Retention:
        """Write the archive and read it back."""
        digest, lines, size_bytes, parts = hashlib.sha256(), 0, 0, 0
        async for part in self._parts(key):
            write = self._retentions.add_part(found.key, parts, part.data)
            await self._state.commit(self._retentions.unchanged(found) + write)
            digest.update(part.data)
            lines, size_bytes, parts = lines + part.lines, size_bytes + len(part.data), parts + 1
        kept = hashlib.sha256()
        for number in range(parts):
            kept.update(await self._retentions.part(found.key, number))
        _require_same(found.key, digest.hexdigest(), kept.hexdigest())
        return msgspec.structs.replace(
            found.value,
            digest=digest.hexdigest(),
            lines=lines,
            size_bytes=size_bytes,
            parts=parts,
        )

    async def _parts(self, key: Key) -> AsyncIterator[_Part]:
        lines, data = 0, bytearray()
        async for line in self._lines(key):
            lines += 1
            data += line
            if len(data) >= PART_BYTES:
                yield _Part(lines, bytes(data))
                lines, data = 0, bytearray()
        yield _Part(lines, bytes(data))

    async def _lines(self, key: Key) -> AsyncIterator[bytes]:
        """The worker, its state, its events and its transcript, in this order."""
        yield _line("workers", 0, (await self._workers.get(key)).value)
        yield _line("worker_states", 0, (await self._workers.state(key)).value)
        logs: tuple[Log[Any], ...] = (WORKER_EVENTS, TRANSCRIPTS)
        for log in logs:
            last = 0
            while page := await self._state.engine.read(log, key, after=last, limit=_READ):
                for entry in page:
                    yield _line(log.name, entry.seq, entry.value)
                last = page[-1].seq


def _line(collection: str, number: int, value: object) -> bytes:
    return codec.encode({"collection": collection, "number": number, "value": value}) + b"\n"


def _require_same(operation: Key, expected: str | None, found: str) -> None:
    if found != expected:
        raise Damaged(f"the archive {show(operation)}", f"it has {found}, not {expected}")
