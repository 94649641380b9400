"""What a route is. One table of these gives routing, admission, metric labels and the OpenAPI
document, so none of them can say something else than the server does.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Literal

import msgspec

from perdure.frontends.http.call import Answer, Call, Download, EventStream

Access = Literal["open", "key", "operator"]
"""`open`: anyone, for probes. `key`: whoever admission lets in. `operator`: control socket only."""


_PARAMETER = re.compile(r"\{(\w+)(?::\w+)?\}")


class Route(msgspec.Struct, frozen=True, kw_only=True):
    """One operation. `body`, `query`, `answer` and `refusal` (of a 503) are the types from which
    schemas are made; a query's type has one field a parameter, all optional. `statuses` are the
    ways it can fail beyond those of every route like it; `ranged` ones can be asked for a part.

    `gives` says which ids an answer holds that other routes take, and where, as a JSON pointer;
    `builds` holds, by such an id, a request body that builds on the answer that gave it."""

    method: Literal["GET", "POST", "DELETE"]
    path: str
    name: str
    summary: str
    handler: Callable[[Any, Call], Awaitable[Answer | Download | EventStream]]
    answer: Any
    refusal: Any = None
    body: Any = None
    body_required: bool = True
    query: type[msgspec.Struct] | None = None
    statuses: tuple[int, ...] = ()
    access: Access = "key"
    needs_ready: bool = True
    body_media: str = "application/json"
    idempotent: bool = False
    ranged: bool = False
    streams: bool = False
    media: str = "application/json"
    gives: Mapping[str, str] = {}
    builds: Mapping[str, Any] = {}


def template(path: str) -> str:
    """A path with its parameters as people and OpenAPI write them."""
    return _PARAMETER.sub(r"{\1}", path)


def parameters(path: str) -> list[str]:
    """The names of a path's parameters."""
    return _PARAMETER.findall(path)
