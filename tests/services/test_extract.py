"""The built-in model: quotes what earlier turns said, the closest first, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perdure.core.clock import SystemClock
from perdure.services.bridge import ChatReader
from perdure.services.extract import HEAD, MODEL, NOTHING, PASSAGE_CHARS_MAX, QUOTES_MAX, answer
from perdure.wire.errors import WireError
from perdure.wire.fold import View
from perdure.wire.items import sound_items
from perdure.wire.responses import Outcome, parse_create_response

CLOCK = SystemClock()


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def ask(sent: Any, *history: Any, **fields: Any) -> tuple[str, Outcome, int]:
    """The text of the answer, how it ended, and in how many pieces it came."""
    request = parse_create_response({"model": MODEL, "input": sent} | fields)
    items = sound_items(sent, CLOCK)
    view = View()
    reader = ChatReader(view, CLOCK)
    chunks = list(answer(request, sound_items(history, CLOCK), items))
    for chunk in chunks:
        reader.read(chunk)
    _, outcome = reader.end()
    (item,) = view.output()
    return item["content"][0]["text"], outcome, len(chunks)


def quoted(*arguments: Any) -> list[str]:
    text, _, _ = ask(*arguments)
    return [] if text == NOTHING else text.removeprefix(HEAD).strip().split("\n\n")


PETS = user("My cat is called Mia.\n\nMy dog is called Bob.")
TOWN = user("I have lived in Zürich since 2011.")


def test_with_nothing_to_quote_it_says_how_to_get_more() -> None:
    text, outcome, _ = ask("What is my cat called?")
    assert text == NOTHING
    assert "perdure serve --upstream http://127.0.0.1:11434/v1" in text
    assert outcome.status == "completed"


def test_the_closest_passage_comes_first_with_its_speaker() -> None:
    history = [PETS, assistant("Mia is a fine name for a cat, and cats are fine."), TOWN]
    assert quoted("Where have I lived?", *history) == ["> user: I have lived in Zürich since 2011."]
    first, *_ = quoted("What is the name of my dog?", *history)
    assert first == "> user: My dog is called Bob."
    assert quoted("zurich", *history) == ["> user: I have lived in Zürich since 2011."]
    assert "> assistant: Mia is a fine name for a cat, and cats are fine." in quoted(
        "cat", *history
    )


def test_what_is_unrelated_is_not_quoted() -> None:
    assert quoted("quantum chromodynamics", PETS, TOWN) == []


def test_the_question_is_never_quoted_nor_are_quotes() -> None:
    question = "What is my cat called?"
    first, _, _ = ask(question, PETS)
    again = quoted(question, PETS, user(question), assistant(first), assistant(NOTHING))
    assert again[0] == "> user: My cat is called Mia."
    assert not any(question in quote or HEAD in quote for quote in again)
    assert quoted([user("My cat is called Mia."), user(question)]) == []


def test_turns_within_the_request_can_be_quoted() -> None:
    sent = [PETS, assistant("Noted."), user("Who is Bob?")]
    assert quoted(sent) == ["> user: My dog is called Bob."]


def test_tool_outputs_can_be_quoted_but_not_system_messages_or_thoughts() -> None:
    call = {"type": "function_call", "call_id": "c", "name": "weather", "arguments": "{}"}
    output = {"type": "function_call_output", "call_id": "c", "output": "Rain in Oslo."}
    thought = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Oslo thought"}]}
    system = {"role": "system", "content": "Oslo is secret."}
    assert quoted("Oslo?", system, call, output, thought) == ["> tool: Rain in Oslo."]


def test_scripts_without_spaces_are_searched_too() -> None:
    assert quoted("猫の名前は？", user("私の猫はミアです。"), user("東京に住む。"))[0] == (
        "> user: 私の猫はミアです。"
    )


def test_long_turns_are_quoted_in_passages() -> None:
    filler = "Nothing to see here, move along please. " * 40
    (quote, *_) = quoted("pelican", user(f"{filler}The pelican is purple. {filler}"))
    assert "pelican is purple" in quote
    assert len(quote) <= PASSAGE_CHARS_MAX + len("> user: ")
    unbroken = quoted("needle", user("x" * 1000 + " needle " + "y" * 1000))
    assert any("needle" in quote for quote in unbroken)


def test_many_matches_are_cut_to_the_best() -> None:
    many = [user(f"fact {n} about bees") for n in range(50)]
    assert len(quoted("bees", *many)) == QUOTES_MAX


def test_answers_repeat_and_stream_word_by_word_with_estimated_usage() -> None:
    first, repeat = ask("cat?", PETS), ask("cat?", PETS)
    assert first == repeat
    text, outcome, pieces = first
    assert pieces == len(text.split()) + 1
    assert outcome.usage is not None
    assert outcome.usage["output_tokens"] >= len(text) // 4
    assert outcome.usage["input_tokens"] > 0


def test_the_token_limit_is_kept() -> None:
    text, outcome, _ = ask("cat?", PETS, max_output_tokens=10)
    assert HEAD.startswith(text.strip())
    assert outcome.status == "incomplete"
    assert outcome.incomplete_details == {"reason": "max_output_tokens"}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"text": {"format": {"type": "json_object"}}}, "text.format"),
        (
            {"tools": [{"type": "function", "name": "f"}], "tool_choice": "required"},
            "tool_choice",
        ),
    ],
)
def test_what_takes_a_writing_model_is_refused(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(WireError) as caught:
        ask("cat?", PETS, **fields)
    assert caught.value.param == param


@pytest.mark.parametrize(
    "question",
    [
        'cat" OR 1',
        "cat*",
        "NEAR(cat dog)",
        "text: cat",
        "{a b}: cat",
        "^cat + AND NOT -cat",
        "'; drop table passage; -- cat",
        "\x00cat\x00",
        "cat\n\ncat",
    ],
)
def test_hostile_syntax_in_the_question_is_only_words(question: str) -> None:
    assert "> user: My cat is called Mia." in quoted(question, PETS)


@given(
    st.text(st.characters(exclude_categories=("Cs",))),
    st.text(st.characters(exclude_categories=("Cs",))),
)
def test_any_text_is_answered(question: str, said: str) -> None:
    text, outcome, _ = ask(question, user(said), PETS)
    assert text.startswith((HEAD, NOTHING))
    assert outcome.status == "completed"
