"""The OpenAPI document is complete, and the server keeps to it whatever it is sent."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from perdure.frontends.http.openapi import document
from perdure.frontends.http.routes import template
from perdure.frontends.http.server import ROUTES
from perdure.proving.upstream import ScriptedUpstream
from tests.e2e.http_server import Server, clean_environment, serving
from tests.e2e.openapi_links import DATA, LEADING

DEPTH = int(os.environ.get("SCHEMATHESIS_EXAMPLES", "1"))
"""How many times as many examples are tried (`make test DEPTH=20`)."""

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "missing_required_header",
    "unsupported_method",
    "use_after_free",
    "ensure_resource_availability",
)
"""All but `positive_data_acceptance`: a schema cannot say that a name was not used before, that a
cursor was given out by this server, or that numbers nested in free fields have 64 bits."""


def references(part: Any) -> Iterator[str]:
    if isinstance(part, dict):
        if "$ref" in part:
            yield part["$ref"]
        for value in part.values():
            yield from references(value)
    elif isinstance(part, list):
        for value in part:
            yield from references(value)


def test_every_route_is_documented_and_every_reference_resolves() -> None:
    for keyed in (False, True):
        made = msgspec.json.decode(document(ROUTES, keyed=keyed))
        described = {
            (method.upper(), path) for path, methods in made["paths"].items() for method in methods
        }
        assert described == {(route.method, template(route.path)) for route in ROUTES}
        for reference in references(made):
            assert reference.rsplit("/", 1)[1] in made["components"]["schemas"]
        names = [
            operation["operationId"]
            for methods in made["paths"].values()
            for operation in methods.values()
        ]
        assert len(set(names)) == len(names)


async def judged(server: Server, *options: str, examples: int, config: str = "") -> str:
    """What schemathesis told of a server that it found nothing wrong with."""
    here = server.log.parent
    (here / "schemathesis.toml").write_text(config)
    judge = await asyncio.create_subprocess_exec(
        *(str(Path(sys.executable).with_name("schemathesis")), "--no-color", "run"),
        *(f"{server.url}/openapi.json", "--max-examples", str(examples * DEPTH), "--seed", "1"),
        *("--checks", ",".join(CHECKS), "--suppress-health-check", "all", *options),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        cwd=here,
        env=clean_environment(PYTHONPATH=os.pathsep.join(map(os.path.abspath, sys.path))),
    )
    told, _ = await asyncio.wait_for(judge.communicate(), 240 * DEPTH)
    assert judge.returncode == 0, told.decode()[-6000:]
    assert '"level": "error"' not in server.log.read_text()
    return told.decode()


ONCE = """
[[operations]]
include-operation-id = [
    "count_input_tokens", "compact_response", "create_conversation_items",
    "create_worker", "fail_worker", "cancel_worker", "list_runtimes", "list_worker_diagnostics",
    "list_worker_transcript",
]
phases.coverage.enabled = false
"""
"""What these take is all, or a part, of what another takes (creating a response, a conversation, a
runtime), and every corner of its schema is gone through there."""


async def test_schemathesis_finds_nothing_undocumented(tmp_path: Path) -> None:
    async with serving(tmp_path / "data") as server:
        phases = ("--phases", "examples,coverage,fuzzing")
        told = await judged(server, *phases, examples=5, config=ONCE)
        tested = len(ROUTES) - 1  # all but the document itself
        assert f"Tested: {tested}" in told, told[-3000:]


STATEFUL = """
hooks = "tests.e2e.openapi_links"
[phases.stateful]
max-steps = 6
[phases.stateful.inference]
algorithms = []
"""
"""Only the links of the document: what schemathesis guesses beyond them is in the other run."""


async def test_schemathesis_finds_nothing_wrong_along_the_links(tmp_path: Path) -> None:
    """Among others, that what was deleted is gone, and that what was made is there."""
    async with (
        ScriptedUpstream() as upstream,
        serving(tmp_path / "data", "--upstream", upstream.url) as server,
    ):
        options = ("--phases", "stateful", "--mode", "positive")
        among = ("--include-path-regex", "^/v1/(responses|conversations|files|uploads)")
        told = await judged(server, *options, *among, examples=15, config=STATEFUL)
        found = re.search(r"API Links: +(\d+) covered / (\d+) selected", told)
        assert found is not None, told[-3000:]
        assert int(found[1]) > 5
        assert int(found[2]) == len(links())


def links() -> list[tuple[str, str, Any]]:
    """Method and path of an operation, and a link of its answer, for every link there is."""
    made = msgspec.json.decode(document(ROUTES, keyed=False))
    return [
        (method, path, link)
        for path, methods in made["paths"].items()
        for method, operation in methods.items()
        for link in operation["responses"]["200"].get("links", {}).values()
    ]


def resolved(value: Any, parameters: dict[str, str], answer: Any) -> Any:
    """A part of a link with its runtime expressions replaced by what they stand for."""
    if isinstance(value, dict):
        return {name: resolved(one, parameters, answer) for name, one in value.items()}
    if isinstance(value, list):
        return [resolved(one, parameters, answer) for one in value]
    if not isinstance(value, str):
        return value
    if value.startswith("$request.path."):
        return parameters[value.removeprefix("$request.path.")]
    if value.startswith("$response.body#/"):
        for name in value.removeprefix("$response.body#/").split("/"):
            answer = answer[int(name) if isinstance(answer, list) else name]
        return answer
    return value


ITEMS = {"items": [{"type": "message", "role": "user", "content": "hello"}]}
BODIES: dict[str, Any] = {
    "create_conversation": {},
    "create_conversation_items": ITEMS,
    "update_conversation": {"metadata": {"topic": "links"}},
}
FILES = {"create_file": ("file", {"purpose": "user_data"}), "add_upload_part": ("data", {})}
AGAINST = {"cancel_response": 400}
"""Links that are there to be refused: only a background response can be cancelled."""


async def test_every_link_leads_where_it_says(tmp_path: Path) -> None:
    operations = {route.name: (route.method, template(route.path)) for route in ROUTES}
    names = {place: name for name, place in operations.items()}
    into = {link["operationId"]: (method, path, link) for method, path, link in links()}

    async def call(client: Any, name: str, parameters: dict[str, str], body: Any) -> Any:
        method, path = operations[name]
        sent: dict[str, Any] = {"json": body} if body is not None else {}
        if name in FILES:
            field, form = FILES[name]
            sent = {"files": {field: ("a.txt", DATA)}, "data": form}
        answer = await client.request(method, path.format(**parameters), **sent)
        assert answer.status_code == AGAINST.get(name, 200), (name, answer.text)
        return answer

    async def made(client: Any, name: str) -> tuple[dict[str, str], Any]:
        """The path parameters and the answer of an operation, reached by a link if it must be."""
        method, path = operations[name]
        if "{" in path:
            _, parameters, answer = await follow(client, *into[name])
            return parameters, answer.json()
        body = BODIES.get(name, LEADING.get(f"{method} {path}"))
        return {}, (await call(client, name, {}, body)).json()

    async def follow(client: Any, method: str, path: str, link: Any) -> Any:
        before, given = await made(client, names[method.upper(), path])
        name = link["operationId"]
        parameters = resolved(link.get("parameters", {}), before, given)
        body = resolved(link.get("requestBody", BODIES.get(name)), before, given)
        return name, parameters, await call(client, name, parameters, body)

    async with (
        ScriptedUpstream() as upstream,
        serving(tmp_path / "data", "--upstream", upstream.url) as server,
        server.client() as client,
    ):
        followed = {(await follow(client, *one))[0] for one in links()}
        assert len(links()) > 20
        assert {"complete_upload", "download_file", "list_input_items"} <= followed
