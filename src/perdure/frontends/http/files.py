"""Routes of the Files API."""

from __future__ import annotations

import hashlib
import re
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from urllib.parse import quote

from perdure.frontends.http.call import OCTETS, Answer, Call, Download
from perdure.frontends.http.errors import NoSuchRange
from perdure.frontends.http.multipart import Form
from perdure.frontends.http.queries import FilesQuery, query_of
from perdure.frontends.http.routes import Route
from perdure.frontends.http.schemas import CreateFileBody
from perdure.frontends.http.service import Service, shown
from perdure.wire.files import (
    FIELDS,
    CreateFile,
    FileDeleted,
    FileList,
    FileObject,
    check_filename,
    check_purpose,
    parse_create_file,
)

_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")


async def create(service: Service, call: Call) -> Answer:
    form = Form(call, "file", FIELDS, file_bytes_max=service.limits.file_bytes_max)
    await form.begin()
    check_filename(form.filename or "", "file")
    if "purpose" in form.fields:  # most clients say it first, so a wrong one need not wait
        check_purpose(form.fields["purpose"])

    async def chunks() -> AsyncGenerator[bytes, None]:
        async with aclosing(form.file()) as file:
            async for chunk in file:
                yield chunk
        described()

    def described() -> CreateFile:
        return parse_create_file(form.fields, form.filename)

    return Answer(
        await service.node.files.create(
            call.tenant, chunks(), described, lambda sent: service.caller(call, sent)
        )
    )


async def list_files(service: Service, call: Call) -> Answer:
    query = query_of(call, FilesQuery)
    if query.purpose is not None:
        check_purpose(query.purpose)
    return shown(
        await service.node.files.list(
            call.tenant,
            purpose=query.purpose,
            order=query.order,
            limit=query.limit,
            after=query.after,
        )
    )


async def retrieve(service: Service, call: Call) -> Answer:
    return shown(await service.node.files.describe(call.tenant, call.param("file_id")))


async def content(service: Service, call: Call) -> Answer | Download:
    """Damage in the first block is an answer; behind it, it ends the connection short of the
    length that was announced. What a client has already is not sent again (RFC 9110, 13.2.2)."""
    files = service.node.files
    held = await files.get(call.tenant, call.param("file_id"))
    file = held.value
    tag = _tag([piece.digest for piece in file.pieces])
    if _has(call.headers.get(b"if-none-match"), tag):
        return Answer(b"", 304, ((b"etag", tag),), OCTETS)
    part = None
    if call.headers.get(b"if-range", tag) == tag:
        part = _part(call.headers.get(b"range", b""), file.size_bytes)
    start, size_bytes = part or (0, file.size_bytes)
    await files.check(held)
    parts = files.content(held, start=start, size_bytes=size_bytes)
    first = await anext(parts, b"")
    headers = [
        (b"accept-ranges", b"bytes"),
        (b"etag", tag),
        (b"content-disposition", b"attachment; filename*=UTF-8''" + _quoted(file.filename)),
        (b"x-content-type-options", b"nosniff"),
    ]
    if part is not None:
        last = start + size_bytes - 1
        headers.append((b"content-range", b"bytes %d-%d/%d" % (start, last, file.size_bytes)))
    status = 200 if part is None else 206
    return Download(_after(first, parts), size_bytes, status, tuple(headers))


async def delete(service: Service, call: Call) -> Answer:
    file_id = call.param("file_id")
    await service.node.files.delete(call.tenant, file_id)
    return shown(FileDeleted(id=file_id))


def _part(asked: bytes, size_bytes: int) -> tuple[int, int] | None:
    """Start and length of the part asked for; None for what names no single one, which gets all of
    them (RFC 9110, 14.2). Raises `NoSuchRange`."""
    found = _RANGE.fullmatch(asked.decode("latin-1"))
    first, last = found.groups() if found else ("", "")
    if not (first or last) or (first and last and int(last) < int(first)):
        return None
    start = int(first) if first else max(0, size_bytes - int(last))
    end = int(last) if first and last else size_bytes - 1
    length = min(end, size_bytes - 1) - start + 1
    if length <= 0:
        raise NoSuchRange(size_bytes)
    return start, length


async def _after(first: bytes, rest: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
    if first:
        yield first
    async for part in rest:
        yield part


def _has(sent: bytes | None, tag: bytes) -> bool:
    """Whether a client names these bytes among those it has."""
    tags = [one.strip().removeprefix(b"W/") for one in (sent or b"").split(b",")]
    return tag in tags or tags == [b"*"]


def _tag(digests: list[str]) -> bytes:
    """Names the bytes: equal for equal pieces, whatever file they are in."""
    return f'"{hashlib.sha256("".join(digests).encode()).hexdigest()}"'.encode()


def _quoted(filename: str) -> bytes:
    return quote(filename, safe="").encode()


ROUTES = (
    Route(
        method="POST",
        path="/v1/files",
        name="create_file",
        summary="Keep a file. Its bytes are on disk when the answer comes.",
        handler=create,
        body=CreateFileBody,
        body_media="multipart/form-data",
        answer=FileObject,
        gives={"file_id": "/id"},
        idempotent=True,
    ),
    Route(
        method="GET",
        path="/v1/files",
        name="list_files",
        summary="Files by their creation, the newest first unless asked otherwise.",
        handler=list_files,
        query=FilesQuery,
        answer=FileList,
    ),
    Route(
        method="GET",
        path="/v1/files/{file_id}",
        name="retrieve_file",
        summary="What is known of a file.",
        handler=retrieve,
        answer=FileObject,
        statuses=(404,),
    ),
    Route(
        method="DELETE",
        path="/v1/files/{file_id}",
        name="delete_file",
        summary="Delete a file, and its bytes unless another file has the same.",
        handler=delete,
        answer=FileDeleted,
        statuses=(404,),
    ),
    Route(
        method="GET",
        path="/v1/files/{file_id}/content",
        name="download_file",
        summary="The bytes of a file, or a part of them, each verified before it is sent; none of "
        "them to a client that names their `etag`.",
        handler=content,
        answer=None,
        media="application/octet-stream",
        statuses=(404,),
        ranged=True,
    ),
)
