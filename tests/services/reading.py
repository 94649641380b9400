"""How tests read the answer of an upstream: to the end, judging every event made of it."""

from __future__ import annotations

from typing import Any

from openai import omit
from openai._models import validate_type
from openai.lib.streaming.responses._responses import ResponseStreamState
from openai.types.responses import ResponseStreamEvent

from perdure.core import codec
from perdure.core.clock import SystemClock
from perdure.services.bridge import ChatReader
from perdure.services.relay import ResponsesReader
from perdure.wire import events as ev
from perdure.wire.events import Event
from perdure.wire.fold import View, take
from perdure.wire.responses import Outcome, finished, parse_create_response, response_body

CLOCK = SystemClock()
LEAST: dict[str, Any] = {"model": "m", "input": "x"}
BODY = response_body(parse_create_response(LEAST), id="resp_1", created_at=1)


def told(
    *chunks: dict[str, Any], by: type[ChatReader] | type[ResponsesReader] = ChatReader
) -> tuple[list[dict[str, Any]], Outcome, list[Event]]:
    """Read chunks to the end; every event passes strict validation, and the official client's own
    accumulation agrees with ours."""
    view = View()
    reader = by(view, CLOCK)
    made = take(view, ev.ResponseCreated(response=BODY), ev.ResponseInProgress(response=BODY))
    for chunk in chunks:
        made += reader.read(codec.parse(codec.encode(chunk)))
    events, outcome = reader.end()
    made += events
    ended = finished(BODY, outcome, view.output(), completed_at=2)
    made += take(view, ev.terminal(ended))
    ev.encode_events(made, after=0)
    assert view.open_indexes() == []
    official = ResponseStreamState(input_tools=omit, text_format=omit)
    for event in made:
        wire = codec.parse(ev.encode_event(event))
        read = validate_type(type_=ResponseStreamEvent, value=wire)
        official.handle_event(read)
        if isinstance(event, ev.OutputItemDone):
            snapshot = official._get_output_item(event.output_index)
            assert_same_words(snapshot.to_dict(), event.item)
    return view.output(), outcome, made


def assert_same_words(snapshot: dict[str, Any], item: dict[str, Any]) -> None:
    assert snapshot["id"] == item["id"]
    if item["type"] == "function_call":
        assert snapshot["arguments"] == item["arguments"]
    if item["type"] == "message":
        texts = [part["text"] for part in item["content"] if part["type"] == "output_text"]
        said = [part["text"] for part in snapshot["content"] if part["type"] == "output_text"]
        assert said == texts


def words(item: dict[str, Any]) -> str:
    return "".join(part.get("text") or part.get("refusal") or "" for part in item["content"])
