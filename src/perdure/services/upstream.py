"""The upstream: an OpenAI-compatible server that generates, reached over HTTP.

It is asked by one of two APIs: chat completions, which nearly every server speaks, or Responses.

Only the start of a request is retried: once a stream has begun, its text may already be durable
and shown, and asking again would say it twice.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import suppress
from typing import Any, Literal

import httpx
import msgspec

from perdure.core.clock import Clock
from perdure.core.errors import Unavailable
from perdure.services.breaker import Breaker
from perdure.wire.relayed import RESPONSE_ENDS

_RETRIED_STATUSES = frozenset({0, 429, 500, 502, 503, 504})
_BROKEN_STATUSES = _RETRIED_STATUSES - {429}
_AWAY = frozenset({0, 502, 503, 504})
"""What is answered, if anything, where a server is away: by itself, or by a proxy before it."""

_CLIENTS_OWN = frozenset({400, 404, 413, 422, 429})
_BACKOFF_FIRST_S = 0.2
_MODELS_KEPT_S = 30.0
_MODELS_TIMEOUT_S = 5.0
_SILENCE_KEPT_S = 5.0
"""How long an upstream that did not list its models is not asked again: requests wait for it."""
_BESIDE_TIMEOUT_S = 10.0
_BESIDE_BYTES_MAX = 8 * 1024 * 1024
_ERROR_BYTES_MAX = 64 * 1024
_CHUNK_BYTES_MAX = 1024 * 1024
_EVENT_BYTES_MAX = 8 * 1024 * 1024
"""Of one line: the last event of a response holds all of it."""
_DRAINED_WITHIN_S = 0.2
_REST_WITHIN_S = 2.0
"""How soon after the end of an answer the rest has to come: what it used, and the stream's end."""
_JSON = {"content-type": "application/json"}

Api = Literal["chat", "responses"]
ApiChoice = Literal["chat", "responses", "auto"]

_UNKNOWN_ROUTE = frozenset({404, 405, 501})
_UNSOUND_REQUEST = frozenset({400, 413, 415, 422})


class UpstreamFailed(Unavailable):
    """The upstream refused, broke off or could not be reached. `answered` is its HTTP status, 0
    where there was none; `status` what a client of ours is told: the client's own mistakes as
    they are, everything else as a bad gateway."""

    code = "upstream_failed"
    should_retry: bool | None = None
    """False where the failure is what a response ended with: a repeat is given the same one."""

    def __init__(self, message: str, *, answered: int = 0, begun: bool = False) -> None:
        super().__init__(message)
        self.answered = answered
        self.begun = begun
        """Whether an answer had begun, of which the model may have made any part."""
        self.status = answered if answered in _CLIENTS_OWN else 502

    @property
    def unreached(self) -> bool:
        """Whether nothing there has begun to answer, so that another may be asked instead."""
        return not self.begun and self.answered in _AWAY


class CircuitOpen(UpstreamFailed):
    """The upstream has only failed of late and is left alone: nothing was sent to it."""

    code = "upstream_circuit_open"

    def __init__(self, url: str, failures: int, last: str, wait_s: float) -> None:
        super().__init__(
            f"the upstream {url} has failed {failures} times in a row and is left alone for "
            f"{wait_s:.1f} s. The last time: {last}"
        )
        self.status = 503
        self.retry_after_ms = max(1, int(wait_s * 1000))


class Passage(msgspec.Struct, frozen=True):
    """An answer on its way through: its media type, and its bytes in groups, as they come."""

    media: str
    groups: AsyncGenerator[list[bytes], None]


class UpstreamStats(msgspec.Struct):
    """Counters since start; `streaming` is how many answers are being read now. `refused` were not
    sent, because the circuit was open."""

    requests: int = 0
    retries: int = 0
    failures: int = 0
    refused: int = 0
    streaming: int = 0


class Upstream:
    """One server. `url` includes its version path, as OpenAI clients expect."""

    def __init__(
        self,
        url: str,
        *,
        key: str | None,
        api: ApiChoice,
        connect_timeout_s: float,
        read_timeout_s: float,
        attempts_max: int,
        clock: Clock,
    ) -> None:
        self.url = url.rstrip("/")
        self.stats = UpstreamStats()
        self.breaker = Breaker(clock)
        self._last_failure = ""
        self._clock = clock
        self._api = api
        self._attempts_max = attempts_max
        self.listed: list[str] = []
        """The models it listed last, even if it has fallen silent since."""
        self._ask_again_s = clock.monotonic_s()
        self._silent: str | None = None
        self._client = httpx.AsyncClient(
            headers={"authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(read_timeout_s, connect=connect_timeout_s),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=64),
            # Reading the certificate store takes longer than the rest of a start.
            verify=self.url.startswith("https:"),
        )

    def resting(self) -> CircuitOpen | None:
        """Why it would not be asked now, or None."""
        wait_s = self.breaker.wait_s()
        if wait_s == 0:
            return None
        return CircuitOpen(self.url, self.breaker.failures, self._last_failure, wait_s)

    async def api(self) -> Api:
        """The API it is asked by. Where that is to be found out, it is asked once for nothing: a
        server refuses the emptiness where it knows the route, and the route where it does not; no
        answer is begun. Raises `UpstreamFailed`."""
        if self._api == "auto":
            self._api = await self._speaks()
        return self._api

    async def _speaks(self) -> Api:
        try:
            response = await self._start("responses", b"{}")
        except UpstreamFailed as refused:
            if refused.answered in _UNKNOWN_ROUTE:
                return "chat"
            if refused.answered in _UNSOUND_REQUEST:
                return "responses"
            raise
        await response.aclose()
        return "responses"

    def stream_chat(self, request: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """The chunks of a streamed chat completion; one that holds all of it where the upstream
        does not stream. Raises `UpstreamFailed`."""
        return self._stream("chat/completions", request, _CHUNK_BYTES_MAX)

    def stream_response(self, request: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """The events of a streamed response, the last of which holds all of it; only that where
        the upstream does not stream. Raises `UpstreamFailed`."""
        return self._stream("responses", request, _EVENT_BYTES_MAX)

    async def _stream(
        self, route: str, request: dict[str, Any], line_bytes_max: int
    ) -> AsyncGenerator[dict[str, Any], None]:
        response = await self._start(route, msgspec.json.encode(request))
        self.stats.streaming += 1
        try:
            lines = _payloads(response, line_bytes_max)
            within_s: float | None = None
            while (data := await _next(lines, within_s)) not in (None, b"[DONE]"):
                chunk = msgspec.json.decode(data, type=dict)
                yield chunk
                if chunk.get("type") in RESPONSE_ENDS:
                    break
                if _finishes(chunk):
                    within_s = _REST_WITHIN_S
            await _drain(lines)
            self.breaker.succeeded()
        except (httpx.HTTPError, ValueError) as error:  # a decoder's errors are all of the latter
            raise self._broken(error) from error
        finally:
            self.stats.streaming -= 1
            await response.aclose()

    async def models(self) -> list[str]:
        """Ids of the models the upstream offers, asked for at most twice a minute."""
        if self._clock.monotonic_s() >= self._ask_again_s:
            await self._list()
        if self._silent is not None:
            raise UpstreamFailed(self._silent)
        return self.listed

    async def _list(self) -> None:
        try:
            response = await self._client.get(f"{self.url}/models", timeout=_MODELS_TIMEOUT_S)
            response.raise_for_status()
            listed = msgspec.json.decode(response.content, type=_Models)
        except (httpx.HTTPError, ValueError) as error:
            self._silent = (
                f"the upstream {self.url} did not list its models: {_say(error)}. "
                "Check that it runs and that its URL ends in /v1."
            )
            self._ask_again_s = self._clock.monotonic_s() + _SILENCE_KEPT_S
            return
        self._silent = None
        self._ask_again_s = self._clock.monotonic_s() + _MODELS_KEPT_S
        self.listed = [model.id for model in listed.data]

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

    async def pass_chat(self, body: bytes) -> Passage:
        """A chat completion as the upstream answers it, streamed or not: nothing of it is read
        here. Raises `UpstreamFailed`."""
        response = await self._start("chat/completions", body)
        groups = self._passed(response)
        await anext(groups)  # begun, so that closing it closes the connection
        return Passage(response.headers.get("content-type", "application/json"), groups)

    async def _passed(self, response: httpx.Response) -> AsyncGenerator[list[bytes], None]:
        """The body: whole events of a stream, as they come, or all of an answer."""
        self.stats.streaming += 1
        try:
            yield []
            rest = b""
            async for chunk in response.aiter_bytes():
                rest += chunk
                if end := _end_of_events(rest):
                    yield [rest[:end]]
                    rest = rest[end:]
                if len(rest) > _EVENT_BYTES_MAX:
                    raise ValueError(f"it is longer than {_EVENT_BYTES_MAX} bytes")
            if rest:
                yield [rest]
            self.breaker.succeeded()
        except (httpx.HTTPError, ValueError) as error:
            raise self._broken(error) from error
        finally:
            self.stats.streaming -= 1
            await response.aclose()

    async def _start(self, route: str, body: bytes) -> httpx.Response:
        """The response whose status is good and whose body has not been read yet."""
        if not self.breaker.admit():
            self.stats.refused += 1
            raise self.resting() or AssertionError("what is not admitted has to wait")
        for attempt in range(1, self._attempts_max + 1):
            self.stats.requests += 1
            failure: UpstreamFailed
            try:
                response = await self._client.send(
                    self._client.build_request(
                        "POST", f"{self.url}/{route}", content=body, headers=_JSON
                    ),
                    stream=True,
                )
                if response.status_code < 300:
                    self.breaker.started()
                    return response
                failure = UpstreamFailed(
                    await _refusal(self.url, response), answered=response.status_code
                )
            except httpx.HTTPError as error:
                failure = UpstreamFailed(
                    f"the upstream {self.url} cannot be reached: {_say(error)}. "
                    "Start it, or serve with another --upstream."
                )
            retried = failure.answered in _RETRIED_STATUSES
            if not retried or attempt == self._attempts_max:
                self._failed(failure)
                raise failure
            self.stats.failures += 1
            self.stats.retries += 1
            await self._clock.sleep(_BACKOFF_FIRST_S * 2 ** (attempt - 1))
        raise AssertionError("a loop of at least one attempt returns or raises")

    def _broken(self, error: Exception) -> UpstreamFailed:
        """Count an answer that broke off, and say so."""
        failure = UpstreamFailed(
            f"the upstream {self.url} broke off its answer: {_say(error)}.", begun=True
        )
        self._failed(failure)
        return failure

    def _failed(self, failure: UpstreamFailed) -> None:
        """Count a request that got no answer. One that was refused was answered: it says nothing
        about the next."""
        self.stats.failures += 1
        if failure.answered in _BROKEN_STATUSES:
            self._last_failure = str(failure)
            self.breaker.failed()
        else:
            self.breaker.succeeded()


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


async def _payloads(response: httpx.Response, line_bytes_max: int) -> AsyncIterator[bytes]:
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
        if max(map(len, (rest, *lines))) > line_bytes_max:
            raise ValueError(f"a line of its stream is longer than {line_bytes_max} bytes")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()
            elif line.startswith(b"error:"):  # of llama.cpp's server
                yield b'{"error":%b}' % line[6:].strip()
    if streams is False:
        yield rest
    elif rest.startswith(b"data:"):
        yield rest[5:].strip()


def _end_of_events(data: bytes) -> int:
    """Where the last whole event of a stream ends; 0 where there is none."""
    return max(
        at + len(gap) if (at := data.rfind(gap)) >= 0 else 0 for gap in (b"\n\n", b"\r\n\r\n")
    )


async def _next(lines: AsyncIterator[bytes], within_s: float | None) -> bytes | None:
    """What comes next; None at the end of the stream, or where nothing came in time: some servers
    neither say that they are done nor close."""
    try:
        async with asyncio.timeout(within_s):
            return await anext(lines, None)
    except TimeoutError:
        return None


def _finishes(chunk: dict[str, Any]) -> bool:
    """Whether a chunk of a chat completion says how the answer ended."""
    choices = chunk.get("choices")
    return isinstance(choices, list) and any(
        isinstance(choice, dict) and choice.get("finish_reason") for choice in choices
    )


async def _drain(lines: AsyncIterator[bytes]) -> None:
    """Wait a little for a stream to end that has said all: only then its connection can be used
    again. One that does not end is cut, and nothing is lost."""
    with suppress(TimeoutError, httpx.HTTPError, ValueError):
        async with asyncio.timeout(_DRAINED_WITHIN_S):
            async for _ in lines:
                pass


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
