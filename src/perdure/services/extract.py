"""`perdure-extract`, the built-in model of a server without an upstream: it quotes, never writes.

An answer is the passages of earlier turns closest to the question, ranked by the BM25 of SQLite's
FTS5, and of attached files, with name and place. The question itself is never quoted, nor are
answers that were quotes. The result is told as chat completion chunks, so that it takes the same
way to the client as any other model's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import apsw

from perdure.wire.errors import unsupported_value
from perdure.wire.items import Item, text_of
from perdure.wire.responses import CreateResponse

MODEL = "perdure-extract"

HEAD = (
    "perdure-extract does not generate text. The closest passages of earlier turns and files are:"
)

NOTHING = (
    "perdure-extract only quotes earlier turns and files, and found nothing to quote; for "
    "generated answers, start a model server and run: "
    "perdure serve --upstream http://127.0.0.1:11434/v1"
)

QUOTES_MAX = 3
PASSAGES_MAX = 2_000
PASSAGE_CHARS_MAX = 400
FILE_PASSAGES_MAX = 20_000
TERMS_MAX = 64

_CHARS_PER_TOKEN = 4
_FILE = re.compile(r"\[file: [^\n]+\]\n")
_PAGE = re.compile(r"\[(page \d+)\]")
_UNSPACED = re.compile("[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")
_SENTENCE_END = re.compile(r"(?<=[.!?。！？])\s*")
_STOP_WORDS = frozenset(
    [
        "a",
        "about",
        "an",
        "and",
        "are",
        "as",
        "at",
        "be",
        "been",
        "but",
        "by",
        "can",
        "could",
        "did",
        "do",
        "does",
        "for",
        "from",
        "had",
        "has",
        "have",
        "he",
        "her",
        "him",
        "his",
        "how",
        "i",
        "in",
        "is",
        "it",
        "its",
        "me",
        "my",
        "of",
        "on",
        "or",
        "our",
        "she",
        "should",
        "so",
        "tell",
        "that",
        "the",
        "their",
        "them",
        "there",
        "they",
        "this",
        "to",
        "was",
        "we",
        "were",
        "what",
        "when",
        "where",
        "which",
        "who",
        "whom",
        "whose",
        "why",
        "will",
        "with",
        "would",
        "you",
        "your",
    ]
)


def answer(
    request: CreateResponse, history: Sequence[Item], items: Sequence[Item]
) -> Iterator[dict[str, Any]]:
    """The chunks of an answer to `items`, this request's, quoting `history` and whatever in `items`
    came before the last answer or tool output. Deterministic.

    Raises `WireError` for a request that only a model which writes could fulfil.
    """
    format = (request.text or {}).get("format") or {"type": "text"}
    if format["type"] != "text":
        raise unsupported_value(f"structured output by {MODEL}", "text.format", "Omit it.")
    if request.tool_choice not in (None, "none", "auto"):
        raise unsupported_value(f"a forced tool call by {MODEL}", "tool_choice", "Omit it.")
    start = _current(items)
    current = [item for item in items[start:] if item.get("role") == "user"]
    question = "\n".join(text_of(_apart(item)[0]) for item in current)
    said = _passages([_apart(item)[0] for item in (*history, *items[:start])])
    files = [text for item in (*history, *items) for text in _apart(item)[1]]
    quotes = closest(question, [*said, *_file_passages(files)])
    read = sum(len(text_of(item)) for item in (*history, *items)) + len(request.instructions or "")
    return _chunks(_written(quotes), read, request.max_output_tokens)


def closest(question: str, passages: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """The passages (speaker, text) that share the question's words, the closest first."""
    terms = _terms(question)
    asked = _normal(question)
    passages = [passage for passage in passages if _normal(passage[1]) != asked]
    if not terms or not passages:
        return []
    connection = apsw.Connection(":memory:")
    try:
        connection.execute(
            "create virtual table passage "
            "using fts5(text, tokenize = 'porter unicode61 remove_diacritics 2')"
        )
        connection.executemany(
            "insert into passage (rowid, text) values (?, ?)",
            ((place, _spaced(text)) for place, (_, text) in enumerate(passages)),
        )
        found = connection.execute(
            "select rowid from passage where passage match ? "
            "order by bm25(passage), rowid desc limit ?",
            (" OR ".join(f'"{term}"' for term in terms), QUOTES_MAX),
        )
        return [passages[place] for (place,) in found]
    finally:
        connection.close()


def _current(items: Sequence[Item]) -> int:
    """Where the current turn starts: after the last thing that is not a message to the model."""
    for place in range(len(items), 0, -1):
        item = items[place - 1]
        if item["type"] != "message" or item["role"] == "assistant":
            return place
    return 0


def _passages(items: Sequence[Item]) -> list[tuple[str, str]]:
    """What can be quoted, oldest first, each text once: where it was said last."""
    said: dict[str, str] = {}
    for item in items:
        text = text_of(item)
        match item:
            case {"type": "message", "role": "user" | "assistant" as speaker}:
                if text.startswith((HEAD, NOTHING)):
                    continue
            case {"type": "function_call_output"}:
                speaker = "tool"
            case _:
                continue
        for passage in _split(text):
            said.pop(passage, None)
            said[passage] = speaker
    latest = list(said.items())[-PASSAGES_MAX:]
    return [(speaker, passage) for passage, speaker in latest]


def _apart(item: Item) -> tuple[Item, list[str]]:
    """An item without the files attached to it, and their texts."""
    parts = item.get("content")
    if not isinstance(parts, list):
        return item, []
    files = [part["text"] for part in parts if _FILE.match(part.get("text") or "")]
    left = [part for part in parts if not _FILE.match(part.get("text") or "")]
    return (item | {"content": left} if files else item), files


def _file_passages(files: Sequence[str]) -> list[tuple[str, str]]:
    """What can be quoted of files: blocks of lines, each with the file's name and its place."""
    found: dict[tuple[str, str], None] = {}
    for text in files:
        name, body = text.removeprefix("[file: ").split("]\n", 1)
        page: str | None = None
        block: list[str] = []
        first = 1
        for number, line in enumerate((*body.split("\n"), ""), 1):
            heading = _PAGE.fullmatch(line)
            if block and (heading or not line.strip() or _long(block)):
                place = page or f"line {first}"
                for passage in _split(" ".join(block)):
                    found[(f"{name}, {place}", passage)] = None
                block = []
            if heading:
                page = heading[1]
            elif line.strip():
                first = first if block else number
                block.append(line.strip())
    return list(found)[:FILE_PASSAGES_MAX]


def _long(block: list[str]) -> bool:
    return sum(map(len, block)) >= PASSAGE_CHARS_MAX // 2


def _split(text: str) -> Iterator[str]:
    """Paragraphs; long ones by sentences, and a sentence that is too long by length."""
    for paragraph in re.split(r"\n\s*\n", text):
        passage = ""
        pieces = [paragraph]
        if len(paragraph) > PASSAGE_CHARS_MAX:
            pieces = _SENTENCE_END.split(paragraph)
        for piece in pieces:
            if passage and len(passage) + len(piece) >= PASSAGE_CHARS_MAX:
                yield passage
                passage = ""
            passage = f"{passage} {piece}".strip()
            while len(passage) > PASSAGE_CHARS_MAX:
                yield passage[:PASSAGE_CHARS_MAX]
                passage = passage[PASSAGE_CHARS_MAX:].strip()
        if passage:
            yield passage


def _terms(question: str) -> list[str]:
    """The question's words, each once; its stop words only where it has no others. Words hold no
    quotes, so that inside quotes none is FTS5 syntax."""
    words = list(dict.fromkeys(re.findall(r"\w+", _spaced(question).casefold())))
    telling = [word for word in words if word not in _STOP_WORDS]
    return (telling or words)[:TERMS_MAX]


def _normal(text: str) -> str:
    return " ".join(text.casefold().split())


def _spaced(text: str) -> str:
    """Scripts that put no space between words are searched by character."""
    return _UNSPACED.sub(r" \g<0> ", text)


def _written(quotes: list[tuple[str, str]]) -> str:
    if not quotes:
        return NOTHING
    quoted = (f"> {speaker}: " + passage.replace("\n", "\n> ") for speaker, passage in quotes)
    return "\n\n".join((HEAD, *quoted))


def _chunks(text: str, chars_read: int, max_output_tokens: int | None) -> Iterator[dict[str, Any]]:
    """Word by word. Tokens are estimated, at four characters each."""
    written = 0
    finish = "stop"
    for word in re.findall(r"\S+\s*", text):
        tokens = _tokens(len(word))
        if max_output_tokens is not None and written + tokens > max_output_tokens:
            finish = "length"
            break
        written += tokens
        yield {"choices": [{"index": 0, "delta": {"content": word}}]}
    yield {
        "choices": [{"index": 0, "delta": {}, "finish_reason": finish}],
        "usage": {"prompt_tokens": _tokens(chars_read), "completion_tokens": written},
    }


def _tokens(chars: int) -> int:
    return -(-chars // _CHARS_PER_TOKEN)
