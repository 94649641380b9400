"""Errors to answers: the one place. A kind decides the status, a finer name may refine it.

The body is OpenAI's. `x-should-retry` tells official clients what a blind repeat would do, where
their own guess from the status would be wrong.
"""

from __future__ import annotations

from traceback import extract_tb

import msgspec
import structlog
from starlette.types import ASGIApp, Receive, Scope, Send

from perdure.core import errors
from perdure.core.errors import PerdureError
from perdure.frontends.http.call import CALL, Answer, BodyTooLarge, Call, Disconnected
from perdure.wire.errors import ErrorBody, ErrorDetail, body_of

_log = structlog.get_logger("perdure.http")

Headers = tuple[tuple[bytes, bytes], ...]

RETRY: Headers = ((b"x-should-retry", b"true"),)
NO_RETRY: Headers = ((b"x-should-retry", b"false"),)


class Unfinished(Exception):
    """An answer that had begun cannot be finished, nor become another: the connection ends."""


class Unauthorized(errors.Invalid):
    """No key, or none that is known."""

    code = "invalid_api_key"


class Forbidden(errors.Invalid):
    """The caller is known and may not do this."""

    code = "forbidden"


class NoRoute(errors.Missing):
    """Nothing answers at this path."""

    code = "unknown_url"


class WrongMethod(errors.Invalid):
    """The path exists and does something else."""

    code = "method_not_supported"

    def __init__(self, method: str, template: str, allowed: list[str]) -> None:
        self.allowed = ", ".join(allowed)
        super().__init__(f"{method[:20]} is not possible on {template}; use {self.allowed}.")


class NoSuchRange(errors.Invalid):
    """The part asked for lies behind the end."""

    code = "range_not_satisfiable"

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        super().__init__(f"The part asked for lies behind the end: there are {size_bytes} bytes.")


class TooManyRequests(errors.Unavailable):
    """The key has used up its rate."""

    code = "rate_limit_exceeded"
    type = "requests"

    def __init__(self, per_minute: int, wait_s: float) -> None:
        self.retry_after_ms = max(1, int(wait_s * 1000))
        super().__init__(
            f"Rate limit of {per_minute} requests per minute reached for this key. "
            f"Please try again in {wait_s:.1f}s."
        )


class NotReady(errors.Unavailable):
    """The server is starting or stopping."""

    code = "not_ready"
    retry_after_ms = 500


STATUSES: dict[type[PerdureError], tuple[int, Headers]] = {
    errors.Invalid: (400, ()),
    errors.Missing: (404, ()),
    errors.Conflict: (409, NO_RETRY),
    errors.Unavailable: (503, RETRY),
    errors.Damaged: (500, NO_RETRY),
    errors.Closed: (503, RETRY),
    errors.StorageFull: (507, NO_RETRY),
    errors.Latched: (503, NO_RETRY),
    Unauthorized: (401, ()),
    Forbidden: (403, ()),
    BodyTooLarge: (413, NO_RETRY),
    WrongMethod: (405, ()),
    NoSuchRange: (416, NO_RETRY),
    TooManyRequests: (429, RETRY),
    Disconnected: (400, ()),
}
"""Status and headers by error class; the nearest base in the class's own order counts."""


class Answered:
    """The wrapper that turns what the application raises into an answer, whatever it is. The log
    gets the place of a fault of our own, not its message, which may quote what a user wrote."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        call: Call = scope[CALL]
        try:
            await self._app(scope, receive, send)
        except PerdureError as error:
            answer, failure = answer_to(error), error.code
        except Exception as error:
            answer, failure = _unexpected(call.request_id), type(error).__name__
            _log.error(
                "a request failed",
                request_id=call.request_id,
                route=call.template,
                error=failure,
                at=[
                    f"{frame.filename}:{frame.lineno}" for frame in extract_tb(error.__traceback__)
                ],
            )
        else:
            return
        if call.status:
            raise Unfinished(failure)
        await call.reply(answer)


def places(error: BaseException) -> list[str]:
    """Where an exception came through, the innermost last: all of it that a log may hold."""
    return [f"{frame.filename}:{frame.lineno}" for frame in extract_tb(error.__traceback__)]


def answer_to(error: PerdureError) -> Answer:
    """The answer that tells a client about an error raised on purpose."""
    status, headers = _status(error)
    if (told := getattr(error, "should_retry", None)) is not None:
        headers = RETRY if told else NO_RETRY
    wait_ms = getattr(error, "retry_after_ms", None)
    if wait_ms is not None:
        seconds = max(1, -(-wait_ms // 1000))
        headers = (
            *RETRY,
            (b"retry-after-ms", b"%d" % wait_ms),
            (b"retry-after", b"%d" % seconds),
        )
    if isinstance(error, NoSuchRange):
        headers = (*headers, (b"content-range", b"bytes */%d" % error.size_bytes))
    if isinstance(error, WrongMethod):
        headers = (*headers, (b"allow", error.allowed.encode()))
    return Answer(msgspec.json.encode(body_of(error)), status, headers)


def _unexpected(request_id: str) -> Answer:
    """The answer to a fault of our own; what it was stands in the log under the request id."""
    detail = ErrorDetail(
        message="The server had an error while processing your request. "
        f"Its log has the details under the request id {request_id}.",
        type="server_error",
        code="internal_error",
    )
    return Answer(msgspec.json.encode(ErrorBody(detail)), 500, NO_RETRY)


def _status(error: PerdureError) -> tuple[int, Headers]:
    for kind in type(error).__mro__:
        if kind in STATUSES:
            status, headers = STATUSES[kind]
            own = getattr(error, "status", status)
            return own, headers if own == status else ()
    return 500, NO_RETRY
