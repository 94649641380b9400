"""The postgres engine while a standby takes over: what takes no writes is refused by that name and
is no damage, and what takes over without all that was acknowledged is not written to."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import suppress
from functools import partial

import pytest

from perdure.core.batch import append
from perdure.core.errors import Latched, Unavailable
from perdure.engines.postgres import PostgresEngine
from perdure.engines.postgres_driver import Database
from perdure.proving.postgres import Server, make_server
from perdure.proving.proxy import proxied
from perdure.proving.subject import EVENTS, Note
from perdure.proving.waiting import wait_until
from tests.engines.postgres_stores import at, beside, opened

A = ("t", "a")


@pytest.fixture(scope="module")
def primary() -> Iterator[Server]:
    """A server that every test has a standby of, and that is well when one begins."""
    made = make_server()
    yield made
    made.remove()


@pytest.fixture
def standby(primary: Server) -> Iterator[Server]:
    primary.start()
    made = make_server(primary)
    yield made
    made.remove()


async def end_sessions(server: Server) -> None:
    await say(
        server,
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'perdure'",
    )


async def say(server: Server, *statements: str) -> None:
    async with beside(at(server.dsn, "public")) as session:
        for statement in statements:
            await session.execute(statement)


# proves C3, C12
async def test_a_standby_takes_no_writes_until_it_is_promoted_and_then_has_all(
    primary: Server, standby: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Database.again, "__kwdefaults__", {"patience_s": 0.2, "may_pass": None})
    async with proxied(primary.socket) as proxy:
        url = at(f"postgresql://perdure@127.0.0.1:{proxy.port}/postgres", "taken_over")
        engine = await opened(url)
        for _ in range(3):
            await engine.commit(append(EVENTS, A, [Note()]))
        with pytest.raises(Unavailable, match="it is a standby"):
            await opened(at(standby.dsn, "taken_over"))
        reader = await opened(at(standby.dsn, "taken_over"), read_only=True)
        assert reader.store_id == engine.store_id
        await reader.close()
        primary.stop()  # in good order: its standby is sent all of it
        proxy.target = standby.socket
        for _ in range(2):
            with pytest.raises(Unavailable, match="it is a standby"):
                await engine.commit(append(EVENTS, A, [Note()]))
            with pytest.raises(Unavailable, match="it is a standby"):
                await engine.tip(EVENTS, A)
        assert engine.latched is None
        await say(standby, "SELECT pg_promote()")
        assert (await engine.commit(append(EVENTS, A, [Note()]))).numbers == (4,)
        assert [finding async for finding in engine.verify()] == []
        await engine.close()


# proves C9
async def test_a_standby_that_lacks_what_was_confirmed_is_found_and_not_written_to(
    primary: Server, standby: Server
) -> None:
    hosts = ",".join(str(server.socket.parent) for server in (primary, standby))
    either = f"postgresql://perdure@/postgres?host={hosts}&target_session_attrs=read-write"
    engine = await opened(at(either, "lost"))
    await engine.commit(append(EVENTS, A, [Note()]))
    await wait_until(lambda: has(standby, 1), 30, "a standby that has the first")
    standby.stop()
    await engine.commit(append(EVENTS, A, [Note()]))
    primary.stop(signal.SIGQUIT)
    standby.start()
    await say(standby, "SELECT pg_promote()")
    with pytest.raises(Latched, match="lost what it had confirmed"):
        await engine.commit(append(EVENTS, A, [Note()]))
    assert (await engine.tip(EVENTS, A)).last == 1
    await engine.close()


async def has(server: Server, last: int) -> bool:
    reader = await opened(at(server.dsn, "lost"), read_only=True)
    try:
        return (await reader.tip(EVENTS, A)).last == last
    finally:
        await reader.close()


async def test_a_server_that_is_told_to_take_no_writes_is_heeded_and_taken_at_its_word(
    primary: Server,
) -> None:
    """As some do by themselves where their disk is nearly full."""
    primary.start()
    engine = await opened(at(primary.dsn, "told"))
    await engine.commit(append(EVENTS, A, [Note()]))
    told = "ALTER SYSTEM SET default_transaction_read_only = {}"
    await say(primary, told.format("on"), "SELECT pg_reload_conf()")
    await wait_until(lambda: refused(engine), 30, "writes that are refused")
    with pytest.raises(Unavailable, match="takes no writes"):
        await engine.commit(append(EVENTS, A, [Note()]))
    await end_sessions(primary)
    with pytest.raises(Unavailable, match="read-only"):
        await engine.commit(append(EVENTS, A, [Note()]))
    before = (await engine.tip(EVENTS, A)).last
    await say(primary, told.format("off"), "SELECT pg_reload_conf()")
    await wait_until(partial(written, engine, before), 30, "writes")
    assert engine.latched is None
    await engine.close()


async def refused(engine: PostgresEngine) -> bool:
    before = (await engine.tip(EVENTS, A)).last
    return not await written(engine, before)


async def written(engine: PostgresEngine, before: int) -> bool:
    with suppress(Unavailable):
        await engine.commit(append(EVENTS, A, [Note()]))
    return (await engine.tip(EVENTS, A)).last > before
