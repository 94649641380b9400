"""The upstream: an OpenAI-compatible server that generates, reached over HTTP.

Only the start of a request is retried: once a stream has begun, its text may already be durable
and shown, and asking again would say it twice.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import httpx
import msgspec

from perdure.core.clock import Clock
from perdure.core.errors import Unavailable

_RETRIED_STATUSES = frozenset({0, 429, 500, 502, 503, 504})
_CLIENTS_OWN = frozenset({400, 404, 413, 422, 429})
_BACKOFF_FIRST_S = 0.2
_MODELS_KEPT_S = 30.0
_BESIDE_TIMEOUT_S = 10.0
_BESIDE_BYTES_MAX = 8 * 1024 * 1024
_ERROR_BYTES_MAX = 64 * 1024
_LINE_BYTES_MAX = 1024 * 1024


class UpstreamFailed(Unavailable):
    """The upstream refused, broke off or could not be reached. `answered` is its HTTP status, 0
    where there was none; `status` what a client of ours is told: the client's own mistakes as
    they are, everything else as a bad gateway."""

    code = "upstream_failed"

    def __init__(self, message: str, *, answered: int = 0) -> None:
        super().__init__(message)
        self.answered = answered
        self.status = answered if answered in _CLIENTS_OWN else 502


class UpstreamStats(msgspec.Struct):
    """Counters since start."""

    requests: int = 0
    retries: int = 0
    failures: int = 0
    streaming: int = 0


class Upstream:
    """One `chat/completions` server. `url` includes its version path, as OpenAI clients expect."""

    def __init__(
        self,
        url: str,
        *,
        key: str | None,
        connect_timeout_s: float,
        read_timeout_s: float,
        attempts_max: int,
        clock: Clock,
    ) -> None:
        self.url = url.rstrip("/")
        self.stats = UpstreamStats()
        self._clock = clock
        self._attempts_max = attempts_max
        self._models: tuple[float, list[str]] | None = None
        self._client = httpx.AsyncClient(
            headers={"authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(read_timeout_s, connect=connect_timeout_s),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=64),
            # Reading the certificate store takes longer than the rest of a start.
            verify=self.url.startswith("https:"),
        )

    async def stream_chat(self, request: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """The chunks of a streamed chat completion; one that holds all of it where the upstream
        does not stream. Raises `UpstreamFailed`."""
        response = await self._start(request)
        self.stats.streaming += 1
        try:
            async for data in _payloads(response):
                if data == b"[DONE]":
                    return
                yield msgspec.json.decode(data, type=dict)
        except (httpx.HTTPError, ValueError) as error:  # a decoder's errors are all of the latter
            self.stats.failures += 1
            raise UpstreamFailed(
                f"the upstream {self.url} broke off its answer: {_say(error)}."
            ) from error
        finally:
            self.stats.streaming -= 1
            await response.aclose()

    async def models(self) -> list[str]:
        """Ids of the models the upstream offers, asked for at most twice a minute."""
        now_s = self._clock.monotonic_s()
        if self._models is not None and now_s - self._models[0] < _MODELS_KEPT_S:
            return self._models[1]
        try:
            response = await self._client.get(f"{self.url}/models")
            response.raise_for_status()
            listed = msgspec.json.decode(response.content, type=_Models)
        except (httpx.HTTPError, ValueError) as error:
            raise UpstreamFailed(
                f"the upstream {self.url} did not list its models: {_say(error)}. "
                "Check that it runs and that its URL ends in /v1."
            ) from error
        self._models = (now_s, [model.id for model in listed.data])
        return self._models[1]

    async def ask_beside(self, path: str, body: dict[str, Any]) -> dict[str, Any] | None:
        """The JSON answer of a route that stands beside the API's version path; None where there
        is no such route, or none that takes this. Never a failure: nobody promised it."""
        url = self.url.removesuffix("/v1") + path
        told = b""
        try:
            async with self._client.stream(
                "POST", url, json=body, timeout=_BESIDE_TIMEOUT_S
            ) as response:
                async for piece in response.aiter_bytes():
                    told += piece
                    if response.status_code != 200 or len(told) > _BESIDE_BYTES_MAX:
                        return None
            return msgspec.json.decode(told, type=dict)
        except (httpx.HTTPError, ValueError):
            return None

    async def close(self) -> None:
        """Close pooled connections."""
        await self._client.aclose()

    async def _start(self, request: dict[str, Any]) -> httpx.Response:
        """The response whose status is good and whose body has not been read yet."""
        for attempt in range(1, self._attempts_max + 1):
            self.stats.requests += 1
            failure: UpstreamFailed
            try:
                response = await self._client.send(
                    self._client.build_request(
                        "POST", f"{self.url}/chat/completions", json=request
                    ),
                    stream=True,
                )
                if response.status_code < 300:
                    return response
                failure = UpstreamFailed(
                    await _refusal(self.url, response), answered=response.status_code
                )
            except httpx.HTTPError as error:
                failure = UpstreamFailed(
                    f"the upstream {self.url} cannot be reached: {_say(error)}. "
                    "Start it, or serve with another --upstream."
                )
            self.stats.failures += 1
            retried = failure.answered in _RETRIED_STATUSES
            if not retried or attempt == self._attempts_max:
                raise failure
            self.stats.retries += 1
            await self._clock.sleep(_BACKOFF_FIRST_S * 2 ** (attempt - 1))
        raise AssertionError("a loop of at least one attempt returns or raises")


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


async def _payloads(response: httpx.Response) -> AsyncIterator[bytes]:
    """The `data:` payloads of an event stream, none of which spans events here; all of the answer
    where it is an object instead. Its first byte tells, because its media type may lie."""
    rest, streams = b"", None
    async for chunk in response.aiter_bytes():
        rest += chunk
        if streams is None and (begun := rest.lstrip()):
            streams = not begun.startswith(b"{")
        lines = []
        if streams:
            *lines, rest = rest.split(b"\n")
        if max(map(len, (rest, *lines))) > _LINE_BYTES_MAX:
            raise ValueError(f"a line of its stream is longer than {_LINE_BYTES_MAX} bytes")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()
    if streams is False:
        yield rest
    elif rest.startswith(b"data:"):
        yield rest[5:].strip()


async def _refusal(url: str, response: httpx.Response) -> str:
    """What the upstream said when it refused, cut to a size for people."""
    body = b""
    try:
        async for chunk in response.aiter_bytes():
            body += chunk
            if len(body) > _ERROR_BYTES_MAX:
                break
    except httpx.HTTPError as error:
        body = _say(error).encode()
    finally:
        await response.aclose()
    try:
        told = msgspec.json.decode(body, type=dict)
        refused = told.get("error") or told.get("message") or told.get("detail")
        said = refused.get("message") if isinstance(refused, dict) else refused
    except ValueError:
        said = None
    said = said or body.decode(errors="replace")
    return f"the upstream {url} answered {response.status_code}: {str(said).strip()[:500]}"


def _say(error: Exception) -> str:
    return str(error) or type(error).__name__
