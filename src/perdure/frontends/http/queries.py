"""Query parameters, as types: the OpenAPI document shows what is parsed here."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from perdure.frontends.http.call import Call
from perdure.wire.errors import WireError
from perdure.wire.files import LIST_MAX
from perdure.wire.jobs import JobStatus
from perdure.wire.lists import LIMIT_DEFAULT, LIMIT_MAX, ListQuery, Order, parse_list_query
from perdure.wire.workers import WorkerStatus

Q = TypeVar("Q", bound=msgspec.Struct)

AfterSequence = Annotated[
    int, Meta(ge=-1, le=2**53, description="Leave out events up to this sequence number.")
]
StatusName = Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]
Include = Annotated[list[str], Meta(description="Fields that are always shown here if present.")]


class ItemsQuery(msgspec.Struct, frozen=True):
    """A page of items. `after` is the id of the last item seen."""

    limit: Annotated[int, Meta(ge=1, le=LIMIT_MAX)] = LIMIT_DEFAULT
    order: Order = "desc"
    after: str | None = None
    include: Include = []


class ListedQuery(msgspec.Struct, frozen=True):
    """A page of a tenant's objects. `after` is the id of the last one seen."""

    limit: Annotated[int, Meta(ge=1, le=LIMIT_MAX)] = LIMIT_DEFAULT
    order: Order = "desc"
    after: str | None = None


class ResponsesQuery(ListedQuery, frozen=True):
    """The same, of responses."""

    status: StatusName | msgspec.UnsetType = msgspec.UNSET  # "null" is no status either


class JobsQuery(ListedQuery, frozen=True):
    """The same, of jobs."""

    status: JobStatus | msgspec.UnsetType = msgspec.UNSET
    kind: str | msgspec.UnsetType = msgspec.UNSET


class WorkersQuery(ListedQuery, frozen=True):
    """The same, of workers."""

    status: WorkerStatus | msgspec.UnsetType = msgspec.UNSET


class InputsQuery(msgspec.Struct, frozen=True):
    """At most so many inputs."""

    limit: Annotated[int, Meta(ge=1, le=LIMIT_MAX)] = LIMIT_DEFAULT


class TranscriptQuery(InputsQuery, frozen=True):
    """A part of a log, behind the `cursor` of the one before."""

    after: str | None = None


class LogQuery(TranscriptQuery, frozen=True):
    """The same; `stream` goes on with what comes, and begins with a snapshot unless `after`, or
    the header `Last-Event-ID`, says behind what."""

    stream: bool = False


class RetrieveQuery(msgspec.Struct, frozen=True):
    """`stream` follows the response's events, from the beginning or after `starting_after`."""

    stream: bool = False
    starting_after: AfterSequence | None = None
    include: Include = []
    include_obfuscation: Literal["false"] = "false"


class IncludeQuery(msgspec.Struct, frozen=True):
    """Only what official clients may add to any read of an item."""

    include: Include = []


class PageQuery(msgspec.Struct, frozen=True):
    """A page of what operators list. `after` is the cursor of the page before."""

    limit: Annotated[int, Meta(ge=1, le=LIMIT_MAX)] = LIMIT_DEFAULT
    after: str | None = None


class FilesQuery(msgspec.Struct, frozen=True):
    """A page of files. `after` is the id of the last file seen."""

    purpose: str | None = None
    limit: Annotated[int, Meta(ge=1, le=LIST_MAX)] = LIST_MAX
    order: Order = "desc"
    after: str | None = None


def query_of(call: Call, type: type[Q]) -> Q:
    """The query string as a struct. Raises `WireError` for a parameter nobody reads, one given
    twice that is not a list, or a value that does not fit."""
    sent = _known(call, type)
    if not sent:
        return type()
    kinds = {field.encode_name: field.type for field in msgspec.structs.fields(type)}
    values: dict[str, Any] = {}
    for name, texts in sent.items():
        value = texts if _is_list(kinds[name]) else texts[0]
        try:
            values[name] = msgspec.convert(value, kinds[name], strict=False)
        except msgspec.ValidationError as error:
            text = str(error).replace("`", "'")
            raise WireError(
                f"Invalid value for '{name}': {text[0].lower()}{text[1:]}.", param=name
            ) from None
    return type(**values)


def list_query(call: Call, type: type[msgspec.Struct] = ItemsQuery) -> ListQuery:
    """The parameters of a list. Raises `WireError`."""
    sent = _known(call, type)
    return parse_list_query({name: texts[0] for name, texts in sent.items()})


def _known(call: Call, type: type[msgspec.Struct]) -> dict[str, list[str]]:
    sent = call.query()
    if not sent:
        return {}
    kinds = {field.encode_name: field.type for field in msgspec.structs.fields(type)}
    for name, texts in sent.items():
        if name not in kinds:
            raise WireError(
                f"Unknown query parameter: '{name[:64]}'. Known are: {', '.join(kinds) or 'none'}.",
                param=name[:64],
                code="unknown_parameter",
            )
        if len(texts) > 1 and not _is_list(kinds[name]):
            raise WireError(f"Query parameter '{name}' is given more than once.", param=name)
    return sent


def _is_list(type: Any) -> bool:
    inner = getattr(type, "__origin__", None)
    return inner is list or getattr(inner, "__origin__", None) is list
