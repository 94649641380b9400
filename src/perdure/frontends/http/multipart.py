"""Multipart forms, read as they arrive: short fields, and one file whose bytes are handed on.

Nothing of the file is held here but the chunk being filled, so a form may be as large as its file.
Fields may stand before the file or after it; they are complete when the file has been read.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Collection

from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header

from perdure.frontends.http.call import BodyTooLarge, Call
from perdure.wire.errors import WireError, missing

CHUNK_BYTES = 1024 * 1024
"""Bytes of the file are handed on in pieces of at least this, but for the last: each one changes
threads, which costs more than the copying of a smaller one."""

FIELD_BYTES_MAX = 4_096
OVERHEAD_BYTES_MAX = 64 * 1024
"""How much larger than its file a form may be."""


class Form:
    """A form with one file in the field `file`, and other fields from `names`.

    Everything raises `WireError` for a form that is none or has other fields, `BodyTooLarge` past
    `file_bytes_max`, and `Disconnected`.
    """

    def __init__(
        self, call: Call, file: str, names: Collection[str], *, file_bytes_max: int
    ) -> None:
        self.fields: dict[str, str] = {}
        self.filename: str | None = None
        self._file = file
        self._names = names
        self._bytes_max = file_bytes_max
        self._body = call.stream(file_bytes_max + OVERHEAD_BYTES_MAX)
        self._parser = MultipartParser(
            _boundary(call),
            {
                "on_part_begin": self._begin_part,
                "on_header_field": self._add_name,
                "on_header_value": self._add_value,
                "on_header_end": self._end_header,
                "on_headers_finished": self._begin_content,
                "on_part_data": self._add_content,
                "on_part_end": self._end_part,
                "on_end": self._end,
            },
        )
        self._headers: dict[bytes, bytes] = {}
        self._header = (b"", b"")
        self._name: str | None = None
        self._field = b""
        self._chunk: list[memoryview] = []
        self._chunk_bytes = 0
        self._file_bytes = 0
        self._ended = False

    async def begin(self) -> None:
        """Read as far as the file's first byte. Raises `WireError` where there is no file."""
        while self.filename is None:
            if not await self._read():
                raise missing(self._file)

    async def file(self) -> AsyncGenerator[bytes, None]:
        """The bytes of the file; the fields are complete at its end."""
        more = True
        while more:
            more = await self._read()
            if self._chunk_bytes >= CHUNK_BYTES or (not more and self._chunk_bytes):
                yield b"".join(self._chunk)
                self._chunk, self._chunk_bytes = [], 0

    async def _read(self) -> bool:
        """Take in what arrives next; whether there was something."""
        data = await anext(self._body, b"")
        try:
            if data and not self._ended:
                self._parser.write(data)
        except MultipartParseError as error:
            raise WireError(f"The form cannot be read: {error}.", code="invalid_form") from None
        if not data and not self._ended:
            raise WireError("The form ends in the middle.", code="invalid_form")
        return bool(data)

    def _begin_part(self) -> None:
        self._headers = {}
        self._name, self._field = None, b""

    def _add_name(self, data: bytes, start: int, end: int) -> None:
        self._header = (self._header[0] + data[start:end], self._header[1])

    def _add_value(self, data: bytes, start: int, end: int) -> None:
        self._header = (self._header[0], self._header[1] + data[start:end])

    def _end_header(self) -> None:
        name, value = self._header
        self._headers[name.lower()] = value
        self._header = (b"", b"")

    def _begin_content(self) -> None:
        kind, options = parse_options_header(self._headers.get(b"content-disposition"))
        if kind != b"form-data" or b"name" not in options:
            raise WireError("A part of the form has no name.", code="invalid_form")
        name = _text(options[b"name"], "a field's name")
        filename = options.get(b"filename")
        if name == self._file:
            if self.filename is not None:
                raise WireError(f"'{name}' is given more than once.", param=name)
            if filename is None:
                raise WireError(f"Invalid '{name}': expected a file, with a filename.", param=name)
            self.filename = _text(filename, "the filename")
            return
        if name not in self._names:
            raise WireError(
                f"Unknown parameter: '{name[:64]}'.", param=name[:64], code="unknown_parameter"
            )
        if name in self.fields:
            raise WireError(f"'{name}' is given more than once.", param=name)
        if filename is not None:
            raise WireError(f"Invalid '{name}': expected a text, not a file.", param=name)
        self._name = name

    def _add_content(self, data: bytes, start: int, end: int) -> None:
        part = memoryview(data)[start:end]
        if self._name is None:
            self._file_bytes += len(part)
            if self._file_bytes > self._bytes_max:
                raise BodyTooLarge(
                    f"'{self._file}' is over the limit of {self._bytes_max} bytes. "
                    "Send less at once: /v1/uploads takes large files in parts."
                )
            self._chunk.append(part)
            self._chunk_bytes += len(part)
            return
        self._field += part
        if len(self._field) > FIELD_BYTES_MAX:
            raise WireError(
                f"Invalid '{self._name}': expected at most {FIELD_BYTES_MAX} bytes.",
                param=self._name,
                code="string_above_max_length",
            )

    def _end_part(self) -> None:
        if self._name is not None:
            self.fields[self._name] = _text(self._field, f"'{self._name}'")

    def _end(self) -> None:
        self._ended = True


def _boundary(call: Call) -> bytes:
    kind, options = parse_options_header(call.headers.get(b"content-type", b""))
    boundary = options.get(b"boundary", b"")
    if kind != b"multipart/form-data" or not 0 < len(boundary) <= 200:
        raise WireError(
            "The request is not a form: send it as multipart/form-data, with a boundary.",
            code="invalid_content_type",
        )
    return boundary


def _text(data: bytes, what: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise WireError(f"The form cannot be read: {what} is not UTF-8.") from None
