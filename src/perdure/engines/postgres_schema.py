"""What a postgres store looks like inside: its tables, how they are made and brought up to date.

A collection of records is one table: the joined key, version, checksum, a column for each indexed
field, value and attachment. Value and attachment are the authority, kept as they came; whoever
wants to look into a value casts it to jsonb. Everything else is static and lives in sql/postgres:
`schema.sql` is what a new store gets, the numbered files bring an older one to the same.

A migration names the oldest format whose code may go on using the store: while one process after
another is replaced by a newer release, both work.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from importlib.resources import files
from typing import TYPE_CHECKING, Any, NamedTuple

import asyncpg
import msgspec
import xxhash

from perdure.core import keys
from perdure.core.clock import Clock
from perdure.core.engine import Snapshot, Step, Written
from perdure.core.errors import Damaged, Invalid, Missing, NewerFormat
from perdure.core.layouts import Column, Index, Layout, Records
from perdure.core.stored import Lacking, check_layouts, check_whole, checked_record, shape_of
from perdure.core.values import Record
from perdure.engines.postgres_driver import SQL, Database, quoted

if TYPE_CHECKING:
    from perdure.engines.postgres_driver import Connection, Session


_OPENING = 0x7065726475726531
"""The advisory lock that processes take which make or change a schema, one at a time."""

_FILL_ROWS = 500
STREAM_IDS = 1_000
"""How many ids of streams are taken at a time; the sequence is declared so."""

_ALLOWED_ENCODING = "UTF8"
_VERSION_MIN = 13
_NAME_BYTES_MAX = 63


class Migration(NamedTuple):
    """One step of the schema. Code of format `serves` and later can use what it leaves."""

    number: int
    serves: int
    sql: str
    says: str = ""


def _migrations() -> tuple[Migration, ...]:
    found = []
    for file in (files("perdure.engines") / "sql" / "postgres").iterdir():
        if name := re.fullmatch(r"(\d{4})_\w+\.sql", file.name):
            text = file.read_text("utf-8")
            serves = re.search(r"^-- serves: (\d+)$", text, flags=re.MULTILINE)
            assert serves is not None, f"{file.name} does not say whom it serves"
            says = text.partition("\n")[0].removeprefix("-- ")
            found.append(Migration(int(name[1]), int(serves[1]), text, says))
    return tuple(sorted(found))


MIGRATIONS = _migrations()
FORMAT = MIGRATIONS[-1].number
"""The number of the last migration."""

SCHEMA = (files("perdure.engines") / "sql" / "postgres" / "schema.sql").read_text("utf-8")


class Table:
    """The SQL of one collection of records, and the way from its rows to records."""

    def __init__(self, records: Records[Any]) -> None:
        self.records = records
        self.name = quoted(self.name_of(records.name))
        self.has_tenant = any(not index.every_tenant for index in records.indexes)
        kinds = {str: "text", int: "bigint"}
        types = [kinds[kind] for kind in records.kinds()]
        fields = tuple(quoted(_short(f"field_{field}")) for field in records.fields)
        tenant = ("tenant",) if self.has_tenant else ()
        self._typed = list(zip(fields, types, strict=True))
        columns = ("key", "version", "sum", *tenant, *fields, "value", "attachment")
        arrays = ("text", "bigint", "bigint", *("text" for _ in tenant), *types, "text", "bytea")
        marks = ", ".join(f"${at}::{kind}[]" for at, kind in enumerate(arrays, 1))
        updates = ", ".join(f"{column} = excluded.{column}" for column in columns[1:])
        self.put = (
            f"INSERT INTO {self.name} ({', '.join(columns)}) SELECT * FROM unnest({marks}) "
            f"ON CONFLICT (key) DO UPDATE SET {updates}"
        )
        self.delete = f"DELETE FROM {self.name} WHERE key = ANY($1::text[])"
        self.versions = (
            f"SELECT 0, $1::text, key, version, 0, 0, 0, 0, '' FROM {self.name} "
            "WHERE key = ANY($2::text[])"
        )
        self.get = (
            f"SELECT key, version, sum, value, attachment FROM {self.name} "
            "WHERE key = ANY($1::text[])"
        )
        self.row = ", ".join(("key", "version", "sum", "value", "attachment", *tenant, *fields))
        self.sizes = (
            "SELECT key, octet_length(value) + coalesce(octet_length(attachment), 0) "
            f"FROM {self.name} WHERE key > $1 ORDER BY key LIMIT $2"
        )
        self.rows = (
            "SELECT key, version, sum, value, attachment FROM (SELECT *, sum(size) OVER "
            "(ORDER BY key) - size AS before FROM (SELECT key, version, sum, value, attachment, "
            "octet_length(value) + coalesce(octet_length(attachment), 0) AS size "
            f"FROM {self.name} WHERE key >= $1 AND key < $2 ORDER BY key LIMIT $3) AS page) "
            "AS sized WHERE before < $4 ORDER BY key"
        )
        self.next_key = f"SELECT key FROM {self.name} WHERE key >= $1 ORDER BY key LIMIT 1"
        self.present = f"SELECT key, version, sum FROM {self.name} WHERE key = ANY($1::text[])"
        self.get_many = f"SELECT {self.row} FROM {self.name} WHERE key = ANY($1::text[])"

    @staticmethod
    def name_of(collection: str) -> str:
        """The name of the table of a collection, not quoted."""
        return _short(f"records_{collection}")

    def create(self) -> list[str]:
        """The table and its indexes. A value is not compressed, so that writing it costs nothing
        and what it takes is what it is."""
        tenant = [("tenant", 'text COLLATE "C" NOT NULL')] if self.has_tenant else []
        fields = [(name, _collated(kind)) for name, kind in self._typed]
        columns = [
            ("key", 'text COLLATE "C" PRIMARY KEY'),
            ("version", "bigint NOT NULL"),
            ("sum", "bigint NOT NULL"),
            *tenant,
            *fields,
            ("value", 'text COLLATE "C" NOT NULL'),
            ("attachment", "bytea"),
        ]
        listed = ", ".join(" ".join(column) for column in columns)
        return [
            f"CREATE TABLE {self.name} ({listed})",
            *(
                f"ALTER TABLE {self.name} ALTER COLUMN {column} SET STORAGE EXTERNAL"
                for column in ("value", "attachment")
            ),
            *self.create_indexes(),
        ]

    def create_indexes(self) -> list[str]:
        """Every index of the table that is not there yet. An index holds only records whose first
        field is set."""
        made = []
        for index in self.records.indexes:
            fields = self.fields_of(index)
            tenant = () if index.every_tenant else ("tenant",)
            order = (*tenant, *(f"{field} NULLS FIRST" for field in fields), "key")
            name = quoted(_short(f"i_{self.records.name}_{index.name}"))
            made.append(
                f"CREATE INDEX IF NOT EXISTS {name} ON {self.name} ({', '.join(order)}) "
                f"WHERE {fields[0]} IS NOT NULL"
            )
        return made

    def add_columns(self) -> list[str]:
        """Every column that only indexes need."""
        tenant = [("tenant", "text COLLATE \"C\" NOT NULL DEFAULT ''")] if self.has_tenant else []
        fields = [(name, _collated(kind)) for name, kind in self._typed]
        return [
            f"ALTER TABLE {self.name} ADD COLUMN IF NOT EXISTS {name} {kind}"
            for name, kind in (*tenant, *fields)
        ]

    def fill(self) -> str:
        """Sets the columns that only indexes need, of one record in one version."""
        names = (*(("tenant",) if self.has_tenant else ()), *(name for name, _ in self._typed))
        sets = ", ".join(f"{name} = ${at}" for at, name in enumerate(names, 3))
        return f"UPDATE {self.name} SET {sets} WHERE key = $1 AND version = $2"

    def fields_of(self, index: Index) -> tuple[str, ...]:
        """The columns of an index, in its order."""
        return tuple(quoted(_short(f"field_{field}")) for field in index.fields)

    def holds(self, index: Index, where: Sequence[Column]) -> bool:
        """Whether a column can be equal to what is asked for at all, being text or a number."""
        kinds = dict(zip(self.records.fields, self.records.kinds(), strict=True))
        return all(
            isinstance(part, kinds[field]) for field, part in zip(index.fields, where, strict=False)
        )

    def index_columns(self, key: keys.Key, columns: Sequence[Column | None]) -> tuple[Any, ...]:
        """What the columns that only indexes need hold for a record."""
        return (key[0], *columns) if self.has_tenant else tuple(columns)

    def record(self, row: Iterable[Any]) -> Record[Any]:
        """The record in a row selected as `row`. Raises `Damaged` where its bytes or its index
        columns are not those that were written."""
        place, version, checksum, value, attachment, *columns = row
        key = keys.split(place)
        text = value.encode()
        record = checked_record(self.records, key, place, (version, checksum, text, attachment))
        found = self.records.stored_columns(record.value)
        if tuple(columns) != self.index_columns(key, found):
            raise Damaged(
                f"{self.records.name} {keys.show(key)}", "its index columns are not its value's"
            )
        return record


async def open_schema(
    database: Database,
    session: Connection,
    layouts: Sequence[Layout],
    clock: Clock,
    note: Callable[[str], None],
    copy_of: str | None,
    snapshots: Sequence[Snapshot],
    *,
    read_only: bool,
) -> tuple[str, Lacking, Written]:
    """Find or make the store, bring it up to date if one of the `snapshots` is of it, and return
    its id, what it still lacks, which is nothing unless `read_only`, and the format it is in. With
    `copy_of`, the id of another, it becomes a copy of that.

    All that is changed is changed in one transaction, by one process at a time. Raises `Missing`
    where there is none to be read, `Invalid`, `NewerFormat`, `NeedsUpgrade`.
    """
    where = database.where
    version = session.get_server_version().major
    if version < _VERSION_MIN:
        raise Invalid(
            f"{where}: PostgreSQL {version} is too old; it takes {_VERSION_MIN} or later."
        )
    encoding = await session.fetchval("SHOW server_encoding")
    if encoding != _ALLOWED_ENCODING:
        raise Invalid(
            f"{where}: the database keeps text in {encoding}, which cannot hold every key. "
            "Make one with ENCODING 'UTF8'."
        )
    if read_only:
        facts = await _facts(session, where)
        if facts is None:
            raise Missing(f"{where} holds no Perdure store, so there is nothing to read.")
        _check_format(where, facts)
        check_whole(where, facts["store_id"], facts.get("copy_of"), copy_of)
        lacking = check_layouts(await _layouts(session), where, layouts)
        return facts["store_id"], lacking, await _written(session, facts, lacking)
    async with session.transaction():
        await session.execute(SQL["lock"], _OPENING)
        facts = await _facts(session, where)
        if facts is None:
            facts = await create_store(session, where, clock, copy_of)
        _check_format(where, facts)
        check_whole(where, facts["store_id"], facts.get("copy_of"), copy_of)
        lacking = check_layouts(await _layouts(session), where, layouts, writing=True)
        found = await _written(session, facts, lacking)
        found.require(where, facts["store_id"], snapshots)
        await _migrate(session, found.format)
        for layout in lacking.collections:
            await add_layout(session, layout)
        for records in lacking.indexes:
            await widen(session, records, note)
    return facts["store_id"], Lacking(), Written(max(found.format, FORMAT), FORMAT)


async def choose_schema(
    database: Database, session: Connection, schema: str | None, *, read_only: bool
) -> None:
    """Settle which schema the store is in, and make the one that was named where it is absent."""
    there = schema is None or await session.fetchval(SQL["schema_exists"], schema)
    if not there and read_only:
        raise Missing(f"{database.where} does not exist, so there is nothing to read.")
    if schema is not None and not there:
        async with session.transaction():
            await session.execute(SQL["lock"], _OPENING)
            await session.execute(f"CREATE SCHEMA IF NOT EXISTS {quoted(schema)}")
    found = await session.fetchval("SELECT current_schema()")
    if found is None:
        raise Invalid(
            f"{database.where}: no schema of the search path exists. Name one in the URL, as in "
            "?schema=perdure; it is made where the role may make it."
        )
    database.use(found)


async def add_layout(session: Session, layout: Layout) -> None:
    """Make room for a collection. Inside the caller's transaction."""
    if isinstance(layout, Records):
        for statement in Table(layout).create():
            await session.execute(statement)
    await session.execute(SQL["set_layout"], layout.name, layout.version, shape_of(layout))


async def _facts(session: Session, where: str) -> dict[str, str] | None:
    """What is known of the store, None where the schema holds none."""
    columns = await session.fetch(SQL["columns"], "store")
    if not columns:
        return None
    if {column for (column,) in columns} != {"name", "value"}:
        raise _occupied(where)
    facts: dict[str, str] = dict(map(tuple, await session.fetch(SQL["facts"])))
    if "format" not in facts or "store_id" not in facts:
        raise _occupied(where)
    return facts


async def holds_store(session: Session, where: str) -> bool:
    """Whether there is a store already. Raises `Invalid` where its names are taken."""
    return await _facts(session, where) is not None


def _occupied(where: str) -> Invalid:
    return Invalid(
        f"{where}: the schema holds tables of somebody else by names that Perdure needs. They were "
        "left as they are; give Perdure a schema of its own, as in ?schema=perdure."
    )


async def create_store(
    session: Session, where: str, clock: Clock, copy_of: str | None = None
) -> dict[str, str]:
    """Make an empty store of today's schema, under an id of its own or that of its original."""
    try:
        await session.execute(SCHEMA)
    except (asyncpg.DuplicateObjectError, asyncpg.DuplicateTableError) as error:
        raise _occupied(where) from error
    facts = {
        "format": str(FORMAT),
        "serves": str(MIGRATIONS[-1].serves),
        "store_id": copy_of or clock.new_id("store"),
        **({"copy_of": copy_of} if copy_of else {}),
    }
    for fact in facts.items():
        await session.execute(SQL["set_fact"], *fact)
    return facts


def _check_format(where: str, facts: dict[str, str]) -> None:
    if int(facts["serves"]) > FORMAT:
        raise NewerFormat(
            f"{where} has store format {facts['format']}, which serves releases from format "
            f"{facts['serves']} on; this one has {FORMAT}. The store was left untouched; use the "
            "Perdure that wrote it, or a newer one."
        )


async def _migrate(session: Session, found: int) -> None:
    for migration in MIGRATIONS:
        if migration.number > found:
            await session.execute(migration.sql)
            await session.execute(SQL["set_fact"], "format", str(migration.number))
            await session.execute(SQL["set_fact"], "serves", str(migration.serves))


async def _written(session: Session, facts: dict[str, str], lacking: Lacking) -> Written:
    """What the store is in, and what an upgrade would do to it."""
    found = int(facts["format"])
    todo: list[Step] = []
    if found < FORMAT:
        ((rows,),) = await session.fetch(SQL["rows_about"])
        todo = [Step(step.says, rows) for step in MIGRATIONS if step.number > found]
    for records in lacking.indexes:
        ((rows,),) = await session.fetch(f"SELECT count(*) FROM {Table(records).name}")
        todo.append(Step(f"new indexes of {records.name}", rows, records.name))
    return Written(found, FORMAT, tuple(todo))


async def _layouts(session: Session) -> list[tuple[str, int, str]]:
    return [(name, version, shape) for name, version, shape in await session.fetch(SQL["layouts"])]


async def widen(
    session: Session,
    records: Records[Any],
    note: Callable[[str], None] = lambda detail: None,
) -> None:
    """Give a collection the indexes its layout has gained since. The columns are there before they
    are filled, and filled before anybody uses the index."""
    table = Table(records)
    for statement in table.add_columns():
        await session.execute(statement)
    last, filled = "", 0
    page = f"SELECT key, version, value FROM {table.name} WHERE key > $1 ORDER BY key LIMIT $2"
    while rows := await session.fetch(page, last, _FILL_ROWS):
        wanted = []
        for place, version, value in rows:
            key = keys.split(place)
            try:
                columns = records.columns(records.decode(key, value.encode()))
            except Damaged:  # it stays damage, to be found by whoever reads it
                continue
            wanted.append((place, version, *table.index_columns(key, columns)))
        await session.executemany(table.fill(), wanted)
        last, filled = rows[-1][0], filled + len(rows)
        note(f"indexing {records.name}: {filled}")
    for statement in table.create_indexes():
        await session.execute(statement)
    await session.execute(SQL["set_layout"], records.name, records.version, shape_of(records))


def decoded_numbers(text: str) -> tuple[int, ...]:
    """The numbers an operation was answered with."""
    return msgspec.json.decode(text, type=tuple[int, ...])


def _short(name: str) -> str:
    """A name that PostgreSQL keeps whole; of a longer one it would keep the beginning alone."""
    if len(name.encode()) <= _NAME_BYTES_MAX:
        return name
    return f"{name[: _NAME_BYTES_MAX // 4]}_{xxhash.xxh3_64_hexdigest(name.encode())}"


def _collated(kind: str) -> str:
    return 'text COLLATE "C"' if kind == "text" else kind
