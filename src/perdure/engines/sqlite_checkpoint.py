"""Moving the log into the database, off the committer's thread, so that the log stays small.

SQLite starts its log over only when a checkpoint has caught up while nobody writes. Under steady
writes the background thread never quite does. So above a bound the committer finishes, between two
groups, what was written while the background thread was at it. It does so early where few batches
come at once: few have to wait then, and a log that is overwritten syncs twice as fast as one that
grows. Only a read that lasts can then still hold the log; above a higher bound it is interrupted,
and its caller told to try again. So the log stays under 64 MiB, but for a batch that is larger by
itself; SQLite cuts the file back when the log starts over. While a backup runs the bound is not
kept: see `sqlite_backup`.
"""

from __future__ import annotations

import enum
import queue
import threading
from collections.abc import Callable
from pathlib import Path

import apsw

from perdure.core.engine import EngineStats
from perdure.engines.sqlite_driver import known_full
from perdure.engines.sqlite_wal import FRAME_BYTES

_MIB = 1024 * 1024
_FEW_BATCHES = 8
FEW_STEP_FRAMES = 4 * _MIB // FRAME_BYTES
_STEP_FRAMES = 8 * _MIB // FRAME_BYTES
FINISH_FRAMES = 24 * _MIB // FRAME_BYTES
_MAKE_WAY_FRAMES = 44 * _MIB // FRAME_BYTES


class _Step(enum.Enum):
    """What the background thread is asked for."""

    MOVE = enum.auto()
    LET_GO = enum.auto()
    STOP = enum.auto()


class Checkpointer:
    """`after_group` belongs to the committer's thread; everything else to this one's own."""

    def __init__(
        self,
        connection: apsw.Connection,
        path: Path,
        stats: EngineStats,
        *,
        make_way: Callable[[], None],
        failed: Callable[[str], None],
    ) -> None:
        self._connection = connection
        self._path = path
        self._stats = stats
        self._make_way = make_way
        self._failed = failed
        self._steps: queue.SimpleQueue[_Step] = queue.SimpleQueue()
        self._seen_frames = 0
        self._nearly_done = False
        self._held = False
        self._file = path.stat().st_ino
        self._thread = threading.Thread(target=self._run, name="perdure-checkpoint", daemon=True)
        self._thread.start()

    def after_group(self, connection: apsw.Connection, frames: int, batches: int) -> None:
        """Keep the log within its bound, now that it holds `frames` after a group of `batches`."""
        few = batches < _FEW_BATCHES
        if frames < self._seen_frames:  # it has started over
            self._seen_frames = 0
            self._nearly_done = False
        if frames >= _MAKE_WAY_FRAMES and not self._held:
            if not self._checkpoint(connection, apsw.SQLITE_CHECKPOINT_PASSIVE):
                self._make_way()
                self._checkpoint(connection, apsw.SQLITE_CHECKPOINT_RESTART)
        elif self._nearly_done and (few or frames >= FINISH_FRAMES):
            self._nearly_done = False
            self._checkpoint(connection, apsw.SQLITE_CHECKPOINT_PASSIVE)
        elif frames - self._seen_frames >= (FEW_STEP_FRAMES if few else _STEP_FRAMES):
            self._seen_frames = frames
            self._nearly_done = False
            self._steps.put(_Step.MOVE)

    def hold(self) -> None:
        """Let the log grow from here on: a backup reads a moment of it, and nobody may be made to
        wait for that, nor it be interrupted."""
        self._held = True

    def let_go(self) -> None:
        """The backup is over. What has piled up is moved in the background before the bound is
        kept again, so that no commit waits for it."""
        self._steps.put(_Step.LET_GO)

    def close(self) -> None:
        """Stop after the checkpoint under way."""
        self._steps.put(_Step.STOP)
        self._thread.join()
        self._connection.close()

    def _run(self) -> None:
        while (step := self._steps.get()) is not _Step.STOP:
            self._checkpoint(self._connection, apsw.SQLITE_CHECKPOINT_PASSIVE)
            self._nearly_done = True
            if step is _Step.LET_GO:
                self._held = False

    def _checkpoint(self, connection: apsw.Connection, mode: int) -> bool:
        """Whether the whole log is in the database now. A checkpoint that does not get its turn, or
        no space, is made up for by the next one."""
        frames, moved = 1, 0
        try:
            frames, moved = connection.wal_checkpoint(mode=mode)
        except (apsw.BusyError, apsw.LockedError):
            return False
        except apsw.Error as error:
            if isinstance(known_full(error, connection), apsw.FullError):
                return False
            self._failed(f"a checkpoint failed ({error})")
        if not self._path.exists() or self._path.stat().st_ino != self._file:
            self._failed("its file was removed or replaced while it was open")
            return False
        self._stats.stored_size_bytes = self._path.stat().st_size
        return frames == moved
