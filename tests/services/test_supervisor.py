"""Background work: failures are shown, work goes on, bugs have a name."""

from __future__ import annotations

import asyncio

import pytest
from structlog.testing import capture_logs

from perdure.core.clock import SystemClock
from perdure.core.errors import Unavailable
from perdure.services.supervisor import Crashed, Supervisor, contained


class Hasty(SystemClock):
    """A clock on which every pause is over at once, and that counts them."""

    def __init__(self) -> None:
        self.slept: list[float] = []

    async def sleep(self, duration_s: float) -> None:
        self.slept.append(duration_s)
        await asyncio.sleep(0)


async def test_work_that_fails_is_shown_and_tried_again_ever_more_rarely() -> None:
    clock = Hasty()
    supervisor = Supervisor(clock)
    seen: list[dict[str, str]] = []
    done = asyncio.Event()

    async def work() -> None:
        seen.append(dict(supervisor.failing))
        if len(seen) == 5:
            done.set()
        if len(seen) < 4:
            raise ValueError("not yet")

    supervisor.every("work", 0.1, work)
    await done.wait()
    await supervisor.stop()
    assert seen == [{}, *[{"work": "not yet"}] * 3, {}]
    assert clock.slept[:3] == [0.5, 1.0, 2.0]


async def test_errors_raised_on_purpose_pass_and_bugs_are_named() -> None:
    async def full() -> None:
        raise Unavailable("full")

    async def bug() -> None:
        raise KeyError("bug")

    with pytest.raises(Unavailable, match="full"):
        await contained("work", full())
    with pytest.raises(Crashed, match="work stopped"):
        await contained("work", bug())


# proves O6
async def test_the_log_names_the_kind_of_a_failure_and_not_its_words() -> None:
    supervisor = Supervisor(Hasty())
    done = asyncio.Event()

    async def work() -> None:
        done.set()
        raise ValueError("what a user wrote")

    with capture_logs() as lines:
        supervisor.every("work", 0.1, work)
        await done.wait()
        await asyncio.sleep(0)
        await supervisor.stop()
    assert lines[0] == {
        "event": "background work fails",
        "log_level": "warning",
        "work": "work",
        "error": "ValueError",
    }
