"""An older store, opened by who has taken a snapshot of it; without one it is refused."""

from __future__ import annotations

import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest

from perdure.core.engine import Engine
from perdure.core.errors import NeedsUpgrade

E = TypeVar("E", bound=Engine)


async def upgraded(opening: Callable[..., Awaitable[E]], **options: Any) -> E:
    """The store, upgraded. `opening` is what opens it with these options and others."""
    with pytest.raises(NeedsUpgrade):
        await opening(**options)
    before = await opening(read_only=True)
    try:
        assert before.written.steps
        with tempfile.TemporaryDirectory() as into:
            snapshot = await before.backup(Path(into), lambda done, total: None)
    finally:
        await before.close()
    engine = await opening(snapshots=[snapshot], **options)
    assert not engine.written.steps
    assert engine.written.format == engine.written.newest
    return engine
