"""The engine storing responses under some of their declared indexes: what each index costs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import msgspec

from bench.load import closed_loop, main
from perdure.core.batch import append, join, put
from perdure.core.clock import SystemClock
from perdure.core.engine import Engine
from perdure.core.layouts import Records
from perdure.engines import open_engine
from perdure.surfaces.responses import EVENTS, RESPONSES, Response, Status

STORED = 20_000
"""Responses that are there before, so that an index is a tree of some depth."""

BODY = b'{"x":"%b"}' % (b"x" * 2_000)
EVENT = msgspec.Raw(b'{"type":"response.created"}')
FIRST = RESPONSES.indexes[0]
"""What recovery needs; every other index is for lists and retention."""

Measure = Callable[[Path, int, float], dict[str, float]]


def creates(
    kept: Callable[[str], bool], directory: Path, writers: int, duration_s: float
) -> dict[str, float]:
    """Create responses and end them, two commits each, with only the indexes `kept`; also the CPU
    time of one."""
    indexes = tuple(index for index in RESPONSES.indexes if kept(index.name))
    layout = Records("responses", Response, key=RESPONSES.key, indexes=indexes)
    clock = SystemClock()
    done = 0

    def created(at_s: int) -> Response:
        before = clock.new_id("resp")
        return Response(Status.IN_PROGRESS, at_s, "bench", "boot", previous_response_id=before)

    async def one(engine: Engine, _writer: int, n: int) -> None:
        nonlocal done
        key, begun = ("default", clock.new_id("resp")), created(STORED + n)
        ended = msgspec.structs.replace(begun, status=Status.COMPLETED, runner=None)
        beginning = put(layout, key, begun, attachment=BODY, expect=0)
        await engine.commit(beginning + append(EVENTS, key, [EVENT], after=0))
        await engine.commit(put(layout, key, ended, attachment=BODY, expect=1))
        done += 1

    async def within() -> dict[str, float]:
        engine = await open_engine(f"sqlite:///{directory / 'perdure.db'}", (layout, EVENTS))
        try:
            for start in range(0, STORED, 1_000):
                there = range(start, start + 1_000)
                keys = [("default", clock.new_id("resp")) for _ in there]
                made = (
                    put(layout, key, created(at_s), attachment=BODY)
                    for key, at_s in zip(keys, there, strict=True)
                )
                await engine.commit(join(made))
            began_s = time.process_time()
            sample = await closed_loop(partial(one, engine), writers, duration_s)
            return sample | {"cpu_us": (time.process_time() - began_s) / done * 1e6}
        finally:
            await engine.close()

    return asyncio.run(within())


CASES: dict[str, Measure] = {
    "all": partial(creates, lambda name: True),
    "none": partial(creates, lambda name: name == FIRST.name),
}
CASES |= {
    f"without_{index.name}": partial(creates, lambda name, own=index.name: name != own)
    for index in RESPONSES.indexes[1:]
}

if __name__ == "__main__":
    main(CASES)
