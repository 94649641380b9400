"""Routing, errors, strict input, the log and the metrics of the HTTP frontend."""

from __future__ import annotations

import json
from typing import Any

import pytest

from perdure.core import errors
from perdure.core.errors import PerdureError
from perdure.frontends.http.errors import answer_to
from perdure.frontends.http.metrics import RequestStats
from perdure.frontends.http.server import ROUTES
from perdure.proving.hostile import LEGAL_NAMES, REFUSED_JSON, REFUSED_NAMES
from perdure.services.upstream import UpstreamFailed
from perdure.surfaces.conversations import CONVERSATIONS
from perdure.surfaces.idempotency import IDEMPOTENCY
from perdure.surfaces.items import ITEMS
from perdure.surfaces.responses import RESPONSES
from perdure.wire.errors import ConversationLocked, NotFound, WireError
from tests.frontends.conftest import Serve

KINDS: list[tuple[PerdureError, int, str | None]] = [
    (errors.Invalid("no"), 400, None),
    (errors.LimitExceeded("x", 2, 1), 400, None),
    (WireError("no", param="input"), 400, None),
    (NotFound("Response", "resp_1"), 404, None),
    (errors.Conflict("x", 1, 2), 409, "false"),
    (ConversationLocked("conv_1", 750), 400, "true"),
    (errors.Unavailable("later"), 503, "true"),
    (errors.StorageFull("full"), 507, "false"),
    (errors.Latched("stuck"), 503, "false"),
    (errors.CommitUnknown("?"), 503, "true"),
    (errors.Damaged("record x", "bad"), 500, "false"),
    (errors.Closed("shut"), 503, "true"),
    (UpstreamFailed("gone"), 502, None),
    (UpstreamFailed("too long", answered=400), 400, None),
    (UpstreamFailed("who?", answered=401), 502, None),
]


# proves R7
@pytest.mark.parametrize(("error", "status", "retry"), KINDS, ids=lambda part: type(part).__name__)
def test_every_kind_of_error_has_one_answer(
    error: PerdureError, status: int, retry: str | None
) -> None:
    answer = answer_to(error)
    assert answer.status == status
    headers = {name.decode(): value.decode() for name, value in answer.headers}
    assert headers.get("x-should-retry") == retry
    body = json.loads(answer.body)["error"]
    assert set(body) == {"message", "type", "param", "code"}
    assert body["message"] == str(error)
    assert body["code"] == error.code
    if isinstance(error, ConversationLocked):
        assert headers["retry-after-ms"] == "750"
        assert body["param"] == "conversation"


async def test_paths_and_methods_nobody_serves(serve: Serve) -> None:
    server = await serve()
    unknown = await server.client.get("/v1/nowhere")
    assert unknown.status_code == 404
    assert unknown.json()["error"]["code"] == "unknown_url"
    wrong = await server.client.put("/v1/conversations/conv_1", json={})
    assert wrong.status_code == 405
    assert wrong.headers["allow"] == "DELETE, GET, HEAD, POST"
    assert (await server.client.get("/v1/models/")).status_code == 404
    head = await server.client.head("/livez")
    assert (head.status_code, head.content) == (200, b"")
    assert (await server.client.get("/control/verify")).status_code == 404


async def test_every_answer_names_its_request(serve: Serve) -> None:
    server = await serve()
    answers = [await server.client.get(path) for path in ("/livez", "/v1/x", "/v1/responses/a")]
    ids = {answer.headers["x-request-id"] for answer in answers}
    assert len(ids) == 3


# proves C20
@pytest.mark.parametrize("name", REFUSED_JSON)
async def test_hostile_json_is_refused_before_anything_is_written(serve: Serve, name: str) -> None:
    server = await serve()
    conversation = await server.json("POST", "/v1/conversations", {})
    engine = server.node.state.engine
    key = ("default", conversation["id"])
    for path in (
        "/v1/responses",
        f"/v1/conversations/{conversation['id']}",
        f"/v1/conversations/{conversation['id']}/items",
    ):
        answer = await server.client.post(path, content=REFUSED_JSON[name])
        assert answer.status_code == 400, (path, answer.text)
        assert answer.json()["error"]["type"] == "invalid_request_error"
    held = await engine.get(CONVERSATIONS, key)
    assert held is not None
    assert held.version == 1
    assert await engine.count(CONVERSATIONS, ()) == {(): 1}
    for untouched in (RESPONSES, ITEMS, IDEMPOTENCY):
        assert await engine.count(untouched, ()) in ({}, {(): 0})


# proves C20
async def test_hostile_ids_are_not_found_or_refused(serve: Serve) -> None:
    server = await serve()
    names = [*LEGAL_NAMES.values(), *REFUSED_NAMES.values(), "%ff", "%ed%a0%80"]
    for name in names:
        quoted = name if name.startswith("%") else _quoted(name)
        if quoted in ("", ".", ".."):
            continue
        for path in (f"/v1/responses/{quoted}", f"/v1/conversations/{quoted}/items"):
            answer = await server.raw(
                f"GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n".encode()
            )
            status = int(answer.split(b" ")[1])
            assert status in (400, 404), (name, status)
            assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"]
    assert await server.node.state.engine.count(CONVERSATIONS, ("default",)) == {}


def _quoted(name: str) -> str:
    return "".join(f"%{byte:02x}" for byte in name.encode(errors="surrogatepass"))


# proves C18
@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("limit=0", "limit"),
        ("limit=101", "limit"),
        ("limit=ten", "limit"),
        ("limit=1&limit=2", "limit"),
        ("order=up", "order"),
        ("after=msg_unknown", "after"),
        ("before=x", "before"),
        ("limit=%ff", None),
    ],
)
async def test_list_parameters_out_of_range_are_errors_naming_them(
    serve: Serve, query: str, param: str | None
) -> None:
    server = await serve()
    conversation = await server.json("POST", "/v1/conversations", {})
    answer = await server.client.get(f"/v1/conversations/{conversation['id']}/items?{query}")
    assert answer.status_code == 400, answer.text
    if param is not None:
        assert answer.json()["error"]["param"] == param


# proves C19
async def test_pages_are_stable_both_ways(serve: Serve) -> None:
    server = await serve()
    conversation = (await server.json("POST", "/v1/conversations", {}))["id"]
    path = f"/v1/conversations/{conversation}/items"

    async def add(*texts: str) -> None:
        items = [{"role": "user", "content": text} for text in texts]
        await server.json("POST", path, {"items": items})

    async def walk(order: str, then: Any = None) -> list[str]:
        found: list[str] = []
        after = ""
        while True:
            query = f"?limit=2&order={order}" + (f"&after={after}" if after else "")
            page = await server.json("GET", path + query)
            found += [item["content"][0]["text"] for item in page["data"]]
            assert page["first_id"] == (page["data"][0]["id"] if page["data"] else None)
            if not page["has_more"]:
                return found
            after = page["last_id"]
            if then is not None:
                await then()
                then = None

    await add(*"abcde")
    assert await walk("asc") == list("abcde")
    assert await walk("desc") == list("edcba")
    assert await walk("desc", lambda: add("f")) == list("edcba")
    assert await walk("asc", lambda: add("g")) == list("abcdefg")


# proves O6
async def test_a_fault_of_our_own_is_a_500_whose_message_no_log_holds(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server = await serve()

    async def broken(*_: Any) -> None:
        raise KeyError("a private word")

    monkeypatch.setattr(server.node.conversations, "get", broken)
    answer = await server.client.get("/v1/conversations/conv_1")
    assert answer.status_code == 500
    told = answer.json()["error"]
    assert (told["type"], told["code"]) == ("server_error", "internal_error")
    assert answer.headers["x-request-id"] in told["message"]
    logged = "".join(capsys.readouterr())
    assert answer.headers["x-request-id"] in logged
    assert "KeyError" in logged
    assert "test_http_app.py" in logged
    assert "private" not in logged + answer.text


# proves O3
async def test_metrics_have_bounded_labels(serve: Serve) -> None:
    server = await serve()
    conversation = (await server.json("POST", "/v1/conversations", {}))["id"]
    for path in (f"/v1/conversations/{conversation}", "/v1/responses/secret-id", "/v1/%00", "/x"):
        await server.client.get(path)
    text = (await server.client.get("/metrics")).text
    assert conversation not in text
    assert "secret-id" not in text
    requests = "perdure_http_requests_total"
    for series in (
        requests + '{method="GET",route="/v1/responses/{response_id}",status="404"} 1',
        requests + '{method="GET",route="(none)",status="404"} 2',
        'perdure_http_request_seconds_count{method="POST",route="/v1/conversations"} 1',
        "perdure_engine_commits_total ",
        "perdure_engine_sync_s_total ",
        "perdure_engine_queued ",
        "perdure_engine_conflicts_total 0",
        "perdure_engine_latched 0",
        'perdure_recovered{surface="responses",what="interrupted"} 0',
        "perdure_stream_open 0",
        "perdure_ready 1",
    ):
        assert series in text, series
    templates = {part.split('"')[0] for part in text.split('route="')[1:]}
    assert templates <= {"(none)", *(route.path.replace(":path", "") for route in ROUTES)}


# proves O3
def test_latencies_are_counted_in_their_buckets() -> None:
    stats = RequestStats()
    for duration_s in (0.0005, 0.02, 0.02, 70.0):
        stats.observe("GET", "/v1/models", 200, duration_s)
    (seconds,) = [it for it in stats.collect() if it.name == "perdure_http_request_seconds"]
    counted = {sample.labels.get("le"): sample.value for sample in seconds.samples}
    wanted = {"0.001": 1.0, "0.01": 1.0, "0.025": 3.0, "60.0": 3.0, "+Inf": 4.0}
    assert {bound: counted[bound] for bound in wanted} == wanted


# proves O6
async def test_the_access_log_holds_nothing_a_user_wrote(serve: Serve) -> None:
    server = await serve()
    items = [{"role": "user", "content": "a private word"}]
    made = await server.json(
        "POST", "/v1/conversations", {"items": items, "metadata": {"k": "own"}}
    )
    await server.client.get(f"/v1/conversations/{made['id']}/items?limit=7")
    await server.client.get("/v1/unknown-private-path")
    server.application.log.flush()
    lines = [json.loads(line) for line in server.log.getvalue().splitlines()]
    assert [line["route"] for line in lines] == [
        "/v1/conversations",
        "/v1/conversations/{conversation_id}/items",
        "(none)",
    ]
    assert [line["status"] for line in lines] == [200, 200, 404]
    for word in (b"private", b"own", made["id"].encode(), b"limit"):
        assert word not in server.log.getvalue()


# proves O1
async def test_a_server_that_is_not_open_yet_says_so(serve: Serve) -> None:
    server = await serve(opened=False)
    assert (await server.client.get("/livez")).status_code == 200
    unready = await server.client.get("/readyz")
    assert unready.status_code == 503
    assert unready.json()["ready"] is False
    assert all(check["reason"] for check in unready.json()["checks"])
    startup = await server.json("GET", "/v1/startup")
    assert (startup["done"], startup["ready"], startup["number"]) == (False, False, None)
    refused = await server.client.get("/v1/models")
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "not_ready"
    assert refused.headers["retry-after-ms"] == "500"
    assert "perdure_ready 0" in (await server.client.get("/metrics")).text
    await server.node.open()
    assert (await server.client.get("/readyz")).status_code == 200
    startup = await server.json("GET", "/v1/startup")
    assert (startup["done"], startup["ready"], startup["number"]) == (True, True, 1)
    assert startup["phases"][0]["name"] == "open engine"
    assert all(phase["duration_s"] is not None for phase in startup["phases"])


# proves C1
async def test_the_state_report_lists_every_surface(serve: Serve) -> None:
    server = await serve()
    report = await server.json("GET", "/v1/state")
    assert {surface["surface"] for surface in report["surfaces"]} == {
        "responses",
        "jobs",
        "conversations",
        "items",
        "files",
        "blobs",
        "idempotency",
        "seals",
        "boots",
        "workers",
        "worker_views",
        "worker_retentions",
    }
    for surface in report["surfaces"]:
        assert surface["acknowledgement"]
        assert surface["owner"]
        assert surface["retention"]
        assert surface["engine"] == server.node.state.engine.url
        assert surface["version"] >= 1
        derived = surface["durability"] == "derived_projection_state"
        assert surface["survives"]["process_crash"] is not derived
        assert surface["collections"]
        assert surface["proofs"]
        assert all(tests for tests in surface["proofs"].values())
    recovered = {one["surface"] for one in report["surfaces"] if one["last_recovery"]}
    assert recovered == {"responses", "jobs", "workers", "blobs"}, "the others need no recovery"
    if server.node.state.engine.url == "memory://":
        promised = [one["surface"] for one in report["surfaces"] if one["survives"]["damage"]]
        assert all(surface in report["warnings"][0] for surface in promised)


# proves C15
async def test_boots_and_instances_are_listed(serve: Serve) -> None:
    server = await serve()
    instances = (await server.json("GET", "/v1/instances"))["data"]
    assert len(instances) == 1
    assert instances[0]["boot_id"] == server.node.boot_id
    assert instances[0]["heartbeat_age_s"] < 5
    boots = (await server.json("GET", "/v1/boots"))["data"]
    assert [boot["id"] for boot in boots] == [server.node.boot_id]
    assert boots[0]["boot"]["ended_clean"] is False
