"""Bugs planted in the engine of several stores, in how it moves partitions and in what it says of a
store that is down."""

from __future__ import annotations

from typing import Any

from perdure.core.errors import Unavailable
from perdure.engines import sharded_merge
from perdure.engines.sharded import ShardedEngine
from perdure.engines.sharded_map import ShardMap
from perdure.engines.sharded_move import Mover
from perdure.engines.sharded_places import Places

_get = ShardedEngine.get


async def _where_it_was(places: Places, partition: str) -> str:
    return places.map.homes(partition)[0]


async def _copy_nothing(mover: Mover, *of: Any) -> int:
    return 0


async def _remove_nothing(mover: Mover, *of: Any) -> bool:
    return True


async def _not_there(engine: ShardedEngine, records: Any, key: Any) -> Any:
    try:
        return await _get(engine, records, key)
    except Unavailable:
        return None


async def _unasked(places: Places, map: ShardMap, partition: str, silent: Any) -> str:
    try:
        return await places.home_id(partition)
    except Unavailable:
        return map.homes(partition)[0]


BUGS: tuple[tuple[str, Any, str, Any], ...] = (
    (
        "a partition that has moved is looked for where it was",
        *(Places, "home_id", _where_it_was),
    ),
    ("a partition is marked as moved and was not copied", Mover, "_copy", _copy_nothing),
    ("what has moved stays where it was too", Mover, "_remove", _remove_nothing),
    ("a key of a store that is down is answered as absent", ShardedEngine, "get", _not_there),
    (
        "a list leaves out what it cannot ask the whereabouts of",
        *(sharded_merge, "_home", _unasked),
    ),
)
"""What is wrong; and the owner, the name and the bug of what is replaced."""
