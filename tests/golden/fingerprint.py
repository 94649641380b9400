"""What stands in stores, as text: tables, stored types, and bytes whose places are fixed. Whoever
changes one of these sees it in the difference, and so cannot do it by mistake.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from msgspec import inspect

from perdure.core.layouts import Records
from perdure.core.mark import _slot
from perdure.core.stored import newest, shape_of
from perdure.core.values import Tip, entry_sum, record_sum, tip_sum
from perdure.engines import (
    files_backup,
    files_format,
    files_journal,
    files_manifest,
    files_names,
    files_recovery,
    postgres_backup,
    postgres_schema,
    sqlite_backup,
    sqlite_driver,
    sqlite_schema,
    sqlite_upgrade,
    sqlite_wal,
)
from perdure.services import backups
from perdure.surfaces.state import LAYOUTS

_FILES = (
    *(files_format.RecordFile, files_format._Line),
    *(files_manifest.Head, files_manifest.LayoutRow, files_manifest.RecordRow),
    *(files_manifest.StreamRow, files_manifest.OperationRow),
    *(files_journal.Frame, files_journal.JournalHead),
)
_BACKUPS = (backups.Manifest, postgres_backup.Head, postgres_backup.Piece, postgres_backup.End)


def fingerprint() -> str:
    """All of it."""
    return "\n".join([*_engines(), "", *_collections()]) + "\n"


def _engines() -> Iterator[str]:
    yield f"sqlite format {newest(sqlite_upgrade.STEPS)}"
    yield from _indented(sqlite_schema.SQL["create"])
    pages = (sqlite_driver.PAGE_BYTES, sqlite_driver.RESERVE_BYTES)
    yield f"  pages {pages}, application {sqlite_schema.APPLICATION_ID:x}"
    yield f"  stamp {sqlite_wal.stamp(7).hex()}, stream ids << {sqlite_schema.STREAM_SHIFT}"
    yield f"  backup {sqlite_backup.COPY}"
    yield f"files format {newest(files_recovery.STEPS)}"
    yield from _types(_FILES)
    change = files_journal.RecordChange("c", "t\x1fk", 2, b"{}", b"a", (1, None))
    stream = files_journal.StreamChange("l", "t\x1fs", Tip(1, 1, 2), (b"1", b"2"))
    operation = files_manifest.OperationRow("o", "p", 5, (2,), 9)
    frame = files_journal.Frame(7, 9, [change], [stream], [operation])
    yield f"  frame {files_journal.sealed(frame, 'store').hex()}"
    line = files_format.entry_line(files_format.Identity("l", "t\x1fs", 1), 1, b'{"a":1}')
    yield f"  line {line.decode().strip()}"
    yield f"  mark {_slot(7, b'store').hex()}"
    yield f"  names {files_names.encoded('Ab.é/')} {files_names.encoded('x' * 300)[-40:]}"
    yield f"  backup {files_backup.MANIFEST} {files_backup.FRAMES}"
    yield f"postgres format {postgres_schema.FORMAT}"
    yield from _indented(postgres_schema.SCHEMA)
    yield f"backup format {backups.FORMAT}"
    yield from _types(_BACKUPS)
    sums = (
        record_sum("c", "k", 1, b"v", b"a"),
        record_sum("c", "k", 1, None, None),
        entry_sum("l", "s", 1, 2, b"v"),
        tip_sum("l", "s", Tip(1, 2, 3)),
    )
    yield f"sums {' '.join(f'{one & (1 << 64) - 1:016x}' for one in sums)}"


def _collections() -> Iterator[str]:
    for layout in sorted(LAYOUTS, key=lambda layout: layout.name):
        yield f"{type(layout).__name__.lower()} {layout.name} version {layout.version}"
        yield f"  shape {shape_of(layout)} partition {layout.partition} path {layout.path}"
        if isinstance(layout, Records):
            yield from _indented(sqlite_schema.Table(layout).create())
            for statement in postgres_schema.Table(layout).create():
                yield f"  pg {statement}"
        yield from _types((layout.type,))


def _types(types: tuple[Any, ...]) -> Iterator[str]:
    """The fields of every struct that is met, each struct once."""
    left = [inspect.type_info(type) for type in types]
    seen: set[type] = set()
    while left:
        info = left.pop(0)
        if not isinstance(info, inspect.StructType):
            left = [*_within(info), *left]
        elif info.cls not in seen:
            seen.add(info.cls)
            how = ["as an array"] if info.array_like else []
            how += [f"{info.tag_field} is {info.tag!r}"] if info.tag_field else []
            yield f"  {info.cls.__name__} {' '.join(how)}".rstrip()
            for field in info.fields:
                optional = "" if field.required else " or absent"
                yield f"    {field.encode_name}: {_named(field.type)}{optional}"
            left = [*(field.type for field in info.fields), *left]


def _within(info: inspect.Type) -> list[inspect.Type]:
    match info:
        case inspect.UnionType(types=types):
            return list(types)
        case inspect.TupleType(item_types=items):
            return list(items)
        case inspect.ListType(item_type=item) | inspect.VarTupleType(item_type=item):
            return [item]
        case inspect.DictType(key_type=key, value_type=value):
            return [key, value]
    return []


def _named(info: inspect.Type) -> str:
    """A type in a few words."""
    match info:
        case inspect.StructType(cls=cls):
            return cls.__name__
        case inspect.UnionType(types=types):
            return " | ".join(map(_named, types))
        case inspect.LiteralType(values=values):
            return repr(tuple(sorted(values, key=str)))
        case inspect.EnumType(cls=cls):
            return repr(tuple(one.value for one in cls))
    within = ", ".join(map(_named, _within(info)))
    name = type(info).__name__.removesuffix("Type").lower()
    return f"{name}[{within}]" if within else name


def _indented(text: str) -> list[str]:
    return [f"  {line}".rstrip() for line in text.splitlines()]
