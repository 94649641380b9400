"""What is another tenant's does not exist: on every route of the table a stranger, a wrong key and
the key of another tenant are each told the same of an id that exists and of one that does not.
"""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import AsyncIterator

import httpx
import msgspec
import pytest

from perdure.core.clock import SystemClock
from perdure.frontends.http.app import Context, Perimeter, routed
from perdure.frontends.http.call import Call, Principal
from perdure.frontends.http.errors import Unauthorized
from perdure.frontends.http.routes import Route, parameters, template
from perdure.frontends.http.server import ROUTES, Listener
from tests.frontends.conftest import Serve

OWNER, OTHER = "acme", "globex"


class ByTenant:
    """A gate at which every tenant's key is its name."""

    keyed = True

    def admit(self, call: Call) -> Principal:
        tenant = call.headers.get(b"authorization", b"").decode().removeprefix("Bearer ")
        if tenant not in (OWNER, OTHER):
            raise Unauthorized("Incorrect API key provided.")
        return Principal(tenant, tenant)


def key(tenant: str) -> dict[str, str]:
    return {"authorization": f"Bearer {tenant}"}


@pytest.fixture
async def client(serve: Serve) -> AsyncIterator[httpx.AsyncClient]:
    served = await serve()
    service, clock = served.service, SystemClock()
    context = Context(service, ByTenant(), service.streams, clock, service.not_ready)
    app = Perimeter(routed(ROUTES, context), service.requests, served.application.log, clock)
    listener = Listener(app, service, served.application.log)
    listening = socket.create_server(("127.0.0.1", 0))
    serving = asyncio.create_task(listener.serve(sockets=[listening]))
    await listener.listening.wait()
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    async with httpx.AsyncClient(base_url=url, trust_env=False, verify=False) as made:
        yield made
    listener.should_exit = listener.force_exit = True
    await serving


async def owned(client: httpx.AsyncClient) -> dict[str, str]:
    """One id of each kind that a path can hold, all of one tenant."""

    async def made(path: str, **body: object) -> str:
        answer = await client.post(path, headers=key(OWNER), **body)  # type: ignore[arg-type]
        assert answer.status_code == 200, answer.text
        found: str = answer.json()["id"]
        return found

    message = {"type": "message", "role": "user", "content": "mine"}
    conversation = await made("/v1/conversations", json={"items": [message]})
    items = await client.get(f"/v1/conversations/{conversation}/items", headers=key(OWNER))
    asked = {"model": "perdure-extract", "input": "mine", "background": True}
    response = await made("/v1/responses", json=asked)
    jobs = await client.get("/v1/jobs", headers=key(OWNER))
    form = {"purpose": "assistants"}
    file = await made("/v1/files", data=form, files={"file": ("a.txt", b"mine")})
    runtime = await made("/v1/runtimes", json={"id": "mine_runtime"})
    worker = await made(f"/v1/runtimes/{runtime}/workers", json={"id": "mine_worker"})
    await made(f"/v1/runtimes/{runtime}/workers/{worker}/stop")
    gone = {"operation_id": "mine_operation", "mode": "archive"}
    operation = await made(f"/v1/runtimes/{runtime}/workers/{worker}/retain", json=gone)
    worker = await made(f"/v1/runtimes/{runtime}/workers", json={"id": "mine_worker"})
    upload = {"filename": "b.txt", "purpose": "assistants", "bytes": 4, "mime_type": "text/plain"}
    return {
        "conversation_id": conversation,
        "item_id": items.json()["data"][0]["id"],
        "response_id": response,
        "job_id": jobs.json()["data"][0]["id"],
        "file_id": file,
        "runtime_id": runtime,
        "worker_id": worker,
        "operation_id": operation,
        "upload_id": await made("/v1/uploads", json=upload),
    }


def unknown(id: str) -> str:
    """An id of the same kind and length that nobody has."""
    return id[:-4] + ("0000" if not id.endswith("0000") else "1111")


async def told(
    client: httpx.AsyncClient, route: Route, ids: dict[str, str], headers: dict[str, str]
) -> tuple[int, bytes, list[tuple[str, str]]]:
    """All of an answer, but for the id that was asked for and what differs between any two."""
    path = template(route.path)
    for name, id in ids.items():
        path = path.replace(f"{{{name}}}", id)
    # A body that is sound for every POST: none may say more to a stranger than the route itself.
    body = {} if route.method != "POST" else {"json": {"metadata": {}, "items": [], "part_ids": []}}
    answer = await client.request(route.method, path, headers=headers, **body)  # type: ignore[arg-type]
    content = answer.content
    for name, id in ids.items():
        content = content.replace(id.encode(), name.encode())
    varying = ("x-request-id", "date", "content-length")
    kept = [(name, value) for name, value in answer.headers.items() if name not in varying]
    assert re.fullmatch(r"req_\w+", answer.headers["x-request-id"])
    return answer.status_code, content, kept


SHARED = {"model"}
"""What is everybody's."""

WITH_IDS = [route for route in ROUTES if set(parameters(route.path)) - SHARED]


# proves O6
async def test_of_anothers_things_one_is_told_as_of_things_that_are_not(
    client: httpx.AsyncClient,
) -> None:
    ids = await owned(client)
    none = {name: unknown(id) for name, id in ids.items()}
    for route in WITH_IDS:
        assert set(parameters(route.path)) <= set(ids), f"{route.name}: give it an id above"
        for headers in ({}, key("nobody"), key(OTHER)):
            existing = await told(client, route, ids, headers)
            assert existing == await told(client, route, none, headers), route.name
            if headers != key(OTHER):
                assert existing[0] == 401, route.name
            else:
                assert existing[0] in (400, 404), (route.name, existing)
    for name in ("conversation_id", "response_id", "file_id"):
        [read] = [
            one
            for one in WITH_IDS
            if one.method == "GET" and parameters(one.path) == [name] and one.path.endswith("}")
        ]
        assert (await told(client, read, ids, key(OWNER)))[0] == 200, f"{name} was left alone"


# proves O6
async def test_lists_and_references_do_not_reach_anothers_things(
    client: httpx.AsyncClient,
) -> None:
    ids = await owned(client)
    none = {name: unknown(id) for name, id in ids.items()}
    for route in ROUTES:
        if route.method == "GET" and not parameters(route.path) and route.access == "key":
            listed = await client.get(route.path, headers=key(OTHER))
            assert not any(id.encode() in listed.content for id in ids.values()), route.name
            for headers in ({}, key("nobody")):
                assert (await client.get(route.path, headers=headers)).status_code == 401
    for field, name in (
        ("previous_response_id", "response_id"),
        ("conversation", "conversation_id"),
    ):
        bodies = []
        for id in (ids[name], none[name]):
            asked = {"model": "perdure-extract", "input": "yours?", field: id}
            answer = await client.post("/v1/responses", json=asked, headers=key(OTHER))
            bodies.append((answer.status_code, answer.content.replace(id.encode(), b"ID")))
        assert bodies[0] == bodies[1]
        assert bodies[0][0] in (400, 404)
    for path, name in (("/v1/responses", "response_id"), ("/v1/files", "file_id")):
        pages = []
        for id in (ids[name], none[name]):
            answer = await client.get(path, params={"after": id}, headers=key(OTHER))
            pages.append((answer.status_code, answer.content.replace(id.encode(), b"ID")))
        assert pages[0] == pages[1]
    named = {"idempotency-key": "one"}
    mine = await client.post("/v1/conversations", json={}, headers=named | key(OWNER))
    yours = await client.post("/v1/conversations", json={}, headers=named | key(OTHER))
    assert mine.json()["id"] != yours.json()["id"]
    assert msgspec.json.decode(yours.content)["object"] == "conversation"
