"""Leaving the event loop: a generator that blocks is run step by step and always closed."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Generator
from contextlib import aclosing

import pytest

from perdure.core.offload import off_loop, steps_off_loop


async def test_steps_run_off_the_loop_and_the_generator_is_closed() -> None:
    threads: list[int] = []

    def counting() -> Generator[int, None, None]:
        try:
            for number in range(3):
                threads.append(threading.get_ident())
                yield number
        finally:
            threads.append(0)

    assert [step async for step in steps_off_loop(counting())] == [0, 1, 2]
    assert threading.get_ident() not in threads
    threads.clear()
    async with aclosing(steps_off_loop(counting())) as steps:
        assert await anext(steps) == 0
    assert threads[-1] == 0


async def test_a_cancelled_step_is_finished_before_the_generator_is_closed() -> None:
    entered, go_on, order = threading.Event(), threading.Event(), list[str]()

    def slow() -> Generator[None, None, None]:
        try:
            entered.set()
            go_on.wait(10)
            order.append("step")
            yield
        finally:
            order.append("closed")

    async def consume() -> None:
        async with aclosing(steps_off_loop(slow())) as steps:
            await anext(steps)

    consuming = asyncio.create_task(consume())
    await off_loop(entered.wait, 10)
    consuming.cancel()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await consuming
    assert order == ["step", "closed"]
