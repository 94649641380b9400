"""The engine protocol: what every way of keeping state must do. These docstrings are the
specification; `perdure.proving.conformance` holds an engine to them.

An engine keeps *records* (collection + key -> versioned value) and *logs* (collection + stream ->
numbered entries). It knows layouts, never the surfaces that own them.

What holds for every method
- Keys, values and batches are validated while they are built, so an engine never sees bad input.
- Reads see every commit acknowledged before the read began, and nothing of one that failed.
- Reads are bounded: a limit over `limits.PAGE_MAX` raises `LimitExceeded`; limit 0 is legal and
  empty.
- Stored bytes that do not match their checksum raise `Damaged`, naming the record or entry. The
  rest keeps working.
- After `close`, everything raises `Closed`. A store that a failed sync or rollback has made
  uncertain refuses writes with `Latched` until it is reopened; reads go on.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import msgspec

from perdure.core.batch import NOTHING, Batch
from perdure.core.errors import NeedsUpgrade
from perdure.core.keys import Key
from perdure.core.layouts import Column, Log, Records
from perdure.core.rows import At, Row, Rows
from perdure.core.values import Committed, Entry, Finding, Lost, Page, Record, Tip

T = TypeVar("T")


class Survives(msgspec.Struct, frozen=True):
    """What acknowledged writes outlive. An engine states what it can hold, a promise what it
    needs; `damage` means stored damage is detected and never answered as a value."""

    process_crash: bool = False
    power_cut: bool = False
    failed_sync: bool = False
    node_loss: bool = False
    damage: bool = False


class Recovered(msgspec.Struct, frozen=True):
    """What opening found in the store before anything else read it.

    `clean` is False where the last owner did not close it. `cut` names torn tails that were
    removed (never acknowledged, by the engine's rules), with file and byte offset; `findings`
    lists damage; `replayed` counts transactions or frames reapplied from a journal.
    """

    clean: bool
    replayed: int = 0
    cut: tuple[Finding, ...] = ()
    findings: tuple[Finding, ...] = ()
    duration_s: float = 0.0


class EngineStats(msgspec.Struct):
    """Counters since opening; read by whoever shows metrics, written by the engine only."""

    commits: int = 0
    groups: int = 0
    conflicts: int = 0
    sync_s: float = 0.0
    sync_last_s: float = 0.0
    log_size_bytes: int = 0
    stored_size_bytes: int = 0
    queued: int = 0


class Usage(msgspec.Struct, frozen=True):
    """What a store takes, in bytes: each collection with its indexes, what belongs to none, room
    that is free to be used again, and all of it. Logs may be told apart by estimate."""

    collections: dict[str, int]
    other_bytes: int
    free_bytes: int
    total_bytes: int


class Snapshot(msgspec.Struct, frozen=True):
    """What a backup holds: the store of this id after its commit `number`, and nothing later; where
    it is made of shards, `parts` are theirs."""

    store_id: str
    number: int
    format: int
    parts: tuple[Snapshot, ...] = ()


class Step(msgspec.Struct, frozen=True):
    """One step of an upgrade: what it does, and how many rows it goes through. It writes no more
    than `collection` takes, or than the whole store where that is empty."""

    says: str
    rows: int
    collection: str = ""


class Written(msgspec.Struct, frozen=True):
    """The format that a store is in, the newest one this release knows, and what an upgrade does to
    the store, which is nothing once it was opened for writing."""

    format: int
    newest: int
    steps: tuple[Step, ...] = ()
    number: int | None = None
    """The last commit, as it was when the store was opened; None where others commit as well."""

    def require(self, where: str, store_id: str, taken: Iterable[Snapshot]) -> None:
        """Raises `NeedsUpgrade` unless there is nothing to do or one of the snapshots that were
        `taken` is of this store after its last commit: so nothing is upgraded that is not kept as
        it was."""
        parts = (part for snapshot in taken for part in (snapshot, *snapshot.parts))
        kept = [part.number for part in parts if part.store_id == store_id]
        if self.steps and not (kept if self.number is None else self.number in kept):
            raise NeedsUpgrade(
                f"{where} was written by an older Perdure and needs an upgrade: "
                f"{'; '.join(step.says for step in self.steps)}. Nothing was changed. Run `perdure "
                "migrate`, which keeps a verified snapshot of it as it is and upgrades it."
            )


class Salvaged(msgspec.Struct, frozen=True):
    """What was brought over from a damaged store, counted by collection, and what could not be."""

    kept: dict[str, int]
    lost: list[Lost]


class Resharded(msgspec.Struct, frozen=True):
    """The shards there are now, by id, and how much has moved to where it belongs by that."""

    shards: tuple[str, ...]
    partitions: int
    rows: int


class ShardState(msgspec.Struct, frozen=True, kw_only=True):
    """One of several stores that are one together, as it was seen last. `down` says why it does not
    answer. One that was never seen has no id, and what it is, is not known."""

    id: str | None = None
    url: str
    primary: bool = False
    member: bool = False
    down: str | None
    recovered: Recovered | None = None


class Moving(msgspec.Struct, frozen=True, kw_only=True):
    """Partitions are on their way from the shards that had them to those that will, by id. `here`
    says whether this process moves them; `partitions` how many have moved, if that was counted."""

    members: tuple[str, ...]
    to: tuple[str, ...]
    here: bool
    partitions: int | None


class Sharding(msgspec.Struct, frozen=True):
    """The shards that a store is made of. `missing` are the ids of those that hold a part of it and
    were never seen: they are among those without an id."""

    shards: tuple[ShardState, ...]
    missing: tuple[str, ...]
    moving: Moving | None = None


Progress = Callable[[int, int], None]
"""Told bytes done and bytes in all, from the event loop."""


class Engine(Protocol):
    """See the head of this file for what holds for every method."""

    url: str
    """How it was opened, without credentials."""

    store_id: str
    """A random id made with the store; cursors are bound to it."""

    survives: Survives
    shared: bool
    """Whether several processes may open the store at once."""

    places_max: int | None
    """How many records, streams and operation ids it keeps, deleted ones until they are forgotten;
    None where the disk alone limits that."""

    recovered: Recovered
    written: Written

    @property
    def stats(self) -> EngineStats: ...

    @property
    def latched(self) -> str | None:
        """Why writes are refused until reopened, and in which shard where there are several; None
        while they are accepted."""
        ...

    def latched_for(self, log: Log[Any], stream: Key) -> str | None:
        """The same for writes to one stream: a shard that refuses them fails what lives in it."""
        ...

    async def commit(self, batch: Batch) -> Committed:
        """Apply a batch wholly or not at all; return once it is durable under `survives`.

        Versions rise by 1 with each write of a record, deletions included. `expect` and `check`
        name the version that must be live; 0 matches absent. Log numbers run from 1 without
        holes within an incarnation and are never reused; the order of commits is promised within
        a stream only. An empty batch commits nothing and returns at once.

        With an operation id: if it was committed before, with equal content, the first result is
        returned and preconditions are not looked at; other content under the same id raises
        `Invalid`. Ids are kept `limits.OPERATION_KEPT_S` in the batch's partition.

        Cancelling the caller does not undo a commit that was handed over.

        Raises `Conflict` (naming the operation, expected and actual; nothing applied),
        `SpansPartitions`, `LimitExceeded`, `StorageFull` (rolled back), `Latched`, and
        `CommitUnknown` where the outcome cannot be learned: it may be there or not, wholly.
        """
        ...

    async def get(self, records: Records[T], key: Key) -> Record[T] | None:
        """The live record at `key`, or None. Raises `Damaged`."""
        ...

    async def get_many(self, records: Records[T], keys: Sequence[Key]) -> list[Record[T] | None]:
        """The live records at `keys`, in that order, at most `limits.PAGE_MAX`."""
        ...

    async def scan(
        self,
        records: Records[T],
        prefix: Key,
        *,
        index: str | None = None,
        where: Sequence[Column] = (),
        limit: int,
        cursor: str | None = None,
        descending: bool = False,
        partial: bool = False,
    ) -> Page[Record[T]]:
        """Live records in order, at most `limit`.

        Without an index: those whose key starts with `prefix` and is longer, by key (code point
        order, segment by segment). With one: those whose leading index fields equal `where`, by
        the remaining fields and then by key; None sorts before text and numbers. `prefix` is then
        the tenant alone, or empty for an index of every tenant.

        A page ends before a damaged record; when that stands first, `Damaged` is raised, whose
        `resume` is the cursor that goes on behind it.

        A cursor comes from `Page.cursor` or `cursors.at_record`. It is opaque, survives restarts
        and concurrent writes (an item neither written nor deleted meanwhile is neither repeated
        nor left out), and raises `CursorRefused` when it belongs to another store, collection,
        index, prefix, `where` or direction.

        Where it is spread over shards and one of them is `Unavailable`, so is the page; with
        `partial` it holds what the others have, and names in `Page.missing` what it lacks.
        """
        ...

    async def count(
        self, records: Records[Any], prefix: Key, *, index: str | None = None, group: int = 0
    ) -> dict[tuple[Column | None, ...], int]:
        """How many live records there are under `prefix` (here it may be empty), by the first
        `group` fields of `index`; without an index under the one key `()`."""
        ...

    async def read(
        self,
        log: Log[T],
        stream: Key,
        *,
        after: int = 0,
        incarnation: int | None = None,
        limit: int,
    ) -> list[Entry[T]]:
        """Entries numbered above `after`, in order, at most `limit`; none past the end.

        The cost depends on `limit`, not on the length of the stream. Raises `Trimmed` with the
        first number kept if entries after `after` were trimmed, and `CursorRefused` if
        `incarnation` is given and is not the stream's.
        """
        ...

    async def tip(self, log: Log[Any], stream: Key) -> Tip:
        """Where a stream stands; `Tip()` for one that was never written."""
        ...

    async def wait(self, log: Log[Any], stream: Key, after: int, *, timeout_s: float) -> Tip:
        """The tip once entries above `after` exist or `timeout_s` has passed. No commit that was
        acknowledged before the call, or while it waits, is slept through."""
        ...

    async def streams(
        self,
        log: Log[Any],
        prefix: Key,
        *,
        limit: int,
        cursor: str | None = None,
        partial: bool = False,
    ) -> Page[Key]:
        """Keys of the streams with entries kept whose key starts with `prefix`, by key; `partial`
        as for `scan`."""
        ...

    def verify(self) -> AsyncIterator[Finding]:
        """Walk everything stored and yield what is not as it was written: checksums, index
        columns against values, numbering without holes, and the engine's own structures."""
        ...

    async def usage(self) -> Usage:
        """What the store takes now. It may read everything: ask seldom. Raises `Unavailable` where
        so much is written that it was ended."""
        ...

    async def backup(self, into: Path, progress: Progress) -> Snapshot:
        """Copy the store, as of one moment, into the empty directory `into`, while commits go on.

        Everything that was acknowledged before the call is in the copy, and nothing by half. When
        this returns, the copy has been read back and verified, and its files are durable;
        the name of `into` is the caller's to publish. The store itself is not changed, whatever
        becomes of the backup; what a failed one left in `into` is the caller's to remove.

        A store is made of the copy by `engines.restore_engine`, never by opening it.

        Raises `Invalid` where nothing outlives the process, `Unavailable` while another backup
        runs and where so much is committed meanwhile that it cannot go on, `StorageFull`, and
        `Damaged`: a copy of a damaged store would be taken for a sound one.
        """
        ...

    async def rows(self, *, after: At | None = None, partition: str | None = None) -> Rows:
        """All that is stored, or all of one partition, in the one order of `core.rows`: at most
        `limits.PAGE_MAX` rows and entries after `after`, and `limits.ROWS_BYTES_MAX` unless one
        row alone is larger. A page is of one moment; two are, where nobody writes between them.

        Other than scans it gives tombstones, incarnations and operation ids, all as they are, and
        lets nothing out: it raises `Damaged` for what is not as it was written, and `Invalid` for
        a store that holds a collection it was opened without.
        """
        ...

    async def load(
        self, rows: Sequence[Row], *, complete: bool = False, under: Batch = NOTHING
    ) -> None:
        """Write a page of rows as they are, wholly or not at all, as durably as a commit.
        `complete` makes a store that was opened as a copy one that opens as any other.

        What is there already, equal in everything, is left alone, so loading is repeated without
        harm. A stretch of a stream goes on where the stream ends, or overlaps it. How long a
        tombstone or an operation id is kept counts from here anew.

        `under` is a batch of checks, which must hold at that moment. Raises `Conflict` where one
        does not or a row would replace something else, and what `commit` raises.
        """
        ...

    async def unload(self, rows: Sequence[Row], *, under: Batch = NOTHING) -> None:
        """Remove a page of rows that another store keeps now, as if they had never been here:
        wholly or not at all, as durably as a commit. Stretches of a stream go in their order.

        What is not there any more is passed over, so unloading is repeated without harm. Raises
        `Conflict` where something else stands in the place of a row, and what `commit` raises;
        `under` as for `load`. An engine that cannot be a shard refuses with `Invalid`.
        """
        ...

    def announce(self, note: str) -> None:
        """Tell whoever is refused the store who holds it: lines of pid, boot and control socket."""
        ...

    async def close(self) -> None:
        """Finish commits under way, mark the store clean, release it. Closing twice is harmless."""
        ...
