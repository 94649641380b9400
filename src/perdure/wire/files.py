"""The Files API: what may be said of a file when it is sent, and the objects that are shown."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec

from perdure.core import codec
from perdure.wire.errors import WireError, missing, not_among, typed

PURPOSES = ("assistants", "batch", "fine-tune", "vision", "user_data", "evals")
ANCHOR = "created_at"
EXPIRES_MIN_S = 3_600
EXPIRES_MAX_S = 2_592_000
FILENAME_BYTES_MAX = 1_024

UPLOAD_BYTES_MAX = 8 * 1024 * 1024 * 1024
UPLOAD_KEPT_S = 3_600
PART_BYTES_MAX = 64 * 1024 * 1024
PARTS_MAX = 4_000

LIST_MAX = 10_000
"""Most files one list shows, and how many it shows unless asked for fewer."""

UploadState = Literal["pending", "completed", "cancelled", "expired"]
Purpose = Literal["assistants", "batch", "fine-tune", "vision", "user_data", "evals"]
FileStatus = Literal["uploaded", "processed", "error"]

_MD5 = re.compile(r"[0-9A-Fa-f]{32}|[A-Za-z0-9+/]{22}==")
_ANCHOR_FIELD = "expires_after[anchor]"
_SECONDS_FIELD = "expires_after[seconds]"
FIELDS = ("purpose", _ANCHOR_FIELD, _SECONDS_FIELD)
"""Form fields of an upload, beside the file itself."""


class FileObject(msgspec.Struct, frozen=True, kw_only=True):
    """A file as the API shows it. `error` says that its bytes were found to be damaged."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: str
    status: FileStatus = "processed"
    status_details: str | None = None


class FileDeleted(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to deleting a file."""

    id: str
    object: Literal["file"] = "file"
    deleted: bool = True


class FileList(msgspec.Struct, frozen=True, kw_only=True):
    """Files by their creation."""

    object: Literal["list"] = "list"
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class ExpiresAfter(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How long after its creation a file is gone."""

    anchor: Literal["created_at"]
    seconds: Annotated[int, msgspec.Meta(ge=EXPIRES_MIN_S, le=EXPIRES_MAX_S)]


class UploadObject(msgspec.Struct, frozen=True, kw_only=True):
    """An upload as the API shows it; `file` is what it became."""

    id: str
    object: Literal["upload"] = "upload"
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: str
    status: UploadState
    file: FileObject | None = None


class UploadPartObject(msgspec.Struct, frozen=True, kw_only=True):
    """A part of an upload as the API shows it."""

    id: str
    object: Literal["upload.part"] = "upload.part"
    created_at: int
    upload_id: str


class CreateUpload(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Announce a file that will come in parts, `bytes` long in all."""

    bytes: Annotated[int, msgspec.Meta(ge=1, le=UPLOAD_BYTES_MAX)]
    filename: str
    mime_type: Annotated[str, msgspec.Meta(min_length=1, max_length=255)]
    purpose: Purpose
    expires_after: ExpiresAfter | None = None


class CompleteUpload(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Make the file of the parts, in this order. `md5`, hex or base64, is that of all bytes."""

    part_ids: Annotated[list[str], msgspec.Meta(min_length=1, max_length=PARTS_MAX)]
    md5: str | None = None


class CreateFile(msgspec.Struct, frozen=True):
    """What is said of a file that is sent."""

    filename: str
    purpose: str
    expires_after_s: int | None = None


def parse_create_file(fields: Mapping[str, str], filename: str | None) -> CreateFile:
    """The form of an upload, apart from the bytes. Raises `WireError`."""
    if filename is None:
        raise missing("file")
    for name in fields:
        if name not in FIELDS:
            raise WireError(
                f"Unknown parameter: '{name[:64]}'.", param=name[:64], code="unknown_parameter"
            )
    if "purpose" not in fields:
        raise missing("purpose")
    return CreateFile(
        filename=check_filename(filename, "file"),
        purpose=check_purpose(fields["purpose"]),
        expires_after_s=_expires_after(fields),
    )


def parse_create_upload(body: Any) -> CreateUpload:
    """Raises `WireError`."""
    request = typed(body, CreateUpload)
    check_filename(request.filename, "filename")
    return request


def parse_complete_upload(body: Any) -> CompleteUpload:
    """Raises `WireError`."""
    request = typed(body, CompleteUpload)
    if len(set(request.part_ids)) != len(request.part_ids):
        raise WireError("A part is named twice in 'part_ids'.", param="part_ids")
    if request.md5 is not None and not _MD5.fullmatch(request.md5):
        raise WireError("Invalid 'md5': expected an MD5 in hex or base64.", param="md5")
    return request


def check_purpose(purpose: str) -> str:
    """Raises `WireError` for a purpose nobody has."""
    if purpose not in PURPOSES:
        raise not_among("purpose", purpose, PURPOSES)
    return purpose


def check_filename(filename: str, param: str) -> str:
    """A name is shown and never used as a path, so it may hold anything that can be shown: no
    control characters, not empty, of bounded size. Raises `WireError`."""
    sound = codec.is_sound(filename) and not any(
        ord(character) < 0x20 or 0x7F <= ord(character) < 0xA0 for character in filename
    )
    if not sound or not filename:
        raise WireError(
            f"Invalid filename in '{param}': it is empty or holds control characters.", param=param
        )
    size_bytes = len(filename.encode())
    if size_bytes > FILENAME_BYTES_MAX:
        raise WireError(
            f"Invalid filename in '{param}': {size_bytes} bytes are too long. Expected at most "
            f"{FILENAME_BYTES_MAX}.",
            param=param,
            code="string_above_max_length",
        )
    return filename


def _expires_after(fields: Mapping[str, str]) -> int | None:
    if _ANCHOR_FIELD not in fields and _SECONDS_FIELD not in fields:
        return None
    for name in (_ANCHOR_FIELD, _SECONDS_FIELD):
        if name not in fields:
            raise missing(name)
    if fields[_ANCHOR_FIELD] != ANCHOR:
        raise not_among(_ANCHOR_FIELD, fields[_ANCHOR_FIELD], (ANCHOR,))
    text = fields[_SECONDS_FIELD]
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise WireError(
            f"Invalid type for '{_SECONDS_FIELD}': expected an integer, but got '{text[:20]}' "
            "instead.",
            param=_SECONDS_FIELD,
            code="invalid_type",
        )
    seconds = int(text)
    if not EXPIRES_MIN_S <= seconds <= EXPIRES_MAX_S:
        raise WireError(
            f"Invalid '{_SECONDS_FIELD}': {seconds} is not from {EXPIRES_MIN_S} to "
            f"{EXPIRES_MAX_S}.",
            param=_SECONDS_FIELD,
            code="integer_below_min_value"
            if seconds < EXPIRES_MIN_S
            else "integer_above_max_value",
        )
    return seconds
