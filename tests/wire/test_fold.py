"""Events and their fold: numbered once, folded the same live and read back, ended when cut off."""

from __future__ import annotations

import copy
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai._models import validate_type
from openai.types.responses import ResponseStreamEvent

from perdure.core import codec
from perdure.wire import events as ev
from perdure.wire.events import Event
from perdure.wire.fold import View, apply, closing, closing_part, interrupting, take
from perdure.wire.responses import (
    Outcome,
    failed,
    finished,
    parse_create_response,
    response_body,
)

READ = msgspec.json.Decoder(Event)

BODY = response_body(parse_create_response({"model": "m", "input": "x"}), id="resp_1", created_at=1)
TEXT_PART = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
LOGPROB = {"token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": []}


def message(id: str) -> dict[str, Any]:
    return {
        "id": id,
        "type": "message",
        "status": "in_progress",
        "role": "assistant",
        "content": [],
    }


def call(id: str) -> dict[str, Any]:
    head = {"id": id, "type": "function_call", "status": "in_progress"}
    return head | {"call_id": f"call_{id}", "name": "f", "arguments": ""}


def thought(id: str) -> dict[str, Any]:
    return {"id": id, "type": "reasoning", "status": "in_progress", "summary": [], "content": []}


def every_type() -> tuple[View, list[Event]]:
    """A response that passes through every type of event but the other endings and errors."""
    view = View()
    made = take(
        view,
        ev.ResponseCreated(response=BODY),
        ev.ResponseQueued(response=BODY),
        ev.ResponseInProgress(response=BODY),
    )
    for index, item in enumerate((thought("rs_1"), message("msg_1"), call("fc_1"))):
        made += take(view, ev.OutputItemAdded(output_index=index, item=item))
    at: dict[str, Any] = {"output_index": 0, "item_id": "rs_1"}
    made += take(
        view,
        ev.ReasoningSummaryPartAdded(
            **at, summary_index=0, part={"type": "summary_text", "text": ""}
        ),
        ev.ReasoningSummaryTextDelta(**at, summary_index=0, delta="su"),
        ev.ReasoningSummaryTextDelta(**at, summary_index=0, delta="m"),
        ev.ContentPartAdded(**at, content_index=0, part={"type": "reasoning_text", "text": ""}),
        ev.ReasoningTextDelta(**at, content_index=0, delta="hm"),
    )
    at = {"output_index": 1, "item_id": "msg_1"}
    made += take(
        view,
        ev.ContentPartAdded(**at, content_index=0, part=TEXT_PART),
        ev.OutputTextDelta(**at, content_index=0, delta="a", logprobs=[LOGPROB]),
        ev.OutputTextDelta(**at, content_index=0, delta="b\n\u2028c"),
    )
    made += take(view, *closing_part(view, 1, 0))
    made += take(
        view,
        ev.ContentPartAdded(**at, content_index=1, part={"type": "refusal", "refusal": ""}),
        ev.RefusalDelta(**at, content_index=1, delta="no"),
        ev.FunctionCallArgumentsDelta(output_index=2, item_id="fc_1", delta='{"a"'),
        ev.FunctionCallArgumentsDelta(output_index=2, item_id="fc_1", delta=":1}"),
    )
    for index in view.open_indexes():
        made += take(view, *closing(view, index, "completed"))
    ended = finished(BODY, Outcome(status="completed"), view.output(), completed_at=2)
    made += take(view, ev.terminal(ended))
    return view, made


# proves R4, R5
def test_every_event_type_passes_the_official_clients_validation() -> None:
    _, made = every_type()
    for status in ("failed", "incomplete"):
        made.append(ev.terminal(BODY | {"status": status}))
    made.append(ev.ErrorEvent(message="x"))
    assert {type(event) for event in made} == set(Event.__args__)  # type: ignore[attr-defined]
    for event in made:
        [encoded] = ev.encode_events([event], after=7)
        assert codec.parse(encoded)["sequence_number"] == 7
        validate_type(type_=ResponseStreamEvent, value=codec.parse(encoded))


# proves R4
def test_sequence_numbers_count_from_zero_without_holes() -> None:
    view, made = every_type()
    numbered = [codec.parse(text) for text in ev.encode_events(made, after=0)]
    assert [event["sequence_number"] for event in numbered] == list(range(len(made)))
    assert view.ended
    assert view.response is not None
    assert view.response["status"] == "completed"


def test_the_finished_output_is_what_the_deltas_said() -> None:
    view, _ = every_type()
    thinking, said, called = view.output()
    assert thinking["summary"] == [{"type": "summary_text", "text": "sum"}]
    assert thinking["content"] == [{"type": "reasoning_text", "text": "hm"}]
    assert said["content"] == [
        TEXT_PART | {"text": "ab\n\u2028c", "logprobs": [LOGPROB]},
        {"type": "refusal", "refusal": "no"},
    ]
    assert called["arguments"] == '{"a":1}'
    assert {item["status"] for item in view.output()} == {"completed"}


# proves R5
def test_read_back_at_any_point_the_fold_is_what_it_was_live() -> None:
    _, made = every_type()
    live = View()
    for count, event in enumerate(made, 1):
        apply(live, event)
        again = View()
        for text in map(ev.encode_event, made[:count]):
            apply(again, READ.decode(text))
        assert again.output() == live.output()
        assert (again.ended, again.response) == (live.ended, live.response)


# proves R5
def test_cut_off_at_any_point_every_item_ends_and_text_is_kept() -> None:
    _, made = every_type()
    for count in range(3, len(made)):
        view = View()
        for text in map(ev.encode_event, made[:count]):
            apply(view, READ.decode(text))
        was_open = set(view.open_indexes())
        shown = view.output()
        ends = take(view, *interrupting(view))
        assert view.output() == shown
        assert view.open_indexes() == []
        done = [event for event in ends if isinstance(event, ev.OutputItemDone)]
        assert {event.output_index for event in done} == was_open
        assert {event.item["status"] for event in done} <= {"incomplete"}
        assert not any(isinstance(event, ev.FunctionCallArgumentsDone) for event in ends)
        ended = finished(BODY, failed("restarted"), view.output(), completed_at=2)
        ends += take(view, ev.terminal(ended))
        for text in ev.encode_events(ends, after=count):
            validate_type(type_=ResponseStreamEvent, value=codec.parse(text))


@given(st.lists(st.text(st.characters(exclude_categories=("Cs",)))))
def test_any_pieces_of_text_join_unchanged(pieces: list[str]) -> None:
    view = View()
    at: dict[str, Any] = {"output_index": 0, "item_id": "msg_1"}
    take(view, ev.OutputItemAdded(output_index=0, item=message("msg_1")))
    take(view, ev.ContentPartAdded(**at, content_index=0, part=TEXT_PART))
    for piece in pieces:
        event = ev.OutputTextDelta(**at, content_index=0, delta=piece)
        apply(view, READ.decode(ev.encode_event(event)))
    assert view.output()[0]["content"][0]["text"] == "".join(pieces)


def test_asking_for_the_output_between_deltas_changes_nothing() -> None:
    _, made = every_type()
    asked, left_alone = View(), View()
    for event in made:
        apply(asked, event)
        asked.output()
        asked.output()
        apply(left_alone, event)
    assert asked.output() == left_alone.output()


def test_a_fold_never_changes_the_events_it_was_given() -> None:
    _, made = every_type()
    before = [ev.encode_event(event) for event in made]
    view = View()
    for event in made:
        apply(view, event)
        view.output()
    assert [ev.encode_event(event) for event in made] == before


def test_an_event_of_an_unknown_item_is_a_broken_log() -> None:
    with pytest.raises(KeyError):
        apply(View(), ev.FunctionCallArgumentsDelta(output_index=0, item_id="x", delta=""))


def test_the_type_stands_first_and_an_event_is_one_line() -> None:
    _, made = every_type()
    for event in made:
        text = ev.encode_event(event)
        assert text.startswith(b'{"type":"%b"' % ev.type_of(event).encode())
        lines = ev.sse(ev.type_of(event), text).split(b"\n")
        assert lines == [b"event: " + ev.type_of(event).encode(), b"data: " + text, b"", b""]


# proves R4
@given(st.data())
def test_deltas_that_extend_one_another_say_the_same(data: st.DataObject) -> None:
    _, made = every_type()
    split: list[Event] = []
    for event in made:
        if isinstance(event, ev.Delta):
            for piece in data.draw(st.lists(st.text("ab", max_size=3), max_size=4)):
                split.append(msgspec.structs.replace(event, delta=piece))
        split.append(event)
    whole = View()
    for event in split:
        apply(whole, event)
    joined: list[Event] = []
    for event in copy.deepcopy(split):
        if not (joined and ev.extend(joined[-1], event)):
            joined.append(event)
    again = View()
    for event in joined:
        apply(again, event)
    assert len(joined) < len(made)
    assert again.output() == whole.output()


def test_a_text_extends_no_other_text_and_none_without_bound() -> None:
    at: dict[str, Any] = {"output_index": 0, "item_id": "msg_1", "content_index": 0}
    first = ev.OutputTextDelta(**at, delta="a")
    assert not ev.extend(first, ev.RefusalDelta(**at, delta="b"))
    assert not ev.extend(first, ev.OutputTextDelta(**at | {"item_id": "msg_2"}, delta="b"))
    assert ev.extend(first, ev.OutputTextDelta(**at, delta="b" * ev.EXTENDED_CHARS_MAX))
    assert not ev.extend(first, ev.OutputTextDelta(**at, delta="c"))
    assert first.delta == "a" + "b" * ev.EXTENDED_CHARS_MAX


# proves R5
def test_what_stands_before_the_last_beginning_is_abandoned_and_nothing_else() -> None:
    view = View()
    take(view, ev.ResponseCreated(response=BODY), ev.ResponseInProgress(response=BODY))
    for attempt, text in enumerate(("first", "second", "third")):
        if attempt:
            take(view, *interrupting(view), ev.ResponseInProgress(response=BODY))
            assert view.output() == []
        at = {"output_index": view.next_index, "item_id": f"msg_{attempt}"}
        take(view, ev.OutputItemAdded(output_index=attempt, item=message(f"msg_{attempt}")))
        take(view, ev.ContentPartAdded(**at, content_index=0, part=TEXT_PART))
        take(view, ev.OutputTextDelta(**at, content_index=0, delta=text))
    texts = [item["content"][0]["text"] for item in view.output()]
    abandoned = [(item["status"], item["content"][0]["text"]) for item in view.abandoned()]
    assert texts == ["third"]
    assert abandoned == [("incomplete", "first"), ("incomplete", "second")]


# proves R5
def test_a_beginning_that_finds_an_item_open_goes_on_with_it() -> None:
    view = View()
    take(view, ev.ResponseCreated(response=BODY), ev.ResponseInProgress(response=BODY))
    at: dict[str, Any] = {"output_index": 0, "item_id": "msg_0"}
    take(view, ev.OutputItemAdded(output_index=0, item=message("msg_0")))
    take(view, ev.ContentPartAdded(**at, content_index=0, part=TEXT_PART))
    for text in ("cut ", "short ", "twice"):
        take(view, ev.OutputTextDelta(**at, content_index=0, delta=text))
        take(view, ev.ResponseInProgress(response=BODY))
    assert view.abandoned() == []
    assert [item["content"][0]["text"] for item in view.output()] == ["cut short twice"]
    take(view, *interrupting(view), ev.ResponseInProgress(response=BODY))
    assert [item["id"] for item in view.abandoned()] == ["msg_0"]


# proves R5
def test_a_cancelled_response_ends_with_an_event_that_every_client_knows() -> None:
    body = finished(BODY, Outcome(status="cancelled"), [], completed_at=9)
    event = ev.terminal(body)
    assert ev.type_of(event) == "response.incomplete"
    validate_type(type_=ResponseStreamEvent, value=msgspec.to_builtins(event))
    view = View()
    apply(view, event)
    assert view.ended
