"""The postgres engine beyond what every engine must do: which servers and schemas it takes, as whom
it works, how its tables change from release to release, and what it forgets in time."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import asyncpg
import msgspec
import pytest

from perdure.core.batch import append, delete, drop, join, put
from perdure.core.disk import Disk
from perdure.core.errors import (
    Closed,
    CursorRefused,
    Damaged,
    Invalid,
    Latched,
    Missing,
    NewerFormat,
    PromiseBroken,
    Unavailable,
)
from perdure.core.keys import join as join_key
from perdure.core.keys import show
from perdure.core.layouts import Index, Records
from perdure.core.limits import BATCH_OPS_MAX, CLOCK_OFF_S, OPERATION_KEPT_S, TOMBSTONE_KEPT_S
from perdure.core.values import Record, Tip
from perdure.engines import open_engine, postgres_commit, postgres_schema, restore_engine
from perdure.engines.postgres_backup import COPY
from perdure.engines.postgres_driver import SQL, parse
from perdure.engines.postgres_schema import FORMAT, MIGRATIONS, SCHEMA, Migration, Table
from perdure.proving.postgres import DSN, Server, make_server, shared_dsn
from perdure.proving.subject import EVENTS, FACTS, LAYOUTS, NOTES, Note
from perdure.surfaces.state import LAYOUTS as SURFACES
from tests.engines.postgres_stores import at, beside, opened
from tests.engines.upgrades import upgraded

A = ("t", "a")
B = ("t", "b")
BOX = ("t", "box")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    made = make_server()
    yield made
    made.remove()


@pytest.fixture
def url(server: Server, tmp_path: Path) -> str:
    return at(server.dsn, f"s_{abs(hash(tmp_path))}")


@pytest.fixture
async def administrator(server: Server) -> AsyncIterator[asyncpg.Connection[asyncpg.Record]]:
    session = await asyncpg.connect(server.dsn)
    yield session
    await session.close()


def _as(dsn: str, role: str) -> str:
    return dsn.replace("perdure@", f"{role}@")


@pytest.mark.parametrize(
    ("url", "dsn", "schema", "shown"),
    [
        (
            "postgresql://u:secret@db:5433/state?schema=mine",
            "postgresql://u:secret@db:5433/state",
            "mine",
            "postgresql://db:5433/state?schema=mine",
        ),
        (
            "postgres://u@/state?host=/run/pg&password=secret&sslmode=require",
            "postgresql://u@/state?host=%2Frun%2Fpg&password=secret&sslmode=require",
            None,
            "postgres:///state?host=/run/pg&sslmode=require",
        ),
        ("postgresql://a:1,b:2/x", "postgresql://a:1,b:2/x", None, "postgresql://a:1,b:2/x"),
    ],
)
def test_a_url_is_taken_apart_and_shown_without_credentials(
    url: str, dsn: str, schema: str | None, shown: str
) -> None:
    address = parse(url)
    assert (address.dsn, address.schema, address.shown) == (dsn, schema, shown)


# proves C2
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"fsync": "off"}, "fsync = off"),
        ({"full_page_writes": "off"}, "full_page_writes = off"),
        ({"synchronous_commit": "off"}, "synchronous_commit = off"),
    ],
)
async def test_a_server_that_promises_less_is_refused_in_words(
    settings: dict[str, str], words: str, url: str, server: Server
) -> None:
    server.stop()
    server.start(**settings)
    try:
        for read_only in (False, True):
            with pytest.raises(PromiseBroken, match=words):
                await opened(url, read_only=read_only)
    finally:
        server.stop()
        server.start()


async def test_a_session_that_cannot_write_is_refused_in_words(
    url: str, administrator: asyncpg.Connection[asyncpg.Record]
) -> None:
    await administrator.execute("DROP ROLE IF EXISTS reader; CREATE ROLE reader LOGIN SUPERUSER")
    await administrator.execute("ALTER ROLE reader SET default_transaction_read_only = on")
    with pytest.raises(Unavailable, match="read-only"):
        await opened(_as(url, "reader"))


async def test_an_ordinary_role_works_in_a_schema_of_its_own(
    server: Server, administrator: asyncpg.Connection[asyncpg.Record]
) -> None:
    await administrator.execute(
        "CREATE ROLE plain LOGIN; CREATE SCHEMA own AUTHORIZATION plain;"
        "CREATE ROLE named LOGIN; CREATE SCHEMA named AUTHORIZATION named"
    )
    for url in (_as(at(server.dsn, "own"), "plain"), _as(server.dsn, "named")):
        engine = await opened(url)
        await engine.commit(put(NOTES, (*BOX, "1"), Note("open")) + append(EVENTS, A, [Note()]))
        assert [finding async for finding in engine.verify()] == []
        assert (await engine.usage()).collections["notes"] > 0
        await engine.close()
    for refused in (at(server.dsn, "absent"), at(server.dsn, "public")):
        with pytest.raises(Invalid, match="schema of its own"):
            await opened(_as(refused, "plain"))
    found = await administrator.fetch(
        "SELECT DISTINCT schemaname FROM pg_tables WHERE tablename = 'records_notes'"
    )
    assert {"own", "named"} <= {name for (name,) in found}


async def test_a_schema_that_belongs_to_somebody_else_is_left_alone(
    url: str, administrator: asyncpg.Connection[asyncpg.Record]
) -> None:
    schema = parse(url).schema
    for theirs in ("CREATE TABLE store (id int)", "CREATE TABLE entries (id int)"):
        await administrator.execute(f"CREATE SCHEMA {schema}; SET search_path = {schema}; {theirs}")
        with pytest.raises(Invalid, match="schema of its own"):
            await opened(url)
        tables = await administrator.fetch(
            "SELECT 1 FROM pg_tables WHERE schemaname = current_schema()"
        )
        assert len(tables) == 1
        await administrator.execute(f"DROP SCHEMA {schema} CASCADE")


# proves C2
async def test_what_cannot_be_opened_is_refused_by_what_it_is(url: str, server: Server) -> None:
    with pytest.raises(Invalid, match="lets nobody in"):
        await opened(_as(url, "nobody_at_all"))
    with pytest.raises(Missing, match="absent"):
        await opened(url.replace("/postgres?", "/absent?"))
    with pytest.raises(Missing, match="nothing to read"):
        await opened(url, read_only=True)
    async with beside(at(server.dsn, "public")) as session:
        await session.execute("CREATE DATABASE latin ENCODING 'LATIN1' TEMPLATE template0")
    with pytest.raises(Invalid, match="UTF8"):
        await opened(url.replace("/postgres?", "/latin?"))


async def test_a_store_that_is_open_for_reading_takes_no_writes(url: str) -> None:
    engine = await opened(url)
    await engine.commit(put(FACTS, A, Note(rank=3)))
    reader = await opened(url, read_only=True)
    record = await reader.get(FACTS, A)
    assert record is not None
    assert reader.store_id == engine.store_id
    with pytest.raises(Latched, match="reading only"):
        await reader.commit(put(FACTS, A, Note()))
    await reader.close()
    await engine.close()


async def test_many_processes_make_one_store(url: str) -> None:
    import asyncio

    engines = await asyncio.gather(*(opened(url) for _ in range(8)))
    assert len({engine.store_id for engine in engines}) == 1
    for engine in engines:
        await engine.commit(append(EVENTS, A, [Note()]))
    assert (await engines[0].tip(EVENTS, A)).last == 8
    for engine in engines:
        await engine.close()
    with pytest.raises(Closed):
        await engines[0].get(FACTS, A)


async def _shape(session: asyncpg.Connection[asyncpg.Record]) -> list[tuple[Any, ...]]:
    """Tables, columns, indexes and sequences of a schema, as PostgreSQL describes them."""
    schema = await session.fetchval("SELECT current_schema()")
    found = await session.fetch(
        "SELECT c.relname, a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull, "
        "a.attcollation, a.attstorage, c.reloptions, pg_get_indexdef(c.oid), a.attnum "
        "FROM pg_class AS c JOIN pg_attribute AS a ON a.attrelid = c.oid AND a.attnum > 0 "
        "WHERE c.relnamespace = current_schema()::regnamespace AND c.relkind IN ('r', 'i', 'S') "
        "ORDER BY 1, 9"
    )
    rows = [tuple(row) for row in found]
    return [(*row[:7], (row[7] or "").replace(schema, "schema"), row[8]) for row in rows]


async def test_the_schema_is_the_sum_of_its_migrations(server: Server) -> None:
    shapes = []
    for name, scripts in (
        ("whole", [SCHEMA]),
        ("summed", [migration.sql for migration in MIGRATIONS]),
    ):
        async with beside(at(server.dsn, name)) as session:
            await session.execute(f"CREATE SCHEMA {name}")
            for script in scripts:
                await session.execute(script)
            shapes.append(await _shape(session))
    assert shapes[0] == shapes[1]
    assert len(shapes[0]) > 40


def test_migrations_are_numbered_without_holes() -> None:
    assert [migration.number for migration in MIGRATIONS] == list(range(1, FORMAT + 1))
    assert all(0 < migration.serves <= migration.number for migration in MIGRATIONS)


# proves C2
@pytest.mark.parametrize("serves", [FORMAT, FORMAT + 1])
async def test_a_newer_schema_serves_older_code_where_it_says_so(
    serves: int, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = await opened(url)
    await engine.commit(put(FACTS, A, Note(rank=1)))
    await engine.close()
    newer = Migration(FORMAT + 1, serves, "ALTER TABLE writers ADD COLUMN host text")
    with monkeypatch.context() as later:
        later.setattr(postgres_schema, "MIGRATIONS", (*MIGRATIONS, newer))
        later.setattr(postgres_schema, "FORMAT", FORMAT + 1)
        engine = await upgraded(partial(opened, url))
        assert (await engine.commit(put(FACTS, A, Note(rank=2)))).numbers == (2,)
        await engine.close()
    if serves > FORMAT:
        with pytest.raises(NewerFormat, match="left untouched"):
            await opened(url)
        return
    engine = await opened(url)
    assert (await engine.commit(put(FACTS, A, Note(rank=3)))).numbers == (3,)
    await engine.close()
    async with beside(url) as session:
        facts = dict(map(tuple, await session.fetch(SQL["facts"])))
    assert facts["format"] == str(FORMAT + 1)


async def test_a_collection_gets_the_indexes_its_layout_has_gained(url: str) -> None:
    narrow = Records("notes", Note, key=NOTES.key)
    engine = await opened(url, layouts=[narrow])
    names = [f"{number:04}" for number in range(1_200)]
    for start in range(0, len(names), 400):
        batch = put(narrow, (*BOX, "first"), Note())
        for name in names[start : start + 400]:
            batch += put(narrow, (*BOX, name), Note("open" if int(name) % 3 else None, int(name)))
        await engine.commit(batch)
    await engine.close()
    reader = await opened(url, read_only=True)
    with pytest.raises(Invalid, match="lacks a table or an index"):
        await reader.scan(NOTES, ("t",), index="by_rank", limit=1)
    await reader.close()
    told: list[str] = []
    engine = await upgraded(partial(opened, url), note=told.append)
    counted = await engine.count(NOTES, ("t",), index="by_status", group=1)
    assert counted == {("open",): 800}
    page = await engine.scan(NOTES, ("t",), index="by_rank", limit=3, descending=True)
    assert [record.key[-1] for record in page.items] == ["1199", "1198", "1197"]
    assert told[-1] == "indexing notes: 1201"
    assert [finding async for finding in engine.verify()] == []
    await engine.close()
    with pytest.raises(Invalid, match="there is no way"):
        await opened(url, layouts=[narrow])


async def test_names_longer_than_the_server_keeps_stay_distinct(url: str) -> None:
    long = "x" * 70
    many = [
        Records(f"{long}{end}", Note, key=("tenant", "id"), indexes=(Index(long, ("rank",)),))
        for end in "ab"
    ]
    engine = await opened(url, layouts=many)
    for rank, records in enumerate(many):
        await engine.commit(put(records, A, Note(rank=rank)))
    for rank, records in enumerate(many):
        page = await engine.scan(records, ("t",), index=long, where=(rank,), limit=9)
        assert len(page.items) == 1
    await engine.close()


def test_every_surface_has_columns_of_one_kind() -> None:
    for layout in SURFACES:
        if isinstance(layout, Records):
            assert len(layout.kinds()) == len(layout.fields)


def test_a_field_that_may_hold_text_or_numbers_cannot_be_indexed_here() -> None:
    class Loose(msgspec.Struct):
        either: str | int

    loose = Records("loose", Loose, key=("id",), indexes=(Index("by", ("either",)),))
    with pytest.raises(Invalid, match="declare it as str or as int"):
        Table(loose)


# proves C18
async def test_scans_walk_along_an_index(url: str) -> None:
    engine = await opened(url)
    for number in range(50):
        await engine.commit(put(NOTES, (*BOX, f"{number}"), Note("open", number, due_s=number)))
    async with beside(url) as session:
        await session.execute("SET enable_seqscan = off; SET enable_bitmapscan = off")
        for where, order, index in (
            ("key > 't\x1f' AND key < 't '", "key", "records_notes_pkey"),
            (
                "field_status IS NOT NULL AND tenant = 't' AND field_status = 'open' "
                "AND field_rank > 3",
                "field_rank ASC NULLS FIRST, key",
                "i_notes_by_status",
            ),
            (
                "field_status IS NOT NULL AND tenant = 't' AND field_status < 'p'",
                "field_status DESC NULLS LAST, field_rank DESC NULLS LAST, key DESC",
                "i_notes_by_status",
            ),
            ("field_due_s IS NOT NULL", "field_due_s ASC NULLS FIRST, key", "i_notes_due"),
        ):
            plan = await session.fetch(
                f"EXPLAIN SELECT * FROM records_notes WHERE {where} ORDER BY {order} LIMIT 5"
            )
            text = "\n".join(line for (line,) in plan)
            assert index in text
            assert "Sort" not in text, text
    await engine.close()


async def test_a_batch_with_more_places_than_locks_takes_the_gate(url: str) -> None:
    import asyncio

    one, other = await opened(url), await opened(url)
    large = append(EVENTS, A, [Note()])
    for number in range(postgres_commit.LOCKS_MAX + 10):
        large += put(FACTS, ("t", f"{number}"), Note())
    assert len(large.ops) < BATCH_OPS_MAX
    done = await asyncio.gather(
        *(engine.commit(batch) for engine in (one, other) for batch in (large, large)),
        *(other.commit(append(EVENTS, A, [Note()])) for _ in range(10)),
    )
    assert len(done) == 14
    assert (await one.tip(EVENTS, A)).last == 14
    record = await other.get(FACTS, ("t", "7"))
    assert record is not None
    assert record.version == 4
    for engine in (one, other):
        await engine.close()


# proves C23
async def test_what_is_old_is_forgotten_and_nothing_else(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres_commit, "_SWEEP_EVERY", 1)
    engine = await opened(url)
    await engine.commit(put(FACTS, A, Note()) + put(FACTS, B, Note()))
    await engine.commit((delete(FACTS, A) + delete(FACTS, B)).named("op"))
    await engine.commit(append(EVENTS, A, [Note()]) + append(EVENTS, B, [Note()]))
    await engine.commit(drop(EVENTS, A) + drop(EVENTS, B))
    old = await engine.commit(append(EVENTS, B, [Note()]))
    assert old.numbers == (1,)
    async with beside(url) as session:
        await session.execute(
            f"UPDATE tombstones SET deleted_s = deleted_s - {TOMBSTONE_KEPT_S + 60} "
            "WHERE key LIKE '%a'"
        )
        await session.execute(f"UPDATE streams SET dropped_s = dropped_s - {TOMBSTONE_KEPT_S + 60}")
        kept_s = OPERATION_KEPT_S + CLOCK_OFF_S
        await session.execute(f"UPDATE operations SET committed_s = committed_s - {kept_s + 60}")
        await engine.commit(put(FACTS, ("t", "c"), Note()))
        await engine.commit(delete(FACTS, ("t", "c")))  # a sweep follows it
        await engine.commit(put(FACTS, ("t", "c"), Note()))
        left = "SELECT (SELECT count(*) FROM tombstones), (SELECT count(*) FROM operations), "
        left += "(SELECT count(*) FROM streams)"
        assert tuple(await session.fetchrow(left) or ()) == (1, 0, 1)
    assert await engine.tip(EVENTS, A) == Tip(2)
    assert (await engine.commit(append(EVENTS, A, [Note()]))).numbers == (1,)
    with pytest.raises(CursorRefused):
        await engine.read(EVENTS, A, incarnation=1, limit=1)
    assert (await engine.commit(put(FACTS, A, Note(), expect=0))).numbers == (1,)
    assert (await engine.commit(put(FACTS, B, Note(), expect=0))).numbers == (3,)
    await engine.close()


# proves C7, C8
@pytest.mark.parametrize(
    ("change", "where"),
    [
        ("UPDATE records_notes SET field_rank = 9 WHERE key LIKE '%2'", "notes t/box/2"),
        ("UPDATE records_notes SET version = 9 WHERE key LIKE '%2'", "notes t/box/2"),
        ("UPDATE records_notes SET tenant = 'u' WHERE key LIKE '%2'", "notes t/box/2"),
        ("UPDATE records_notes SET attachment = 'x' WHERE key LIKE '%2'", "notes t/box/2"),
        ("UPDATE records_notes SET value = 'null' WHERE key LIKE '%2'", "notes t/box/2"),
        ("UPDATE entries SET value = value || ' ' WHERE seq = 2", "events t/a entry 2"),
        ("DELETE FROM entries WHERE seq = 2", "events t/a entry 2"),
        ("INSERT INTO entries SELECT stream, 1, 9, 0, '' FROM entries LIMIT 1", "events t/a"),
        ("INSERT INTO entries VALUES (77, 1, 1, 0, '')", "entries of stream 77"),
        ("UPDATE streams SET last = 2", "events t/a"),
        ("UPDATE tombstones SET version = 1", "facts t/a"),
        ("UPDATE operations SET numbers = '[1]'", "operation op"),
    ],
)
async def test_damage_is_found_where_it_is_and_is_not_backed_up(
    change: str, where: str, url: str, tmp_path: Path
) -> None:
    engine = await opened(url)
    for name in "123":
        await engine.commit(put(NOTES, (*BOX, name), Note("open", 1)))
    await engine.commit(append(EVENTS, A, [Note()] * 4).named("op") + put(FACTS, A, Note()))
    await engine.commit(delete(FACTS, A))
    assert [finding async for finding in engine.verify()] == []
    async with beside(url) as session:
        await session.execute(change)
    found = [finding async for finding in engine.verify()]
    assert {finding.where for finding in found} == {where}
    with pytest.raises(Damaged):
        await engine.backup(tmp_path, lambda done, total: None)
    assert await engine.get(NOTES, (*BOX, "1")) is not None
    await engine.commit(put(FACTS, B, Note()))
    await engine.close()


# proves C10
async def test_reads_that_share_a_statement_do_not_share_damage(url: str, server: Server) -> None:
    keys = [(*BOX, f"{n:02}") for n in range(40)]
    engine = await opened(url)
    await engine.commit(join(put(NOTES, key, Note("x" * 250, 1)) for key in keys))
    await engine.close()
    async with beside(url) as session:
        await session.execute("CHECKPOINT")
        path = await session.fetchval("SELECT pg_relation_filepath('records_notes')")
        find = "SELECT key FROM records_notes WHERE ctid < '(1,0)'"
        first_page = {row["key"] for row in await session.fetch(find)}
    server.stop()
    with (server.directory / "data" / path).open("r+b") as file:
        file.seek(4_000)
        byte = file.read(1)
        file.seek(4_000)
        file.write(bytes([byte[0] ^ 1]))
    server.start()
    engine = await opened(url)
    asked = (engine.get(NOTES, key) for key in keys)
    found = dict(zip(keys, await asyncio.gather(*asked, return_exceptions=True), strict=True))
    for key, one in found.items():
        if join_key(key) in first_page:
            assert isinstance(one, Damaged)
            assert one.where == f"notes {show(key)}"
        else:
            assert isinstance(one, Record)
    assert 0 < len(first_page) < len(keys)
    await engine.close()


# proves C17
async def test_a_copy_that_was_changed_is_refused_and_leaves_nothing(
    url: str, tmp_path: Path
) -> None:
    engine = await opened(url)
    for number in range(30):
        batch = put(NOTES, (*BOX, f"{number}"), Note("open", number), attachment=b"x" * 999)
        await engine.commit(batch + append(EVENTS, A, [Note(body="y" * 999)]))
    await engine.backup(tmp_path, lambda done, total: None)
    await engine.close()
    sound = (tmp_path / COPY).read_bytes()
    restored = f"{url}_restored"
    for at_byte in range(0, len(sound), len(sound) // 20):
        for changed in (
            sound[:at_byte],
            sound[:at_byte] + bytes((sound[at_byte] ^ 1,)) + sound[at_byte + 1 :],
        ):
            (tmp_path / COPY).write_bytes(changed)
            with pytest.raises(Damaged):
                await restore_engine(restored, tmp_path, LAYOUTS, lambda done, total: None)
    with pytest.raises(Missing):
        await opened(restored, read_only=True)
    (tmp_path / COPY).write_bytes(sound)
    await restore_engine(restored, tmp_path, LAYOUTS, lambda done, total: None)
    with pytest.raises(Invalid, match="holds a store"):
        await restore_engine(restored, tmp_path, LAYOUTS, lambda done, total: None)
    copy = await opened(restored)
    assert (await copy.commit(append(EVENTS, A, [Note()]))).numbers == (31,)
    assert (await copy.commit(append(EVENTS, B, [Note()]))).numbers == (1,)
    assert [finding async for finding in copy.verify()] == []
    await copy.close()


async def test_the_core_does_not_need_the_driver() -> None:
    blocked = (
        "import sys, asyncio; sys.modules['asyncpg'] = None\n"
        "import perdure.frontends.cli.main, perdure.proving.torture, perdure.proving.subjects\n"
        "from perdure.engines import open_engine\n"
        "asyncio.run(open_engine('postgresql://db/x', []))"
    )
    ran = subprocess.run(
        (sys.executable, "-c", blocked), capture_output=True, text=True, check=False
    )
    assert "Invalid: postgresql:// needs the driver asyncpg: install perdure[postgres]." in (
        ran.stderr
    )


def test_without_a_server_proofs_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DSN, "postgresql://given/db")
    assert shared_dsn() == "postgresql://given/db"
    monkeypatch.delenv(DSN)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("perdure.proving.postgres._shared", [])
    with pytest.raises(Missing, match=DSN):
        shared_dsn()


def test_a_server_ends_with_the_process_that_started_it() -> None:
    starting = (
        "import os, signal\nfrom perdure.proving.postgres import make_server\n"
        "server = make_server()\nprint(server.pid, server.directory, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    ran = subprocess.run((sys.executable, "-c", starting), capture_output=True, check=False)
    said, directory = ran.stdout.decode().split()
    pid = int(said)
    for _ in range(200):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            shutil.rmtree(directory)
            return
        subprocess.run(("sleep", "0.05"), check=True)
    pytest.fail(f"PostgreSQL {pid} goes on without whoever started it")


async def test_the_engine_is_opened_by_its_url(url: str) -> None:
    engine = await open_engine(url, LAYOUTS, disk=Disk())
    assert engine.shared
    assert engine.survives.node_loss
    assert "@" not in engine.url
    await engine.close()


# proves C2
async def test_an_older_process_does_not_write_past_a_newer_index(url: str) -> None:
    narrow = Records("notes", Note, key=NOTES.key)
    older = await opened(url, layouts=[narrow, EVENTS])
    await older.commit(put(narrow, (*BOX, "1"), Note("open", 1)))
    newer = await upgraded(partial(opened, url, layouts=[NOTES, EVENTS]))
    with pytest.raises(Latched, match="more indexes"):
        await older.commit(put(narrow, (*BOX, "2"), Note("open", 2)))
    assert older.latched is not None
    record = await older.get(narrow, (*BOX, "1"))
    assert record is not None
    await newer.commit(put(NOTES, (*BOX, "2"), Note("open", 2)))
    assert await newer.count(NOTES, ("t",), index="by_status") == {(): 2}
    assert [finding async for finding in newer.verify()] == []
    await older.close()
    await newer.close()


async def test_a_value_that_is_no_text_is_refused_before_others_meet_it(url: str) -> None:
    class Verbatim(msgspec.Struct):
        body: msgspec.Raw

    raw = Records("raw", Verbatim, key=("tenant", "id"))
    engine = await opened(url, layouts=[raw, EVENTS])
    for body in (b'"\xff"', b'"\0"'):
        with pytest.raises(Invalid, match="a value of raw"):
            await engine.commit(put(raw, A, Verbatim(msgspec.Raw(body))))
    assert (await engine.commit(append(EVENTS, A, [Note()]))).numbers == (1,)
    await engine.close()
