"""The client that drives a server which is about to die, and remembers what it was told.

Nothing here retries: an answer that did not arrive whole is an answer nobody got.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

import httpx
import msgspec

from perdure.proving.oracle import History, Op

DEADLINE_S = 20.0
"""An answer that takes longer is a hang."""

_REFUSALS = {"latched", "commit_unknown", "storage_full", "unavailable"}

ENDS = ("response.completed", "response.incomplete", "response.failed")


class Gone(Exception):
    """The connection ended before the answer did."""


class Refused(Exception):
    """A server whose disk fails refused to write, or one that is excused refused anything; the text
    is the code. What it was asked for is unknown: some of it may have been done before."""


class Harmed(Exception):
    """What was asked for needs something that is known to be damaged, and the answer said so and
    named it."""


class Answer(NamedTuple):
    """A complete answer."""

    status: int
    body: bytes
    headers: httpx.Headers

    def json(self) -> Any:
        return msgspec.json.decode(self.body)

    @property
    def code(self) -> str | None:
        """The machine-readable code of a refusal."""
        error = self.json().get("error") if self.status >= 400 else None
        return error.get("code") if isinstance(error, dict) else None


class Event(msgspec.Struct):
    """The part of a stream event that a judge needs to find its way."""

    type: str
    sequence_number: int
    response: msgspec.Raw = msgspec.Raw(b"")


class Client:
    """One worker's connection. Its choices come from `rng` alone, so that a seed repeats them.
    While its server is `excused`, that may refuse by 503, or answer nothing."""

    def __init__(self, url: str, history: History, worker: int, rng: random.Random) -> None:
        self.url = url
        self.excused = False
        self.history = history
        self.worker = worker
        self.rng = rng
        self._http = httpx.AsyncClient(
            base_url=url, timeout=DEADLINE_S, trust_env=False, verify=False
        )

    async def do(
        self,
        op: Op,
        method: str,
        path: str,
        body: Any = None,
        headers: dict[str, str] | None = None,
    ) -> Answer:
        """Send an operation and settle it. Raises `Gone`, which leaves it unknown."""
        answer = await self.send(method, path, body, headers)
        self._settle(op, answer.status)
        return answer

    async def do_raw(
        self, op: Op, path: str, content: AsyncIterator[bytes], headers: dict[str, str]
    ) -> Answer:
        """Send an operation whose body is no JSON, piece by piece, and settle it. Raises `Gone`."""
        answer = await self.send_raw(path, content, headers)
        self._settle(op, answer.status)
        return answer

    async def send_raw(
        self, path: str, content: AsyncIterator[bytes], headers: dict[str, str]
    ) -> Answer:
        """Send a part of an operation, whose body is no JSON. Raises `Gone`."""
        return await self._send("POST", path, content, headers)

    async def send(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> Answer:
        """Send what is no operation: a read, or a repeat. Raises `Gone`."""
        content = None if body is None else msgspec.json.encode(body)
        sent = {"content-type": "application/json"} | (headers or {})
        return await self._send(method, path, content, sent)

    async def _send(
        self,
        method: str,
        path: str,
        content: bytes | AsyncIterator[bytes] | None,
        sent: dict[str, str],
    ) -> Answer:
        try:
            response = await self._http.request(method, path, content=content, headers=sent)
        except httpx.RemoteProtocolError as error:
            if path.endswith("/content") and any(map(_is_blob, self.history.harmed)):
                raise Harmed(f"{method} {path}") from error  # cut before the damaged block
            raise self._gone(f"{method} {path}", error) from error
        except httpx.TransportError as error:
            raise self._gone(f"{method} {path}", error) from error
        self._look(f"{method} {path}", response)
        return Answer(response.status_code, response.content, response.headers)

    async def get(self, path: str) -> Answer:
        """A read."""
        return await self.send("GET", path)

    async def status(self, path: str) -> int:
        """The status alone of a read, whichever it is. Raises `Gone`."""
        try:
            return (await self._http.get(path)).status_code
        except httpx.TransportError as error:
            raise self._gone(f"GET {path}", error) from error

    async def post_stream(self, op: Op, path: str, body: Any, seen: list[bytes]) -> None:
        """Send an operation whose answer is a stream; every event goes to `seen` as it arrives.
        It is acknowledged when `response.completed` has arrived. Raises `Gone`."""
        async for event in self._events("POST", path, body, op):
            seen.append(event)
        if seen and head(seen[-1]).type == "response.completed":
            self._settle(op, 200)

    async def log(self, path: str) -> list[bytes]:
        """The events of a stream that is read. Raises `Gone`."""
        return [event async for event in self._events("GET", path)]

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def _events(
        self, method: str, path: str, body: Any = None, op: Op | None = None
    ) -> AsyncIterator[bytes]:
        content = None if body is None else msgspec.json.encode(body)
        headers = {"content-type": "application/json"}
        what = f"{method} {path} as a stream"
        try:
            async with (
                asyncio.timeout(DEADLINE_S),
                self._http.stream(method, path, content=content, headers=headers) as response,
            ):
                if response.status_code != 200:
                    await response.aread()
                    self._look(what, response)
                    if op is not None:
                        self._settle(op, response.status_code)
                    return
                rest = b""
                async for chunk in response.aiter_raw():
                    *blocks, rest = (rest + chunk).split(b"\n\n")
                    for block in blocks:
                        if data := _data(block):
                            if head(data).type == "error":
                                self._look_at_error(what, data)
                            yield data
        except (httpx.TransportError, TimeoutError) as error:
            raise self._gone(what, error) from error

    def _look_at_error(self, what: str, event: bytes) -> None:
        """A stream whose store fails, or whose events are damaged, ends with the reason."""
        if self.history.failing or self.excused:
            raise Refused(what)
        if harm(event, self.history.harmed):
            raise Harmed(what)

    def _settle(self, op: Op, status: int) -> None:
        if status < 300:
            self.history.settle(op, "acknowledged", status)
        elif status < 500:
            self.history.settle(op, "refused", status)
        else:
            self.history.settle(op, "unknown", status)

    def _look(self, what: str, response: httpx.Response) -> None:
        if response.status_code == 503 and self.excused:
            raise Refused(what)
        if response.status_code == 503 and self.history.stopping:
            return
        refused = self.history.failing and refusal(response.status_code, response.content)
        if refused and not what.startswith("GET "):
            raise Refused(refused)
        if response.status_code == 500 and self.history.harmed:
            error = msgspec.json.encode(msgspec.json.decode(response.content).get("error"))
            if harm(error, self.history.harmed):
                raise Harmed(what)
        if response.status_code >= 500:
            told = response.text[:300]
            self.history.complaints.append(f"{what} was answered {response.status_code}: {told}")

    def _gone(self, what: str, error: Exception) -> Gone:
        if isinstance(error, httpx.TimeoutException | TimeoutError) and not self.excused:
            self.history.complaints.append(f"{what} had no answer within {DEADLINE_S:g} s")
        return Gone(f"{what}: {str(error) or type(error).__name__}")


def refusal(status: int, body: bytes) -> str | None:
    """The code of an answer that says, typed, that the store cannot be written now."""
    if status not in (503, 507):
        return None
    code = (msgspec.json.decode(body).get("error") or {}).get("code")
    return code if code in _REFUSALS and (status == 507) == (code == "storage_full") else None


def _is_blob(harmed: str) -> bool:
    return harmed.startswith("the blob ")


class _Error(msgspec.Struct):
    code: str | None = None
    message: str = ""


def harm(error: bytes, harmed: tuple[str, ...]) -> bool:
    """Whether an error says that one of these is damaged."""
    told = _decode_error(error)
    return told.code == "damaged" and any(name in told.message for name in harmed)


_decode_error = msgspec.json.Decoder(_Error).decode


def ends(event: bytes) -> bool:
    """Whether an event is the last of its response."""
    return head(event).type in ENDS


head = msgspec.json.Decoder(Event).decode


def _data(block: bytes) -> bytes:
    """What one server-sent event carries; nothing for a comment and for the mark of the end."""
    lines = [line for line in block.split(b"\n") if line.startswith(b"data: {")]
    return b"\n".join(line[5:].removeprefix(b" ") for line in lines)
