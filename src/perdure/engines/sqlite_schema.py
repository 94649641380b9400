"""What a sqlite store looks like inside: its format, its tables, and the SQL made from layouts.

Records of a collection are one table: the joined key, version, checksum, one column an indexed
field, value and attachment. Everything else is static and lives in sql/sqlite.sql.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import apsw

from perdure.core import keys
from perdure.core.errors import Damaged, Invalid, NewerFormat
from perdure.core.layouts import Column, Index, Layout, Records
from perdure.core.stored import checked_record, shape_of
from perdure.core.values import Record, Tip, record_sum
from perdure.engines.sqlite_driver import RESERVE_BYTES

APPLICATION_ID = int.from_bytes(b"PERD")
STREAM_SHIFT = 32
SEQ_MAX = (1 << STREAM_SHIFT) - 1
STREAM_ID_MAX = (1 << 31) - 1


def _named_statements() -> dict[str, str]:
    text = (files("perdure.engines") / "sql" / "sqlite.sql").read_text("utf-8")
    parts = re.split(r"^-- name: (\w+)\n", text, flags=re.MULTILINE)[1:]
    return {name: sql.strip() for name, sql in zip(parts[::2], parts[1::2], strict=True)}


SQL = _named_statements()


class Table:
    """The SQL of one collection of records, and the way from its rows to records."""

    def __init__(self, records: Records[Any]) -> None:
        self.records = records
        self.name = _quoted(f"records_{records.name}")
        self._fields = tuple(_quoted(f"field_{field}") for field in records.fields)
        self._has_tenant = any(not index.every_tenant for index in records.indexes)
        tenant = ("tenant",) if self._has_tenant else ()
        columns = ("key", "version", "sum", *tenant, *self._fields, "value", "attachment")
        marks = ", ".join("?" * len(columns))
        updates = ", ".join(f"{column} = excluded.{column}" for column in columns[1:])
        self.put = (
            f"INSERT INTO {self.name} ({', '.join(columns)}) VALUES ({marks}) "
            f"ON CONFLICT (key) DO UPDATE SET {updates}"
        )
        self.delete = f"DELETE FROM {self.name} WHERE key = ?"
        self.versions = f"SELECT key, version FROM {self.name} WHERE key IN carray(?)"
        self.get = f"SELECT version, sum, value, attachment FROM {self.name} WHERE key = ?"
        self.row = ", ".join(
            ("key", "version", "sum", "value", "attachment", *tenant, *self._fields)
        )
        self.get_many = f"SELECT {self.row} FROM {self.name} WHERE key IN carray(?)"
        sets = ", ".join(f"{column} = ?" for column in (*tenant, *self._fields))
        self.fill = f"UPDATE {self.name} SET {sets} WHERE id = ?"

    def create(self, schema: str = "main") -> str:
        """The table and its indexes. An index holds only records whose first field is set."""
        tenant_column = "tenant TEXT NOT NULL, " if self._has_tenant else ""
        fields = "".join(f"{field} ANY, " for field in self._fields)
        made = [
            f"CREATE TABLE {schema}.{self.name} (id INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, "
            f"version INTEGER NOT NULL, sum INTEGER NOT NULL, {tenant_column}{fields}"
            "value BLOB NOT NULL, attachment BLOB) STRICT"
        ]
        return ";\n".join((*made, *self.create_indexes(schema)))

    def create_indexes(self, schema: str = "main") -> list[str]:
        """Every index of the table that is not there yet."""
        made = []
        for index in self.records.indexes:
            tenant = () if index.every_tenant else ("tenant",)
            order = (*tenant, *self.fields_of(index), "key")
            name = f"{schema}.{self.index_name(index)}"
            made.append(
                f"CREATE INDEX IF NOT EXISTS {name} ON {self.name} ({', '.join(order)}) "
                f"WHERE {order[len(tenant)]} IS NOT NULL"
            )
        return made

    def added_columns(self) -> list[tuple[str, str]]:
        """Name and definition of each column that only indexes need."""
        tenant = [("tenant", "tenant TEXT NOT NULL DEFAULT ''")] if self._has_tenant else []
        return tenant + [
            (f"field_{field}", f"{_quoted(f'field_{field}')} ANY") for field in self.records.fields
        ]

    def filling(self, place: str, value: bytes, id: int) -> tuple[Any, ...]:
        """What `fill` binds. Raises `Damaged` for a value that cannot be read."""
        key = keys.split(place)
        return (*self._index_columns(Record(key, 0, self.records.decode(key, value))), id)

    def _index_columns(self, record: Record[Any]) -> tuple[Column | None, ...]:
        columns = self.records.columns(record.value)
        return (record.key[0], *columns) if self._has_tenant else columns

    def index_name(self, index: Index) -> str:
        return _quoted(f"index_{self.records.name}_{index.name}")

    def fields_of(self, index: Index) -> tuple[str, ...]:
        """The columns of an index, in its order."""
        return tuple(_quoted(f"field_{field}") for field in index.fields)

    def values(
        self,
        place: str,
        version: int,
        columns: Sequence[Column | None],
        value: bytes,
        attachment: bytes | None,
    ) -> tuple[Any, ...]:
        """What `put` binds."""
        checksum = record_sum(self.records.name, place, version, value, attachment)
        if self._has_tenant:
            tenant = place.partition(keys.SEPARATOR)[0]
            return (place, version, checksum, tenant, *columns, value, attachment)
        return (place, version, checksum, *columns, value, attachment)

    def record(self, row: tuple[Any, ...]) -> Record[Any]:
        """The record in a row selected as `row`. Raises `Damaged` where its bytes or its index
        columns are not those that were written."""
        place, version, checksum, value, attachment, *columns = row
        key = keys.split(place)
        record = checked_record(self.records, key, place, (version, checksum, value, attachment))
        found = self.records.stored_columns(record.value)
        if tuple(columns) != ((key[0], *found) if self._has_tenant else found):
            raise Damaged(
                f"{self.records.name} {keys.show(key)}", "its index columns are not its value's"
            )
        return record


def incarnations(log: str) -> str:
    """The fact that holds the highest incarnation of a dropped stream that was forgotten since."""
    return f"incarnations of {log}"


def absent_tip(connection: apsw.Connection, log: str) -> Tip:
    """Where a stream stands that has no row: above every incarnation a cursor may still name."""
    forgotten: Any = connection.execute(SQL["fact"], (incarnations(log),)).get
    return Tip() if forgotten is None else Tip(forgotten)


def check_file(path: Path, newest: int) -> None:
    """Refuse what is not a store of a format up to `newest`, before SQLite has touched it.

    Raises `NewerFormat`, `Damaged`, or `Invalid` for a file of another kind.
    """
    with path.open("rb") as file:
        head = file.read(100)
    ours = int.from_bytes(head[68:72]) == APPLICATION_ID
    if head[:16] != b"SQLite format 3\0" or not ours:
        if path.with_name(path.name + ".mark").exists():
            raise Damaged(str(path), "its first bytes are not those of a Perdure store")
        raise Invalid(f"{path} is not a Perdure store. It was left as it is; name another path.")
    check_format(str(path), int.from_bytes(head[60:64]), newest)
    if head[20] != RESERVE_BYTES:
        raise Damaged(str(path), "its header no longer announces page checksums")


def check_format(where: str, found: int, newest: int) -> None:
    """Raises `NewerFormat` for a store of a format this release does not know."""
    if found > newest:
        raise NewerFormat(
            f"{where} has store format {found}; this release knows up to {newest}. "
            "It was left untouched; open it with the Perdure that wrote it, or a newer one."
        )


def add_layout(connection: apsw.Connection, layout: Layout) -> None:
    """Make room for a collection. Inside the caller's transaction."""
    if isinstance(layout, Records):
        connection.execute(Table(layout).create())
    connection.execute(SQL["add_layout"], (layout.name, layout.version, shape_of(layout)))


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
