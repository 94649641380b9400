"""What golden stores hold: something of every collection, made from the types that it is declared
with, so that a collection that comes later is in the next ones by itself. And the same as text.
"""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec
from msgspec import inspect

from perdure.core import keys
from perdure.core.batch import append, delete, drop, put, trim
from perdure.core.clock import SystemClock
from perdure.core.engine import Engine
from perdure.core.keys import Key
from perdure.core.layouts import Layout, Records
from perdure.core.rows import FloorRow, OperationRow, RecordRow, Row
from perdure.surfaces.state import LAYOUTS

AT_S = 1_700_000_000
_DEPTH_MAX = 4
"""Below it only what must be there is filled."""


class Then(SystemClock):
    """The moment at which golden stores were made: what is kept for a time only is still there."""

    def now_s(self) -> float:
        return AT_S


async def begin(engine: Engine) -> None:
    """Commit something of everything."""
    for layout in LAYOUTS:
        first, second, third, fourth = (_key(layout, at) for at in range(4))
        if isinstance(layout, Records):
            full, least = _value(layout, 1, full=True), _value(layout, 2, full=False)
            await engine.commit(put(layout, first, least))
            await engine.commit(put(layout, second, least).named(f"op {layout.name}"))
            await engine.commit(put(layout, fourth, full))
        else:
            entries = [_value(layout, at, full=at % 2 == 1) for at in range(4)]
            for stream in (first, second, third, fourth):
                await engine.commit(append(layout, stream, entries))


async def go_on(engine: Engine) -> None:
    """Change some of it, remove some, and add more."""
    for layout in LAYOUTS:
        first, _, third, fourth = (_key(layout, at) for at in range(4))
        if isinstance(layout, Records):
            full, other = _value(layout, 1, full=True), _value(layout, 3, full=True)
            await engine.commit(put(layout, first, full, expect=1, attachment=b"\0bytes\xff"))
            await engine.commit(put(layout, third, other, attachment=b""))
            await engine.commit(delete(layout, fourth, expect=1))
        else:
            entries = [_value(layout, at, full=True) for at in (4, 5)]
            await engine.commit(append(layout, first, entries, after=4).named("op " + layout.name))
            await engine.commit(trim(layout, first, 3))
            await engine.commit(drop(layout, third))
            await engine.commit(drop(layout, fourth))
            await engine.commit(append(layout, fourth, entries))


def blob(at: int) -> bytes:
    """The bytes of a blob that the stores name."""
    return f"blob {at}".encode()


def _key(layout: Layout, at: int) -> Key:
    tenant = "acme" if at == 2 else keys.DEFAULT_TENANT
    digest = hashlib.sha256(blob(at)).hexdigest()
    return (tenant, *(digest if one == "digest" else f"{one}-{at}" for one in layout.key[1:]))


def _value(layout: Layout, seed: int, *, full: bool) -> Any:
    plain = _plain(inspect.type_info(layout.type), seed, 0 if full else _DEPTH_MAX)
    return layout.decode(_key(layout, seed), msgspec.json.encode(plain))


def _plain(info: inspect.Type, seed: int, depth: int) -> Any:
    """A value of a type, as JSON would have it."""
    match info:
        case inspect.StructType(cls=cls, fields=fields, tag=tag, tag_field=tag_field):
            chosen = [field for field in fields if field.required or depth < _DEPTH_MAX]
            values = {f.encode_name: _plain(f.type, seed, depth + 1) for f in chosen}
            return {**({} if tag_field is None else {tag_field: tag}), **values}
        case inspect.UnionType(types=types):
            some = [type for type in types if not isinstance(type, inspect.NoneType)]
            return _plain(some[seed % len(some)], seed, depth)
        case inspect.ListType(item_type=item) | inspect.VarTupleType(item_type=item):
            return [_plain(item, seed, depth)] if depth <= _DEPTH_MAX else []
        case inspect.TupleType(item_types=items):
            return [_plain(item, seed, depth) for item in items]
        case inspect.DictType(value_type=value):
            return {"key": _plain(value, seed, depth)}
        case inspect.LiteralType(values=values):
            return sorted(values, key=str)[seed % len(values)]
        case inspect.EnumType(cls=cls):
            return [one.value for one in cls][seed % len(cls)]
        case inspect.StrType():
            return f"text {seed} é"
        case inspect.IntType():
            return seed
        case inspect.FloatType():
            return seed + 0.5
        case inspect.BoolType():
            return True
        case inspect.RawType() | inspect.AnyType():
            return {"raw": [seed, None, "é"]}
    raise AssertionError(f"no value is known for {info}")


async def listing(engine: Engine) -> str:
    """All that a store holds, a line each."""
    lines: list[str] = []
    page = await engine.rows()
    while True:
        for row in page.items:
            lines += _lines(row)
        if page.after is None:
            return "\n".join(lines) + "\n"
        page = await engine.rows(after=page.after)


def _lines(row: Row) -> list[str]:
    match row:
        case RecordRow(value=None):
            return [f"deleted {row.collection} {_shown(row.place)} {row.version}"]
        case RecordRow():
            attached = "" if row.attachment is None else f" + {row.attachment.hex() or 'nothing'}"
            value = (row.value or b"").decode()
            return [f"record {row.collection} {_shown(row.place)} {row.version} {value}{attached}"]
        case OperationRow():
            return [f"operation {msgspec.json.encode(row).decode()}"]
        case FloorRow():
            return [f"floor {msgspec.json.encode(row).decode()}"]
    where = f"{row.log} {_shown(row.place)} {row.incarnation}"
    begun = [f"stream {where} from {row.first}"] if row.after == row.first - 1 else []
    entries = enumerate(row.values, row.after + 1)
    return begun + [f"entry {where} {seq} {value.decode()}" for seq, value in entries]


def _shown(place: str) -> str:
    return "/".join(keys.split(place))


async def decode_all(engine: Engine) -> int:
    """Read everything through its layout, as surfaces do; how many values there are. Raises
    `Damaged` for one that its type does not take any more."""
    count = 0
    for layout in LAYOUTS:
        if isinstance(layout, Records):
            count += len((await engine.scan(layout, (), limit=100)).items)
            for index in layout.indexes:
                within = () if index.every_tenant else (keys.DEFAULT_TENANT,)
                await engine.scan(layout, within, index=index.name, limit=100)
        else:
            for stream in (await engine.streams(layout, (), limit=100)).items:
                tip = await engine.tip(layout, stream)
                count += len(await engine.read(layout, stream, after=tip.first - 1, limit=100))
    return count
