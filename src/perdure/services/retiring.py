"""Retiring workers: one that has ended is archived, or purged, under the id of an operation.

The operation's record is written with the worker's last change of status, so nothing is written for
the worker from then on, and whoever sends the operation again goes on with it. The source is
removed in the last commit, and only once the archive was read back and is what was to be kept,
byte for byte. A crash leaves the source, or the whole archive.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import msgspec

from perdure.core import codec
from perdure.core.batch import join
from perdure.core.clock import Clock
from perdure.core.errors import Damaged
from perdure.core.keys import Key, show
from perdure.core.layouts import Log
from perdure.core.values import Record
from perdure.services.conversations import decided
from perdure.surfaces.state import State
from perdure.surfaces.workers import TRANSCRIPTS, WORKER_EVENTS, Retention
from perdure.wire.errors import NotFound
from perdure.wire.workers import OtherFingerprint, RetainBody

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
        self._surface = state.runtimes
        self._clock = clock

    async def retain(self, key: Key, asked: RetainBody) -> tuple[Key, Retention]:
        """Archive or purge a worker. The same operation again goes on with it, or finds it done."""
        operation = (*key[:2], asked.operation_id)

        async def attempt() -> Retention:
            found = await self._surface.find_retention(operation)
            if found is None:
                held, counts = await self._surface.get(key), await self._surface.state(key)
                at_s, event_id = int(self._clock.now_s()), self._clock.new_id("evt")
                begun = Retention(key[-1], asked.mode, at_s)
                moved, _ = self._surface.move(held, counts, "retired", event_id, at_s=at_s)
                await self._state.commit(moved + self._surface.retain(operation, begun, expect=0))
                found = await self._surface.retention(operation)
            elif (found.value.worker_id, found.value.mode) != (key[-1], asked.mode):
                where = f"operation {show(operation)}"
                was = f"{found.value.mode} {found.value.worker_id}"
                raise OtherFingerprint(where, f"{asked.mode} {key[-1]}", was)
            return found.value if found.value.done else await self._go_on(key, found)

        return operation, await decided(attempt, f"worker {show(key)}")

    async def archive(self, operation: Key) -> AsyncGenerator[bytes, None]:
        """What an operation archived, a line an entry. Raises `Damaged` where it is not what it
        was."""
        found = await self._surface.retention(operation)
        if found.value.digest is None:
            raise NotFound("Archive", operation[-1])
        digest = hashlib.sha256()
        for number in range(found.value.parts):
            data = await self._surface.part(operation, number)
            digest.update(data)
            yield data
        _require_same(operation, found.value.digest, digest.hexdigest())

    async def _go_on(self, key: Key, found: Record[Retention]) -> Retention:
        done = found.value
        if done.mode == "archive":
            done = await self._archived(key, found)
        while page := await self._surface.submissions(key, limit=_REMOVED):
            removed = join(map(self._surface.forget, page))
            await self._state.commit(self._surface.unchanged(found) + removed)
        done = msgspec.structs.replace(done, done=True)
        held = await self._surface.get(key)
        last = self._surface.retain(found.key, done, expect=found.version)
        await self._state.commit(self._surface.remove(held) + last)
        return done

    async def _archived(self, key: Key, found: Record[Retention]) -> Retention:
        """Write the archive and read it back."""
        digest, lines, size_bytes, parts = hashlib.sha256(), 0, 0, 0
        async for part in self._parts(key):
            write = self._surface.add_part(found.key, parts, part.data)
            await self._state.commit(self._surface.unchanged(found) + write)
            digest.update(part.data)
            lines, size_bytes, parts = lines + part.lines, size_bytes + len(part.data), parts + 1
        kept = hashlib.sha256()
        for number in range(parts):
            kept.update(await self._surface.part(found.key, number))
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
        yield _line("workers", 0, (await self._surface.get(key)).value)
        yield _line("worker_states", 0, (await self._surface.state(key)).value)
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
