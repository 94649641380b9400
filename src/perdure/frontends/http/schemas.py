"""JSON Schemas of what is kept as plain JSON rather than as structs: items, and the responses and
requests that hold them. Made from the tables that validate requests, where there is one.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import msgspec

from perdure.wire.compaction import COMPACTED
from perdure.wire.conversations import ITEMS_MAX
from perdure.wire.files import ANCHOR, EXPIRES_MAX_S, EXPIRES_MIN_S, PURPOSES
from perdure.wire.input_tokens import COUNTED
from perdure.wire.items import INPUT_ROLES, KINDS, REFERENCE, STATUSES, TEXT_FIELDS
from perdure.wire.lists import LIMIT_MAX
from perdure.wire.metadata import KEY_CHARS_MAX, PAIRS_MAX, VALUE_CHARS_MAX
from perdure.wire.responses import INCLUDES, CreateResponse

Json = dict[str, Any]

TEXT: Json = {"type": "string"}
OBJECT: Json = {"type": "object"}
ITEM_ID: Json = {"type": "string", "pattern": "^[A-Za-z0-9_-]{1,64}$"}


class Schema(msgspec.Struct, frozen=True):
    """A named JSON Schema, for where a route would name a type."""

    name: str
    definition: Json


def ref(schema: Schema) -> Json:
    return {"$ref": f"#/components/schemas/{schema.name}"}


def nullable(schema: Json) -> Json:
    return {"anyOf": [schema, {"type": "null"}]}


def _object(properties: Json, required: tuple[str, ...] = (), **more: Any) -> Json:
    return {"type": "object", "properties": properties, "required": list(required), **more}


def _array(items: Json, **more: Any) -> Json:
    return {"type": "array", "items": items, **more}


def _part(type: str, **fields: Json) -> Json:
    return _object({"type": {"const": type}, **fields}, ("type", *fields))


METADATA: Json = {
    "type": "object",
    "additionalProperties": {"type": "string", "maxLength": VALUE_CHARS_MAX},
    "propertyNames": {"maxLength": KEY_CHARS_MAX},
    "maxProperties": PAIRS_MAX,
}

INPUT_PART = Schema(
    "InputPart",
    {
        "anyOf": [
            _part("input_text", text=TEXT),
            _part("input_image", image_url=TEXT),
            _part("input_image", file_id=TEXT),
            _part("input_file", file_data=TEXT),
            _part("input_file", file_id=TEXT),
        ]
    },
)
OUTPUT_PART = Schema(
    "OutputPart",
    {"anyOf": [_part("output_text", text=TEXT), _part("refusal", refusal=TEXT)]},
)

_THOUGHTS = _array(_object({"text": TEXT}, ("text",)))
_FIELDS: dict[tuple[str, str], Json] = {
    ("function_call_output", "output"): {"anyOf": [TEXT, _array(ref(INPUT_PART))]},
    ("reasoning", "summary"): _THOUGHTS,
}
"""Fields of items with a form of their own."""

_STATUS = nullable({"enum": list(STATUSES)})
_STRICT = ("function_call", "function_call_output")
_ANY: Json = {"not": {"type": "null"}}


def _message(role: Json, part: Schema) -> Json:
    return _object(
        {
            "type": nullable({"const": "message"}),
            "id": nullable(ITEM_ID),
            "role": role,
            "status": _STATUS,
            "content": {"anyOf": [TEXT, _array(ref(part))]},
        },
        ("role", "content"),
    )


def _kind(name: str) -> Json:
    kind = KINDS[name]
    fields = {
        field: _FIELDS.get((name, field), TEXT if field in TEXT_FIELDS.get(name, ()) else _ANY)
        for field in kind.needs
    }
    own = {"type": {"const": name}, "id": nullable(ITEM_ID), **fields}
    if name == "reasoning":
        own["content"] = nullable(_THOUGHTS)
    if kind.status:
        own["status"] = _STATUS if name in _STRICT else nullable(TEXT)
    return _object(own, ("type", *kind.needs))


INPUT_ITEM = Schema(
    "InputItem",
    {
        "anyOf": [
            _message({"enum": list(INPUT_ROLES)}, INPUT_PART),
            _message({"const": "assistant"}, OUTPUT_PART),
            _object({"type": {"const": REFERENCE}, "id": ITEM_ID}, ("type", "id")),
            _object({"type": {"type": "null"}, "id": ITEM_ID}, ("id",), additionalProperties=False),
            *(_kind(name) for name in KINDS if name != "message"),
        ]
    },
)
ItemObject = Schema(
    "Item",
    _object({"id": ITEM_ID, "type": {"enum": list(KINDS)}}, ("id", "type")),
)
ItemList = Schema(
    "ItemList",
    _object(
        {
            "object": {"const": "list"},
            "data": _array(ref(ItemObject), maxItems=LIMIT_MAX),
            "first_id": nullable(TEXT),
            "last_id": nullable(TEXT),
            "has_more": {"type": "boolean"},
        },
        ("object", "data", "first_id", "last_id", "has_more"),
    ),
)

_RESPONSE_FIELDS: Json = {
    "id": TEXT,
    "object": {"const": "response"},
    "created_at": {"type": "integer"},
    "status": {"enum": ["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]},
    "background": {"type": "boolean"},
    "completed_at": nullable({"type": "integer"}),
    "conversation": nullable(_object({"id": TEXT}, ("id",))),
    "error": nullable(_object({"code": TEXT, "message": TEXT}, ("code", "message"))),
    "frequency_penalty": {"type": "number"},
    "incomplete_details": nullable(OBJECT),
    "instructions": nullable(TEXT),
    "max_output_tokens": nullable({"type": "integer"}),
    "max_tool_calls": nullable({"type": "integer"}),
    "metadata": OBJECT,
    "model": TEXT,
    "output": _array(ref(ItemObject)),
    "parallel_tool_calls": {"type": "boolean"},
    "presence_penalty": {"type": "number"},
    "previous_response_id": nullable(TEXT),
    "prompt_cache_key": nullable(TEXT),
    "reasoning": OBJECT,
    "safety_identifier": nullable(TEXT),
    "service_tier": TEXT,
    "store": {"type": "boolean"},
    "temperature": {"type": "number"},
    "text": OBJECT,
    "tool_choice": {"anyOf": [TEXT, OBJECT]},
    "tools": _array(OBJECT),
    "top_logprobs": {"type": "integer"},
    "top_p": {"type": "number"},
    "truncation": TEXT,
    "usage": nullable(OBJECT),
    "user": nullable(TEXT),
}
ResponseObject = Schema("Response", _object(_RESPONSE_FIELDS, tuple(_RESPONSE_FIELDS)))


def _object_list(name: str, item: Json) -> Schema:
    """The envelope of lists that are Perdure's own."""
    finding = _object({"where": TEXT, "why": TEXT, "kind": TEXT}, ("where", "why", "kind"))
    fields = {
        "object": {"const": "list"},
        "data": _array(item, maxItems=LIMIT_MAX),
        "first_id": nullable(TEXT),
        "last_id": nullable(TEXT),
        "has_more": {"type": "boolean"},
        "damaged": _array(finding),
    }
    return Schema(name, _object(fields, tuple(fields)))


ResponseList = _object_list("ResponseList", ref(ResponseObject))
JobList = _object_list("JobList", {"$ref": "#/components/schemas/JobObject"})
ConversationList = _object_list("ConversationList", {"$ref": "#/components/schemas/Conversation"})


def _create_response() -> Json:
    """The request's schema, from the struct that validates it, with what nests in it spelled out.
    Fields that no standard knows are accepted and given back."""
    (own,), definitions = msgspec.json.schema_components((CreateResponse,))
    made: Json = definitions[own["$ref"].rsplit("/", 1)[1]]
    fields = made["properties"]
    del fields["extra"]
    fields["model"] = TEXT
    fields["input"] = nullable({"anyOf": [TEXT, _array(ref(INPUT_ITEM), minItems=1)]})
    fields["metadata"] = nullable(METADATA)
    fields["include"] = nullable(_array({"enum": list(INCLUDES)}))
    fields["conversation"] = nullable(
        {"anyOf": [TEXT, _object({"id": TEXT}, ("id",), additionalProperties=False)]}
    )
    fields["tools"] = nullable(_array(_part("function", name=TEXT)))
    made["required"] = ["model"]
    made["anyOf"] = [
        _object({name: {"not": {"type": "null"}}}, (name,))
        for name in ("input", "previous_response_id", "conversation")
    ]
    return made


def _part_of_create(takes: Collection[str], **changed: Any) -> Json:
    """The schema of a request that takes some of what creating a response takes."""
    made = _create_response()
    made["properties"] = {
        name: schema for name, schema in made["properties"].items() if name in takes
    }
    made["anyOf"] = [origin for origin in made["anyOf"] if origin["required"][0] in takes]
    return made | changed


CreateResponseBody = Schema("CreateResponse", _create_response())
CompactBody = Schema("Compact", _part_of_create(COMPACTED))
CompactionObject = Schema(
    "Compaction",
    _object(
        {
            "id": TEXT,
            "object": {"const": "response.compaction"},
            "created_at": {"type": "integer"},
            "output": _array(ref(ItemObject)),
            "usage": OBJECT,
        },
        ("id", "object", "created_at", "output", "usage"),
    ),
)
InputTokensBody = Schema("CountInputTokens", _part_of_create(COUNTED, required=[]))
CreateConversationBody = Schema(
    "CreateConversation",
    nullable(
        _object(
            {
                "metadata": nullable(METADATA),
                "items": nullable(_array(ref(INPUT_ITEM), maxItems=ITEMS_MAX)),
            },
            additionalProperties=False,
        )
    ),
)
CreateItemsBody = Schema(
    "CreateItems",
    _object(
        {"items": _array(ref(INPUT_ITEM), minItems=1, maxItems=ITEMS_MAX)},
        ("items",),
        additionalProperties=False,
    ),
)
UpdateConversationBody = Schema(
    "UpdateConversation",
    _object({"metadata": nullable(METADATA)}, ("metadata",), additionalProperties=False),
)
CreateFileBody = Schema(
    "CreateFile",
    _object(
        {
            "file": {"type": "string", "format": "binary"},
            "purpose": {"enum": list(PURPOSES)},
            "expires_after[anchor]": {"const": ANCHOR},
            "expires_after[seconds]": {
                "type": "integer",
                "minimum": EXPIRES_MIN_S,
                "maximum": EXPIRES_MAX_S,
            },
        },
        ("file", "purpose"),
        dependentRequired={
            "expires_after[anchor]": ["expires_after[seconds]"],
            "expires_after[seconds]": ["expires_after[anchor]"],
        },
        additionalProperties=False,
    ),
)
AddPartBody = Schema(
    "AddUploadPart",
    _object(
        {"data": {"type": "string", "format": "binary"}}, ("data",), additionalProperties=False
    ),
)
PARTS = (INPUT_PART, OUTPUT_PART, INPUT_ITEM, ItemObject)
"""Schemas that only others refer to."""
