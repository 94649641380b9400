"""The library as a program of one's own uses it."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Timer
from typing import Any

import pytest

import perdure
from perdure.core.disk import Disk
from perdure.core.errors import Closed, StoreLocked
from perdure.engines import open_engine
from perdure.surfaces.conversations import Conversation

KEY = ("default", "conv_1")


# proves C3
async def test_what_one_program_commits_the_next_one_reads(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'state.db'}"
    async with perdure.open(url) as state:
        await state.commit(state.conversations.create(KEY, Conversation(7, {"a": "b"})))
    async with perdure.open(url) as state:
        found = await state.conversations.get(*KEY)
    assert (found.version, found.value.metadata) == (1, {"a": "b"})


# proves C11
async def test_a_store_in_use_is_refused_naming_the_holder(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'state.db'}"
    async with perdure.open(url):
        with pytest.raises(StoreLocked, match="in use") as refused:
            async with perdure.open(url):
                pass
    assert refused.value.holder == os.getpid()


def test_a_script_needs_no_event_loop(tmp_path: Path) -> None:
    with perdure.blocking(f"sqlite:///{tmp_path / 'state.db'}") as state:
        state.commit(state.conversations.create(KEY, Conversation(7, {})))
        assert state.conversations.get(*KEY).version == 1
        assert list(state.items.all(KEY, "items")) == []
        assert list(state.engine.verify()) == []


# proves C11
@pytest.mark.parametrize("where", ["file:///{}/state", "sqlite:///{}/state.db"])
async def test_who_only_looks_at_a_store_is_waited_for(where: str, tmp_path: Path) -> None:
    url = where.format(tmp_path)
    async with perdure.open(url):
        pass
    async with perdure.open(url, read_only=True):
        opening = asyncio.ensure_future(perdure.open(url).__aenter__())
        await asyncio.wait([opening], timeout=0.3)
        assert not opening.done()
    await (await opening).engine.close()


# proves W1, W2
@pytest.mark.parametrize("where", ["memory://", "file:///{}/state", "sqlite:///{}/state.db"])
def test_an_agent_needs_no_server_and_no_event_loop(where: str, tmp_path: Path) -> None:
    with perdure.blocking(where.format(tmp_path)) as state:
        workers = state.workers
        workers.create_runtime({"id": "lab"})
        workers.create("lab", {"id": "scout"})
        assert workers.input("lab", "scout", {"content": "look around"}).number == 1
        run = workers.start("lab", "scout").generation
        (given,) = workers.inputs("lab", "scout").data
        said = [{"role": "assistant", "content": f"done: {given.content}"}]
        workers.progress("lab", "scout", {"generation": run, "taken": 1, "transcript": said})
        said_of_all = [one.content for one in workers.transcript("lab", "scout").data]
        assert said_of_all == ["look around", "done: look around"]
        for ((_, told),) in workers.follow("lab", "scout"):
            assert told.overview.taken == 1
            break


def with_a_worker(state: Any) -> Any:
    state.workers.create_runtime({"id": "lab"})
    state.workers.create("lab", {"id": "scout"})
    return state.workers


# proves W4
def test_threads_share_what_one_of_them_opened(tmp_path: Path) -> None:
    with perdure.blocking(f"file:///{tmp_path / 'state'}") as state:
        workers = with_a_worker(state)

        def send(who: int) -> None:
            for number in range(5):
                workers.input("lab", "scout", {"content": [who, number]})

        with ThreadPoolExecutor(4) as threads:
            list(threads.map(send, range(4)))
        assert workers.state("lab", "scout").inputs == 20


async def test_a_program_with_an_event_loop_may_block_it() -> None:
    with perdure.blocking("memory://") as state:
        assert with_a_worker(state).get("lab", "scout").status == "ready"


def test_an_interrupt_ends_a_call_and_nothing_else(tmp_path: Path) -> None:
    with perdure.blocking(f"file:///{tmp_path / 'state'}") as state:
        workers = with_a_worker(state)
        followed = workers.follow("lab", "scout")
        next(followed)
        interrupting = Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
        interrupting.start()
        with pytest.raises(KeyboardInterrupt):
            next(followed)
        interrupting.join()
        assert workers.input("lab", "scout", {"content": "still here"}).number == 1


def test_who_comes_after_the_end_or_is_a_fork_is_told(tmp_path: Path) -> None:
    with perdure.blocking(f"file:///{tmp_path / 'state'}") as state:
        workers = with_a_worker(state)
        if not (child := os.fork()):
            try:
                workers.get("lab", "scout")
            except Closed as refused:
                os._exit(7 if f"opened by process {os.getppid()}" in str(refused) else 8)
            os._exit(9)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        assert workers.get("lab", "scout").status == "ready"
    with pytest.raises(Closed, match="Open it again"):
        workers.get("lab", "scout")


FORGETFUL = """
import sys, perdure
opened = perdure.blocking(sys.argv[1])
workers = opened.__enter__().workers
workers.create_runtime({"id": "lab"})
workers.create("lab", {"id": "scout"})
run = workers.start("lab", "scout")
"""


class Contended(Disk):
    """A disk on which somebody wants the store whenever a directory is synced."""

    def __init__(self, lock: Path) -> None:
        super().__init__()
        self._lock = lock
        self.told: list[int] = []

    def sync_directory(self, path: Path) -> None:
        if self._lock.exists():
            try:
                Disk().lock(self._lock).release()
            except StoreLocked as refused:
                self.told.append(refused.holder)
        super().sync_directory(path)


# proves C11
@pytest.mark.parametrize(
    ("url", "lock"),
    [("file:///{}", ".perdure/lock"), ("sqlite:///{}/state.db", "state.db.lock")],
)
async def test_who_is_still_opening_a_store_is_named_and_not_who_held_it_before(
    url: str, lock: str, tmp_path: Path
) -> None:
    at = tmp_path / lock
    Disk().make_directory(at.parent)
    Disk().write_file(at, b"4194305\nboot\n/gone/control\n")  # of one that was killed
    disk = Contended(at)
    await (await open_engine(url.format(tmp_path), (), disk=disk)).close()
    assert set(disk.told) == {os.getpid()}


# proves C3, C11, W7
@pytest.mark.parametrize("where", ["file:///{}/state", "sqlite:///{}/state.db"])
def test_who_forgets_to_close_loses_nothing_and_ends(where: str, tmp_path: Path) -> None:
    url = where.format(tmp_path)
    subprocess.run((sys.executable, "-c", FORGETFUL, url), check=True, timeout=60)
    with perdure.blocking(url) as state:
        worker = state.workers.get("lab", "scout")
        assert (worker.status, worker.generation) == ("ready", 2)
        with pytest.raises(StoreLocked, match=f"process {os.getpid()}"), perdure.blocking(url):
            pass


# proves W2
def test_without_the_files_engine_the_core_imports_and_the_suite_passes(tmp_path: Path) -> None:
    home, copy = Path(perdure.__file__).parent, tmp_path / "src/perdure"
    shutil.copytree(home, copy, ignore=shutil.ignore_patterns("__pycache__"))
    gone = sorted(path.name for path in (copy / "engines").glob("files*.py"))
    assert "files.py" in gone
    for name in gone:
        (copy / "engines" / name).unlink()
    made = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-k", "memory"),
            *("tests/services/test_workers.py", f"--override-ini=pythonpath=. {tmp_path / 'src'}"),
        ],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"PYTHONPATH": f"{tmp_path / 'src'}"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert made.returncode == 0, made.stdout
