"""Model servers that already run on this machine: found and named, never adopted.

Somebody who starts without an upstream most often has one; which of them to use, and whether its
keys and costs are meant, is theirs to say.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

import httpx
import msgspec

from perdure.services.extract import MODEL

PORTS: Mapping[int, str] = {
    11434: "Ollama",
    8000: "vLLM",
    30000: "SGLang",
    8080: "llama.cpp",
    1234: "LM Studio",
}
"""Where the usual ones listen."""

_TIMEOUT_S = 1.0


class Neighbour(msgspec.Struct, frozen=True):
    """A model server, as `--upstream` wants it, and what usually listens there."""

    url: str
    usually: str
    models: int


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


_models = msgspec.json.Decoder(_Models)


async def neighbours(ports: Mapping[int, str] = PORTS) -> Sequence[Neighbour]:
    """Model servers that answer on loopback, in the order of `ports`."""
    async with httpx.AsyncClient(timeout=_TIMEOUT_S, trust_env=False, verify=False) as client:
        found = await asyncio.gather(
            *(_ask(client, f"http://127.0.0.1:{port}/v1", name) for port, name in ports.items())
        )
    return [neighbour for neighbour in found if neighbour is not None]


async def _ask(client: httpx.AsyncClient, url: str, usually: str) -> Neighbour | None:
    """None for what does not answer like a model server, or generates nothing, like ours."""
    try:
        answer = await client.get(f"{url}/models")
        models = _models.decode(answer.content).data
    except (httpx.HTTPError, msgspec.MsgspecError):
        return None
    if answer.status_code != 200 or any(model.id == MODEL for model in models):
        return None
    return Neighbour(url, usually, len(models))
