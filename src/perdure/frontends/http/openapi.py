"""The OpenAPI document, made from the route table and from the types it names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from perdure import __version__
from perdure.frontends.http.routes import Route, parameters, template
from perdure.frontends.http.schemas import PARTS, Json, Schema
from perdure.wire.errors import ErrorBody

_REF = "#/components/schemas/{name}"

_MEANINGS = {
    200: "Done.",
    206: "The part that was asked for.",
    304: "The client has these bytes already.",
    400: "The request cannot be served as sent.",
    401: "No API key, or one that is not known.",
    403: "This caller may not do that.",
    404: "There is no such object.",
    408: "The request did not arrive in time.",
    409: "Something changed meanwhile; read it again.",
    413: "The request body is too large.",
    416: "The part that was asked for lies behind the end.",
    422: "The upstream does not take this request.",
    429: "The key's rate is used up; `retry-after` says for how long.",
    431: "The request's headers are too large.",
    500: "A fault of this server, or damage in what is stored.",
    502: "The upstream failed.",
    503: "Not now: starting, stopping, or the store refuses writes.",
    507: "The disk is full; nothing was written.",
}


def document(routes: Sequence[Route], *, keyed: bool) -> bytes:
    """The whole document as JSON. `keyed` says whether a key is asked for."""
    kinds = list(_kinds(routes))
    types = [kind for kind in kinds if not isinstance(kind, Schema)]
    references, components = msgspec.json.schema_components(types, ref_template=_REF)
    by_type = dict(zip(map(repr, types), references, strict=True))
    for kind in (*kinds, *PARTS):
        if isinstance(kind, Schema):
            by_type[repr(kind)] = {"$ref": _REF.format(name=kind.name)}
            components[kind.name] = kind.definition
    paths: dict[str, Json] = {}
    for route in routes:
        made = _operation(route, by_type, keyed)
        if links := _links(route, routes):
            made["responses"]["200"]["links"] = links
        paths.setdefault(template(route.path), {})[route.method.lower()] = made
    whole: Json = {
        "openapi": "3.1.0",
        "info": {
            "title": "Perdure",
            "version": __version__,
            "summary": "The durable state plane of LLM services.",
        },
        "paths": paths,
        "components": {"schemas": components},
    }
    if keyed:
        whole["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return msgspec.json.encode(whole)


def statuses(route: Route, *, keyed: bool) -> list[int]:
    """Every status but 200 that a route can answer with."""
    found = {400, 408, 431, 500, 503, *route.statuses}
    if route.access != "open":
        found |= {403, 429} | ({401} if keyed else set())
    if route.method != "GET":
        found |= {409, 507}
    if route.body is not None:
        found.add(413)
    if route.ranged:
        found.add(416)
    return sorted(found)


def _kinds(routes: Iterable[Route]) -> Iterable[Any]:
    yield ErrorBody
    for route in routes:
        for kind in (route.body, route.answer, route.refusal):
            if kind is not None:
                yield kind


def _operation(route: Route, by_type: dict[str, Json], keyed: bool) -> Json:
    made: Json = {
        "operationId": route.name,
        "summary": route.summary,
        "parameters": [
            *_path_parameters(route),
            *_query_parameters(route),
            *(_IDEMPOTENCY if route.idempotent else ()),
            *(_RANGE if route.ranged else ()),
        ],
        "responses": {"200": _answer(route, by_type)},
    }
    if route.ranged:
        made["responses"]["206"] = {"description": _MEANINGS[206], "content": _bytes(route)}
        made["responses"]["304"] = {"description": _MEANINGS[304]}
    for status in statuses(route, keyed=keyed):
        kind = route.refusal if status == 503 and route.refusal is not None else ErrorBody
        made["responses"][str(status)] = _json(_MEANINGS[status], by_type[repr(kind)])
    if route.body is not None:
        made["requestBody"] = {
            "required": route.body_required,
            "content": {route.body_media: {"schema": by_type[repr(route.body)]}},
        }
    if keyed and route.access != "open":
        made["security"] = [{"key": []}]
    return made


def _answer(route: Route, by_type: dict[str, Json]) -> Json:
    if route.answer is None:
        return {"description": _MEANINGS[200], "content": _bytes(route)}
    made = _json(_MEANINGS[200], by_type[repr(route.answer)])
    if route.streams:
        made["content"]["text/event-stream"] = {"schema": _TEXT}
    return made


def _links(route: Route, routes: Iterable[Route]) -> Json:
    """What can be asked next of what an answer gives: every route that takes its id, together with
    the ids of this request's own path."""
    known = {name: f"$request.path.{name}" for name in parameters(route.path)}
    made = {}
    for id, pointer in route.gives.items():
        values = known | {id: f"$response.body#{pointer}"}
        for other in routes:
            needs = parameters(other.path)
            leads = id in other.builds if other.builds else id in needs
            if leads and values.keys() >= set(needs):
                link: Json = {"operationId": other.name}
                if needs:
                    link["parameters"] = {name: values[name] for name in needs}
                if id in other.builds:
                    link["requestBody"] = other.builds[id]
                made[f"{other.name}_of_{id}"] = link
    return made


def _bytes(route: Route) -> Json:
    return {route.media: {"schema": _TEXT}}


def _json(meaning: str, schema: Json) -> Json:
    return {
        "description": meaning,
        "headers": {"x-request-id": {"schema": _TEXT}},
        "content": {"application/json": {"schema": schema}},
    }


def _path_parameters(route: Route) -> list[Json]:
    """Ids given out by this server; any other text answers 404, or 400 where it cannot be one."""
    return [
        {"name": name, "in": "path", "required": True, "schema": _MODEL if name == "model" else _ID}
        for name in parameters(route.path)
    ]


def _query_parameters(route: Route) -> list[Json]:
    if route.query is None:
        return []
    (own,), definitions = msgspec.json.schema_components((route.query,), ref_template=_REF)
    made = definitions[own["$ref"].rsplit("/", 1)[1]]
    found = []
    for name, schema in made["properties"].items():
        plain = _without_null(schema)
        found.append({"name": name, "in": "query", "required": False, "schema": plain})
    return found


def _without_null(schema: Json) -> Json:
    """A query parameter is absent rather than null."""
    kinds = [kind for kind in schema.get("anyOf", ()) if kind != {"type": "null"}]
    if len(kinds) != 1:
        return schema
    rest = {name: value for name, value in schema.items() if name not in ("anyOf", "default")}
    return {**rest, **kinds[0]}


_TEXT: Json = {"type": "string"}
_ID: Json = {"type": "string", "pattern": "^[A-Za-z0-9_-]{1,128}$"}
_MODEL: Json = {"type": "string", "pattern": "^[A-Za-z0-9_.:/-]{1,128}$"}
_IDEMPOTENCY: tuple[Json, ...] = (
    {
        "name": "Idempotency-Key",
        "in": "header",
        "required": False,
        "description": "Names this request: sent again with the same body within a day, it has "
        "one effect and gets the first answer.",
        "schema": {"type": "string", "minLength": 1, "pattern": "^[!-~]+$"},
    },
)
_RANGE: tuple[Json, ...] = (
    {
        "name": "Range",
        "in": "header",
        "required": False,
        "description": "One part of the bytes, as `bytes=FIRST-LAST`, `bytes=FIRST-` or "
        "`bytes=-LENGTH`. Anything else gets all of them.",
        "schema": _TEXT,
    },
    {
        "name": "If-Range",
        "in": "header",
        "required": False,
        "description": "The `etag` that the part is to be of; all of the bytes where they have "
        "another.",
        "schema": _TEXT,
    },
    {
        "name": "If-None-Match",
        "in": "header",
        "required": False,
        "description": "The `etag`s of what the client has, or `*`; 304 where it is this.",
        "schema": _TEXT,
    },
)
