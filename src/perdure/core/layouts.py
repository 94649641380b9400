"""Layouts: what a collection holds. From them come tables, index columns and typed reads.

A layout is a constant of the surface that owns it and the first argument of every operation on
its records or streams. No engine knows which surface that is.
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any, Generic, TypeVar, get_type_hints

import msgspec

from perdure.core import codec
from perdure.core.errors import Damaged, Invalid, LimitExceeded
from perdure.core.keys import Key, show
from perdure.core.limits import COLUMN_BYTES_MAX, VALUE_BYTES_MAX

T = TypeVar("T")

Column = str | int
Columns = tuple[Column | None, ...]


class Index(msgspec.Struct, frozen=True):
    """Fields of the value by which records can be scanned, in this order, then by key.

    The fields are top-level, of type str or int. A record whose first field is None is left out
    of the index, which keeps indexes of rare states small. An index belongs to each tenant
    separately unless `every_tenant`, which services use to find work wherever it lies.
    """

    name: str
    fields: tuple[str, ...]
    every_tenant: bool = False


class _Layout(Generic[T]):
    """`partition` is the position of the key segment that names a record's or stream's partition,
    None where the collection lives in the common one. `key` names the segments, tenant first.
    A `msgspec.Raw` inside `type` is kept verbatim: whoever makes it has parsed it with `codec`.
    A batch that touches nothing but `urgent` collections waits behind no batch that touches others:
    they are for what tells the living from the dead.
    `path` is where an engine keeps it whose files people read: names of directories, with a `*` for
    each key segment behind the tenant, in their order. Collections may share directories.
    """

    def __init__(
        self,
        name: str,
        type: type[T],
        *,
        key: tuple[str, ...],
        version: int = 1,
        partition: str | None = None,
        urgent: bool = False,
        path: str | None = None,
    ) -> None:
        self.name = name
        self.type = type
        self.key = key
        self.version = version
        self.partition = None if partition is None else key.index(partition)
        self.urgent = urgent
        self.path = default_path(name, key) if path is None else _checked_path(name, key, path)
        self._decoder = msgspec.json.Decoder(type)
        self._walk = not _is_plain(type)

    def __repr__(self) -> str:
        return f"{self.__class__.__name__}({self.name!r})"

    def encode(self, value: T) -> bytes:
        """Stored JSON text of a value. Raises `Invalid` for what JSON cannot hold unchanged."""
        if self._walk:
            codec.check(codec.plain(value))
        text = codec.encode(value)
        if len(text) > VALUE_BYTES_MAX:
            raise LimitExceeded(f"the value in {self.name}, in bytes,", len(text), VALUE_BYTES_MAX)
        return text

    def decode(self, key: Key, text: bytes) -> T:
        """The value of stored text. Raises `Damaged` where it does not fit the layout's type."""
        try:
            return self._decoder.decode(text)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise Damaged(f"{self.name} {show(key)}", f"does not decode: {error}") from None

    def partition_of(self, key: Key) -> str | None:
        """The partition a key of this layout lies in; None is the common one."""
        return None if self.partition is None else key[self.partition]


class Records(_Layout[T]):
    """A collection of versioned values. Those of one that is `everywhere` stand in every shard, and
    a batch of any partition may check them."""

    def __init__(
        self,
        name: str,
        type: type[T],
        *,
        key: tuple[str, ...],
        indexes: tuple[Index, ...] = (),
        version: int = 1,
        partition: str | None = None,
        urgent: bool = False,
        everywhere: bool = False,
        path: str | None = None,
    ) -> None:
        super().__init__(
            *(name, type),
            key=key,
            version=version,
            partition=partition,
            urgent=urgent,
            path=path,
        )
        self.indexes = indexes
        self.everywhere = everywhere
        self.fields = tuple(dict.fromkeys(field for index in indexes for field in index.fields))
        """Every indexed field once: the order of the columns in `columns`."""

    def index(self, name: str) -> Index:
        """The declared index of that name. Raises `Invalid` for any other."""
        for index in self.indexes:
            if index.name == name:
                return index
        raise Invalid(f"{self.name} has no index {name!r}.")

    def kinds(self) -> tuple[type[Column], ...]:
        """Whether each of `fields` is declared to hold text or numbers, for an engine whose columns
        hold one of them only. Raises `Invalid` where the type leaves it open."""
        info = msgspec.inspect.type_info(self.type)
        declared = info.fields if isinstance(info, msgspec.inspect.StructType) else ()
        types = {field.name: field.type for field in declared}
        for field in self.fields:
            made = getattr(self.type, field, None)
            if isinstance(made, property):
                hints = get_type_hints(made.fget)
                types[field] = msgspec.inspect.type_info(hints.get("return", Any))
        found = tuple(_kind(types.get(field)) for field in self.fields)
        if None in found:
            field = self.fields[found.index(None)]
            raise Invalid(f"{self.name}: {field} is indexed, so declare it as str or as int.")
        return tuple(kind for kind in found if kind)

    def columns(self, value: T) -> Columns:
        """Index columns of a value, in the order of `fields`. Raises `Invalid` for what an index
        of some engine could not hold: other types than str, int and None, NUL, wide integers."""
        return tuple(
            None if part is None else check_column(self.name, field, part)
            for field, part in zip(self.fields, self.stored_columns(value), strict=True)
        )

    def stored_columns(self, value: T) -> Columns:
        """The same of a value that was stored, whose columns were looked at when it was."""
        read = value.get if isinstance(value, dict) else partial(getattr, value)
        return tuple(map(read, self.fields))

    def column_of(self, index: Index, columns: Columns) -> Columns:
        """The part of `columns` that one index uses."""
        return tuple(columns[self.fields.index(field)] for field in index.fields)


class Log(_Layout[T]):
    """A collection of streams; each stream numbers its entries from 1 without holes."""


Layout = Records[Any] | Log[Any]

_PATH_PART = re.compile(r"[a-z][a-z0-9_-]*|\*")


def default_path(name: str, key: Key) -> str:
    """Where a collection lies that declares nothing: in a directory of its own."""
    return "/".join((name, *("*" for _ in key[1:])))


def _checked_path(name: str, key: Key, path: str) -> str:
    parts = path.split("/")
    if parts.count("*") != len(key) - 1 or not all(map(_PATH_PART.fullmatch, parts)):
        raise Invalid(
            f"{name}: the path {path!r} is not made of lower-case names with one * for each of "
            f"{', '.join(key[1:])}."
        )
    return path


def check_column(collection: str, field: str, part: Any) -> Column:
    """The part, if every engine can index it and look for it. Raises `Invalid` otherwise."""
    if isinstance(part, str) and "\0" not in part and codec.is_sound(part):
        size_bytes = len(part.encode())
        if size_bytes > COLUMN_BYTES_MAX:
            raise LimitExceeded(f"{collection}: {field}, in bytes,", size_bytes, COLUMN_BYTES_MAX)
        return part
    if type(part) is int and codec.INT_MIN <= part <= codec.INT_MAX:
        return part
    raise Invalid(f"{collection}: the indexed field {field} cannot be {part!r:.40}.")


def _kind(info: msgspec.inspect.Type | None) -> type[Column] | None:
    """The one kind of column that values of a type need, None where there is no such one."""
    match info:
        case msgspec.inspect.UnionType(types=types):
            kinds = {
                _kind(part) for part in types if not isinstance(part, msgspec.inspect.NoneType)
            }
            return kinds.pop() if len(kinds) == 1 else None
        case msgspec.inspect.LiteralType(values=values):
            return str if all(isinstance(value, str) for value in values) else None
        case msgspec.inspect.EnumType(cls=cls):
            return str if issubclass(cls, str) else None
        case msgspec.inspect.StrType():
            return str
        case msgspec.inspect.IntType():
            return int
        case _:
            return None


def _is_plain(type: Any) -> bool:
    """Whether no value of this type can hold what JSON cannot: no floats, wide ints, or Any.

    Lone surrogates need no walk: encoding them fails. Integers of structs are trusted to be
    counters and times, declared by a surface.
    """
    seen: set[int] = set()

    def plain(info: msgspec.inspect.Type) -> bool:
        match info:
            case msgspec.inspect.StructType(cls=cls, fields=fields):
                if id(cls) in seen:
                    return True
                seen.add(id(cls))
                return all(plain(field.type) for field in fields)
            case msgspec.inspect.UnionType(types=types):
                return all(plain(part) for part in types)
            case (
                msgspec.inspect.ListType(item_type=item)
                | msgspec.inspect.VarTupleType(item_type=item)
            ):
                return plain(item)
            case msgspec.inspect.TupleType(item_types=items):
                return all(plain(part) for part in items)
            case msgspec.inspect.DictType(key_type=key, value_type=value):
                return plain(key) and plain(value)
            case (
                msgspec.inspect.StrType()
                | msgspec.inspect.IntType()
                | msgspec.inspect.BoolType()
                | msgspec.inspect.NoneType()
                | msgspec.inspect.LiteralType()
                | msgspec.inspect.EnumType()
                | msgspec.inspect.RawType()
            ):
                return True
            case _:
                return False

    return plain(msgspec.inspect.type_info(type))
