"""Fuzzing: what reads bytes that others wrote says no in our words, whatever they are.

Each target takes mutated samples of what it reads. It may accept them or raise one of the six
kinds of error; anything else is a bug. `python -m perdure.proving.fuzz --seconds 10` goes on as
long as it is told to; the seed decides every mutation, so a finding is repeated by it.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import httpx
import msgspec

from perdure.core import codec, cursors, keys
from perdure.core.clock import SystemClock
from perdure.core.cursors import Position, Question
from perdure.core.errors import PerdureError
from perdure.core.stored import checked_record, checked_tip
from perdure.core.values import record_sum
from perdure.services.bridge import ChatReader, chat_request
from perdure.services.relay import ResponsesReader, responses_request
from perdure.services.upstream import _payloads
from perdure.surfaces.jobs import JOBS, Job
from perdure.surfaces.state import LAYOUTS
from perdure.wire import conversations, files, lists
from perdure.wire.compaction import parse_compact
from perdure.wire.events import Event
from perdure.wire.fold import View
from perdure.wire.items import sound_items
from perdure.wire.responses import parse_create_response, response_body

_CLOCK = SystemClock()
_QUESTION = Question("store", "jobs", ("t",), "by_age", (), False)
_LINE_BYTES_MAX = 1_000

_HOSTILE: tuple[Any, ...] = (
    *(None, True, 0, -1, 2**31, 2**63 - 1, -(2**63), 0.5, 1e308, "", "\0", "é" * 300, "\U0010ffff"),
    *(
        "../../x",
        "%2e%2e",
        "data:,",
        "x" * 5_000,
        [],
        {},
        [[]],
        [{}],
        {"type": None},
        {"type": "x"},
    ),
    *([None] * 50, {"": {"": {"": {}}}}, {"type": "message", "content": 7}, "2026-01-01"),
)

_REQUEST: dict[str, Any] = {
    "model": "m",
    "input": [
        {"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "4"},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "so"}]},
        {
            "role": "user",
            "content": [{"type": "input_image", "image_url": "data:image/png;base64,"}],
        },
    ],
    "tools": [{"type": "function", "name": "f", "parameters": {"type": "object"}}],
    "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function"}]},
    "text": {"format": {"type": "json_schema", "name": "n", "schema": {}}},
    "metadata": {"a": "b"},
    "temperature": 0.5,
    "stream": True,
    "include": ["reasoning.encrypted_content"],
}
_DELTA = {"role": "assistant", "content": "a", "reasoning_content": "t", "refusal": None}
_CALL = {"index": 0, "id": "c", "function": {"name": "f", "arguments": '{"a"'}}
_CHUNKS: list[dict[str, Any]] = [
    {"object": "chat.completion.chunk", "choices": [{"index": 0, "delta": _DELTA}]},
    {"choices": [{"delta": {"tool_calls": [_CALL]}, "finish_reason": "tool_calls"}]},
    {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}},
    {"error": {"message": "no", "code": 500}},
]
_ITEM = {
    "type": "message",
    "id": "msg_1",
    "role": "assistant",
    "status": "in_progress",
    "content": [],
}
_AT = {"output_index": 0, "item_id": "msg_1", "content_index": 0, "sequence_number": 2}
_PART = {"type": "output_text", "text": "", "annotations": []}
_EVENTS: list[dict[str, Any]] = [
    {"type": "response.created", "response": {"id": "r", "status": "in_progress", "output": []}},
    {"type": "response.output_item.added", "output_index": 0, "item": _ITEM},
    {"type": "response.content_part.added", **_AT, "part": _PART},
    {"type": "response.output_text.delta", **_AT, "delta": "a", "logprobs": []},
    {"type": "response.output_item.done", "output_index": 0, "item": _ITEM},
    {"type": "response.completed", "response": {"status": "completed", "output": [_ITEM]}},
]

Target = Callable[[random.Random], None]


def mutated(rng: random.Random, data: bytes) -> bytes:
    """The bytes with a few of them changed, removed, doubled or put in."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(changed) + 1)
        match rng.randrange(5):
            case 0 if changed:
                changed[at % len(changed)] ^= 1 << rng.randrange(8)
            case 1:
                del changed[at:]
            case 2:
                changed[at:at] = rng.randbytes(rng.randint(1, 8))
            case 3:
                changed[at:at] = changed[at : at + rng.randint(1, 40)]
            case _:
                del changed[at : at + rng.randint(1, 8)]
    return bytes(changed)


def bent(rng: random.Random, value: Any) -> Any:
    """The value with one part of it, somewhere, replaced by what nobody expects there."""
    if rng.random() < 0.2 or not isinstance(value, dict | list) or not value:
        return rng.choice(_HOSTILE)
    if isinstance(value, list):
        at = rng.randrange(len(value))
        return [bent(rng, part) if place == at else part for place, part in enumerate(value)]
    name = rng.choice(sorted(value))
    if rng.random() < 0.1:
        return {key: part for key, part in value.items() if key != name}
    return value | {name: bent(rng, value[name])}


def _sent(rng: random.Random, sample: Any) -> Any:
    """What a client sends: the sample, bent as a value or mutated as text."""
    if rng.random() < 0.7:
        sample = bent(rng, sample)
    data = msgspec.json.encode(sample)
    return codec.parse(mutated(rng, data) if rng.random() < 0.3 else data)


def request(rng: random.Random) -> None:
    """A request, as far as what it makes of it is asked of an upstream."""
    asked = parse_create_response(_sent(rng, _REQUEST))
    response_body(asked, id="resp_1", created_at=1)
    items = sound_items(asked.input or [], _CLOCK)
    for make in (chat_request, responses_request):
        make(asked, [], items)


def other_bodies(rng: random.Random) -> None:
    """Bodies of every other route."""
    said = {"items": _REQUEST["input"], "metadata": {"a": "b"}}
    expiry = {"anchor": "created_at", "seconds": 3600}
    file = {"filename": "a", "bytes": 3, "mime_type": "text/plain", "purpose": "user_data"}
    parse, sample = rng.choice(
        [
            (conversations.parse_create_conversation, said),
            (conversations.parse_update_conversation, {"metadata": {"a": "b"}}),
            (conversations.parse_create_items, {"items": _REQUEST["input"]}),
            (files.parse_create_upload, file | {"expires_after": expiry}),
            (files.parse_complete_upload, {"part_ids": ["p"], "md5": "0" * 32}),
            (parse_compact, {"model": "m", "input": "hi", "instructions": "be brief"}),
        ]
    )
    parse(_sent(rng, sample))


def queries(rng: random.Random) -> None:
    """Queries of lists, and cursors."""
    text = mutated(rng, rng.choice([b"10", b"asc", b"resp_1"])).decode(errors="replace")
    lists.parse_list_query({rng.choice(["limit", "order", "after"]): text})
    cursor = cursors.pack(_QUESTION, Position((5,), "t\x1fjob_1"))
    cursors.unpack(_QUESTION, mutated(rng, cursor.encode()).decode(errors="surrogateescape"))


def key_texts(rng: random.Random) -> None:
    """Names that become keys."""
    text = mutated(rng, b"conv_12345").decode(errors="surrogateescape")
    joined = keys.join(("t", text, "x"))
    assert keys.split(joined) == ("t", text, "x"), f"{text!r} came back as {keys.split(joined)}"


def stored(rng: random.Random) -> None:
    """Rows of a store that do not say what was written."""
    layout = rng.choice(LAYOUTS)
    layout.decode(("t", "x"), mutated(rng, msgspec.json.encode(bent(rng, {"status": "queued"}))))
    value = JOBS.encode(Job("kind", "subject", 1, 2))
    found = mutated(rng, value)
    row = (1, record_sum(JOBS.name, "t\x1fx", 1, value, None), found, None)
    if found != value:
        read = checked_record(JOBS, ("t", "x"), "t\x1fx", row)
        raise AssertionError(f"{found!r} was taken for {read}")
    checked_tip(JOBS.name, ("t", "x"), "t\x1fx", (1, 1, rng.randrange(9), rng.getrandbits(63)))


def answers(rng: random.Random) -> None:
    """What an upstream says, event by event, in either API."""
    reader: ChatReader | ResponsesReader
    samples: list[dict[str, Any]]
    if rng.random() < 0.5:
        reader, samples = ChatReader(View(), _CLOCK), _CHUNKS
    else:
        reader, samples = ResponsesReader(View(), _CLOCK), _EVENTS
    for sample in samples:
        said = bent(rng, sample) if rng.random() < 0.4 else sample
        if isinstance(said, dict):
            reader.read(said)
    events, _ = reader.end()
    for event in events:
        msgspec.json.decode(msgspec.json.encode(event), type=Event)


def streams(rng: random.Random) -> None:
    """The bytes of an upstream's stream, in pieces as they come."""
    whole = b"".join(b"data: %b\n\n" % msgspec.json.encode(chunk) for chunk in _CHUNKS)
    data = mutated(rng, whole + b"data: [DONE]\n\n")

    async def read() -> None:
        async for _ in _payloads(httpx.Response(200, content=data), _LINE_BYTES_MAX):
            pass

    with suppress(ValueError):  # a line that is too long, which the caller says in our words
        asyncio.run(read())


TARGETS: dict[str, Target] = {
    target.__name__: target
    for target in (request, other_bodies, queries, key_texts, stored, answers, streams)
}


def fuzz(name: str, seed: str, case: int) -> str | None:
    """Put one case to a target; what it did that it must not, None if nothing."""
    try:
        TARGETS[name](random.Random(f"{seed}/{name}/{case}"))
    except PerdureError:
        return None
    except Exception as error:  # whatever else comes out is what is looked for
        return f"{name} case {case} of seed {seed}: {type(error).__name__}: {error}"
    return None


def main() -> None:
    """Fuzz every target for some seconds, and end with 1 where one broke."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=10, help="for each target")
    parser.add_argument("--seed", default="1")
    asked = parser.parse_args()
    broken = False
    for name in TARGETS:
        ends_s, case = time.monotonic() + asked.seconds, 0
        wrong: str | None = None
        while wrong is None and time.monotonic() < ends_s:
            case += 1
            wrong = fuzz(name, asked.seed, case)
        print(wrong or f"{name}: {case} cases, none broke it", flush=True)
        broken = broken or wrong is not None
    sys.exit(broken)


if __name__ == "__main__":
    main()
