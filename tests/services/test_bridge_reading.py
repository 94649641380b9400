"""What is made of what chat servers say: events the official client accepts, quirks included."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perdure.proving.scripts import script_of
from perdure.proving.upstream import chat_chunks
from perdure.services.bridge import ChatReader
from perdure.wire import events as ev
from perdure.wire.fold import View
from perdure.wire.responses import Outcome
from tests.services.reading import CLOCK, told, words


def delta(**fields: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": fields}]}


def piece(index: int | None, arguments: Any, **fields: Any) -> dict[str, Any]:
    """A chunk with a piece of one call."""
    function = {"arguments": arguments} | ({"name": fields.pop("name")} if "name" in fields else {})
    found = {"function": function} | fields
    return delta(tool_calls=[found if index is None else found | {"index": index}])


def end(reason: str = "stop") -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]}


USAGE = {
    "prompt_tokens": 5,
    "completion_tokens": 7,
    "total_tokens": 12,
    "prompt_tokens_details": {"cached_tokens": 3},
    "completion_tokens_details": {"reasoning_tokens": 2},
}


# proves R12
def test_a_plain_answer() -> None:
    items, outcome, made = told(
        delta(role="assistant", content=""),
        delta(content="Hel"),
        delta(content="lo"),
        end(),
        {"choices": [], "usage": USAGE},
    )
    assert [ev.type_of(event) for event in made] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [words(item) for item in items] == ["Hello"]
    assert items[0]["status"] == "completed"
    assert outcome.usage == {
        "input_tokens": 5,
        "input_tokens_details": {"cached_tokens": 3, "cache_write_tokens": 0},
        "output_tokens": 7,
        "output_tokens_details": {"reasoning_tokens": 2},
        "total_tokens": 12,
    }


# proves R12
@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_thoughts_become_a_reasoning_item(name: str) -> None:
    items, outcome, _ = told(
        delta(**{name: "let me "}),
        delta(**{name: "see", "content": None}),
        delta(content="4"),
        end(),
    )
    assert [(item["type"], words(item)) for item in items] == [
        ("reasoning", "let me see"),
        ("message", "4"),
    ]
    assert outcome.usage is None


# proves R12
def test_parallel_calls_are_put_together_by_index() -> None:
    items, _, _ = told(
        delta(content="calling"),
        piece(0, "", id="c0", name="f"),
        piece(1, '{"b"', id="c1", name="g"),
        piece(0, '{"a":'),
        piece(1, ":2}"),
        piece(0, "1}"),
        end("tool_calls"),
    )
    assert [item["type"] for item in items] == ["message", "function_call", "function_call"]
    assert [(c["call_id"], c["name"], c["arguments"]) for c in items[1:]] == [
        ("c0", "f", '{"a":1}'),
        ("c1", "g", '{"b":2}'),
    ]


# proves R12
@pytest.mark.parametrize(
    "chunks",
    [
        [piece(0, "{}", id="a", name="f"), piece(0, "{}", id="b", name="g")],
        [piece(None, "{}", id="a", name="f"), piece(None, "{}", id="b", name="g")],
        [piece(None, "{}", name="f"), piece(None, "{}", name="g")],
        [piece(0, {}, name="f"), piece(1, None, name="g"), piece(1, "{}")],
        [
            piece(0, "{", id="a", name="f"),
            piece(0, "}", id="a", name="f"),
            piece(1, "{}", name="g"),
        ],
        [piece(None, "{", id="a", name="f"), piece(None, "}"), piece(None, "{}", id="b", name="g")],
        [piece(0, "{}", id="", name="f"), piece(1, "{}", id="", name="g")],
        [
            delta(
                tool_calls=[
                    {"index": 0, "id": "a", "function": {"name": "f", "arguments": "{}"}},
                    {"index": 1, "id": "b", "function": {"name": "g", "arguments": "{}"}},
                ]
            )
        ],
    ],
    ids=[
        "one index for all",
        "no index",
        "no index and no id",
        "arguments as object",
        "name repeated",
        "no index, in pieces",
        "empty ids",
        "all in one chunk",
    ],
)
def test_calls_of_odd_servers(chunks: list[dict[str, Any]]) -> None:
    items, outcome, _ = told(*chunks, end("tool_calls"))
    assert [(c["name"], c["arguments"]) for c in items] == [("f", "{}"), ("g", "{}")]
    assert outcome.status == "completed"
    assert all(item["call_id"] for item in items)
    assert len({item["call_id"] for item in items}) == 2


# proves R12
def test_a_refusal_is_a_part_of_its_own() -> None:
    items, _, _ = told(delta(content="Well"), delta(refusal="I "), delta(refusal="won't"), end())
    assert [part["type"] for part in items[0]["content"]] == ["output_text", "refusal"]
    assert items[0]["content"][1]["refusal"] == "I won't"


# proves R12
@pytest.mark.parametrize(
    ("reason", "status", "why"),
    [
        ("stop", "completed", None),
        ("tool_calls", "completed", None),
        ("eos_token", "completed", None),
        ("length", "incomplete", "max_output_tokens"),
        ("content_filter", "incomplete", "content_filter"),
        ("abort", "failed", None),
    ],
)
def test_how_answers_end(reason: str, status: str, why: str | None) -> None:
    items, outcome, made = told(delta(content="half a"), end(reason))
    assert outcome.status == status
    assert (outcome.incomplete_details or {}).get("reason") == why
    assert items[0]["status"] == ("completed" if status == "completed" else "incomplete")
    assert words(items[0]) == "half a"
    assert ev.type_of(made[-1]) == f"response.{status}"


# proves R12
@pytest.mark.parametrize(
    ("last", "code", "says"),
    [
        ([], "server_error", "closed the stream before"),
        ([{"error": {"message": "boom", "code": 500}}], "server_error", "boom"),
        ([{"error": "boom"}], "server_error", "boom"),
        ([{"error": {"message": "slow", "code": 429}}], "rate_limit_exceeded", "slow"),
        ([{"choices": [{"delta": {"content": 5}}]}], "server_error", "cannot be read"),
        ([{"choices": "x"}], "server_error", "cannot be read"),
        ([piece(0, "{}", id="a")], "server_error", "without a name"),
    ],
)
def test_failures_keep_what_was_said(last: list[Any], code: str, says: str) -> None:
    items, outcome, _ = told(delta(content="so far"), *last, delta(content="ignored"))
    if last:
        assert words(items[0]) == "so far"
    assert outcome.status == "failed"
    assert outcome.error is not None
    assert outcome.error["code"] == code
    assert says in outcome.error["message"]
    assert {item["status"] for item in items} == {"incomplete"}


def test_a_failure_from_outside_ends_what_is_open() -> None:
    view = View()
    reader = ChatReader(view, CLOCK)
    reader.read(delta(content="half"))
    cut = Outcome(status="failed", error={"code": "server_error", "message": "gone"})
    _, outcome = reader.end(cut)
    assert outcome.error == cut.error
    assert view.output()[0]["status"] == "incomplete"


def test_an_empty_answer_is_an_empty_message() -> None:
    items, outcome, _ = told(delta(role="assistant", content=""), end())
    assert outcome.status == "completed"
    assert [words(item) for item in items] == [""]


def test_nulls_unknown_fields_and_whole_messages_are_read() -> None:
    items, outcome, _ = told(
        {"choices": None, "usage": None, "timings": {}},
        {"choices": [{"delta": None}]},
        delta(content=None, tool_calls=None, reasoning_content=None, refusal=None, extra=1),
        delta(content=[{"type": "text", "text": "pa"}, {"type": "other"}]),
        {
            "choices": [
                {"message": {"role": "assistant", "content": "rts"}, "finish_reason": "stop"}
            ]
        },
        {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": None}},
    )
    assert words(items[0]) == "parts"
    assert outcome.usage is not None
    assert outcome.usage["total_tokens"] == 1


def test_log_probabilities_are_kept() -> None:
    near = {"token": "b", "logprob": -2.0, "bytes": None}
    token = {"token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": [near]}
    chunk = {"choices": [{"delta": {"content": "a"}, "logprobs": {"content": [token]}}]}
    items, _, _ = told(chunk, end())
    kept = token | {"top_logprobs": [near | {"bytes": []}]}
    assert items[0]["content"][0]["logprobs"] == [kept]


CHUNKS = st.lists(
    st.one_of(
        st.builds(lambda text: delta(content=text), st.text("ab ", max_size=3)),
        st.builds(lambda text: delta(reasoning=text), st.text("ab ", max_size=3)),
        st.builds(lambda text: delta(refusal=text), st.text("ab ", max_size=3)),
        st.builds(
            lambda index, text, named: piece(index, text, name="f", id=named),
            st.integers(0, 2) | st.none(),
            st.text('{}"1', max_size=3),
            st.sampled_from(["a", "b", "", None]),
        ),
        st.builds(piece, st.integers(0, 2) | st.none(), st.text("12", max_size=3)),
    ),
    max_size=12,
)


# proves R12
@given(CHUNKS, st.sampled_from(["stop", "length", "abort", None]))
def test_any_order_of_chunks_makes_a_stream_the_official_client_accepts(
    chunks: list[dict[str, Any]], reason: str | None
) -> None:
    items, _, _ = told(*chunks, *([end(reason)] if reason else []))
    said = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
    told_text = "".join(
        part["text"]
        for item in items
        if item["type"] == "message"
        for part in item["content"]
        if part["type"] == "output_text"
    )
    assert said.startswith(told_text)


# proves R12
@pytest.mark.parametrize("prompt", ["count 5", "reasoning so", "refuse it", "parallel f g", "hi"])
def test_scripted_answers_read_back_word_for_word(prompt: str) -> None:
    script = script_of(prompt)
    chunks = chat_chunks(script, {"model": "m", "stream_options": {"include_usage": True}})
    items, outcome, _ = told(*chunks)
    texts = [words(item) for item in items if item["type"] == "message"]
    assert texts == ([script.text or script.refusal] if script.text or script.refusal else [])
    calls = [(c["name"], c["arguments"]) for c in items if c["type"] == "function_call"]
    assert calls == list(script.calls)
    assert outcome.usage is not None
