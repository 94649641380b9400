"""What the collections of a sqlite store take on the disk, from SQLite's own count of pages.

Every page is read for it, so it is asked for seldom. Each b-tree is one step in a snapshot of its
own, which the log does not have to wait for long. Entries of all logs share one table: its pages
are divided by the number of entries each log keeps.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator
from typing import Any

import apsw

from perdure.core.engine import Usage
from perdure.engines.sqlite_driver import PAGE_BYTES
from perdure.engines.sqlite_schema import SQL

_LOG_TABLES = ("entries", "streams")


def usage_steps(connection: apsw.Connection) -> Generator[Usage | None, None, None]:
    """None after each step, and at last the whole."""
    kept: dict[str, int] = dict(_rows(connection, SQL["entries_by_log"]))
    taken: Counter[str] = Counter()
    logs = other = 0
    for name, table in _rows(connection, SQL["trees"]):
        ((size_bytes,),) = _rows(connection, SQL["tree_bytes"], (name,))
        size_bytes = size_bytes or 0
        if table.startswith("records_"):
            taken[table.removeprefix("records_")] += size_bytes
        elif table in _LOG_TABLES:
            logs += size_bytes
        else:
            other += size_bytes
        yield None
    entries = sum(kept.values())
    for log, count in kept.items():
        taken[log] = logs * count // entries if entries else 0
    ((pages,),) = _rows(connection, "PRAGMA page_count")
    ((free,),) = _rows(connection, "PRAGMA freelist_count")
    yield Usage(
        collections=dict(taken),
        other_bytes=other + (0 if entries else logs),
        free_bytes=free * PAGE_BYTES,
        total_bytes=pages * PAGE_BYTES,
    )


def _rows(connection: apsw.Connection, sql: str, values: tuple[Any, ...] = ()) -> list[Any]:
    return connection.execute(sql, values).fetchall()
