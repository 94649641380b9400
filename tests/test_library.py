"""The library as a program of one's own uses it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import perdure
from perdure.core.errors import StoreLocked
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
