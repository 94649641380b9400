"""What an engine reads back from its store, held to checksums and to what is declared now. Here
once, so that every engine says the same of the same damage."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import msgspec

from perdure.core.errors import Damaged, Invalid, NewerFormat, Unavailable, WrongShards
from perdure.core.keys import SEPARATOR, Key, show
from perdure.core.layouts import Index, Layout, Records
from perdure.core.values import Record, Tip, record_sum, tip_sum

T = TypeVar("T")


def checked_record(
    records: Records[Any], key: Key, place: str, row: tuple[int, int, bytes, bytes | None]
) -> Record[Any]:
    """The record in `row`. Raises `Damaged` where the bytes do not match their checksum."""
    version, checksum, value, attachment = row
    if record_sum(records.name, place, version, value, attachment) != checksum:
        raise Damaged(f"{records.name} {show(key)}", "it does not match its checksum")
    return Record(key, version, records.decode(key, value), attachment)


def checked_tip(log: str, key: Key, place: str, row: tuple[int, int, int, int]) -> Tip:
    """The tip in `row`. Raises `Damaged` where it does not match its checksum."""
    incarnation, first, last, checksum = row
    tip = Tip(incarnation, first, last)
    if tip_sum(log, place, tip) != checksum:
        raise Damaged(f"{log} {show(key)}", "its tip does not match its checksum")
    return tip


def operation_sum(operation: tuple[str, str], digest: int, numbers: bytes) -> int:
    """Checksum of the row of an operation id."""
    return record_sum("operations", SEPARATOR.join(operation), digest, numbers, None)


def check_whole(where: str, store_id: str, found: str | None, copy_of: str | None) -> None:
    """Refuse a store that is not whole, `found` being the store of which it is to become a copy; or
    with `copy_of` what is no such copy. Raises `Unavailable` and `Invalid`."""
    if copy_of is None:
        if found is not None:
            raise Unavailable(
                f"{where} is a copy that is not complete. Run the same `perdure copy` again, which "
                "completes it, or remove what is there."
            )
    elif found is None:
        what = "that store already, whole" if store_id == copy_of else "another store"
        raise Invalid(f"{where} holds {what}. A copy goes to an empty place only.")
    elif found != copy_of:
        raise Invalid(
            f"{where} holds an unfinished copy of another store, {found}. Name another place, or "
            "remove what is there."
        )


class FormatStep(NamedTuple, Generic[T]):
    """The step of a store from one format to the next. A step is given an open store of the format
    before and makes it one of its own; its engine says what must hold if it is cut off."""

    format: int
    says: str
    run: Callable[[T], None]


def newest(steps: Sequence[FormatStep[Any]]) -> int:
    """The format that a store has after all of the steps, which begin behind format 1."""
    return steps[-1].format if steps else 1


class Lacking(msgspec.Struct, frozen=True):
    """What a store does not hold yet: whole collections, and indexes of some that it does."""

    collections: tuple[Layout, ...] = ()
    indexes: tuple[Records[Any], ...] = ()


SHARDS = "shards"
"""The collection in which a shard keeps what it is."""


def check_layouts(
    rows: Iterable[tuple[str, int, str]],
    where: str,
    layouts: Sequence[Layout],
    *,
    writing: bool = False,
) -> Lacking:
    """What a store lacks of the layouts, if `rows` are the names, versions and shapes it holds.
    Raises `NewerFormat` for one written by a newer declaration, and `Invalid` for one declared
    otherwise under the same version. One that is a shard is not written to as if it were whole,
    because what is in the others would look absent: that is `WrongShards`."""
    stored = {name: (version, shape) for name, version, shape in rows}
    if writing and SHARDS in stored and all(layout.name != SHARDS for layout in layouts):
        raise WrongShards(
            f"{where} is a shard of a store that is spread over several. Nothing was written; give "
            'all of them, as `shards = ["...", "..."]` in perdure.toml.'
        )
    missing: list[Layout] = []
    widened: list[Records[Any]] = []
    for layout in layouts:
        if layout.name not in stored:
            missing.append(layout)
            continue
        version, shape = stored[layout.name]
        if version > layout.version:
            raise NewerFormat(
                f"{where}: {layout.name} was written in version {version}; this release knows up "
                f"to {layout.version}. The store was left untouched; open it with a newer Perdure."
            )
        if (version, shape) == (layout.version, shape_of(layout)):
            continue
        if version == layout.version and isinstance(layout, Records) and _fits(layout, shape):
            widened.append(layout)
            continue
        raise Invalid(
            f"{where}: {layout.name} is stored as version {version} with another key or other "
            f"indexes than version {layout.version} declares, and there is no way from one to the "
            "other. The store was left untouched; open it with the Perdure that wrote it."
        )
    return Lacking(tuple(missing), tuple(widened))


def shape_of(layout: Layout) -> str:
    """What of a layout the tables depend on."""
    indexes = layout.indexes if isinstance(layout, Records) else None
    return msgspec.json.encode([layout.key, indexes]).decode()


def stored_records(
    rows: Iterable[tuple[str, int, str]], layouts: Sequence[Layout]
) -> list[Records[Any]]:
    """Every collection of records in the `rows` that describe layouts, as the store holds it. One
    that is declared otherwise, or not at all, is held to its checksums only, as its index columns
    cannot be told from its value."""
    declared = {layout.name: layout for layout in layouts if isinstance(layout, Records)}
    found = []
    for name, _, shape in rows:
        key, indexes = msgspec.json.decode(shape)
        if indexes is None:
            continue
        layout = declared.get(name)
        alike = layout is not None and shape_of(layout) == shape
        found.append(layout if alike and layout else Records(name, Any, key=tuple(key)))
    return found


def as_stored(layout: Layout, rows: Iterable[tuple[str, int, str]]) -> Layout:
    """A layout with the indexes that the store has by the `rows` that describe its layouts."""
    for name, version, shape in rows:
        if name == layout.name and isinstance(layout, Records):
            key, indexes = msgspec.json.decode(shape, type=tuple[Key, tuple[Index, ...]])
            return Records(name, layout.type, key=key, indexes=indexes, version=version)
    return layout


def _fits(layout: Records[Any], shape: str) -> bool:
    """Whether the declared layout is the stored one with more indexes."""
    key, indexes = msgspec.json.decode(shape, type=tuple[Key, tuple[Index, ...] | None])
    return key == layout.key and indexes is not None and set(indexes) <= set(layout.indexes)
