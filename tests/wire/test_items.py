"""Items as they are kept: in full form, with ids, unknown fields included, nothing unsound."""

from __future__ import annotations

from typing import Any, get_args

import pytest
from openai._models import validate_type
from openai.types.conversations import ConversationItem
from openai.types.responses import ResponseItem

from perdure.core.clock import SystemClock
from perdure.wire.errors import WireError
from perdure.wire.items import KINDS, sound_items, text_of

CLOCK = SystemClock()


def sound(*sent: Any) -> list[dict[str, Any]]:
    return sound_items(list(sent), CLOCK)


def official_kinds() -> dict[str, list[Any]]:
    """The official client's models of items, by type."""
    found: dict[str, list[Any]] = {}
    for model in get_args(get_args(ResponseItem)[0]):
        (type,) = get_args(model.model_fields["type"].annotation)
        found.setdefault(type, []).append(model)
    return found


# proves R1
def test_every_kind_of_the_official_client_is_known_with_what_it_needs() -> None:
    official = official_kinds()
    assert set(KINDS) == set(official)
    for type, models in official.items():
        needed = set.intersection(
            *(
                {name for name, field in model.model_fields.items() if field.is_required()}
                for model in models
            )
        )
        assert needed - {"id", "type", "status"} <= set(KINDS[type].needs), type
        assert "status" not in needed or KINDS[type].status, type


def test_the_prefixes_of_ids_differ() -> None:
    assert len({kind.prefix for kind in KINDS.values()}) == len(KINDS)


# proves R1, R8
@pytest.mark.parametrize(
    "sent",
    [
        {"role": "user", "content": "hi"},
        {"role": "developer", "content": [{"type": "input_text", "text": "hi"}]},
        {"role": "system", "content": [], "type": "message"},
        {"role": "assistant", "content": "hi"},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
        {"role": "assistant", "content": [{"type": "output_text", "text": "x"}], "phase": None},
        {"role": "user", "content": [{"type": "input_image", "image_url": "data:,"}]},
        {"role": "user", "content": [{"type": "input_file", "file_data": "data:,"}]},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "1"},
        {
            "type": "function_call_output",
            "call_id": "c",
            "output": [{"type": "input_text", "text": "1"}],
        },
        {"type": "reasoning", "summary": [], "id": "rs_1"},
        {
            "type": "reasoning",
            "summary": [{"type": "summary_text", "text": "s"}],
            "content": [{"type": "reasoning_text", "text": "t"}],
        },
        {"type": "custom_tool_call", "call_id": "c", "name": "n", "input": "x"},
        {"type": "custom_tool_call_output", "call_id": "c", "output": "x"},
        {"type": "file_search_call", "queries": ["q"]},
        {"type": "mcp_call", "server_label": "s", "name": "n", "arguments": "{}"},
        {"type": "image_generation_call", "result": None},
        {"type": "code_interpreter_call", "container_id": "c", "code": None, "outputs": None},
        {"type": "compaction", "encrypted_content": "x"},
    ],
    ids=lambda sent: str(sent.get("type", sent.get("role"))),
)
def test_kept_items_pass_strict_validation_in_both_apis(sent: dict[str, Any]) -> None:
    (item,) = sound(sent)
    validate_type(type_=ResponseItem, value=item)
    validate_type(type_=ConversationItem, value=item)
    assert item["id"].startswith(KINDS[item["type"]].prefix)
    assert {name: item[name] for name in sent if name != "content"} == {
        name: value for name, value in sent.items() if name != "content"
    }


def test_a_string_is_one_message_of_the_user() -> None:
    (item,) = sound_items("hé", CLOCK)
    assert item == {
        "id": item["id"],
        "type": "message",
        "status": "completed",
        "role": "user",
        "content": [{"type": "input_text", "text": "hé"}],
    }


# proves R1
def test_unknown_fields_and_own_ids_are_kept() -> None:
    part = {"type": "input_text", "text": "x", "vendor": [1, {"deep": None}]}
    sent = {"id": "msg_mine", "role": "user", "content": [part], "vendor": {"a": 1.5}}
    (item,) = sound(sent)
    assert item["id"] == "msg_mine"
    assert item["vendor"] == {"a": 1.5}
    assert item["content"] == [part]


def test_references_are_left_to_be_resolved() -> None:
    assert sound({"type": "item_reference", "id": "msg_1"}, {"id": "msg_2"}) == [
        {"type": "item_reference", "id": "msg_1"},
        {"type": "item_reference", "id": "msg_2"},
    ]


@pytest.mark.parametrize(
    ("sent", "param"),
    [
        ("text", "input[0]"),
        ({}, "input[0].type"),
        ({"type": "nonsense"}, "input[0].type"),
        ({"type": ["message"]}, "input[0].type"),
        ({"role": "user"}, "input[0].content"),
        ({"role": "tool", "content": "x"}, "input[0].role"),
        ({"role": ["user"], "content": "x"}, "input[0].role"),
        ({"role": "user", "content": 5}, "input[0].content"),
        ({"role": "user", "content": ["x"]}, "input[0].content[0]"),
        ({"role": "user", "content": [{"type": "text", "text": "x"}]}, "input[0].content[0].type"),
        ({"role": "user", "content": [{"type": ["x"]}]}, "input[0].content[0].type"),
        ({"role": "user", "content": [{"type": "input_text"}]}, "input[0].content[0].text"),
        (
            {"role": "user", "content": [{"type": "input_text", "text": 1}]},
            "input[0].content[0].text",
        ),
        ({"role": "user", "content": [{"type": "input_image"}]}, "input[0].content[0]"),
        (
            {"role": "assistant", "content": [{"type": "input_text", "text": "x"}]},
            "input[0].content[0].type",
        ),
        ({"role": "user", "content": "x", "status": "odd"}, "input[0].status"),
        ({"role": "user", "content": "x", "status": {}}, "input[0].status"),
        ({"role": "user", "content": "x", "id": "a b"}, "input[0].id"),
        ({"role": "user", "content": "x", "id": "a" * 65}, "input[0].id"),
        ({"role": "user", "content": "x", "id": 7}, "input[0].id"),
        ({"type": "item_reference"}, "input[0].id"),
        ({"type": "function_call", "call_id": "c", "name": "f"}, "input[0].arguments"),
        (
            {"type": "function_call", "call_id": "c", "name": "f", "arguments": {}},
            "input[0].arguments",
        ),
        ({"type": "function_call_output", "output": "x"}, "input[0].call_id"),
        ({"type": "function_call_output", "call_id": "c", "output": 3}, "input[0].output"),
        ({"type": "reasoning"}, "input[0].summary"),
        ({"type": "reasoning", "summary": "x"}, "input[0].summary"),
        ({"type": "reasoning", "summary": ["x"]}, "input[0].summary[0]"),
        ({"type": "reasoning", "summary": [], "content": [{}]}, "input[0].content[0].text"),
    ],
)
def test_unsound_items_are_refused_by_place(sent: Any, param: str) -> None:
    with pytest.raises(WireError) as caught:
        sound(sent)
    assert caught.value.param == param


def test_one_id_cannot_stand_twice() -> None:
    message = {"id": "msg_1", "role": "user", "content": "x"}
    with pytest.raises(WireError, match="Duplicate item"):
        sound(message, message)


def test_the_words_of_an_item() -> None:
    message = {"role": "user", "content": "said"}
    image = {"role": "user", "content": [{"type": "input_image", "image_url": "u"}]}
    output = {"type": "function_call_output", "call_id": "c", "output": "told"}
    refusal = {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}
    call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
    assert [text_of(item) for item in sound(message, image, output, refusal, call)] == [
        "said",
        "",
        "told",
        "no",
        "",
    ]
