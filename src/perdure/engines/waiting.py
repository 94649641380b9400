"""Those who wait for entries of a stream, in an engine that learns of every commit on its loop."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping

from perdure.core.clock import Clock
from perdure.core.deciding import Place
from perdure.core.values import Tip


class Waiting:
    """Futures by stream. All of it belongs to the event loop."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._waiting: dict[Place, set[asyncio.Future[Tip | None]]] = defaultdict(set)

    async def wait(
        self, place: Place, after: int, timeout_s: float, tip_now: Callable[[], Awaitable[Tip]]
    ) -> Tip:
        """See `core.engine.Engine.wait`; `tip_now` is looked at first, so that a commit before the
        call is not slept through, and raises where the engine is closed."""
        deadline_s = self._clock.monotonic_s() + timeout_s
        tip = await tip_now()
        while tip.last <= after:
            left_s = deadline_s - self._clock.monotonic_s()
            if left_s <= 0:
                break
            changed: asyncio.Future[Tip | None] = asyncio.get_running_loop().create_future()
            self._waiting[place].add(changed)
            try:
                await asyncio.wait((changed,), timeout=left_s)
            finally:
                self._forget(place, changed)
            told = changed.result() if changed.done() else None
            tip = told or await tip_now()
        return tip

    def tell(self, tips: Mapping[Place, Tip]) -> None:
        """Wake those who wait for what was committed."""
        for place, tip in tips.items():
            for changed in self._waiting.pop(place, ()):
                if not changed.done():
                    changed.set_result(tip)

    def end(self) -> None:
        """Wake everybody, to look again."""
        for waiting in list(self._waiting.values()):
            for changed in waiting:
                if not changed.done():
                    changed.set_result(None)

    def _forget(self, place: Place, changed: asyncio.Future[Tip | None]) -> None:
        waiting = self._waiting.get(place)
        if waiting is not None:
            waiting.discard(changed)
            if not waiting:
                del self._waiting[place]
