"""Background tasks: started here, watched here, and stopped here.

This is the one place that catches every exception of a task. A loop that fails is recorded with
its error, shown in readiness, and started again after a pause; a bug in any other work becomes
`Crashed`, logged with its traceback. Nothing dies unseen.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

import structlog

from perdure.core.clock import Clock
from perdure.core.errors import PerdureError, Unavailable

T = TypeVar("T")

_PAUSE_FIRST_S = 0.5
_PAUSE_MAX_S = 30.0

_log = structlog.get_logger("perdure.supervisor")


class Crashed(Unavailable):
    """A bug in Perdure stopped this work; the log holds its traceback."""

    code = "internal_error"


async def contained(name: str, work: Awaitable[T]) -> T:
    """The result of `work`. Errors raised on purpose pass; anything else becomes `Crashed`."""
    try:
        return await work
    except PerdureError:
        raise
    except Exception as error:
        _log.exception("work crashed", work=name)
        raise Crashed(f"{name} stopped on an internal error ({type(error).__name__}).") from error


class Supervisor:
    """Runs named loops for the life of a service."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self.failing: dict[str, str] = {}
        """Why each loop that is failing now fails."""

    def every(
        self,
        name: str,
        period_s: float,
        work: Callable[[], Awaitable[object]],
        *,
        pause_max_s: float = _PAUSE_MAX_S,
    ) -> None:
        """Do `work` again and again, `period_s` apart, more rarely while it fails."""
        loop = self._loop(name, period_s, work, pause_max_s)
        self._tasks[name] = asyncio.create_task(loop, name=name)

    async def stop(self, *, but: str | None = None) -> None:
        """Stop every loop, or every other one, and wait for them."""
        stopped = {name: task for name, task in self._tasks.items() if name != but}
        for name, task in stopped.items():
            task.cancel()
            del self._tasks[name]
        await asyncio.gather(*stopped.values(), return_exceptions=True)

    async def _loop(
        self,
        name: str,
        period_s: float,
        work: Callable[[], Awaitable[object]],
        pause_max_s: float,
    ) -> None:
        pause_s = _PAUSE_FIRST_S
        while True:
            try:
                await work()
            except Exception as error:
                if name not in self.failing:
                    # Its words are shown in readiness; in the log they might quote a user.
                    _log.warning("background work fails", work=name, error=type(error).__name__)
                self.failing[name] = str(error)
                await self._clock.sleep(max(pause_s, period_s))
                pause_s = min(pause_s * 2, pause_max_s)
            else:
                if self.failing.pop(name, None) is not None:
                    _log.info("background work goes on", work=name)
                pause_s = _PAUSE_FIRST_S
                await self._clock.sleep(period_s)
