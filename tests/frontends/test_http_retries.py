"""What a client is told to do after each error, judged by the official client that obeys it."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator

import httpx2
import openai
import pytest

import perdure
from perdure.core import errors
from perdure.core.errors import PerdureError
from perdure.frontends.http import errors as http
from perdure.frontends.http.call import BodyTooLarge, Disconnected
from perdure.services.requests import result_lost
from perdure.services.supervisor import Crashed
from perdure.services.upstream import CircuitOpen, UpstreamFailed
from perdure.wire.errors import ConversationLocked, NotFound, ResponseInProgress, WireError
from perdure.wire.workers import NotPossible, OtherFingerprint, StaleGeneration, WorkerEnded
from tests.frontends.conftest import Serve

CHANGES = ("status", "should_retry", "retry_after_ms")
"""What a class of errors sets to be answered otherwise than its base."""


def final(error: UpstreamFailed) -> UpstreamFailed:
    """The failure that a response ended with."""
    error.should_retry = False
    return error


WORKER_CONFLICTS = (StaleGeneration, WorkerEnded, NotPossible, OtherFingerprint)

TABLE: list[tuple[PerdureError, int, bool, float | None]] = [
    (errors.Invalid("no"), 400, False, None),
    (WireError("no", param="input"), 400, False, None),
    (BodyTooLarge("no"), 413, False, None),
    (http.Unauthorized("who?"), 401, False, None),
    (http.Forbidden("no"), 403, False, None),
    (http.WrongMethod("PUT", "/v1/models", ["GET"]), 405, False, None),
    (http.NoSuchRange(5), 416, False, None),
    (errors.Missing("gone"), 404, False, None),
    (NotFound("Response", "resp_1"), 404, False, None),
    (errors.Conflict("x", 1, 2), 409, False, None),
    (result_lost(), 409, False, None),
    *((kind("worker x", 1, 2), 409, False, None) for kind in WORKER_CONFLICTS),
    (errors.Unavailable("later"), 503, True, None),
    (errors.CommitUnknown("?"), 503, True, None),
    (Crashed("oh"), 503, True, None),
    (errors.Closed("shut"), 503, True, None),
    (errors.StorageFull("full"), 507, False, None),
    (errors.Latched("stuck"), 503, False, None),
    (errors.Damaged("record x", "bad"), 500, False, None),
    (Disconnected("left"), 400, False, None),
    (ConversationLocked("conv_1", 750), 400, True, 0.75),
    (ResponseInProgress("resp_1"), 400, True, 1.0),
    (http.NotReady("starting"), 503, True, 0.5),
    (http.TooManyRequests(60, 1.5), 429, True, 1.5),
    (CircuitOpen("http://up/v1", 5, "gone", 2.5), 503, True, 2.5),
    (UpstreamFailed("gone"), 502, True, None),
    (UpstreamFailed("too long", answered=400), 400, False, None),
    (UpstreamFailed("slow down", answered=429), 429, True, None),
    (final(UpstreamFailed("gone")), 502, False, None),
    (final(UpstreamFailed("slow down", answered=429)), 429, False, None),
]


# proves R7
@pytest.mark.parametrize(
    ("error", "status", "again", "wait_s"), TABLE, ids=lambda part: type(part).__name__
)
def test_the_official_client_does_what_helps(
    error: PerdureError, status: int, again: bool, wait_s: float | None
) -> None:
    answer = http.answer_to(error)
    told = [(name.decode(), value.decode()) for name, value in answer.headers]
    assert len(dict(told)) == len(told), "no header contradicts another"
    response = httpx2.Response(answer.status, headers=told)
    with openai.OpenAI(api_key="none") as client:
        assert response.status_code == status
        assert client._should_retry(response) is again
        assert client._parse_retry_after_header(response.headers) == wait_s


def everything(kind: type[PerdureError]) -> Iterator[type[PerdureError]]:
    for finer in kind.__subclasses__():
        yield finer
        yield from everything(finer)


# proves R7
def test_every_error_that_is_answered_in_its_own_way_is_in_the_table() -> None:
    for module in pkgutil.walk_packages(perdure.__path__, "perdure."):
        importlib.import_module(module.name)
    listed = {type(error) for error, *_ in TABLE} | {PerdureError}
    ours = {kind for kind in everything(PerdureError) if kind.__module__.startswith("perdure.")}
    assert {kind for kind in ours if kind in http.STATUSES} <= listed
    changed = {kind for kind in ours if any(name in vars(kind) for name in CHANGES)}
    assert changed <= listed, "say in the table what a client does after these"


# proves R7
async def test_a_response_that_failed_is_not_asked_for_again(serve: Serve) -> None:
    server = await serve(upstream__url="http://127.0.0.1:9/v1")
    refused = await server.client.post("/v1/responses", json={"model": "m", "input": "x"})
    assert refused.status_code == 502
    assert refused.headers["x-should-retry"] == "false", "a repeat joins the response that failed"
