"""The error body of the public API, and the errors that know their place in a request.

A wire error is one of the six kinds and adds what OpenAI's clients read: the parameter at fault, a
stable code and the status that the official service answers. Nothing here knows how it is sent.
"""

from __future__ import annotations

import builtins
import re
from collections.abc import Iterable
from typing import Any, Literal, TypeVar, get_args, get_origin

import msgspec

from perdure.core.errors import Invalid, Missing, PerdureError, Unavailable

T = TypeVar("T")


class ErrorDetail(msgspec.Struct, frozen=True, kw_only=True):
    """What went wrong; `param` names the request field as `input[0].content`."""

    message: str
    type: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None


class ErrorBody(msgspec.Struct, frozen=True):
    """The body of every answer that is not a success."""

    error: ErrorDetail


class WireError(Invalid):
    """The request cannot be served as sent. `code` is OpenAI's where it has one."""

    status = 400
    type = "invalid_request_error"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code or "invalid_value"


class NotFound(Missing):
    """No object of that id. The message is the one OpenAI's service answers."""

    status = 404
    type = "invalid_request_error"
    param: str | None = None

    def __init__(self, noun: str, id: str) -> None:
        super().__init__(f"{noun} with id '{id}' not found.")
        self.id = id
        self.code = "not_found"


class ConversationLocked(Unavailable):
    """Another response is being written into the conversation; ask again after the delay."""

    status = 400
    type = "invalid_request_error"
    param: str | None = "conversation"
    code = "conversation_locked"

    def __init__(self, conversation: str, retry_after_ms: int) -> None:
        super().__init__(
            f"Another process is currently operating on the conversation '{conversation}'. "
            "Please retry in a few seconds."
        )
        self.retry_after_ms = retry_after_ms


class ResponseInProgress(Unavailable):
    """What a request builds on has no end yet; ask again after the delay."""

    status = 400
    type = "invalid_request_error"
    param: str | None = "previous_response_id"
    code = "response_in_progress"
    retry_after_ms = 1000

    def __init__(self, response_id: str) -> None:
        super().__init__(
            f"Response '{response_id}' is still being generated; wait for its end before "
            "continuing from it."
        )


def unsupported(what: str, param: str, instead: str = "") -> WireError:
    """What the API defines and this server does not do yet: refused by name, never ignored."""
    hint = f" {instead}" if instead else ""
    return WireError(
        f"Unsupported parameter: '{param}'. {what} is not supported by this server yet.{hint}",
        param=param,
        code="unsupported_parameter",
    )


def unsupported_value(what: str, param: str, instead: str = "") -> WireError:
    """A value of a known parameter that this server cannot honour."""
    hint = f" {instead}" if instead else ""
    return WireError(
        f"Unsupported value at '{param}': {what} is not supported by this server yet.{hint}",
        param=param,
        code="unsupported_value",
    )


def missing(param: str) -> WireError:
    """A parameter that has to be there."""
    return WireError(
        f"Missing required parameter: '{param}'.", param=param, code="missing_required_parameter"
    )


def not_among(param: str, value: object, supported: Iterable[object]) -> WireError:
    """A value that is none of those a parameter takes."""
    named = ", ".join(f"'{one}'" for one in supported)
    return WireError(
        f"Invalid value for '{param}': '{str(value)[:80]}'. Supported values are: {named}.",
        param=param,
    )


def wrong_type(param: str, wanted: str, got: object) -> WireError:
    """A value of another JSON type than the parameter's."""
    named = _JSON_TYPES.get(type(got), "null")
    return WireError(
        f"Invalid type for '{param}': expected {wanted}, but got {named} instead.",
        param=param,
        code="invalid_type",
    )


def previous_response_not_found(id: str) -> WireError:
    """The chain names an ancestor that is not stored (never was, expired or deleted)."""
    return WireError(
        f"Previous response with id '{id}' not found.",
        param="previous_response_id",
        code="previous_response_not_found",
    )


def body_of(error: PerdureError) -> ErrorBody:
    """The error body of any error raised on purpose."""
    return ErrorBody(
        ErrorDetail(
            message=str(error),
            type=getattr(error, "type", _TYPES.get(_kind(error), "server_error")),
            param=getattr(error, "param", None),
            code=error.code,
        )
    )


def typed(value: Any, type: type[T], *, at: str = "") -> T:
    """Convert plain values into a wire struct. Raises `WireError` naming the parameter at fault,
    with `at` in front of its path."""
    try:
        return msgspec.convert(value, type)
    except msgspec.ValidationError as error:
        raise _refusal(str(error), type, at) from None


_TYPES = dict.fromkeys(("Invalid", "Missing", "Conflict"), "invalid_request_error")
"""By kind; the others are `server_error`."""


def _kind(error: PerdureError) -> str:
    for kind in type(error).__mro__:
        if PerdureError in kind.__bases__:
            return kind.__name__
    return ""


def _refusal(message: str, type: Any, at: str) -> WireError:
    """A `WireError` from msgspec's message, which ends in ` - at `$.path`` unless at the root."""
    text, _, path = message.partition(" - at `$")
    path = path.removesuffix("`").replace("[...]", "")
    param = f"{at}{path}".lstrip(".")
    if text.startswith(("Object missing required field", "Object contains unknown field")):
        param = f"{param}.{text.split('`')[1]}".lstrip(".")
        if "missing" in text:
            return missing(param)
        return WireError(f"Unknown parameter: '{param}'.", param=param, code="unknown_parameter")
    if text.startswith("Invalid enum value "):
        value = text.removeprefix("Invalid enum value ").strip("'")
        return not_among(param, value, _literals(type, path.lstrip(".").split(".")))
    named = param or "the request body"
    text = _TYPE_NAME.sub(lambda found: _NAMES.get(found[0], found[0]), text)
    if found := re.fullmatch(r"Expected `(.+)`, got `(.+)`", text):
        wanted = found[1].replace(" | ", " or ")
        return WireError(
            f"Invalid type for '{named}': expected {wanted}, but got {found[2]} instead.",
            param=param or None,
            code="invalid_type",
        )
    said = text.replace("`", "").removeprefix("Expected ")
    return WireError(f"Invalid '{named}': expected {said}.", param=param or None)


def _literals(type: Any, path: list[str]) -> list[object]:
    """The literals that the field at a path takes."""
    for part in (type, *get_args(type)):
        if not path and get_origin(part) is Literal:
            return list(get_args(part))
        for field in msgspec.structs.fields(part) if path and _is_struct(part) else ():
            if field.name == path[0]:
                return _literals(field.type, path[1:])
    return []


def _is_struct(type: Any) -> bool:
    return isinstance(type, builtins.type) and issubclass(type, msgspec.Struct)


_TYPE_NAME = re.compile(r"\b(str|int|float|bool|array|object|null)\b")
_NAMES = {"str": "string", "int": "integer", "float": "number", "bool": "boolean"}

_JSON_TYPES: dict[type, str] = {
    str: "a string",
    bool: "a boolean",
    int: "an integer",
    float: "a number",
    list: "an array",
    dict: "an object",
}
