"""Attachments: files and images of a request, in the form in which a model can read them.

What is stored of a turn names its files; only what a model is given holds their text. A file that
is sent now and cannot be read is refused by name. One of an earlier turn that is gone by now is
told to be gone, so that deleting a file does not end the conversations it was in.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import re
import sys
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from copy import copy
from pathlib import PurePosixPath
from typing import Any

import msgspec

from perdure.core.errors import Damaged, Missing
from perdure.core.offload import off_loop
from perdure.services.files import Files
from perdure.services.parsing import CPU_S_MAX, PARSERS, TEXT_CHARS_MAX, Section
from perdure.surfaces.files import Held
from perdure.wire.errors import WireError, unsupported_value
from perdure.wire.items import Item

FILE_BYTES_MAX = 32 * 1024 * 1024
IMAGE_BYTES_MAX = 20 * 1024 * 1024
IMAGES_CHARS_MAX = 64 * 1024 * 1024
"""Of the data URLs of all stored images of one request together, earlier turns included."""
PARSED_AT_ONCE_MAX = 4
"""Each is a process, which may have `parsing.MEMORY_BYTES_MAX`."""

_PARSE_S_MAX = CPU_S_MAX + 10
_CACHED_CHARS_MAX = 8_000_000

_KINDS = {
    ".txt": "text",
    ".text": "text",
    ".log": "text",
    ".md": "text",
    ".markdown": "text",
    ".json": "text",
    ".jsonl": "text",
    ".csv": "text",
    ".tsv": "text",
    ".html": "html",
    ".htm": "html",
    ".pdf": "pdf",
}
_MEDIA = {
    "text/plain": "text",
    "text/markdown": "text",
    "application/json": "text",
    "text/csv": "text",
    "text/html": "html",
    "application/pdf": "pdf",
}
_IMAGES = ((b"\x89PNG", "png"), (b"\xff\xd8\xff", "jpeg"), (b"GIF8", "gif"), (b"RIFF", "webp"))
_DATA_URL = re.compile(r"data:([\w.+-]+/[\w.+-]+)?(?:;[\w=.-]+)*;base64,")


class _Sent(msgspec.Struct, frozen=True):
    """A file as it came: its name for people, its bytes, and what it is said to be."""

    name: str
    data: bytes
    media: str | None = None


class _Room:
    """How much of files one request may still give the model. It is taken part by part: a file that
    is named a thousand times is read until there is no more room, and not a thousand times."""

    def __init__(self) -> None:
        self._text_chars = TEXT_CHARS_MAX
        self._image_chars = IMAGES_CHARS_MAX

    def take(self, part: Item, at: str) -> None:
        """Raises `WireError` where there is not enough of it."""
        self._text_chars -= len(part.get("text", ""))
        self._image_chars -= len(part.get("image_url", ""))
        if self._text_chars < 0:
            raise WireError(
                f"The text of the files is over {TEXT_CHARS_MAX} characters. "
                "Attach fewer or smaller ones.",
                param=at,
                code="string_above_max_length",
            )
        if self._image_chars < 0:
            raise WireError(
                f"The stored images are over {IMAGES_CHARS_MAX} characters as data URLs. "
                "Attach fewer or smaller ones.",
                param=at,
                code="string_above_max_length",
            )


class Attachments:
    """Reads the files that requests of one state name or bring along."""

    def __init__(self, files: Files) -> None:
        self._files = files
        self._kept: Mapping[str, Held] = {}
        self._room = _Room()
        self._texts: OrderedDict[bytes, str] = OrderedDict()
        self._parsing = asyncio.Semaphore(PARSED_AT_ONCE_MAX)

    def for_request(self, kept: Mapping[str, Held]) -> Attachments:
        """The same for one request, with room of its own, which also reads the files that are
        `kept` for it and may be deleted by now."""
        made = copy(self)
        made._kept = kept
        made._room = _Room()
        return made

    async def readable(
        self, tenant: str, items: Sequence[Item], *, at: str | None = None
    ) -> list[Item]:
        """The items, every file in them as text and every stored image as a data URL. `at` is
        where they stand in the request, None for those of earlier turns. Raises `WireError`."""
        made: list[Item] = []
        for place, item in enumerate(items):
            for field in ("content", "output"):
                parts = item.get(field)
                if not isinstance(parts, list) or not any(map(_attached, parts)):
                    continue
                where = None if at is None else f"{at}[{place}].{field}"
                read = []
                for number, part in enumerate(parts):
                    new = await self._part(tenant, part, where and f"{where}[{number}]")
                    if new is not part:
                        self._room.take(new, where or "input")
                    read.append(new)
                item = item | {field: read}
            made.append(item)
        return made

    async def _part(self, tenant: str, part: Any, at: str | None) -> Any:
        if not _attached(part):
            return part
        try:
            if part["type"] == "input_image":
                return await self._image(tenant, part, at or "input")
            return {"type": "input_text", "text": await self._text(tenant, part, at or "input")}
        except (WireError, Damaged) as error:
            if at is not None:
                raise
            return {"type": "input_text", "text": f"[A file of an earlier turn is gone: {error}]"}

    async def _text(self, tenant: str, part: Item, at: str) -> str:
        """The file's name and, section by section, its text."""
        sent = await self._sent(tenant, part, at)
        kind = _kind(sent)
        if kind is None:
            raise unsupported_value(
                f"the file type of '{sent.name}' ({sent.media or PurePosixPath(sent.name).suffix})",
                at,
                "Send text, Markdown, JSON, CSV, HTML or PDF.",
            )
        key = await off_loop(_key, kind, sent)
        if key in self._texts:
            self._texts.move_to_end(key)
            return self._texts[key]
        if kind in PARSERS:
            async with self._parsing:
                sections = await _parsed(kind, sent, at)
        else:
            sections = [Section("", _decoded(sent, at))]
        told = [f"[file: {' '.join(sent.name.split())}]"]
        for section in sections:
            told += [f"[{section.label}]", section.text] if section.label else [section.text]
        text = "\n".join(told).encode(errors="replace").decode()
        self._texts[key] = text
        while sum(map(len, self._texts.values())) > _CACHED_CHARS_MAX:
            self._texts.popitem(last=False)
        return text

    async def _sent(self, tenant: str, part: Item, at: str) -> _Sent:
        if part.get("file_url") is not None:
            raise unsupported_value("a file by its URL", f"{at}.file_url", "Send 'file_data'.")
        if part.get("file_id") is not None:
            where = f"{at}.file_id"
            return _Sent(*await self._stored(tenant, part["file_id"], where, FILE_BYTES_MAX))
        text = part["file_data"]
        found = _DATA_URL.match(text)
        try:
            data = await off_loop(
                base64.b64decode, text[found.end() :] if found else text, validate=True
            )
        except (binascii.Error, ValueError):
            raise WireError(
                f"Invalid '{at}.file_data': expected base64, or a data URL with base64.",
                param=f"{at}.file_data",
            ) from None
        name = part.get("filename")
        named = name if isinstance(name, str) and name else "file"
        return _Sent(named, data, found[1] if found else None)

    async def _image(self, tenant: str, part: Item, at: str) -> Item:
        name, data = await self._stored(tenant, part["file_id"], f"{at}.file_id", IMAGE_BYTES_MAX)
        for magic, format in _IMAGES:
            if data.startswith(magic):
                url = f"data:image/{format};base64,{base64.b64encode(data).decode()}"
                return {key: it for key, it in part.items() if key != "file_id"} | {
                    "image_url": url
                }
        raise unsupported_value(
            f"the image type of '{name}'", f"{at}.file_id", "Send PNG, JPEG, GIF or WebP."
        )

    async def _stored(
        self, tenant: str, file_id: str, at: str, bytes_max: int
    ) -> tuple[str, bytes]:
        """Name and bytes of a stored file."""
        try:
            held = self._kept.get(file_id) or await self._files.get(tenant, file_id)
            if held.value.size_bytes > bytes_max:
                raise WireError(
                    f"File '{file_id}' has {held.value.size_bytes} bytes; a model is given at most "
                    f"{bytes_max} of one file.",
                    param=at,
                    code="file_too_large",
                )
            data = b"".join([chunk async for chunk in self._files.content(held)])
        except Missing as gone:
            raise WireError(str(gone), param=at, code="file_not_found") from None
        return held.value.filename, data


def named_files(items: Sequence[Item]) -> list[str]:
    """The ids of the files that items name, each once."""
    return list(
        dict.fromkeys(
            part["file_id"]
            for item in items
            for field in ("content", "output")
            if isinstance(parts := item.get(field), list)
            for part in parts
            if _attached(part) and part.get("file_id")
        )
    )


def _attached(part: Any) -> bool:
    kind = part.get("type") if isinstance(part, dict) else None
    return kind == "input_file" or (kind == "input_image" and bool(part.get("file_id")))


def _key(kind: str, sent: _Sent) -> bytes:
    """What one text is made of."""
    return hashlib.sha256(f"{kind} {sent.name}\0".encode(errors="replace") + sent.data).digest()


def _kind(sent: _Sent) -> str | None:
    """What the bytes say, else what the sender says, else what the name says."""
    if sent.data.startswith(b"%PDF-"):
        return "pdf"
    if sent.media in _MEDIA:
        return _MEDIA[sent.media]
    return _KINDS.get(PurePosixPath(sent.name.lower()).suffix)


def _decoded(sent: _Sent, at: str) -> str:
    try:
        utf16 = sent.data.startswith((b"\xff\xfe", b"\xfe\xff"))
        return sent.data.decode("utf-16" if utf16 else "utf-8-sig")
    except UnicodeDecodeError:
        raise _unreadable(sent, at, "its text is not UTF-8") from None


async def _parsed(kind: str, sent: _Sent, at: str) -> list[Section]:
    """What the parsing process makes of a file, within its time."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "perdure.services.parsing", kind),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        async with asyncio.timeout(_PARSE_S_MAX):
            told, _ = await process.communicate(sent.data)
    except TimeoutError:
        raise _unreadable(sent, at, f"reading it took over {_PARSE_S_MAX} s") from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode != 0:
        raise _unreadable(sent, at, f"it cannot be read as {kind.upper()}")
    return msgspec.json.decode(told, type=list[Section])


def _unreadable(sent: _Sent, at: str, why: str) -> WireError:
    return WireError(
        f"No text could be taken out of the file '{sent.name}': {why}.",
        param=at,
        code="invalid_file",
    )
