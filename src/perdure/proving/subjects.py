"""The engines this repository proves: a subject is a name and a way to open."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from threading import Thread

import apsw
import xxhash

from perdure.core.addresses import of_shards
from perdure.core.clock import Clock
from perdure.core.disk import Disk
from perdure.core.engine import Engine
from perdure.core.keys import Key, join
from perdure.core.layouts import Layout
from perdure.engines import open_engine, restore_engine
from perdure.proving import postgres
from perdure.proving.subject import LAYOUTS, NOTES, Subject


async def _memory(directory: Path, layouts: Sequence[Layout], clock: Clock) -> Engine:
    return await open_engine("memory://", layouts, clock=clock)


async def _sqlite(directory: Path, layouts: Sequence[Layout], clock: Clock) -> Engine:
    Disk().make_directory(directory)
    return await open_engine(f"sqlite:///{directory / 'state.db'}", layouts, clock=clock)


def _damage_sqlite(directory: Path, key: Key) -> None:
    _damage_file(directory / "state.db", key)


def _damage_file(path: Path, key: Key) -> None:
    """Change a byte of a value as somebody would who writes past the engine."""
    connection = apsw.Connection(str(path), vfs="cksmvfs")
    place = join(key)
    value = bytearray(
        connection.execute("SELECT value FROM records_notes WHERE key = ?", (place,)).get
    )
    value[-3] ^= 1
    connection.execute("UPDATE records_notes SET value = ? WHERE key = ?", (bytes(value), place))
    connection.close()


async def _restore_sqlite(copy: Path, directory: Path) -> None:
    url = f"sqlite:///{directory / 'state.db'}"
    await restore_engine(url, copy, LAYOUTS, lambda done, total: None)


async def _files(directory: Path, layouts: Sequence[Layout], clock: Clock) -> Engine:
    return await open_engine(f"file:///{directory / 'store'}", layouts, clock=clock)


def _damage_files(directory: Path, key: Key) -> None:
    """The same, as somebody would with an editor."""
    from perdure.engines.files_names import Tree  # the others are proven without it

    tree = Tree(directory / "store")
    tree.declare(NOTES)
    path = tree.record("notes", key)
    text = bytearray(path.read_bytes())
    text[text.index(b"sound")] ^= 1
    Disk().write_file(path, bytes(text))


async def _restore_files(copy: Path, directory: Path) -> None:
    await restore_engine(f"file:///{directory / 'store'}", copy, LAYOUTS, lambda done, total: None)


async def _copy_files(
    directory: Path, layouts: Sequence[Layout], clock: Clock, store_id: str
) -> Engine:
    url = f"file:///{directory / 'store'}"
    return await open_engine(url, layouts, clock=clock, copy_of=store_id)


async def _postgres(directory: Path, layouts: Sequence[Layout], clock: Clock) -> Engine:
    return await open_engine(postgres_url(directory), layouts, clock=clock)


def postgres_url(directory: Path) -> str:
    """A store in the shared database, in the schema that stands for a directory."""
    dsn = postgres.shared_dsn()
    schema = f"store_{xxhash.xxh3_64_hexdigest(str(directory.resolve()).encode())}"
    return f"{dsn}{'&' if '?' in dsn else '?'}schema={schema}"


def _damage_postgres(directory: Path, key: Key) -> None:
    """The same. In a thread, as a loop runs in this one."""
    import asyncpg

    from perdure.engines.postgres_driver import parse

    sql = "UPDATE records_notes SET value = overlay(value PLACING $2 FROM $3) WHERE key = $1"

    async def change() -> None:
        address = parse(postgres_url(directory))
        path = {"search_path": address.schema or ""}
        session = await asyncpg.connect(address.dsn, server_settings=path)
        find = "SELECT value FROM records_notes WHERE key = $1"
        value: str = await session.fetchval(find, join(key))
        at = len(value) - 3
        await session.execute(sql, join(key), chr(ord(value[at]) ^ 1), at + 1)
        await session.close()

    thread = Thread(target=asyncio.run, args=(change(),))
    thread.start()
    thread.join()


async def _restore_postgres(copy: Path, directory: Path) -> None:
    await restore_engine(postgres_url(directory), copy, LAYOUTS, lambda done, total: None)


async def _copy_memory(
    directory: Path, layouts: Sequence[Layout], clock: Clock, store_id: str
) -> Engine:
    return await open_engine("memory://", layouts, clock=clock, copy_of=store_id)


async def _copy_sqlite(
    directory: Path, layouts: Sequence[Layout], clock: Clock, store_id: str
) -> Engine:
    url = f"sqlite:///{directory / 'state.db'}"
    return await open_engine(url, layouts, clock=clock, copy_of=store_id)


async def _copy_postgres(
    directory: Path, layouts: Sequence[Layout], clock: Clock, store_id: str
) -> Engine:
    return await open_engine(postgres_url(directory), layouts, clock=clock, copy_of=store_id)


def shards_url(directory: Path, *numbers: int) -> str:
    """The SQLite shards of these numbers in a directory."""
    return of_shards(f"sqlite:///{directory / f'{number}.db'}" for number in numbers)


async def _sharded(directory: Path, layouts: Sequence[Layout], clock: Clock) -> Engine:
    Disk().make_directory(directory)
    return await open_engine(shards_url(directory, 0, 1, 2), layouts, clock=clock)


def _damage_sharded(directory: Path, key: Key) -> None:
    _damage_file(directory / "0.db", key)


async def _restore_sharded(copy: Path, directory: Path) -> None:
    await restore_engine(shards_url(directory, 0, 1, 2), copy, LAYOUTS, lambda done, total: None)


async def _sharded_memory(directory: Path, layouts: Sequence[Layout], clock: Clock) -> Engine:
    return await open_engine(of_shards(["memory://"] * 3), layouts, clock=clock)


KNOWN = {
    subject.name: subject
    for subject in (
        Subject("memory", _memory, copy=_copy_memory),
        Subject("sqlite", _sqlite, _damage_sqlite, _restore_sqlite, _copy_sqlite),
        Subject("files", _files, _damage_files, _restore_files, _copy_files),
        Subject("postgres", _postgres, _damage_postgres, _restore_postgres, _copy_postgres),
        Subject("sharded", _sharded, _damage_sharded, _restore_sharded),
        Subject("sharded-memory", _sharded_memory),
    )
}
