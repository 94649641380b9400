"""Background responses over HTTP: answered at once, cancelled, and not bound to any connection."""

from __future__ import annotations

from typing import Any

import httpx

from perdure.proving.upstream import ScriptedUpstream
from perdure.proving.waiting import wait_until
from tests.frontends.conftest import Serve, Served

WITHIN_S = 10.0


async def create(server: Served, said: str, **fields: Any) -> dict[str, Any]:
    sent = {"model": "m", "input": said, "background": True} | fields
    return await server.json("POST", "/v1/responses", sent)


async def ended(server: Served, response_id: str) -> dict[str, Any]:
    async def is_over() -> bool:
        body = await server.json("GET", f"/v1/responses/{response_id}")
        return body["status"] not in ("queued", "in_progress")

    await wait_until(is_over, WITHIN_S, f"the end of {response_id}")
    return await server.json("GET", f"/v1/responses/{response_id}")


def refusal(answer: httpx.Response) -> tuple[int, str, str | None]:
    error = answer.json()["error"]
    return answer.status_code, error["message"], error["param"]


# proves R1
async def test_the_answer_comes_at_once_and_the_text_later(
    serve: Serve, upstream: ScriptedUpstream
) -> None:
    server = await serve(upstream__url=upstream.url)
    first = await create(server, "slow 0.01 5", metadata={"topic": "tests"})
    assert (first["status"], first["background"]) == ("queued", True)
    last = await ended(server, first["id"])
    assert (last["status"], last["metadata"]) == ("completed", {"topic": "tests"})
    assert last["output"][0]["content"][0]["text"] == "1 2 3 4 5"


# proves R7
async def test_what_can_be_cancelled_and_what_cannot(
    serve: Serve, upstream: ScriptedUpstream
) -> None:
    server = await serve(upstream__url=upstream.url)
    running = await create(server, "hang 3")
    path = f"/v1/responses/{running['id']}/cancel"
    once, twice = [await server.client.post(path) for _ in range(2)]
    assert once.json()["status"] == "cancelled"
    assert once.content == twice.content
    assert (await server.client.get(path.removesuffix("/cancel"))).content == once.content
    foreground = await server.json("POST", "/v1/responses", {"model": "m", "input": "echo hi"})
    answer = await server.client.post(f"/v1/responses/{foreground['id']}/cancel")
    assert refusal(answer)[:2] == (400, "Cannot cancel a synchronous response.")
    assert (await server.client.post("/v1/responses/resp_nobody/cancel")).status_code == 404


# proves R6
async def test_one_that_is_not_to_be_stored_is_refused(serve: Serve) -> None:
    server = await serve()
    sent = {"model": "m", "input": "hi", "background": True, "store": False}
    status, message, param = refusal(await server.client.post("/v1/responses", json=sent))
    assert (status, param) == (400, "background")
    assert "stored" in message


# proves R4
async def test_a_client_that_leaves_ends_nothing_whatever_the_policy(
    serve: Serve, upstream: ScriptedUpstream
) -> None:
    server = await serve(upstream__url=upstream.url, on_disconnect="cancel")
    sent = {"model": "m", "input": "slow 0.02 10", "background": True, "stream": True}
    seen: list[str] = []
    async with server.client.stream("POST", "/v1/responses", json=sent) as stream:
        async for line in stream.aiter_lines():
            seen.append(line)
            if "output_text.delta" in line:
                break
    assert seen[0] == "event: response.created"
    response_id = next(line for line in seen if '"id":"resp_' in line).split('"id":"')[1][:53]
    last = await ended(server, response_id)
    assert last["output"][0]["content"][0]["text"] == "1 2 3 4 5 6 7 8 9 10"


async def test_the_built_in_model_answers_in_the_background_too(serve: Serve) -> None:
    server = await serve()
    first = await server.json(
        "POST",
        "/v1/responses",
        {"model": "perdure-extract", "input": "The key is under the blue stone."},
    )
    asked = {"model": "perdure-extract", "previous_response_id": first["id"]}
    later = await create(server, "Where is the key?", **asked)
    last = await ended(server, later["id"])
    assert "under the blue stone" in last["output"][0]["content"][0]["text"]


async def test_how_many_run_at_once_can_be_set(serve: Serve, upstream: ScriptedUpstream) -> None:
    server = await serve(upstream__url=upstream.url, jobs__running_max=1)
    first, second = [await create(server, "hang 1") for _ in range(2)]

    async def running() -> bool:
        body = await server.json("GET", f"/v1/responses/{first['id']}")
        return body["status"] == "in_progress"

    await wait_until(running, WITHIN_S, "the first one runs")
    assert (await server.json("GET", f"/v1/responses/{second['id']}"))["status"] == "queued"
    for made in (first, second):
        cancelled = await server.json("POST", f"/v1/responses/{made['id']}/cancel")
        assert cancelled["status"] == "cancelled"
