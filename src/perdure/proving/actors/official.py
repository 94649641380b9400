"""The official OpenAI client, unmodified and with strict validation, as one more user of the
server: what its types refuse is a violation, and what it was told is there after a death.

This module needs the package `openai`, which Perdure itself does not.
"""

from __future__ import annotations

from collections import defaultdict

import msgspec
import openai
from openai import AsyncOpenAI
from openai.types.responses import Response, ResponseStreamEvent

from perdure.proving.actors.responses import a_prompt
from perdure.proving.client import Client, Gone
from perdure.proving.oracle import Check, History, Op, Verdict
from perdure.proving.scripts import script_of
from perdure.proving.snapshot import Snapshot
from perdure.proving.workload import Scene

SURFACE = "official client"


class Told(msgspec.Struct):
    """A turn: what was asked, and what the client made of the answer."""

    op: Op
    prompt: str
    response: Response | None = None
    seen: list[ResponseStreamEvent] = []


class OfficialActor:
    """See `proving.workload.Actor`. It does not retry here: tests/crash/test_sdk.py lets it."""

    surface = SURFACE

    def __init__(self) -> None:
        self._told: dict[int, list[Told]] = defaultdict(list)

    async def act(self, client: Client) -> None:
        own = self._told[client.worker]
        ended = [told for told in own if told.response and told.response.status == "completed"]
        op = client.history.intend(SURFACE, "turn", creates="response")
        told = Told(op, a_prompt(op, client))
        previous = ended[-1].response if ended and client.rng.random() < 0.6 else None
        own.append(told)
        try:
            await _stream(client, told, previous.id if previous else None)
        except openai.APIConnectionError as error:
            raise Gone(f"the official client: {error}") from error
        except (openai.APIStatusError, RuntimeError) as error:
            if not (client.history.stopping or client.history.failing or client.excused):
                client.history.complaints.append(f"the official client refuses: {error!r}")
            return
        client.history.settle(op, "acknowledged", 200)

    async def judge(self, scene: Scene) -> None:
        things = [(told.op, told) for own in self._told.values() for told in own if told.seen]
        async with _sdk(scene.client) as sdk:
            for told in scene.chosen(things):
                try:
                    await _judge_one(scene.verdict, sdk, told)
                except (openai.APIError, RuntimeError) as error:
                    scene.verdict.holds(Check.KEPT, SURFACE, False, f"{told.op}: {error!r}")

    def audit(self, store: Snapshot, history: History, verdict: Verdict, *, settled: bool) -> None:
        """What lies in the store is judged by the actors of its surfaces."""


async def _stream(client: Client, told: Told, previous_id: str | None) -> None:
    """Ask, and keep what comes. A stream that ends early raises `RuntimeError` in the helper."""
    async with (
        _sdk(client) as sdk,
        sdk.responses.stream(
            model="scripted",
            input=told.prompt,
            previous_response_id=previous_id or openai.omit,
        ) as stream,
    ):
        async for event in stream:
            if event.type == "error":  # says that the stream ends here, and is none of its events
                raise RuntimeError(event.message)
            told.seen.append(event)
        told.response = await stream.get_final_response()


async def _judge_one(verdict: Verdict, sdk: AsyncOpenAI, told: Told) -> None:
    created = told.seen[0]
    assert created.type == "response.created"
    response = await sdk.responses.retrieve(created.response.id)
    stream = await sdk.responses.retrieve(created.response.id, stream=True)
    events = [event async for event in stream]
    verdict.holds(
        Check.DENSE,
        SURFACE,
        [event.sequence_number for event in events] == list(range(len(events)))
        and [event.type for event in events[: len(told.seen)]]
        == [event.type for event in told.seen],
        f"{response.id} streams other events than were seen",
    )
    expected = script_of(told.prompt).text
    completed = response.status == "completed"
    verdict.holds(
        Check.KEPT if told.response else Check.WHOLE,
        SURFACE,
        response.output_text == expected
        if completed
        else expected.startswith(response.output_text),
        f"{response.id} ({response.status}) says {response.output_text!r}, not {expected!r}",
    )
    if told.response is not None:
        verdict.holds(
            Check.KEPT,
            SURFACE,
            _essence(response) == _essence(told.response),
            f"{response.id} is not what was answered",
        )


def _essence(response: Response) -> tuple[object, ...]:
    """What two readings must share; the stream helper uses types of its own for the rest."""
    items = [(item.id, item.type, getattr(item, "status", None)) for item in response.output]
    return response.id, response.status, response.output_text, items, response.usage


def _sdk(client: Client) -> AsyncOpenAI:
    return AsyncOpenAI(
        base_url=f"{client.url}/v1",
        api_key="none",
        max_retries=0,
        _strict_response_validation=True,
    )
