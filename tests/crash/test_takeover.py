"""A takeover that dies itself: a server is killed in the middle of a background response, the one
that takes it over is killed at each of its commits in turn, and the one after that ends it. The
reader is the unmodified official client, which resumes by sequence number."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI

from perdure.proving.launcher import At, Death
from perdure.proving.waiting import wait_until
from perdure.services.continuing import Continues
from perdure.surfaces.jobs import JOBS
from perdure.surfaces.responses import RESPONSES
from tests.crash.conftest import Place
from tests.crash.test_sdk import CREATED, RETRIES

pytestmark = pytest.mark.asyncio(loop_scope="module")

TAKEN_OVER_S = 10.0

WORDS_BEFORE_DEATH = 7
ANSWER = " ".join(map(str, range(1, 41)))

EDGES = 8
CERTAIN = 6
"""Commits of a boot that takes a job over: the boot, the job queued again, the boot that is ready,
a sign of life, the new attempt, then its events and its end, which a slow machine puts into fewer
commits."""


async def begin(place: Place, sdk: AsyncOpenAI, gate: str) -> list[Any]:
    """Ask in the background, lose the server in the middle of the text; returns what was seen."""
    await place.start()
    seen: list[Any] = []
    stream = await sdk.responses.create(
        model="scripted",
        input=f"gate {gate} {WORDS_BEFORE_DEATH} 40 0.01",
        background=True,
        stream=True,
    )

    async def listen_and_kill() -> None:
        async for event in stream:
            seen.append(event)
            if event.type == "response.output_text.delta" and event.delta.endswith(
                str(WORDS_BEFORE_DEATH)
            ):
                place.victim.signal()

    with pytest.raises(openai.APIConnectionError):
        await listen_and_kill()
    await place.victim.death()
    await place.stage.upstream.open(gate)
    return seen


async def read_on(sdk: AsyncOpenAI, seen: list[Any]) -> None:
    """Resume behind what was seen, to the end of the connection."""
    stream = await sdk.responses.retrieve(
        seen[0].response.id, stream=True, starting_after=seen[-1].sequence_number
    )
    await listen(stream, seen)


async def listen(stream: Any, seen: list[Any]) -> None:
    async for event in stream:
        seen.append(event)


async def ended(sdk: AsyncOpenAI, response_id: str) -> float:
    async def over() -> bool:
        response = await sdk.responses.retrieve(response_id)
        return response.status not in ("queued", "in_progress")

    return await wait_until(over, TAKEN_OVER_S, f"the end of {response_id}")


def judge(seen: list[Any], response: Any, *, continued: bool) -> None:
    """What was seen in all connections together is one stream that makes sense; where the upstream
    can go on with a message, there is one item, and nothing was abandoned."""
    assert [event.sequence_number for event in seen] == list(range(len(seen)))
    assert seen[-1].response == response
    assert response.output_text == ANSWER
    done = {e.output_index: e.item for e in seen if e.type == "response.output_item.done"}
    assert sorted(done) == list(range(len(done)))
    *left, (last, whole) = sorted(done.items())
    assert (last, whole) == (len(left), response.output[0])
    assert all(item.status == "incomplete" for _, item in left)
    for index, item in done.items():
        deltas = (e for e in seen if e.type == "response.output_text.delta")
        text = "".join(e.delta for e in deltas if e.output_index == index)
        assert item.content[0].text == text
        assert ANSWER.startswith(text)
    abandoned = response.model_extra["perdure"].get("abandoned", [])
    assert abandoned == [item.to_dict() for _, item in left]
    assert (not left) == continued
    attempts = response.model_extra["perdure"]["attempts"]
    assert [attempt.get("continued", False) for attempt in attempts[1:]] == (
        [continued] * (len(attempts) - 1)
    )
    began = sum(event.type == "response.in_progress" for event in seen)
    assert [attempt["attempt"] for attempt in attempts] == list(range(1, began + 1))


# proves R4, R5
@pytest.mark.parametrize("continues", ["no", "continue_final_message"])
@pytest.mark.parametrize("at", ["before", "after"])
@pytest.mark.parametrize("n", range(1, EDGES + 1))
async def test_a_takeover_that_is_killed_is_taken_over(
    place: Place, sdk: AsyncOpenAI, at: At, n: int, continues: Continues
) -> None:
    place.continues = continues
    seen = await begin(place, sdk, f"{continues}-{at}-{n}")
    if await place.born(Death(at, n)):
        try:
            await read_on(sdk, seen)
        except openai.APIConnectionError:
            pass
        else:
            assert n > CERTAIN, "it ended in fewer commits"
            place.victim.signal()
    await place.victim.death()
    await place.start()
    await ended(sdk, seen[0].response.id)
    await read_on(sdk, seen)
    ended_as = await sdk.responses.retrieve(seen[0].response.id)
    judge(seen, ended_as, continued=continues != "no")


# proves C22, R5
@pytest.mark.parametrize("at", ["before", "after"])
async def test_a_request_that_the_sdk_retries_is_one_job(
    place: Place, sdk: AsyncOpenAI, at: At
) -> None:
    await place.start(Death(at, CREATED))
    restarting = asyncio.create_task(place.restart_when_dead())
    made = await sdk.with_options(max_retries=RETRIES).responses.create(
        model="scripted", input="echo once", background=True
    )
    await restarting
    await ended(sdk, made.id)
    assert (await sdk.responses.retrieve(made.id)).output_text == "once"
    store = await place.stop()
    assert [key[-1] for key in store.records[RESPONSES.name]] == [made.id]
    assert [job.value.subject for job in store.records[JOBS.name].values()] == [made.id]
