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
import msgspec

from perdure.core import keys
from perdure.core.errors import Damaged, Invalid, NewerFormat
from perdure.core.layouts import Column, Index, Layout, Records
from perdure.core.values import Record, Tip, record_sum
from perdure.engines.sqlite_driver import RESERVE_BYTES

APPLICATION_ID = int.from_bytes(b"PERD")
FORMAT = 1
"""Of the whole store. A store with a higher one is refused untouched."""

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

    def create(self, schema: str = "main") -> str:
        """The table and its indexes. An index holds only records whose first field is set."""
        tenant_column = "tenant TEXT NOT NULL, " if self._has_tenant else ""
        fields = "".join(f"{field} ANY, " for field in self._fields)
        made = [
            f"CREATE TABLE {schema}.{self.name} (id INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, "
            f"version INTEGER NOT NULL, sum INTEGER NOT NULL, {tenant_column}{fields}"
            "value BLOB NOT NULL, attachment BLOB) STRICT"
        ]
        for index in self.records.indexes:
            tenant = () if index.every_tenant else ("tenant",)
            order = (*tenant, *self.fields_of(index), "key")
            name = f"{schema}.{self.index_name(index)}"
            made.append(
                f"CREATE INDEX {name} ON {self.name} ({', '.join(order)}) "
                f"WHERE {order[len(tenant)]} IS NOT NULL"
            )
        return ";\n".join(made)

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
        expected = self.records.columns(record.value)
        if self._has_tenant:
            expected = (key[0], *expected)
        if tuple(columns) != expected:
            raise Damaged(
                f"{self.records.name} {keys.show(key)}", "its index columns are not its value's"
            )
        return record


def checked_record(
    records: Records[Any], key: keys.Key, place: str, row: tuple[int, int, bytes, bytes | None]
) -> Record[Any]:
    """The record in `row`. Raises `Damaged` where the bytes do not match their checksum."""
    version, checksum, value, attachment = row
    if record_sum(records.name, place, version, value, attachment) != checksum:
        raise Damaged(f"{records.name} {keys.show(key)}", "it does not match its checksum")
    return Record(key, version, records.decode(key, value), attachment)


def incarnations(log: str) -> str:
    """The fact that holds the highest incarnation of a dropped stream that was forgotten since."""
    return f"incarnations of {log}"


def absent_tip(connection: apsw.Connection, log: str) -> Tip:
    """Where a stream stands that has no row: above every incarnation a cursor may still name."""
    forgotten: Any = connection.execute(SQL["fact"], (incarnations(log),)).get
    return Tip() if forgotten is None else Tip(forgotten)


def operation_sum(operation: tuple[str, str], digest: int, numbers: bytes) -> int:
    """Checksum of the row of an operation id."""
    return record_sum("operations", keys.SEPARATOR.join(operation), digest, numbers, None)


def check_file(path: Path) -> None:
    """Refuse what is not a store of this format, before SQLite has touched it.

    Raises `NewerFormat`, `Damaged`, or `Invalid` for a file of another kind.
    """
    with path.open("rb") as file:
        head = file.read(100)
    ours = int.from_bytes(head[68:72]) == APPLICATION_ID
    if head[:16] != b"SQLite format 3\0" or not ours:
        if path.with_name(path.name + ".mark").exists():
            raise Damaged(str(path), "its first bytes are not those of a Perdure store")
        raise Invalid(f"{path} is not a Perdure store. It was left as it is; name another path.")
    check_format(str(path), int.from_bytes(head[60:64]))
    if head[20] != RESERVE_BYTES:
        raise Damaged(str(path), "its header no longer announces page checksums")


def check_format(where: str, found: int) -> None:
    """Raises `NewerFormat` for a store of a format this release does not know."""
    if found > FORMAT:
        raise NewerFormat(
            f"{where} has store format {found}; this release knows up to {FORMAT}. "
            "It was left untouched; open it with the Perdure that wrote it, or a newer one."
        )


def check_layouts(
    connection: apsw.Connection, where: str, layouts: Sequence[Layout]
) -> list[Layout]:
    """The layouts the store does not hold yet. Raises `NewerFormat` for one written by a newer
    declaration, and `Invalid` for one declared otherwise under the same version."""
    stored = {name: (version, shape) for name, version, shape in connection.execute(SQL["layouts"])}
    missing: list[Layout] = []
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
        if (version, shape) != (layout.version, _shape(layout)):
            raise Invalid(
                f"{where}: {layout.name} is stored as version {version} with another key or other "
                f"indexes than version {layout.version} declares, and there is no upgrade for it."
            )
    return missing


def add_layout(connection: apsw.Connection, layout: Layout) -> None:
    """Make room for a collection. Inside the caller's transaction."""
    if isinstance(layout, Records):
        connection.execute(Table(layout).create())
    connection.execute(SQL["add_layout"], (layout.name, layout.version, _shape(layout)))


def _shape(layout: Layout) -> str:
    indexes = layout.indexes if isinstance(layout, Records) else None
    return msgspec.json.encode([layout.key, indexes]).decode()


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
