"""Scripts: what the scripted upstream answers, decided by the last message alone.

A judge can predict every word of an answer (`script_of(prompt).text`). Any text that is no script
is echoed:

    echo TEXT               the text, word by word; also what a tool's output gets
    count N                 1 2 3 ... N, a number a chunk
    slow DELAY_S [N]        count N (20), waiting before each chunk
    pace DELAY_S TEXT       the text, word by word, waiting before each
    gate NAME N M [DELAY_S] slow DELAY_S (0) M, and after N nothing until that gate is opened
    long N                  N characters, a thousand a chunk
    whole TEXT              the text at once, even where a stream was asked for
    reasoning TEXT          thoughts first, then the text
    ponder DELAY_S TEXT     the same, waiting before each piece
    refuse TEXT             a refusal
    tool NAME [ARGUMENTS]   one tool call, its arguments in pieces
    parallel NAME ...       several tool calls, their pieces interleaved
    length N                count N, ended by the token limit
    filter N                count N, ended by the content filter
    fail STATUS             that HTTP status and an error body
    fail after N            count N, then an error object in the stream
    flaky N                 503 to the first N requests with this message, then an echo
    cut N                   count N, then the connection is closed
    hang N                  count N, then nothing until the client leaves
    linger DELAY_S N        slow, its end and its usage, then nothing until the client leaves

A model name is a script too, with dashes for spaces (`slow-0.01-100`), where the message is none.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, Literal

import msgspec

SLOW_CHUNKS = 20
LONG_CHUNK_CHARS = 1_000
PIECE_CHARS = 8

Ending = Literal["stop", "tool_calls", "length", "content_filter", "error", "cut", "hang"]


class Script(msgspec.Struct, frozen=True):
    """What one answer consists of."""

    chunks: tuple[str, ...] = ()
    thoughts: tuple[str, ...] = ()
    refusal: str = ""
    calls: tuple[tuple[str, str], ...] = ()
    delay_s: float = 0.0
    gate: str = ""
    before_gate: int = 0
    status: int = 200
    failures: int = 0
    ending: Ending = "stop"
    streams: bool = True
    lingers: bool = False
    given: str = ""
    repeats: bool = False

    @property
    def text(self) -> str:
        """Everything the answer says."""
        return "".join(self.chunks)

    def going_on(self, given: str, *, repeats: bool) -> Script:
        """The answer of a model that is given the beginning of it: the rest, behind what it was
        given if it repeats that. A text that is no beginning of it is not gone on with."""
        if not self.text.startswith(given):
            return self
        rest, chunks = len(given), []
        for chunk in self.chunks:
            chunks.append(chunk[rest:])
            rest = max(0, rest - len(chunk))
        left = tuple(filter(None, chunks))
        before_gate = max(0, self.before_gate - (len(chunks) - len(left)))
        return msgspec.structs.replace(
            self, chunks=left, thoughts=(), given=given, repeats=repeats, before_gate=before_gate
        )


def script_of(prompt: str, model: str = "") -> Script:
    """The script that a prompt, else a model's name, calls for."""
    for line in (prompt, model.replace("-", " ")):
        verb, _, rest = line.strip().partition(" ")
        if verb in _VERBS:
            try:
                return _VERBS[verb](rest.strip())
            except (ValueError, IndexError):
                continue
    return echo(prompt)


def echo(text: str) -> Script:
    """The script that says the text."""
    return Script(chunks=_words(text))


def _words(text: str) -> tuple[str, ...]:
    """Pieces that join to the text, each a word with the space before it."""
    first, *others = text.split(" ")
    return (first, *(f" {word}" for word in others))


def _count(text: str) -> tuple[str, ...]:
    return tuple(str(n) if n == 1 else f" {n}" for n in range(1, int(text) + 1))


def _slow(rest: str) -> Script:
    delay_s, *count = rest.split()
    return Script(chunks=_count(count[0] if count else str(SLOW_CHUNKS)), delay_s=float(delay_s))


def _pace(rest: str) -> Script:
    delay_s, _, text = rest.partition(" ")
    return Script(chunks=_words(text), delay_s=float(delay_s))


def _gate(rest: str) -> Script:
    name, before, count, *delay_s = rest.split()
    return Script(
        chunks=_count(count),
        gate=name,
        before_gate=int(before),
        delay_s=float(delay_s[0]) if delay_s else 0.0,
    )


def _long(rest: str) -> Script:
    text = ("0123456789" * (int(rest) // 10 + 1))[: int(rest)]
    starts = range(0, len(text), LONG_CHUNK_CHARS)
    return Script(chunks=tuple(text[at : at + LONG_CHUNK_CHARS] for at in starts))


def _reasoning(rest: str) -> Script:
    return Script(thoughts=_words(f"The user wants: {rest}"), chunks=_words(rest))


def _ponder(rest: str) -> Script:
    delay_s, _, text = rest.partition(" ")
    return msgspec.structs.replace(_reasoning(text), delay_s=float(delay_s))


def _tool(rest: str) -> Script:
    name, _, arguments = rest.partition(" ")
    return Script(calls=((name, arguments.strip() or "{}"),), ending="tool_calls")


def _parallel(rest: str) -> Script:
    calls = tuple((name, f'{{"place": {at}}}') for at, name in enumerate(rest.split()))
    return Script(calls=calls, ending="tool_calls")


def _fail(rest: str) -> Script:
    if rest.startswith("after"):
        return Script(chunks=_count(rest.split()[1]), ending="error")
    return Script(status=int(rest))


_VERBS: dict[str, Callable[[str], Script]] = {
    "echo": echo,
    "count": lambda rest: Script(chunks=_count(rest)),
    "slow": _slow,
    "pace": _pace,
    "gate": _gate,
    "long": _long,
    "whole": lambda rest: Script(chunks=_words(rest), streams=False),
    "reasoning": _reasoning,
    "ponder": _ponder,
    "refuse": lambda rest: Script(refusal=rest),
    "tool": _tool,
    "parallel": _parallel,
    "length": lambda rest: Script(chunks=_count(rest), ending="length"),
    "filter": lambda rest: Script(chunks=_count(rest), ending="content_filter"),
    "fail": _fail,
    "flaky": lambda rest: Script(chunks=_words(f"flaky {rest}"), failures=int(rest)),
    "cut": lambda rest: Script(chunks=_count(rest), ending="cut"),
    "linger": lambda rest: msgspec.structs.replace(_slow(rest), lingers=True),
    "hang": lambda rest: Script(chunks=_count(rest), ending="hang"),
}


def call_id(turn: int, at: int) -> str:
    """The id of a call: of its turn and place, so that none stands twice in a conversation."""
    return f"call_{turn}_{at}"


def deltas(script: Script, turn: int) -> Iterator[dict[str, Any]]:
    """The answer as deltas of chat completion chunks; `turn` tells its calls from earlier ones."""
    yield {"role": "assistant", "content": ""}
    for thought in script.thoughts:
        yield {"reasoning_content": thought}
    if script.repeats:
        yield {"content": script.given}
    for chunk in script.chunks:
        yield {"content": chunk}
    for word in _words(script.refusal) if script.refusal else ():
        yield {"refusal": word}
    for at, (name, _) in enumerate(script.calls):
        function = {"name": name, "arguments": ""}
        yield {
            "tool_calls": [
                {"index": at, "id": call_id(turn, at), "type": "function", "function": function}
            ]
        }
    pieces = [
        [
            (at, arguments[start : start + PIECE_CHARS])
            for start in range(0, len(arguments), PIECE_CHARS)
        ]
        for at, (_, arguments) in enumerate(script.calls)
    ]
    for piece in filter(None, itertools.chain.from_iterable(itertools.zip_longest(*pieces))):
        at, arguments = piece
        yield {"tool_calls": [{"index": at, "function": {"arguments": arguments}}]}
