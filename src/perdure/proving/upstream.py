"""The scripted upstream: a real HTTP server that answers like a model, to a script.

It speaks `/v1/chat/completions`, `/v1/responses` and `/v1/models`, streamed and not, counts tokens
at `/tokenize`, tells at `/received` what it was sent, and goes on at `/open` where an answer waits
at a gate. What it answers is decided in proving/scripts.py. Asked by chat completions, it goes on
with a message of the assistant in the way it `continues`.
"""

from __future__ import annotations

import argparse
import asyncio
import atexit
import errno
import functools
import os
import signal
import socket
import subprocess
import sys
from collections import Counter, defaultdict, deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any
from urllib.parse import parse_qs

import httpx
import msgspec
import uvicorn

from perdure.core import codec
from perdure.core.clock import SystemClock
from perdure.proving.scripts import Script, call_id, deltas, echo, script_of
from perdure.services.bridge import ChatReader
from perdure.services.continuing import WAYS, Continues
from perdure.wire import events as ev
from perdure.wire.fold import View, take
from perdure.wire.responses import CreateResponse, finished, response_body

RECEIVED_MAX = 10_000

PATIENCE_S = 20.0
"""How long who asks for a number of requests waits for them."""

_NOTICED_S = 0.05
"""How soon a leaving client is noticed; shorter waits are plain sleeps, which are much cheaper."""

APIS = {"chat": "/v1/chat/completions", "responses": "/v1/responses"}

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class _Cut(Exception):
    """Raised into the server to make it close the connection in the middle of an answer."""


def chat_chunks(script: Script, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The answer as chat completion chunks, up to its ending."""
    head = {"id": "chatcmpl-scripted", "object": "chat.completion.chunk", "created": 0}
    head["model"] = body.get("model")
    for delta in deltas(script, _turn(body)):
        yield head | {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]}
    if script.ending == "error":
        yield {"error": {"message": "scripted failure", "type": "server_error", "code": None}}
    if script.ending in _UNFINISHED:
        return
    last = {"index": 0, "delta": {}, "finish_reason": script.ending}
    yield head | {"choices": [last]}
    if (body.get("stream_options") or {}).get("include_usage"):
        yield head | {"choices": [], "usage": _usage(script, body)}


_UNFINISHED = ("error", "cut", "hang")


def _usage(script: Script, body: dict[str, Any]) -> dict[str, Any]:
    """Counted so that a judge can: a token is a word read or a chunk written, and half of what is
    read was cached."""
    read = len(_prompt(body).split()) + len(script.given.split())
    written = len(script.chunks) + len(script.thoughts)
    return {
        "prompt_tokens": read,
        "completion_tokens": written,
        "total_tokens": read + written,
        "prompt_tokens_details": {"cached_tokens": read // 2},
        "completion_tokens_details": {"reasoning_tokens": len(script.thoughts)},
    }


def _prompt(body: dict[str, Any]) -> str:
    """The text of the last message, or of the last item, whoever said it."""
    said = body.get("messages") or body.get("input") or ""
    if isinstance(said, str):
        return said
    content = said[-1].get("content") or said[-1].get("output") or ""
    if isinstance(content, list):
        return " ".join(part.get("text") or "" for part in content)
    return str(content)


def _given(body: dict[str, Any], continues: Continues) -> tuple[dict[str, Any], str]:
    """A request without the message that is to be gone on with, and what that says. Raises
    `ValueError` for one that is marked in no way, where the server needs it to be."""
    messages = body.get("messages") or [{}]
    way = WAYS.get(continues)
    if way is None or messages[-1].get("role") != "assistant":
        return body, ""
    if any(messages[-1].get(name) != value for name, value in way.marks.items()):
        raise ValueError("the last message is the assistant's, and no prefix")
    if any(body.get(name) != value for name, value in way.fields.items()):
        return body, ""
    return body | {"messages": messages[:-1]}, messages[-1]["content"]


def _turn(body: dict[str, Any]) -> int:
    """How much was said before, which grows along a conversation."""
    return len(body.get("messages") or body.get("input") or ())


def _from_tool(body: dict[str, Any]) -> bool:
    said = body.get("messages") or body.get("input") or ""
    last = said[-1] if isinstance(said, list) else {}
    return last.get("role") == "tool" or last.get("type") == "function_call_output"


class ScriptedApp:
    """The server as one ASGI callable."""

    def __init__(
        self,
        models: Sequence[str] = ("scripted",),
        apis: Sequence[str] = tuple(APIS),
        continues: Continues = "continue_final_message",
    ) -> None:
        self._models = models
        self._continues = continues
        self._routes = {APIS[api] for api in apis}
        self.received: deque[dict[str, Any]] = deque(maxlen=RECEIVED_MAX)
        self.left_early = 0
        self._connections: set[Any] = set()
        self._seen: Counter[str] = Counter()
        self._gates: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)
        self._changed = asyncio.Event()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        match scope["method"], scope["path"]:
            case "GET", "/v1/models":
                model = {"object": "model", "created": 0, "owned_by": "perdure"}
                listed = [model | {"id": id} for id in self._models]
                await _answer(send, 200, {"object": "list", "data": listed})
            case "GET", "/received":
                await self._wait(parse_qs(scope["query_string"].decode()))
                told = {
                    "requests": list(self.received),
                    "left_early": self.left_early,
                    "connections": len(self._connections),
                }
                await _answer(send, 200, told)
            case "POST", "/open":
                self._gates[parse_qs(scope["query_string"].decode())["gate"][0]].set()
                await _answer(send, 200, {})
            case "POST", path if path in self._routes:
                self._connections.add(tuple(scope["client"]))
                await self._play(path, codec.parse(await _body(receive)), receive, send)
            case "POST", path if path in _BESIDE:
                await _answer(send, 200, _BESIDE[path](codec.parse(await _body(receive))))
            case _:
                await _answer(send, 404, _error("there is no such route"))

    async def _play(self, path: str, body: dict[str, Any], receive: Receive, send: Send) -> None:
        if not body.get("model"):
            await _answer(send, 400, _error("'model' is required"))
            return
        self.received.append({"path": path, "body": body})
        self._note()
        try:
            body, given = _given(body, self._continues)
        except ValueError as error:
            await _answer(send, 400, _error(str(error)))
            return
        prompt = _prompt(body)
        script = echo(prompt) if _from_tool(body) else script_of(prompt, body.get("model") or "")
        if given:
            script = script.going_on(given, repeats=WAYS[self._continues].repeats)
        self._seen[prompt] += 1
        if self._seen[prompt] <= script.failures:
            await _answer(send, 503, _error("scripted: not yet"))
        elif script.status != 200:
            await _answer(send, script.status, _error(f"scripted: {script.status}"))
        elif body.get("stream") and script.streams:
            chat = path.endswith("completions")
            stream, lead = (_chat_stream, 1) if chat else (_responses_stream, 4)
            await self._stream(script, stream(script, body), lead, receive, send)
        elif script.ending == "hang":
            await _left(receive)
            self._note(left=1)
        elif script.ending in _UNFINISHED:
            await _answer(send, 500, _error(f"scripted: {script.ending}"))
        else:
            await asyncio.sleep(script.delay_s * len(script.chunks))
            if script.gate:
                await self._gates[script.gate].wait()
            whole = _chat_whole if path.endswith("completions") else _responses_whole
            await _answer(send, 200, whole(script, body))

    def _note(self, left: int = 0) -> None:
        self.left_early += left
        self._changed.set()
        self._changed = asyncio.Event()

    async def _wait(self, query: dict[str, list[str]]) -> None:
        """Return once there are as many requests and leavers as the query names, or too late."""
        requests, left, timeout_s = (
            float(query.get(name, ["0"])[0]) for name in ("requests", "left", "timeout_s")
        )
        try:
            async with asyncio.timeout(timeout_s):
                while len(self.received) < requests or self.left_early < left:
                    await self._changed.wait()
        except TimeoutError:
            return

    async def _stream(
        self, script: Script, chunks: Iterator[bytes], lead: int, receive: Receive, send: Send
    ) -> None:
        """Send chunk by chunk at the script's pace, held against the clock so that it does not
        drift, until the client leaves. The first `lead` chunks say nothing yet."""
        headers = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-cache")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        left = asyncio.create_task(_left(receive))
        loop = asyncio.get_running_loop()
        started_s = loop.time()
        try:
            for at, chunk in enumerate(chunks):
                if script.gate and at == lead + script.before_gate:
                    opened = asyncio.create_task(self._gates[script.gate].wait())
                    await asyncio.wait((left, opened), return_when=asyncio.FIRST_COMPLETED)
                    opened.cancel()
                    started_s = loop.time() - at * script.delay_s
                wait_s = started_s + at * script.delay_s - loop.time()
                if wait_s > _NOTICED_S:
                    await asyncio.wait([left], timeout=wait_s)
                elif script.delay_s:
                    await asyncio.sleep(wait_s)
                if left.done():
                    self._note(left=1)
                    return
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            if script.ending == "hang" or script.lingers:
                await left
                self._note(left=1)
            elif script.ending == "cut":
                raise _Cut
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            left.cancel()


def tokens_in(body: dict[str, Any]) -> int:
    """What this server's tokenizer counts: a token is a word of a message, or a tool."""
    said = [message.get("content") or "" for message in body["messages"]]
    return sum(len(text.split()) for text in said) + len(body.get("tools") or ())


def _tokenize(body: dict[str, Any]) -> dict[str, Any]:
    count = tokens_in(body)
    return {"count": count, "max_model_len": 32_768, "tokens": [0] * count, "token_strs": None}


_BESIDE: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "/tokenize": _tokenize,
    "/llama/tokenize": lambda body: {"tokens": [0] * len(body.get("content", "").split())},
    "/llama/apply-template": lambda body: {"prompt": " token" * tokens_in(body)},
}
"""Tokenizers: vLLM's form beside `/v1`, llama.cpp's beside `/llama/v1`; `/plain/v1` has none."""


def _chat_stream(script: Script, body: dict[str, Any]) -> Iterator[bytes]:
    for chunk in chat_chunks(script, body):
        yield b"data: %b\n\n" % codec.encode(chunk)
    if script.ending not in _UNFINISHED and not script.lingers:
        yield b"data: [DONE]\n\n"


def _chat_whole(script: Script, body: dict[str, Any]) -> dict[str, Any]:
    calls = [
        {
            "id": call_id(_turn(body), at),
            "type": "function",
            "function": {"name": name, "arguments": arguments},
        }
        for at, (name, arguments) in enumerate(script.calls)
    ]
    message: dict[str, Any] = {
        "role": "assistant",
        "content": script.text or None,
        "refusal": script.refusal or None,
    }
    if script.thoughts:
        message["reasoning_content"] = "".join(script.thoughts)
    if calls:
        message["tool_calls"] = calls
    return {
        "id": "chatcmpl-scripted",
        "object": "chat.completion",
        "created": 0,
        "model": body.get("model"),
        "choices": [{"index": 0, "message": message, "finish_reason": script.ending}],
        "usage": _usage(script, body),
    }


def responses_events(script: Script, body: dict[str, Any]) -> Iterator[ev.Event]:
    """The answer as events of the Responses API, up to its ending."""
    clock = SystemClock()
    view = View()
    reader = ChatReader(view, clock)
    request = CreateResponse(model=str(body.get("model")), store=False)
    started = response_body(request, id=clock.new_id("resp"), created_at=int(clock.now_s()))
    yield from take(view, ev.ResponseCreated(response=started))
    yield from take(view, ev.ResponseInProgress(response=started))
    for chunk in chat_chunks(script, body | {"stream_options": {"include_usage": True}}):
        yield from reader.read(chunk)
    if script.ending in ("cut", "hang"):
        return
    events, outcome = reader.end()
    yield from events
    ended = finished(started, outcome, view.output(), completed_at=int(clock.now_s()))
    yield from take(view, ev.terminal(ended))


def _responses_stream(script: Script, body: dict[str, Any]) -> Iterator[bytes]:
    for number, event in enumerate(responses_events(script, body)):
        [encoded] = ev.encode_events([event], after=number)
        yield ev.sse(ev.type_of(event), encoded)


def _responses_whole(script: Script, body: dict[str, Any]) -> dict[str, Any]:
    *_, last = responses_events(script, body)
    assert isinstance(last, ev.Terminal)
    return last.response


async def _body(receive: Receive) -> bytes:
    read = b""
    while True:
        message = await receive()
        read += bytes(message.get("body", b""))
        if not message.get("more_body"):
            return read


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _answer(send: Send, status: int, body: dict[str, Any]) -> None:
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": codec.encode(body)})


def _error(message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "server_error", "param": None, "code": None}}


class _Order(msgspec.Struct):
    """What the nest is asked for: a server, or the end of the one with this `pid`."""

    port: int = 0
    models: Sequence[str] = ("scripted",)
    apis: Sequence[str] = tuple(APIS)
    continues: Continues = "continue_final_message"
    pid: int | None = None


class _Born(msgspec.Struct):
    """A server that listens, or the errno of why none can."""

    pid: int = 0
    port: int = 0
    refused: int = 0


class _Nest:
    """A process that has imported everything and forks servers, so that one costs a fork and not
    an interpreter. It ends with this process, and the servers with it."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            (sys.executable, "-m", "perdure.proving.upstream", "--nest"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,  # an interrupt from the keyboard is for who asked, not for it
        )
        atexit.register(self._close)

    def ask(self, order: _Order) -> _Born:
        """Have it done. Takes milliseconds, but for the first time."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(msgspec.json.encode(order) + b"\n")
        return msgspec.json.decode(self._process.stdout.readline(), type=_Born)

    def _close(self) -> None:
        with self._process:
            """Its standard input ends here, and so does it."""


_nest = functools.cache(_Nest)


class ScriptedUpstream:
    """The server in a process of its own, for as long as the context lasts.

    `url` ends in `/v1`, as `--upstream` wants it. The process also ends with its parent. Raises
    `OSError` where it cannot listen.
    """

    def __init__(
        self,
        port: int = 0,
        models: Sequence[str] = ("scripted",),
        apis: Sequence[str] = tuple(APIS),
        continues: Continues = "continue_final_message",
    ) -> None:
        self.url = ""
        self._order = _Order(port, models, apis, continues)
        self._born = _Born()

    async def __aenter__(self) -> ScriptedUpstream:
        self._born = _nest().ask(self._order)
        if self._born.refused:
            raise OSError(self._born.refused, os.strerror(self._born.refused))
        self.url = f"http://127.0.0.1:{self._born.port}/v1"
        return self

    async def __aexit__(self, *_: object) -> None:
        _nest().ask(_Order(pid=self._born.pid))

    async def received(
        self, at_least: int = 0, *, timeout_s: float = PATIENCE_S
    ) -> list[dict[str, Any]]:
        """The bodies of all requests for an answer so far, in order of arrival; waits for there
        to be `at_least` so many. Raises `TimeoutError`."""
        told = await self._told(requests=at_least, timeout_s=timeout_s)
        if len(told["requests"]) < at_least:
            raise TimeoutError(f"{len(told['requests'])} requests came, not {at_least}.")
        return [request["body"] for request in told["requests"]]

    async def left_early(self, at_least: int = 0, *, timeout_s: float = PATIENCE_S) -> int:
        """How many clients left before the end of their answer; waits for there to be `at_least`
        so many. Raises `TimeoutError`."""
        told = await self._told(left=at_least, timeout_s=timeout_s)
        if told["left_early"] < at_least:
            raise TimeoutError(f"{told['left_early']} clients left early, not {at_least}.")
        return int(told["left_early"])

    async def open(self, gate: str) -> None:
        """Let every answer go on that waits at this gate, or will come to it."""
        async with httpx.AsyncClient(verify=False) as client:
            url = f"http://127.0.0.1:{self._born.port}/open"
            (await client.post(url, params={"gate": gate})).raise_for_status()

    async def connections(self) -> int:
        """How many connections requests for an answer have come on."""
        return int((await self._told(timeout_s=0))["connections"])

    async def _told(self, *, timeout_s: float, **wanted: int) -> dict[str, Any]:
        async with httpx.AsyncClient(timeout=timeout_s + 5, verify=False) as client:
            response = await client.get(
                f"http://127.0.0.1:{self._born.port}/received",
                params={"timeout_s": timeout_s, **wanted},
            )
            response.raise_for_status()
            told: dict[str, Any] = response.json()
            return told


def _listen(port: int) -> socket.socket:
    return socket.create_server(("127.0.0.1", port), backlog=1024)


def _serve(listening: socket.socket, order: _Order) -> None:
    """Serve until told to stop."""
    config = uvicorn.Config(
        ScriptedApp(order.models, order.apis, order.continues),
        log_level="critical",
        access_log=False,
        timeout_graceful_shutdown=1,
    )
    asyncio.run(uvicorn.Server(config).serve(sockets=[listening]))


def _hatch() -> None:
    """Be the nest: carry out the orders on standard input until it ends."""
    living: set[int] = set()
    for line in sys.stdin.buffer:
        order, born = msgspec.json.decode(line, type=_Order), _Born()
        if order.pid is not None:
            _end(order.pid)
            living.remove(order.pid)
        else:
            try:
                born = _fork(order)
                living.add(born.pid)
            except OSError as error:
                born.refused = error.errno or errno.EIO
        sys.stdout.buffer.write(msgspec.json.encode(born) + b"\n")
        sys.stdout.buffer.flush()
    for pid in living:
        _end(pid)


def _fork(order: _Order) -> _Born:
    """A server that accepts connections from this moment on, because it listened before."""
    with _listen(order.port) as listening:
        pid = os.fork()
        if pid == 0:
            nowhere = os.open(os.devnull, os.O_RDWR)
            for pipe in (sys.stdin, sys.stdout):
                os.dup2(nowhere, pipe.fileno())
            _serve(listening, order)
            os._exit(0)
        return _Born(pid, listening.getsockname()[1])


def _end(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def main() -> None:
    """`python -m perdure.proving.upstream --port 0`: prints the port once it listens."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--models", nargs="+", default=["scripted"])
    parser.add_argument("--apis", nargs="+", choices=APIS, default=list(APIS))
    parser.add_argument("--continues", choices=("no", *WAYS), default="continue_final_message")
    parser.add_argument("--nest", action="store_true", help="fork servers on demand")
    options = parser.parse_args()
    if options.nest:
        _hatch()
        return
    order = _Order(options.port, options.models, options.apis, options.continues)
    with _listen(order.port) as listening:
        print(listening.getsockname()[1], flush=True)
        _serve(listening, order)


if __name__ == "__main__":
    main()
