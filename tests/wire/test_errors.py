"""Every error raised on purpose has a body that OpenAI's clients understand."""

from __future__ import annotations

import pytest

from perdure.core import codec
from perdure.core.errors import Conflict, Damaged, Invalid, LimitExceeded, PerdureError, Unavailable
from perdure.wire.errors import (
    ConversationLocked,
    NotFound,
    WireError,
    body_of,
    previous_response_not_found,
)


# proves R7
@pytest.mark.parametrize(
    ("error", "status", "code", "param"),
    [
        (NotFound("Response", "resp_1"), 404, "not_found", None),
        (
            previous_response_not_found("resp_1"),
            400,
            "previous_response_not_found",
            "previous_response_id",
        ),
        (ConversationLocked("conv_1", 250), 400, "conversation_locked", "conversation"),
        (WireError("no", param="model"), 400, "invalid_value", "model"),
    ],
)
def test_wire_errors_carry_status_code_and_parameter(
    error: PerdureError, status: int, code: str, param: str | None
) -> None:
    assert error.status == status  # type: ignore[attr-defined]
    assert codec.parse(codec.encode(body_of(error))) == {
        "error": {
            "message": str(error),
            "type": "invalid_request_error",
            "param": param,
            "code": code,
        }
    }


# proves R7
@pytest.mark.parametrize(
    ("error", "type"),
    [
        (Invalid("no"), "invalid_request_error"),
        (LimitExceeded("the value", 2, 1), "invalid_request_error"),
        (Conflict("x", 1, 2), "invalid_request_error"),
        (Unavailable("later"), "server_error"),
        (Damaged("x", "torn"), "server_error"),
    ],
)
def test_errors_from_below_get_a_body_by_their_kind(error: PerdureError, type: str) -> None:
    said = body_of(error).error
    assert (said.type, said.code, said.message) == (type, error.code, str(error))
