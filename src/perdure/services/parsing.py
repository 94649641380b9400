"""Takes the text out of PDF and HTML, in a process of its own (`python -m`).

Such files come from strangers, and what parses them can be made to run or to grow for ever. A
process can be limited and killed; a thread cannot. The file is standard input, its kind the one
argument, and standard output the sections as JSON: a label and a text each.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from io import BytesIO

import msgspec

TEXT_CHARS_MAX = 1_000_000
"""Of all files of one request together, earlier turns included. One that has more is not read to
its end, because nothing can be done with it."""
MEMORY_BYTES_MAX = 1024 * 1024 * 1024
CPU_S_MAX = 20

_SILENT = frozenset({"script", "style", "template", "noscript", "head"})
_BREAKS = frozenset(
    {
        "p",
        "div",
        "br",
        "li",
        "tr",
        "h1",
        "h2",
        "h3",
        "h4",
        "h5",
        "h6",
        "section",
        "article",
        "table",
    }
)


class Section(msgspec.Struct, frozen=True):
    """A stretch of a file's text; `label` says where it is, empty where lines say it."""

    label: str
    text: str


class _Page(HTMLParser):
    """The words of a page that a reader would see."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._silent = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._silent += tag in _SILENT
        if tag in _BREAKS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        if tag in _SILENT and self._silent:
            self._silent -= 1
        if tag in _BREAKS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self._silent:
            self.parts.append(data)


def html(data: bytes) -> Iterator[Section]:
    """The visible text of a page, a line for each block of it."""
    page = _Page()
    page.feed(data.decode())
    page.close()
    lines = (" ".join(line.split()) for line in "".join(page.parts).split("\n"))
    yield Section("", "\n".join(line for line in lines if line))


def pdf(data: bytes) -> Iterator[Section]:
    """The text of every page."""
    from pypdf import PdfReader  # needed here only, and slow to import

    for number, page in enumerate(PdfReader(BytesIO(data)).pages, 1):
        yield Section(f"page {number}", page.extract_text())


PARSERS: dict[str, Callable[[bytes], Iterator[Section]]] = {"html": html, "pdf": pdf}


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES_MAX, MEMORY_BYTES_MAX))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_S_MAX, CPU_S_MAX))
    data = sys.stdin.buffer.read()
    sections = list(_enough(PARSERS[sys.argv[1]](data)))
    sys.stdout.buffer.write(msgspec.json.encode(sections))


def _enough(sections: Iterator[Section]) -> Iterator[Section]:
    """The sections up to the one that is more than a request can have, and as much of that as shows
    it."""
    left = TEXT_CHARS_MAX
    while left >= 0 and (section := next(sections, None)) is not None:
        yield Section(section.label, section.text[: left + 1])
        left -= len(section.text)


if __name__ == "__main__":
    main()
