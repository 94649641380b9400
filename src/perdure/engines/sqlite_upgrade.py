"""Giving a collection that is stored already the indexes its layout has gained since.

A store is opened for writing only when its tables are those of the layouts, so this happens at
open, before anybody reads. Columns and empty indexes are added first; then the columns are filled
from the values, a bounded piece a transaction, so that neither memory nor the log grows with the
store; the layout's new shape is written last. A crash on the way leaves the old shape: the next
open does it again, from the start, over what is done already. Until then an older release still
finds the shape it knows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import apsw

from perdure.core.errors import Damaged, Unavailable
from perdure.core.layouts import Records
from perdure.core.stored import shape_of
from perdure.engines.sqlite_driver import is_damage
from perdure.engines.sqlite_schema import SQL, Table

_PIECE_ROWS = 1_000
_CHECKPOINT_PIECES = 10

Note = Callable[[str], None]
"""Told how far it is; called by the thread that opens the store."""


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
    ((total,),) = _rows(connection, f"SELECT count(*) FROM {table.name}")
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


def _rows(connection: apsw.Connection, sql: str, values: tuple[Any, ...] = ()) -> list[Any]:
    return connection.execute(sql, values).fetchall()
