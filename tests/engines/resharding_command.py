"""The command line of a Perdure that has one more surface, whose state is partitioned. With DIES_AT
in the environment it kills itself, as the system would, when so many partitions were copied."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from typing import Any

from perdure import library
from perdure.core.rows import Row
from perdure.engines.sqlite import SqliteEngine
from perdure.frontends.cli.main import main
from perdure.proving.subject import MOVES, PLIES

_left = int(os.environ.get("DIES_AT", "0"))
_load = SqliteEngine.load


async def _load_and_die(self: SqliteEngine, rows: Sequence[Row], **named: Any) -> None:
    global _left
    await _load(self, rows, **named)
    _left -= 1
    if _left == 0:
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    library.LAYOUTS = (*library.LAYOUTS, MOVES, PLIES)
    SqliteEngine.load = _load_and_die  # type: ignore[method-assign]
    main()
