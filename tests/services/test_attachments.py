"""Files in a request: what a model is given of them, and which are refused by name."""

from __future__ import annotations

import asyncio
import base64
import sys
from collections.abc import AsyncGenerator
from io import BytesIO
from typing import Any

import msgspec
import pytest
from pypdf import PdfWriter
from pypdf.generic import DecodedStreamObject, DictionaryObject, NameObject

from perdure.proving.upstream import ScriptedUpstream
from perdure.services import attachments, parsing
from perdure.services.lifecycle import Node
from perdure.services.parsing import TEXT_CHARS_MAX, Section
from perdure.wire.errors import WireError
from perdure.wire.files import CreateFile
from tests.services.conftest import Driver, Open, someone

PNG = b"\x89PNG\r\n\x1a\n" + bytes(20)
PAGE = b"""<html><head><title>no</title><script>var no = 1;</script></head>
<body><h1>Storage &amp; you</h1><p>Sync   the folder.</p><style>no</style><div>Twice</div></body>"""


def a_pdf(*pages: str) -> bytes:
    """A document with a line of text on each page."""
    writer = PdfWriter()
    font = DictionaryObject(
        {
            NameObject("/Type"): NameObject("/Font"),
            NameObject("/Subtype"): NameObject("/Type1"),
            NameObject("/BaseFont"): NameObject("/Helvetica"),
        }
    )
    for text in pages:
        page = writer.add_blank_page(300, 300)
        page[NameObject("/Resources")] = DictionaryObject(
            {NameObject("/Font"): DictionaryObject({NameObject("/F1"): font})}
        )
        stream = DecodedStreamObject()
        stream.set_data(f"BT /F1 12 Tf 20 200 Td ({text}) Tj ET".encode())
        page[NameObject("/Contents")] = writer._add_object(stream)
    made = BytesIO()
    writer.write(made)
    return made.getvalue()


async def keep(node: Node, filename: str, data: bytes) -> str:
    async def chunks() -> AsyncGenerator[bytes, None]:
        yield data

    body = await node.files.create(
        "default",
        chunks(),
        lambda: CreateFile(filename, "user_data"),
        lambda sent: someone(digest=""),
    )
    return msgspec.json.decode(body)["id"]


def said(*parts: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*parts, {"type": "input_text", "text": "echo done"}]}]


def sent_data(filename: str, data: bytes, media: str = "") -> dict[str, Any]:
    head = f"data:{media};base64," if media else ""
    file_data = head + base64.b64encode(data).decode()
    return {"type": "input_file", "filename": filename, "file_data": file_data}


async def given(upstream: ScriptedUpstream, message: int = -1) -> list[dict[str, Any]]:
    """The parts of a message the upstream was sent last."""
    return (await upstream.received())[-1]["messages"][message]["content"]


# proves R12
@pytest.mark.parametrize(
    ("filename", "data", "text"),
    [
        ("notes.txt", "grün".encode(), "[file: notes.txt]\ngrün"),
        ("notes.markdown", b"\xef\xbb\xbf# Head", "[file: notes.markdown]\n# Head"),
        ("wide.txt", "weit".encode("utf-16"), "[file: wide.txt]\nweit"),
        ("a.json", b'{"a": 1}', '[file: a.json]\n{"a": 1}'),
        ("a.CSV", b"a,b\n1,2", "[file: a.CSV]\na,b\n1,2"),
        ("a.html", PAGE, "[file: a.html]\nStorage & you\nSync the folder.\nTwice"),
        ("a.pdf", a_pdf("One", "Two"), "[file: a.pdf]\n[page 1]\nOne\n[page 2]\nTwo"),
        ("misnamed.bin", a_pdf("One"), "[file: misnamed.bin]\n[page 1]\nOne"),
    ],
)
async def test_a_file_becomes_text(
    driver: Driver, upstream: ScriptedUpstream, filename: str, data: bytes, text: str
) -> None:
    file_id = await keep(driver.node, filename, data)
    for part in ({"type": "input_file", "file_id": file_id}, sent_data(filename, data)):
        answer = await driver.answer("", input=said(part))
        assert answer["status"] == "completed"
        assert (await given(upstream))[0] == {"type": "text", "text": text}


async def test_a_data_url_says_what_it_is(driver: Driver, upstream: ScriptedUpstream) -> None:
    await driver.answer("", input=said(sent_data("page", PAGE, "text/html")))
    assert (await given(upstream))[0]["text"].startswith("[file: page]\nStorage & you")


# proves R12
async def test_a_stored_image_is_inlined(driver: Driver, upstream: ScriptedUpstream) -> None:
    file_id = await keep(driver.node, "a.png", PNG)
    await driver.answer("", input=said({"type": "input_image", "file_id": file_id}))
    url = f"data:image/png;base64,{base64.b64encode(PNG).decode()}"
    assert (await given(upstream))[0]["image_url"]["url"] == url


# proves R12, R1
@pytest.mark.parametrize(
    ("part", "param", "says"),
    [
        (sent_data("a.docx", b"PK"), "input[0].content[0]", "a.docx"),
        (sent_data("a.txt", b"\xff\xfftext\x80"), "input[0].content[0]", "UTF-8"),
        (sent_data("a.pdf", b"%PDF-1.4 not really"), "input[0].content[0]", "a.pdf"),
        (
            {"type": "input_file", "file_data": "&&&", "filename": "a.txt"},
            "input[0].content[0].file_data",
            "base64",
        ),
        (
            {"type": "input_file", "file_url": "https://a.example/a.pdf"},
            "input[0].content[0].file_url",
            "URL",
        ),
        (
            {"type": "input_file", "file_id": "file-none"},
            "input[0].content[0].file_id",
            "file-none",
        ),
        (
            {"type": "input_image", "file_id": "file-none"},
            "input[0].content[0].file_id",
            "file-none",
        ),
    ],
)
async def test_a_file_that_cannot_be_read_is_refused_by_name(
    driver: Driver, part: dict[str, Any], param: str, says: str
) -> None:
    with pytest.raises(WireError, match=says) as refused:
        await driver.ask("", input=said(part))
    assert refused.value.param == param
    assert driver.node.gateway.stats.running == 0


async def test_too_much_text_is_refused(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attachments, "TEXT_CHARS_MAX", 40)
    await driver.answer("", input=said(sent_data("a.txt", b"x" * 20)))
    with pytest.raises(WireError, match="over 40 characters"):
        await driver.ask("", input=said(*[sent_data("a.txt", b"x" * 20)] * 2))


# proves R12
async def test_what_a_request_gives_of_files_is_bounded_as_it_is_read(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file is named as often as a request likes, and a request has a past."""
    read = []
    stored = attachments.Attachments._stored

    async def counted(self: Any, *arguments: Any) -> tuple[str, bytes]:
        read.append(arguments)
        return await stored(self, *arguments)

    monkeypatch.setattr(attachments.Attachments, "_stored", counted)
    monkeypatch.setattr(attachments, "TEXT_CHARS_MAX", 100)
    monkeypatch.setattr(attachments, "IMAGES_CHARS_MAX", 150)
    text = {"type": "input_file", "file_id": await keep(driver.node, "a.txt", b"x" * 40)}
    image = {"type": "input_image", "file_id": await keep(driver.node, "a.png", PNG)}
    for part in (text, image):
        first = await driver.answer("", input=said(part))
        read.clear()
        with pytest.raises(WireError, match="Attach fewer"):
            await driver.ask("", input=said(*[part] * 50))
        assert len(read) < 10
        with pytest.raises(WireError, match="Attach fewer"):
            await driver.ask("", input=said(*[part] * 2), previous_response_id=first["id"])


# proves R12
async def test_files_are_parsed_a_few_at_once(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once = [0]
    parsed = attachments._parsed

    async def counted(*arguments: Any) -> Any:
        at_once.append(at_once[-1] + 1)
        try:
            return await parsed(*arguments)
        finally:
            at_once.append(at_once[-1] - 1)

    monkeypatch.setattr(attachments, "_parsed", counted)
    pages = [sent_data(f"{name}.html", PAGE, "text/html") for name in range(8)]
    await asyncio.gather(*(driver.answer("", input=said(page)) for page in pages))
    assert max(at_once) == attachments.PARSED_AT_ONCE_MAX


async def test_a_document_that_is_too_long_is_not_read_to_its_end() -> None:
    pages = iter([Section("", "x" * TEXT_CHARS_MAX), Section("", "xyz"), Section("", "")])
    assert [len(section.text) for section in parsing._enough(pages)] == [TEXT_CHARS_MAX, 1]
    assert next(pages, None) is not None


# proves R12
async def test_reading_a_file_is_bounded_in_time(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attachments, "_PARSE_S_MAX", 0.01)
    with pytest.raises(WireError, match="took over"):
        await driver.ask("", input=said(sent_data("a.pdf", a_pdf("One"))))


# proves R10
async def test_a_chain_outlives_the_files_in_it(driver: Driver, upstream: ScriptedUpstream) -> None:
    file_id = await keep(driver.node, "notes.txt", b"words")
    first = await driver.answer("", input=said({"type": "input_file", "file_id": file_id}))
    await driver.answer("echo again", previous_response_id=first["id"])
    told = (await given(upstream, 0))[0]["text"]
    assert told == "[file: notes.txt]\nwords"
    await driver.node.files.delete("default", file_id)
    second = await driver.answer("echo again", previous_response_id=first["id"])
    assert second["status"] == "completed"
    told = (await given(upstream, 0))[0]["text"]
    assert "is gone" in told
    stored = [item async for item in driver.node.state.items.all(("default", first["id"]), "input")]
    assert file_id.encode() in (stored[0].attachment or b"")


# proves R10
async def test_the_built_in_model_quotes_files_with_name_and_place(opened: Open) -> None:
    node = (await opened({"upstream.url": None})).node
    notes = b"# Storage\n\nThe index is rebuilt.\n\nA folder is synced after a rename.\n"
    files = [
        {"type": "input_file", "file_id": await keep(node, "notes.markdown", notes)},
        sent_data("book.pdf", a_pdf("Intro", "A rename is not durable")),
    ]
    question = {"type": "input_text", "text": "When is a rename durable?"}
    driver = Driver(node)
    body = [{"role": "user", "content": [*files, question]}]
    answer = await driver.answer("", model="perdure-extract", input=body)
    text = answer["output"][0]["content"][0]["text"]
    assert "> notes.markdown, line 5: A folder is synced after a rename." in text
    assert "> book.pdf, page 2: A rename is not durable" in text
    assert "index" not in text
    assert "When is" not in text


async def test_the_parser_is_a_program_of_its_own() -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "perdure.services.parsing", "html"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    told, _ = await process.communicate(PAGE)
    assert msgspec.json.decode(told) == [
        {"label": "", "text": "Storage & you\nSync the folder.\nTwice"}
    ]
