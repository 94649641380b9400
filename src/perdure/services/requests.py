"""Requests that must have one effect however often they are sent.

A client that names its request (`Idempotency-Key`) gets the first answer again for a day. The
official SDKs name nothing, but retry a lost connection and say so: a retry whose content equals a
request accepted in the last minute joins that one. What a request led to is remembered in the same
commit as its effect, so a kill between commit and answer leaves one effect, never two.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from weakref import WeakValueDictionary

import msgspec

from perdure.core.batch import Batch
from perdure.core.clock import Clock
from perdure.core.errors import Conflict
from perdure.core.values import Record
from perdure.surfaces.idempotency import Remembered
from perdure.surfaces.state import State
from perdure.wire.errors import WireError

RETRY_WINDOW_S = 60


class Caller(msgspec.Struct, frozen=True):
    """Who sends a request, and how to know it again.

    `digest` covers route, credentials and body; `key` is what the client named the request, None
    if nothing; `retried` says that the client has sent it before. With `store_always` what it
    leads to is stored, whatever it asks for.
    """

    tenant: str
    digest: str = ""
    key: str | None = None
    retried: bool = False
    store_always: bool = False

    @property
    def remembered_as(self) -> str:
        """The key of the record. A client's key may hold anything, so it is hashed."""
        if self.key is None:
            return f"d-{self.digest}"
        return f"k-{hashlib.sha256(self.key.encode(errors='surrogatepass')).hexdigest()}"


class ResultLost(Conflict):
    """The request was carried out, and its answer, which was not to be stored, is gone."""

    code = "idempotent_result_lost"
    should_retry = False


def result_lost() -> ResultLost:
    """For a repeat that can be given neither the answer nor another one."""
    return ResultLost("the request with this Idempotency-Key", "its answer", "not stored")


class Requests:
    """Remembers the requests of one state."""

    def __init__(self, state: State, clock: Clock, boot_id: str) -> None:
        self._state = state
        self._clock = clock
        self._boot_id = boot_id
        self._turns: WeakValueDictionary[tuple[str, str], asyncio.Lock] = WeakValueDictionary()

    @asynccontextmanager
    async def alone(self, caller: Caller) -> AsyncIterator[None]:
        """Carry out one sending of a request at a time. A client that gave up on its first sending
        may send it again before that is committed, and could not find it yet."""
        if not caller.digest:
            yield
            return
        name = (caller.tenant, caller.remembered_as)
        turn = self._turns.setdefault(name, asyncio.Lock())
        async with turn:
            yield

    async def recall(self, caller: Caller) -> Record[Remembered] | None:
        """What this request led to when it was sent before, if it was.

        Raises `WireError` where the key was used for other content, and `ResultLost`.
        """
        if caller.key is None and not caller.retried:
            return None
        record = await self._state.idempotency.find(caller.tenant, caller.remembered_as)
        if record is None:
            return None
        seen = record.value
        if caller.key is None:
            return record if self._is_fresh(record) else None
        if seen.digest != caller.digest:
            raise WireError(
                "This Idempotency-Key was used for a request with another body. "
                "Use a new key for a new request.",
                param="Idempotency-Key",
                code="idempotency_key_reused",
            )
        if seen.transient and seen.boot_id != self._boot_id:
            raise result_lost()
        return record

    async def join(self, seen: Record[Remembered]) -> None:
        """Wait here for a response that another process makes: it is not to stop because its own
        clients leave. Raises `Conflict` where it has let go of it since."""
        joined = msgspec.structs.replace(seen.value, joined=True)
        tenant, name = seen.key
        await self._state.commit(
            self._state.idempotency.remember(tenant, name, joined, expect=seen.version)
        )

    async def let_go(self, caller: Caller, response_id: str) -> bool:
        """Let no later sending find this response; whether none has joined it elsewhere."""
        seen = await self._state.idempotency.find(caller.tenant, caller.remembered_as)
        if seen is None or seen.value.response_id != response_id:
            return True
        if seen.value.joined:
            return False
        try:
            await self._state.commit(self._state.idempotency.forget(seen.key, expect=seen.version))
        except Conflict:
            return False  # somebody came at this moment
        return True

    async def once(self, caller: Caller, batch: Batch, answer: bytes) -> bytes:
        """Commit, or give the answer that an earlier sending of this request was given."""
        async with self.alone(caller):
            if (seen := await self.recall(caller)) is not None and seen.attachment:
                return seen.attachment
            try:
                await self._state.commit(batch + await self.remember(caller, answer=answer))
            except Conflict:
                if (seen := await self.recall(caller)) is not None and seen.attachment:
                    return seen.attachment
                raise
            return answer

    async def remember(
        self,
        caller: Caller,
        *,
        response_id: str | None = None,
        answer: bytes | None = None,
        transient: bool = False,
    ) -> Batch:
        """To be committed with the effect. A client's own key is taken once; a digest is taken
        over, because the same words may be said twice; but by a retry only as it was looked at
        here. Raises `Conflict` where its first sending was accepted a moment ago.
        """
        if not caller.digest:
            return Batch()
        expect = None if caller.key is None else 0
        if caller.key is None and caller.retried:
            before = await self._state.idempotency.find(caller.tenant, caller.remembered_as)
            if before is not None and self._is_fresh(before):
                raise Conflict("a request that was sent again", "not accepted", "accepted")
            expect = 0 if before is None else before.version
        remembered = Remembered(
            digest=caller.digest,
            accepted_at_s=int(self._clock.now_s()),
            boot_id=self._boot_id,
            response_id=response_id,
            transient=transient,
        )
        return self._state.idempotency.remember(
            caller.tenant,
            caller.remembered_as,
            remembered,
            answer=answer,
            expect=expect,
        )

    def _is_fresh(self, seen: Record[Remembered]) -> bool:
        """Whether a retry that was not named may belong to it."""
        return self._clock.now_s() - seen.value.accepted_at_s <= RETRY_WINDOW_S
