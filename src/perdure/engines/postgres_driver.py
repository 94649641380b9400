"""The driver of the postgres engine: where the server is, sessions with the promise in force, and
its errors in ours.

A server may run with settings under which it acknowledges what it can lose. They are read back in
every session that writes, and a server that has one of them is refused, with words for the people
who run it. Waiting has an end everywhere: to connect, for a lock, for a statement, for an answer.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from importlib.resources import files
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import asyncpg
import msgspec

from perdure.core.addresses import without_credentials
from perdure.core.clock import Clock
from perdure.core.errors import (
    Closed,
    Damaged,
    Invalid,
    Missing,
    PerdureError,
    PromiseBroken,
    StorageFull,
    Unavailable,
)

if TYPE_CHECKING:
    Connection = asyncpg.Connection[asyncpg.Record]
    Session = Connection | asyncpg.pool.PoolConnectionProxy[asyncpg.Record]

R = TypeVar("R")

DRIVER_ERRORS = (
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    OSError,
)
"""All that the driver raises; a `TimeoutError` is an `OSError`."""

CONNECT_S = 5.0
LOCK_MS = 5_000
URGENT_LOCK_MS = 500
"""The same for what tells the living from the dead: one that has to wait is not to hold up others
for as long as it takes to be taken for dead."""

STATEMENT_MS = 30_000
IDLE_MS = 4_000
"""A process that is stopped inside a transaction holds its locks for so long: less than it takes
others to wait for a lock, and to take it for dead and its work over."""

ANSWER_S = 40.0
"""Longer than the server takes to give a statement up: then it is the network that is silent."""

PATIENCE_S = 10.0
"""How long a server that cannot be reached is asked again, before whoever waits is told."""

RESOLVE_S = 30.0
"""How long it is asked what became of a commit. A session that was cut off ends sooner."""

_PAUSE_MIN_S, _PAUSE_MAX_S = 0.02, 1.0
_POOL_MAX = 8
_CACHED_STATEMENTS = 500

_SESSION = {
    "application_name": "perdure",
    "lock_timeout": str(LOCK_MS),
    "statement_timeout": str(STATEMENT_MS),
    "idle_in_transaction_session_timeout": str(IDLE_MS),
    # Every statement here is a few short walks along an index; without statistics, as in a table
    # that was filled a moment ago, the planner might take the whole table for one.
    "enable_seqscan": "off",
    "enable_bitmapscan": "off",
    "jit": "off",
    "max_parallel_workers_per_gather": "0",
}

_WRONG = {
    ("fsync", "off"): "it does not wait for its disk, and a power cut loses what it confirmed. "
    "Set fsync = on in postgresql.conf and restart it",
    ("full_page_writes", "off"): "a page that a power cut tears cannot be repaired. "
    "Set full_page_writes = on in postgresql.conf and reload it",
    ("synchronous_commit", "off"): "it confirms commits before they are on its disk. "
    "Set synchronous_commit = on for the server, the database or the role that Perdure uses",
}
_BEHIND = {
    ("in_hot_standby", "on"): "it is a standby. Name the primary, or several hosts with "
    "target_session_attrs=read-write",
}
_NOT_WRITABLE = {
    ("default_transaction_read_only", "on"): "its sessions are read-only. "
    "Set default_transaction_read_only = off for the role that Perdure uses",
}


_POOLED = "unsupported startup parameter"
"""What a pooler says that knows no settings of a session."""


class Address(msgspec.Struct, frozen=True):
    """Where a store is: what the driver connects to, the schema in it (None: the first of the
    search path), and how it is shown, without credentials."""

    dsn: str
    schema: str | None
    shown: str


def parse(url: str) -> Address:
    """The address in `postgresql://[user[:password]@]host[:port]/database[?schema=NAME&...]`."""
    parts = urlsplit(url)
    query = parse_qsl(parts.query, keep_blank_values=True)
    schema = dict(query).get("schema")
    if schema is not None and not 0 < len(schema.encode()) < 64:
        raise Invalid(f"{schema!r} cannot be the name of a schema: it has 1 to 63 bytes.")
    rest = [(name, value) for name, value in query if name != "schema"]
    return Address(
        dsn=urlunsplit(("postgresql", parts.netloc, parts.path, urlencode(rest), "")),
        schema=schema,
        shown=without_credentials(url),
    )


def quoted(name: str) -> str:
    """A name as an identifier in SQL."""
    return '"' + name.replace('"', '""') + '"'


def named_statements() -> dict[str, str]:
    """The statements of sql/postgres/queries.sql by their names."""
    text = (files("perdure.engines") / "sql" / "postgres" / "queries.sql").read_text("utf-8")
    parts = re.split(r"^-- name: (\w+)\n", text, flags=re.MULTILINE)[1:]
    return {name: sql.strip() for name, sql in zip(parts[::2], parts[1::2], strict=True)}


SQL = named_statements()


class Database:
    """The sessions of one engine: a pool that reads, and single ones for whoever asks."""

    def __init__(self, address: Address, clock: Clock, *, read_only: bool) -> None:
        self.where = address.shown
        self.clock = clock
        self.closed = False
        self.address = address
        self._read_only = read_only
        self._settings = dict(_SESSION)
        self._pool: asyncpg.Pool[asyncpg.Record] | None = None
        if address.schema is not None:
            self.use(address.schema)
        if read_only:
            self._settings["default_transaction_read_only"] = "on"

    def use(self, schema: str) -> None:
        """Have every session from now on find its tables in this schema and nowhere else."""
        self._settings["search_path"] = quoted(schema)

    async def connect(
        self, answer_s: float | None = ANSWER_S, *, urgent: bool = False
    ) -> Connection:
        """A session of its own, in which an answer is waited for so long. Raises what the driver
        raises."""
        settings = {"lock_timeout": str(URGENT_LOCK_MS)} if urgent else {}
        return await asyncpg.connect(
            self.address.dsn,
            timeout=CONNECT_S,
            command_timeout=answer_s,
            server_settings=self._settings | settings,
            statement_cache_size=_CACHED_STATEMENTS,
        )

    async def connect_for_long(self) -> Connection:
        """A session for what takes as long as it takes: nothing in it is given up. A server that is
        starting, or gone for a moment, is waited for."""

        async def attempt() -> Connection:
            session = await self.connect(answer_s=None)
            await session.execute(SQL["take_time"])
            return session

        return await self.again(attempt)

    async def open_pool(self) -> None:
        """From now on reads are answered."""
        self._pool = await asyncpg.create_pool(
            self.address.dsn,
            min_size=0,
            max_size=_POOL_MAX,
            timeout=CONNECT_S,
            command_timeout=ANSWER_S,
            server_settings=self._settings,
            statement_cache_size=_CACHED_STATEMENTS,
            init=self._check_again,
            reset=_leave,
        )

    async def read(self, ask: Callable[[Session], Awaitable[R]]) -> R:
        """The answer of a session to a question that changes nothing. It is asked again in a new
        session where one is lost. Raises errors of ours."""

        async def once() -> R:
            if self._pool is None or self.closed:
                raise Closed(f"{self.where} was closed.")
            async with self._pool.acquire(timeout=PATIENCE_S) as session:
                return await ask(session)

        return await self.again(once)

    async def again(
        self,
        attempt: Callable[[], Awaitable[R]],
        *,
        patience_s: float = PATIENCE_S,
        may_pass: Callable[[BaseException], bool] | None = None,
    ) -> R:
        """Try until it succeeds, fails for a reason that stays, or fails `patience_s` after its
        first failure; what `may_pass` is by default that the session is lost. Raises errors of
        ours."""
        deadline_s: float | None = None
        may_pass = may_pass or is_lost
        pause_s = _PAUSE_MIN_S
        while True:
            try:
                return await attempt()
            except DRIVER_ERRORS as error:
                if self.closed:
                    raise Closed(f"{self.where} was closed.") from error
                now_s = self.clock.monotonic_s()
                deadline_s = now_s + patience_s if deadline_s is None else deadline_s
                if not may_pass(error) or now_s > deadline_s:
                    raise translate(error, self.where) from error
                if self._pool is not None:
                    await self._pool.expire_connections()
            await self.clock.sleep(pause_s)
            pause_s = min(2 * pause_s, _PAUSE_MAX_S)

    async def check_promise(self, session: Session, *, to_read: bool = False) -> None:
        """Refuse a server that acknowledges what it can lose, that may lack what was acknowledged,
        or that cannot be written to where that is needed.

        Raises `PromiseBroken`, and `Unavailable` for what may be over in a moment.
        """
        rules = dict(_WRONG)
        if not self._read_only:
            rules |= _BEHIND if to_read else _BEHIND | _NOT_WRITABLE
        names = [*(name for name, _ in rules), *self._settings]
        found = await session.fetch(SQL["settings"], names)
        if forgotten := self._settings.keys() - {row["name"] for row in found if row["mine"]}:
            raise _pooled(self.where, ", ".join(sorted(forgotten)))
        stand = {(row["name"], row["setting"]) for row in found}
        for rule, why in rules.items():
            if rule in stand:
                kind = PromiseBroken if rule in _WRONG else Unavailable
                raise kind(f"{self.where}: the server runs with {' = '.join(rule)}, so {why}.")

    async def pin_promise(self, session: Session) -> None:
        """The same of a new session of a store that is open, which may do better later; and what
        it commits stays as durable as it is now, whatever the server is told meanwhile."""
        await self._check_again(session, to_read=False)
        await session.execute(SQL["pin"])

    async def _check_again(self, session: Session, *, to_read: bool = True) -> None:
        try:
            await self.check_promise(session, to_read=to_read)
        except PromiseBroken as error:
            raise Unavailable(str(error)) from error

    async def close(self) -> None:
        """End every session of the pool, those in use after what they do."""
        self.closed = True
        if self._pool is None:
            return
        try:
            await asyncio.wait_for(self._pool.close(), CONNECT_S)
        except DRIVER_ERRORS:
            self._pool.terminate()


class Held(Database):
    """A database seen through one session: whoever reads sees its transaction and moment."""

    def __init__(self, database: Database, session: Connection) -> None:
        super().__init__(database.address, database.clock, read_only=True)
        self._session = session
        self._free = asyncio.Lock()

    async def read(self, ask: Callable[[Session], Awaitable[R]]) -> R:
        async with self._free:
            with translating(self.where):
                return await ask(self._session)


async def _leave(session: Session) -> None:
    """Reads leave nothing behind in a session that would have to be undone."""


def is_lost(error: BaseException) -> bool:
    """Whether the session or the server is gone, so that another session may do better."""
    if isinstance(error, asyncpg.PostgresError):
        state = error.sqlstate or ""
        if _POOLED in str(error):
            return False
        return state[:2] == "08" or state in ("57P01", "57P02", "57P03", "57P05", "25P03")
    if isinstance(error, asyncpg.InterfaceError):
        return "clos" in str(error)
    return isinstance(error, OSError | asyncpg.InternalClientError)


def is_passing(error: BaseException) -> bool:
    """Whether a statement was given up for what others were doing, and may do better alone."""
    state = getattr(error, "sqlstate", None) or ""
    return state in ("55P03", "40P01", "40001", "57014") or state.startswith("53")


def is_damage(error: BaseException) -> bool:
    """Whether a read failed because what is stored is not what was written."""
    if isinstance(error, asyncpg.PostgresError):
        error = translate(error, "")
    return isinstance(error, Damaged | UnicodeDecodeError)


def translate(error: BaseException, where: str) -> BaseException:
    """What a driver's error means to the caller; the error itself where it is a mistake of ours."""
    if is_lost(error):
        return Unavailable(
            f"{where}: the database cannot be reached ({_words(error)}). "
            "See that it runs, then try again."
        )
    state = getattr(error, "sqlstate", None) or ""
    match state[:2], state:
        case _, "08P01" if _POOLED in str(error):
            return _pooled(where, str(error).partition(":")[2].strip())
        case _, "53100":
            return StorageFull(
                f"{where}: the database's disk is full. The write was rolled back; "
                "it will work again once there is space."
            )
        case (("53" | "40" | "58" | "54"), _):
            return Unavailable(
                f"{where}: the database could not do it ({_words(error)}). Try again."
            )
        case _, ("55P03" | "57014"):
            return Unavailable(
                f"{where}: the database took too long, as others hold what it needs or there is "
                f"too much to do ({_words(error)}). Nothing was written. Try again."
            )
        case _, "25006":
            return Unavailable(
                f"{where}: the server takes no writes now; it may have become a standby. "
                "Name the primary, or wait until it is one."
            )
        case "XX", ("XX001" | "XX002"):
            return Damaged(where, f"PostgreSQL finds its files damaged: {_words(error)}")
        case "28", _:
            return Invalid(f"{where}: the server lets nobody in by that name ({_words(error)}).")
        case _, ("3D000" | "3F000"):
            return Missing(f"{where}: {_words(error)}. Create it, or correct the URL.")
        case _, "42501":
            return Invalid(
                f"{where}: the role may not do that ({_words(error)}). Give it a schema of its "
                "own: CREATE SCHEMA perdure AUTHORIZATION its_name, and ?schema=perdure in the URL."
            )
    return error


@contextmanager
def damage_at(where: str) -> Iterator[None]:
    """Raise what the driver says of damage inside the block as ours, in the place it is about."""
    try:
        yield
    except (asyncpg.PostgresError, UnicodeDecodeError) as error:
        if not is_damage(error):
            raise
        raise Damaged(where, f"it cannot be read ({_words(error)})") from error


class translating:  # noqa: N801 - reads as a statement: `with translating(where):`
    """Raise driver errors inside the block as ours."""

    def __init__(self, where: str) -> None:
        self._where = where

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(error, DRIVER_ERRORS):
            meaning = translate(error, self._where)
            if isinstance(meaning, PerdureError):
                raise meaning from error


def _pooled(where: str, settings: str) -> PromiseBroken:
    """The error for what does not let a session have its settings."""
    return PromiseBroken(
        f"{where}: what Perdure connects to does not heed {settings}, as a pooler does not that "
        "gives one session to many clients. Perdure bounds its waiting and finds its tables by "
        "them. Connect to the server itself; Perdure keeps few sessions, and keeps them."
    )


def _words(error: BaseException) -> str:
    return str(error).split("\n")[0] or type(error).__name__
