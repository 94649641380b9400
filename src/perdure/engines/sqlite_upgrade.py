"""Bringing an older store to the format of this release and to the indexes its layouts have gained.

A store is opened for writing only when its tables are those of this release and its layouts, so
this happens at open, before anybody reads.

Format steps run in one transaction, and with them the number of the format: a crash leaves the old
format or the newest. Until they have run, a store is read as it is, for its snapshot. So whoever
adds a step leaves in the code what reads the format before.

Of an index, columns and empty indexes are added first; then the columns are filled from the values,
a bounded piece a transaction, so that neither memory nor the log grows with the store; the layout's
new shape is written last. A crash on the way leaves the old shape: the next open does it again,
from the start, over what is done already. Until then an older release still finds the shape it
knows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import apsw

from perdure.core.engine import Step, Written
from perdure.core.errors import Damaged, Unavailable
from perdure.core.layouts import Records
from perdure.core.stored import FormatStep, Lacking, newest, shape_of
from perdure.engines.sqlite_driver import is_damage
from perdure.engines.sqlite_schema import SQL, Table

_PIECE_ROWS = 1_000
_CHECKPOINT_PIECES = 10

Note = Callable[[str], None]
"""Told how far it is; called by the thread that opens the store."""


Steps = tuple[FormatStep[apsw.Connection], ...]

STEPS: Steps = ()
"""From format 1 on, one after another. The last leads to the format that this release writes."""


def written(connection: apsw.Connection, steps: Steps, lacking: Lacking, number: int) -> Written:
    """What the store is in, and what an upgrade would do to it."""
    found: int = connection.pragma("user_version")
    todo: list[Step] = []
    if found < newest(steps):
        rows = sum(_count(connection, name) for (name,) in _rows(connection, SQL["tables"]))
        todo = [Step(step.says, rows) for step in steps if step.format > found]
    for records in lacking.indexes:
        rows = _count(connection, Table(records).name)
        todo.append(Step(f"new indexes of {records.name}", rows, records.name))
    return Written(found, newest(steps), tuple(todo), number)


def change_format(connection: apsw.Connection, steps: Steps, note: Note) -> None:
    """Run the steps that the store lacks, inside the caller's transaction."""
    for step in steps:
        if step.format > connection.pragma("user_version"):
            note(f"format {step.format}: {step.says}")
            step.run(connection)
            connection.pragma("user_version", step.format)


def add_indexes(connection: apsw.Connection, records: Records[Any], note: Note) -> None:
    """Bring the table of `records` to the indexes that are declared now."""
    table = Table(records)
    with connection:
        present = {row[1] for row in connection.execute(f"PRAGMA table_info({table.name})")}
        for name, column in table.added_columns():
            if name not in present:
                connection.execute(f"ALTER TABLE {table.name} ADD COLUMN {column}")
        for statement in table.create_indexes():
            connection.execute(statement)
    total = _count(connection, table.name)
    last = pieces = 0
    while (filled := _fill(connection, table, last)) is not None:
        last, pieces = filled, pieces + 1
        note(f"indexing {records.name}: {min(pieces * _PIECE_ROWS, total)} of {total}")
        if pieces % _CHECKPOINT_PIECES == 0:
            empty_log(connection)
    with connection:
        connection.execute(SQL["set_shape"], (shape_of(records), records.name))
    empty_log(connection)


def empty_log(connection: apsw.Connection) -> None:
    """Move the whole log into the database. Raises `Unavailable` where another program reads it."""
    left, _ = connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
    if left > 0:
        raise Unavailable(f"{connection.filename}: its log is in use by another program.")


def _fill(connection: apsw.Connection, table: Table, after: int) -> int | None:
    """Fill the index columns of one piece of rows; the id of its last row, None at the end. A row
    that cannot be read keeps what it has: reads and `verify` say what is wrong with it."""
    piece = f"SELECT id FROM {table.name} WHERE id > ? ORDER BY id LIMIT {_PIECE_ROWS}"
    ids = [id for (id,) in _rows(connection, piece, (after,))]
    filled = []
    for id in ids:
        try:
            sql = f"SELECT key, value FROM {table.name} WHERE id = ?"
            ((place, value),) = _rows(connection, sql, (id,))
            filled.append(table.filling(place, value, id))
        except (apsw.Error, Damaged) as error:
            if not is_damage(error):
                raise
    with connection:
        connection.executemany(table.fill, filled)
    return ids[-1] if ids else None


def _count(connection: apsw.Connection, table: str) -> int:
    count: int = connection.execute(f"SELECT count(*) FROM {table}").get
    return count


def _rows(connection: apsw.Connection, sql: str, values: tuple[Any, ...] = ()) -> list[Any]:
    return connection.execute(sql, values).fetchall()
