"""The postgres engine while its server and its network fail: what was acknowledged is there, once;
what is not known is said to be unknown; and the engine goes on by itself when they are back."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from collections.abc import AsyncIterator, Iterator
from functools import reduce
from operator import add
from pathlib import Path

import asyncpg
import pytest

from perdure.core.batch import append, check, put
from perdure.core.errors import CommitUnknown, Latched, PerdureError, PromiseBroken, Unavailable
from perdure.core.keys import join
from perdure.core.layouts import Records
from perdure.core.limits import PAGE_MAX
from perdure.core.values import Committed, Tip
from perdure.engines import postgres_commit, postgres_driver
from perdure.engines.postgres import PostgresEngine
from perdure.engines.postgres_commit import Committer
from perdure.engines.postgres_driver import Database
from perdure.proving.postgres import Server, make_server
from perdure.proving.proxy import At, Proxy, proxied
from perdure.proving.subject import EVENTS, FACTS, LAYOUTS, Note
from perdure.proving.waiting import wait_until
from tests.engines.postgres_stores import at, beside, opened

A = ("t", "a")
KILLS = {
    "immediate stop": (signal.SIGQUIT, 3),
    "SIGKILL of the postmaster": (signal.SIGKILL, 2),
}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    made = make_server()
    yield made
    made.remove()


@pytest.fixture
def name(tmp_path: Path) -> str:
    """A schema of this test."""
    return f"s_{abs(hash(tmp_path))}"


@pytest.fixture
async def proxy(server: Server) -> AsyncIterator[Proxy]:
    async with proxied(server.socket) as made:
        yield made


def through(proxy: Proxy, name: str) -> str:
    return at(f"postgresql://perdure@127.0.0.1:{proxy.port}/postgres", name)


async def _once(engine: PostgresEngine, key: tuple[str, str] = A) -> bool:
    """Commit one entry, and say whether it is there exactly once."""
    before = (await engine.tip(EVENTS, key)).last
    await engine.commit(append(EVENTS, key, [Note()]))
    return (await engine.tip(EVENTS, key)).last == before + 1


# proves C12
@pytest.mark.parametrize("fault", ["before", "after", "silence"])
async def test_a_commit_whose_answer_is_lost_takes_place_once(
    fault: At, proxy: Proxy, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres_commit, "ANSWER_S", 0.5)
    engine = await opened(through(proxy, name))
    assert await _once(engine)
    commits = proxy.commits
    for _ in range(5):
        proxy.faults = [fault]
        assert await _once(engine)
        assert not proxy.faults
    assert proxy.commits - commits == (10 if fault == "before" else 5)
    await engine.close()


async def test_a_blind_retry_or_a_blind_failure_would_be_seen(
    proxy: Proxy, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = await opened(through(proxy, name))

    async def never(committer: Committer, number: int, lost: BaseException) -> bool:
        return False

    async def always(committer: Committer, number: int, lost: BaseException) -> bool:
        return True

    for blind, fault in ((never, "after"), (always, "before")):
        monkeypatch.setattr(Committer, "_took_place", blind)
        proxy.faults = [fault]
        assert not await _once(engine)
    await engine.close()


# proves C12, C22
async def test_what_cannot_be_learned_is_unknown_and_a_repeat_learns_it(
    proxy: Proxy, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres_commit, "RESOLVE_S", 0.2)
    engine = await opened(through(proxy, name))
    await engine.commit(append(EVENTS, A, [Note()]))
    proxy.then_refuse = True
    faults: tuple[At, ...] = ("before", "after")
    for number, fault in enumerate(faults, 2):
        batch = append(EVENTS, A, [Note()], after=number - 1).named(f"op {number}")
        proxy.faults = [fault]
        with pytest.raises(CommitUnknown, match="operation id"):
            await engine.commit(batch)
        proxy.refusing = False
        assert (await engine.commit(batch)).numbers == (number,)
        assert (await engine.tip(EVENTS, A)).last == number
    assert engine.latched is None
    await engine.close()


async def _write(
    engine: PostgresEngine, writer: int, done: asyncio.Event, acknowledged: dict[str, list[int]]
) -> None:
    """Append to a stream of its own and to one that all share, until told to stop."""
    own = ("t", f"own {writer}")
    turn = 0
    while not done.is_set():
        turn += 1
        batch = append(EVENTS, own, [Note(rank=turn)]) + append(EVENTS, A, [Note(rank=writer)])
        try:
            numbers = (await engine.commit(batch.named(f"{writer} {turn}"))).numbers
        except Unavailable:
            numbers = (await engine.commit(batch.named(f"{writer} {turn}"))).numbers
        acknowledged.setdefault(own[1], []).append(numbers[0])
        acknowledged.setdefault("shared", []).append(numbers[1])


async def _numbers(engine: PostgresEngine, key: tuple[str, str]) -> list[int]:
    found: list[int] = []
    while page := await engine.read(EVENTS, key, after=len(found), limit=PAGE_MAX):
        found += [entry.seq for entry in page]
    return found


async def _check_all(engine: PostgresEngine, acknowledged: dict[str, list[int]]) -> None:
    """Everything acknowledged is there once, under its number, and nothing else."""
    for name, numbers in acknowledged.items():
        found = await _numbers(engine, A if name == "shared" else ("t", name))
        assert sorted(numbers) == found, name
        assert found == list(range(1, len(found) + 1))
    assert [finding async for finding in engine.verify()] == []


# proves C3, C4, C12
@pytest.mark.parametrize("how", KILLS)
async def test_a_server_that_dies_under_writers_loses_nothing(
    how: str, server: Server, name: str
) -> None:
    signal_number, times = KILLS[how]
    engine = await opened(at(server.dsn, name))
    acknowledged: dict[str, list[int]] = {}
    done = asyncio.Event()
    writers = [
        asyncio.create_task(_write(engine, writer, done, acknowledged)) for writer in range(6)
    ]
    for _ in range(times):
        seen = len(acknowledged.get("shared", ()))

        async def went_on(seen: int = seen) -> bool:
            return len(acknowledged.get("shared", ())) > seen + 20

        await wait_until(went_on, 20, "writers that go on")
        server.stop(signal_number)
        server.start()
    done.set()
    await asyncio.gather(*writers)
    await _check_all(engine, acknowledged)
    await engine.close()


# proves C3, C12
async def test_backends_that_are_ended_under_writers_lose_nothing(
    server: Server, name: str
) -> None:
    url = at(server.dsn, name)
    engine = await opened(url)
    acknowledged: dict[str, list[int]] = {}
    done = asyncio.Event()
    writers = [
        asyncio.create_task(_write(engine, writer, done, acknowledged)) for writer in range(6)
    ]
    async with beside(url) as other:
        for _ in range(10):
            seen = len(acknowledged.get("shared", ()))

            async def went_on(seen: int = seen) -> bool:
                return len(acknowledged.get("shared", ())) > seen + 10

            await wait_until(went_on, 20, "writers that go on")
            await other.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE application_name = 'perdure'"
            )
    done.set()
    await asyncio.gather(*writers)
    await _check_all(engine, acknowledged)
    await engine.close()


# proves C3
async def test_a_backend_that_is_killed_takes_the_server_through_recovery(
    server: Server, name: str
) -> None:
    url = at(server.dsn, name)
    engine = await opened(url)
    assert await _once(engine)
    async with beside(url) as other:
        pid = await other.fetchval(
            "SELECT pid FROM pg_stat_activity WHERE application_name = 'perdure' LIMIT 1"
        )
        os.kill(pid, signal.SIGKILL)
    assert await _once(engine)
    assert [finding async for finding in engine.verify()] == []
    await engine.close()


# proves C9, C12
@pytest.mark.skipif(
    shutil.which("strace") is None or os.geteuid() != 0, reason="needs strace, root"
)
@pytest.mark.parametrize("fail_at", [1, 2])
async def test_a_failed_sync_is_the_servers_end_and_the_commit_is_looked_up(
    fail_at: int, server: Server, name: str
) -> None:
    """The server cannot know whether its record is on the disk, panics and recovers."""
    url = at(server.dsn, name)
    engine = await opened(url)
    assert await _once(engine)
    session = engine._committer and engine._committer._session
    assert session is not None
    tracer = await asyncio.create_subprocess_exec(
        *("strace", "-qq", "-p", f"{session.get_server_pid()}", "-e", "trace=fdatasync,fsync"),
        *("-e", f"inject=fdatasync,fsync:error=EIO:when={fail_at}", "-o", os.devnull),
        stderr=asyncio.subprocess.PIPE,
    )
    attached = Path(f"/proc/{session.get_server_pid()}/status")

    async def traced() -> bool:
        return f"TracerPid:\t{tracer.pid}\n" in attached.read_text()

    await wait_until(traced, 5, "strace at the backend")
    for _ in range(3):
        assert await _once(engine)
    assert await tracer.wait() is not None
    assert [finding async for finding in engine.verify()] == []
    await engine.close()


# proves C6
async def test_a_tail_in_another_process_misses_nothing_of_many_writers(
    server: Server, name: str
) -> None:
    """32 writers over 4 engines, each with sessions of its own, as processes would have."""
    engines = [await opened(at(server.dsn, name)) for _ in range(4)]
    reader = await opened(at(server.dsn, name))
    writers, turns = 32, 12

    async def write(writer: int) -> None:
        for turn in range(turns):
            await engines[writer % 4].commit(append(EVENTS, A, [Note(rank=writer, due_s=turn)]))

    async def tail() -> list[tuple[int, int, int | None]]:
        seen: list[tuple[int, int, int | None]] = []
        while len(seen) < writers * turns:
            await reader.wait(EVENTS, A, len(seen), timeout_s=20)
            page = await reader.read(EVENTS, A, after=len(seen), limit=7)
            assert page, "a waiter was woken, or waited in vain, with nothing to read"
            seen += [(entry.seq, entry.value.rank, entry.value.due_s) for entry in page]
        return seen

    tailing = asyncio.create_task(tail())
    await asyncio.gather(*(write(writer) for writer in range(writers)))
    seen = await tailing
    assert [seq for seq, _, _ in seen] == list(range(1, writers * turns + 1))
    for writer in range(writers):
        assert [turn for _, rank, turn in seen if rank == writer] == list(range(turns))
    for engine in (*engines, reader):
        await engine.close()


# proves C6
@pytest.mark.parametrize("hints", [True, False])
async def test_who_waits_learns_of_a_commit_elsewhere_with_hints_and_without(
    hints: bool, server: Server, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("perdure.engines.postgres_tail.POLL_S", 60.0 if hints else 0.05)
    if not hints:
        monkeypatch.setitem(postgres_driver.SQL, "notify", "SELECT $1::text, $2::text")
    one, other = [await opened(at(server.dsn, name)) for _ in range(2)]
    first = asyncio.create_task(one.wait(EVENTS, A, 0, timeout_s=30))
    listening = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'LISTEN%'"
    async with beside(at(server.dsn, name)) as session:

        async def listens() -> bool:
            return bool(await session.fetchval(listening))

        await wait_until(listens, 5, "a session that listens")
    async with asyncio.timeout(5):
        for last in range(1, 4):
            await other.commit(append(EVENTS, A, [Note()]))
            assert await first == Tip(1, 1, last)
            first = asyncio.create_task(one.wait(EVENTS, A, last, timeout_s=30))
    await one.close()
    await other.close()
    with pytest.raises(PerdureError):
        await first


# proves C5
async def test_of_writers_in_several_processes_exactly_one_wins(server: Server, name: str) -> None:
    engines = [await opened(at(server.dsn, name)) for _ in range(4)]
    for version in range(10):
        results = await asyncio.gather(
            *(
                engine.commit(put(FACTS, A, Note(rank=rank), expect=version))
                for rank, engine in enumerate(engines * 3)
            ),
            return_exceptions=True,
        )
        assert sum(isinstance(result, Committed) for result in results) == 1
    for engine in engines:
        await engine.close()


async def test_what_waits_for_a_lock_is_refused_alone(
    server: Server, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(postgres_driver._SESSION, "lock_timeout", "200")
    url = at(server.dsn, name)
    engine = await opened(url)
    await engine.commit(put(FACTS, A, Note()))
    async with beside(url) as other, other.transaction():
        await other.execute("SELECT 1 FROM records_facts FOR UPDATE")
        refused, *others = await asyncio.gather(
            engine.commit(put(FACTS, A, Note())),
            *(engine.commit(append(EVENTS, A, [Note()])) for _ in range(5)),
            return_exceptions=True,
        )
        assert isinstance(refused, Unavailable)
        assert "took too long" in str(refused)
        assert all(isinstance(done, Committed) for done in others)
    assert (await engine.commit(put(FACTS, A, Note(), expect=1))).numbers == (2,)
    await engine.close()


# proves C5
async def test_what_is_urgent_passes_who_waits_and_is_fenced_all_the_same(
    server: Server, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Signs of life do not wait for a process that was stopped with the gate in its hand, and a
    batch of any size that looks at a lease waits for who is about to end it."""
    monkeypatch.setattr(postgres_commit, "LOCKS_MAX", 3)
    url = at(server.dsn, name)
    beats = Records("beats", Note, key=("tenant", "id"), urgent=True)
    engine = await opened(url, layouts=[*LAYOUTS, beats])
    committer = engine._committer
    assert committer is not None
    many = reduce(add, (put(FACTS, ("t", f"fact {number}"), Note()) for number in range(4)))
    lock = "SELECT pg_advisory_xact_lock($1)"
    async with beside(url) as other:
        async with other.transaction():
            await other.execute(lock, committer._gate)
            waiting = asyncio.create_task(engine.commit(put(FACTS, A, Note())))
            for number in range(1, 4):
                assert (await engine.commit(put(beats, A, Note()))).numbers == (number,)
            assert not waiting.done()
        await waiting
        async with other.transaction():
            await other.execute(lock, committer._number_of(f"{beats.name}\x1e{join(A)}"))
            with pytest.raises(Unavailable, match="took too long"):
                await engine.commit(put(beats, A, Note()))
            fenced = asyncio.create_task(engine.commit(many + check(beats, A, 3)))
            await wait_until(lambda: waits(other), 30, "a batch that waits for a lease")
            assert not fenced.done()
        await fenced
    await engine.close()


async def waits(session: asyncpg.Connection[asyncpg.Record]) -> bool:
    return bool(await session.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"))


async def test_a_statement_that_takes_too_long_is_given_up_and_nothing_is_written(
    server: Server, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(postgres_driver._SESSION, "statement_timeout", "200")
    url = at(server.dsn, name)
    engine = await opened(url)
    async with beside(url) as other:
        async with other.transaction():
            await other.execute("LOCK TABLE entries")
            with pytest.raises(Unavailable, match="took too long"):
                await engine.commit(append(EVENTS, A, [Note()]) + put(FACTS, A, Note()))
        assert await engine.get(FACTS, A) is None
    assert await _once(engine)
    await engine.close()


# proves C9
async def test_a_server_that_lost_what_it_confirmed_is_not_written_to(
    server: Server, name: str
) -> None:
    """As after a restore, or when a standby took over that lacked the last commits."""
    url = at(server.dsn, name)
    engine = await opened(url)
    for _ in range(3):
        await engine.commit(append(EVENTS, A, [Note()]))
    async with beside(url) as other:
        await other.execute("UPDATE writers SET number = 2")
        await other.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE application_name = 'perdure'"
        )
    with pytest.raises(Latched, match="knows commit 2"):
        await engine.commit(append(EVENTS, A, [Note()]))
    with pytest.raises(Latched):
        await engine.commit(append(EVENTS, A, [Note()]))
    assert engine.latched is not None
    assert (await engine.tip(EVENTS, A)).last == 3
    await engine.close()
    engine = await opened(url)
    assert await _once(engine)
    await engine.close()


async def test_reads_go_on_in_new_sessions_and_say_when_there_are_none(
    proxy: Proxy, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = await opened(through(proxy, name))
    await engine.commit(put(FACTS, A, Note(rank=7)))
    for _ in range(5):
        reads = [asyncio.create_task(engine.get(FACTS, A)) for _ in range(12)]
        await asyncio.sleep(0)
        proxy.cut()
        for record in await asyncio.gather(*reads):
            assert record is not None
            assert record.value.rank == 7
    proxy.refusing = True
    proxy.cut()
    monkeypatch.setattr(Database.again, "__kwdefaults__", {"patience_s": 0.2, "may_pass": None})
    for asked in (engine.get(FACTS, A), engine.commit(put(FACTS, A, Note()))):
        with pytest.raises(Unavailable, match="cannot be reached"):
            await asked
    proxy.refusing = False
    assert (await engine.commit(put(FACTS, A, Note(), expect=1))).numbers == (2,)
    await engine.close()


# proves C2
async def test_a_pooler_that_forgets_the_settings_of_a_session_is_refused(
    proxy: Proxy, name: str
) -> None:
    """It would wait without end, and look for its tables where others have theirs."""
    engine = await opened(through(proxy, name))
    proxy.forgetful = True
    for read_only in (False, True):
        with pytest.raises(PromiseBroken, match="search_path"):
            await opened(through(proxy, name), read_only=read_only)
    proxy.cut()
    for asked in (engine.get(FACTS, A), engine.commit(put(FACTS, A, Note()))):
        with pytest.raises(Unavailable, match="lock_timeout"):
            await asked
    proxy.forgetful = False
    proxy.cut()
    assert (await engine.commit(put(FACTS, A, Note()))).numbers == (1,)
    await engine.close()
    refusal = asyncpg.ProtocolViolationError("unsupported startup parameter: lock_timeout")
    assert not postgres_driver.is_lost(refusal)
    assert isinstance(postgres_driver.translate(refusal, ""), PromiseBroken)


async def test_a_slow_network_makes_everything_late_and_nothing_wrong(
    proxy: Proxy, name: str
) -> None:
    engine = await opened(through(proxy, name))
    proxy.delay_s = 0.02
    results = await asyncio.gather(*(engine.commit(append(EVENTS, A, [Note()])) for _ in range(50)))
    assert sorted(done.numbers[0] for done in results) == list(range(1, 51))
    assert engine.stats.groups < 10, "they shared transactions"
    await engine.close()


async def test_closing_does_not_wait_for_a_server_that_is_gone(
    proxy: Proxy, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Database.again, "__kwdefaults__", {"patience_s": 0.2, "may_pass": None})
    engine = await opened(through(proxy, name))
    proxy.refusing = True
    proxy.cut()
    committing = asyncio.create_task(engine.commit(put(FACTS, A, Note())))
    await asyncio.sleep(0)
    async with asyncio.timeout(10):
        await engine.close()
    with pytest.raises(Unavailable):
        await committing
