"""Items: the messages, tool calls and thoughts that responses and conversations are made of.

An item is kept as the plain dict that was sent, unknown fields included, in the full form in which
the API gives it back: with an id, a type, a status where its kind has one, and content as a list.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import msgspec

from perdure.core.clock import Clock
from perdure.wire.errors import WireError, missing, not_among, wrong_type

Item = dict[str, Any]

INPUT_ROLES = ("user", "system", "developer")
INPUT_PARTS = ("input_text", "input_image", "input_file")
OUTPUT_PARTS = ("output_text", "refusal")
STATUSES = ("in_progress", "completed", "incomplete")

_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


class Kind(msgspec.Struct, frozen=True):
    """One kind of item: how its ids begin, which fields it needs, and whether it has a status."""

    prefix: str
    needs: tuple[str, ...] = ()
    status: bool = False


KINDS: dict[str, Kind] = {
    "message": Kind("msg", ("role", "content"), status=True),
    "function_call": Kind("fc", ("call_id", "name", "arguments"), status=True),
    "function_call_output": Kind("fco", ("call_id", "output"), status=True),
    "reasoning": Kind("rs", ("summary",)),
    "custom_tool_call": Kind("ctc", ("call_id", "name", "input"), status=True),
    "custom_tool_call_output": Kind("ctco", ("call_id", "output"), status=True),
    "file_search_call": Kind("fs", ("queries",), status=True),
    "web_search_call": Kind("ws", ("action",), status=True),
    "computer_call": Kind("cu", ("call_id", "pending_safety_checks"), status=True),
    "computer_call_output": Kind("cuo", ("call_id", "output"), status=True),
    "image_generation_call": Kind("ig", status=True),
    "code_interpreter_call": Kind("ci", ("container_id",), status=True),
    "local_shell_call": Kind("lsh", ("call_id", "action"), status=True),
    "local_shell_call_output": Kind("lsho", ("output",)),
    "shell_call": Kind("sh", ("call_id", "action"), status=True),
    "shell_call_output": Kind("sho", ("call_id", "output"), status=True),
    "apply_patch_call": Kind("apc", ("call_id", "operation"), status=True),
    "apply_patch_call_output": Kind("apco", ("call_id",), status=True),
    "mcp_list_tools": Kind("mcpl", ("server_label", "tools")),
    "mcp_approval_request": Kind("mcpr", ("server_label", "name", "arguments")),
    "mcp_approval_response": Kind("mcprs", ("approval_request_id", "approve")),
    "mcp_call": Kind("mcp", ("server_label", "name", "arguments")),
    "tool_search_call": Kind("tsc", ("arguments", "execution"), status=True),
    "tool_search_output": Kind("tso", ("execution", "tools"), status=True),
    "additional_tools": Kind("adt", ("role", "tools")),
    "configuration_update": Kind("cfg"),
    "program": Kind("prog", ("call_id", "code", "fingerprint")),
    "program_output": Kind("progo", ("call_id", "result"), status=True),
    "compaction": Kind("cmp", ("encrypted_content",)),
}
"""Every kind of item that can be kept. Which of them a model can read is the bridge's business."""

REFERENCE = "item_reference"

TEXT_FIELDS = {
    "function_call": ("call_id", "name", "arguments"),
    "function_call_output": ("call_id",),
    "custom_tool_call": ("call_id", "name", "input"),
    "compaction": ("encrypted_content",),
}
"""Needed fields that must be text; the others that a kind needs may be anything but null."""


def sound_items(sent: str | Sequence[Any], clock: Clock, *, at: str = "input") -> list[Item]:
    """The items of a request in their full form, ids given to those without one.

    References come back as `{"type": "item_reference", "id": ...}`, for the caller to resolve.
    Raises `WireError` naming the item and field that cannot be kept.
    """
    if isinstance(sent, str):
        sent = [{"role": "user", "content": sent}]
    items = [_sound(item, clock, f"{at}[{place}]") for place, item in enumerate(sent)]
    seen: set[str] = set()
    for place, item in enumerate(items):
        if item["id"] in seen:
            raise duplicate(item["id"], f"{at}[{place}].id")
        seen.add(item["id"])
    return items


def duplicate(id: str, param: str) -> WireError:
    """An item that is already where it was to be added: lists could not be paged by its id."""
    return WireError(
        f"Duplicate item found with id '{id}'. "
        "Remove duplicate items from your input and try again.",
        param=param,
    )


def text_of(item: Item) -> str:
    """The words of an item: a message's text, a tool's output, a thought. Empty for others."""
    parts = item.get("output") if item.get("type") == "function_call_output" else None
    if parts is None:
        parts = item.get("content")
    if isinstance(parts, str):
        return parts
    return "\n".join(
        part.get("text") or part.get("refusal") or ""
        for part in parts or ()
        if "text" in part or "refusal" in part
    )


def _sound(item: Any, clock: Clock, at: str) -> Item:
    if not isinstance(item, dict):
        raise wrong_type(at, "an object", item)
    type = _type_of_untyped(item, at) if item.get("type") is None else item["type"]
    if type == REFERENCE:
        return {"type": REFERENCE, "id": _id(item.get("id"), at)}
    kind = KINDS.get(type) if isinstance(type, str) else None
    if kind is None:
        raise not_among(f"{at}.type", type, (*KINDS, REFERENCE))
    _need(item, kind.needs, at)
    for field in TEXT_FIELDS.get(type, ()):
        if not isinstance(item[field], str):
            raise wrong_type(f"{at}.{field}", "a string", item[field])
    id = clock.new_id(kind.prefix) if item.get("id") is None else _id(item["id"], at)
    head: Item = {"id": id, "type": type}
    if kind.status:
        head["status"] = _status(item, type, at)
    sound = head | {name: value for name, value in item.items() if name not in head}
    match type:
        case "message":
            sound["content"] = _content(sound, at)
        case "reasoning":
            _check_reasoning(sound, at)
        case "function_call_output" if not isinstance(sound["output"], str):
            sound["output"] = _parts(sound["output"], "user", f"{at}.output")
    return sound


def _type_of_untyped(item: Item, at: str) -> str:
    """Messages and references may be sent without a type."""
    if "role" in item:
        return "message"
    if set(item) <= {"id", "type"} and "id" in item:
        return REFERENCE
    raise missing(f"{at}.type")


def _status(item: Item, type: str, at: str) -> str:
    status = "completed" if item.get("status") is None else item["status"]
    if not isinstance(status, str):
        raise wrong_type(f"{at}.status", "a string", status)
    if type in ("message", "function_call", "function_call_output") and status not in STATUSES:
        raise not_among(f"{at}.status", status, STATUSES)
    return status


def _content(item: Item, at: str) -> list[Item]:
    role = item["role"]
    if role not in (*INPUT_ROLES, "assistant"):
        raise not_among(f"{at}.role", role, (*INPUT_ROLES, "assistant"))
    content = item["content"]
    if isinstance(content, str):
        type = "output_text" if role == "assistant" else "input_text"
        content = [{"type": type, "text": content}]
    return _parts(content, role, f"{at}.content")


def _parts(parts: Any, role: str, at: str) -> list[Item]:
    if not isinstance(parts, list):
        raise wrong_type(at, "a string or an array of content parts", parts)
    return [_part(part, role, f"{at}[{place}]") for place, part in enumerate(parts)]


def _part(part: Any, role: str, at: str) -> Item:
    if not isinstance(part, dict):
        raise wrong_type(at, "an object", part)
    match part.get("type"), role == "assistant":
        case "input_text", False:
            return _with_text(part, "text", at)
        case "output_text", True:
            return _with_text({"annotations": [], "logprobs": [], **part}, "text", at)
        case "refusal", True:
            return _with_text(part, "refusal", at)
        case "input_image", False:
            _one_of(part, ("image_url", "file_id"), at)
            return {"detail": "auto", **part}
        case "input_file", False:
            _one_of(part, ("file_id", "file_data", "file_url"), at)
            return part
        case type, assistant:
            raise not_among(f"{at}.type", type, OUTPUT_PARTS if assistant else INPUT_PARTS)


def _with_text(part: Item, field: str, at: str) -> Item:
    _need(part, (field,), at)
    if not isinstance(part[field], str):
        raise wrong_type(f"{at}.{field}", "a string", part[field])
    return part


def _one_of(part: Item, fields: tuple[str, ...], at: str) -> None:
    given = [part[field] for field in fields if part.get(field) is not None]
    if len(given) != 1 or not isinstance(given[0], str):
        named = ", ".join(f"'{field}'" for field in fields)
        raise WireError(f"'{at}' needs exactly one of {named}, as a string.", param=at)


def _check_reasoning(item: Item, at: str) -> None:
    for field in ("summary", "content"):
        parts = item.get(field)
        if parts is None and field == "content":
            continue
        if not isinstance(parts, list):
            raise wrong_type(f"{at}.{field}", "an array", parts)
        for place, part in enumerate(parts):
            if not isinstance(part, dict):
                raise wrong_type(f"{at}.{field}[{place}]", "an object", part)
            _with_text(part, "text", f"{at}.{field}[{place}]")


def _need(item: Item, fields: tuple[str, ...], at: str) -> None:
    for field in fields:
        if item.get(field) is None:
            raise missing(f"{at}.{field}")


def _id(id: Any, at: str) -> str:
    if not isinstance(id, str) or not _ID.fullmatch(id):
        raise WireError(
            f"Invalid '{at}.id'. Expected an ID of at most 64 letters, numbers, underscores, or "
            "dashes.",
            param=f"{at}.id",
        )
    return id
