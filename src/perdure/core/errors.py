"""The six kinds of error, sorted by what the caller does next.

Every failure that leaves an engine, a surface or a service is one of these. A finer name is a
subclass and never changes what the caller should do; `code` is stable and machine-readable.
"""

from __future__ import annotations


class PerdureError(Exception):
    """Base of all errors raised on purpose. `str(error)` says what happened, to what, what next."""

    code = "error"


class Invalid(PerdureError):
    """The request can never succeed as it stands: correct it. Nothing was written."""

    code = "invalid"


class Missing(PerdureError):
    """The thing named does not exist (any more): stop asking for it."""

    code = "missing"


class Conflict(PerdureError):
    """A precondition did not hold and nothing was applied: read again, decide again."""

    code = "conflict"

    def __init__(self, where: str, expected: object, actual: object) -> None:
        super().__init__(
            f"{where}: expected {expected}, found {actual}; nothing was written. "
            "Read it again and decide on what it says now."
        )
        self.where = where
        self.expected = expected
        self.actual = actual


class Unavailable(PerdureError):
    """The store cannot do it now (locked, full, latched, unreachable): try again later."""

    code = "unavailable"


class Damaged(PerdureError):
    """Stored bytes are not what was written. Never skipped, never answered with another value.

    Raised by a scan, `resume` is the cursor that goes on behind the damage, for a caller that has
    taken note of it; None where there is nothing behind it.
    """

    code = "damaged"

    def __init__(self, where: str, why: str, resume: str | None = None) -> None:
        super().__init__(
            f"{where}: {why}. Nothing was changed; run `perdure verify` to list all damage."
        )
        self.where = where
        self.why = why
        self.resume = resume


class Closed(PerdureError):
    """The engine or service was closed: open a new one."""

    code = "closed"


class LimitExceeded(Invalid):
    """A size or count is over a stated limit. Limits are errors, never silent clamps."""

    code = "limit_exceeded"

    def __init__(self, what: str, actual: int, limit: int) -> None:
        super().__init__(f"{what} is {actual}, over the limit of {limit}.")
        self.what = what
        self.actual = actual
        self.limit = limit


class SpansPartitions(Invalid):
    """One batch touches two partitions; effects across partitions go through an outbox."""

    code = "spans_partitions"


class CursorRefused(Invalid):
    """A cursor was not made by this store for this question."""

    code = "cursor_refused"


class NewerFormat(Invalid):
    """The store was written by a newer Perdure; it was left untouched."""

    code = "newer_format"


class NeedsUpgrade(Unavailable):
    """The store was written by an older Perdure, and no snapshot was taken of it as it is."""

    code = "needs_upgrade"


class PromiseBroken(Invalid):
    """A surface's promise cannot be held by the engine it was given."""

    code = "promise_broken"


class Trimmed(Missing):
    """The entries asked for were trimmed away; reading can start at `first_kept`."""

    code = "trimmed"

    def __init__(self, where: str, first_kept: int) -> None:
        super().__init__(f"{where}: entries before {first_kept} were trimmed.")
        self.first_kept = first_kept


class WrongShards(Invalid):
    """The stores given are not the shards of one whole: one is missing, foreign or there twice."""

    code = "wrong_shards"


class StoreLocked(Unavailable):
    """Another process owns the store. `holder` is its pid, 0 where it could not be read;
    `control_socket` is where it answers its operator, empty if it does not."""

    code = "store_locked"

    def __init__(self, where: str, holder: int, control_socket: str = "") -> None:
        who = f"process {holder}" if holder else "another process"
        super().__init__(
            f"{where} is in use by {who}. Stop that process first, "
            "or ask it through `perdure status`."
        )
        self.holder = holder
        self.control_socket = control_socket


class StorageFull(Unavailable):
    """The disk is full. The write was rolled back; writes resume once there is space."""

    code = "storage_full"


class Latched(Unavailable):
    """A sync or a rollback failed earlier, so what is on disk is uncertain until reopened; or
    another process has taken the store over, so that this one may not write to it any more."""

    code = "latched"


class CommitUnknown(Unavailable):
    """The outcome of this commit could not be learned. Ask again with its operation id."""

    code = "commit_unknown"
