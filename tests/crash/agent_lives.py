"""Lives of the example's agent, forked one after another: `DIRECTORY GATEWAY UPSTREAM`.

An event is an edge of a commit, of a request to the model, or of a call of the tool. Case N is
killed by SIGKILL at event N of its life, and another life goes on; what both have left is told on a
line of JSON. Case 0 is not killed, and the last is one that has no event N.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import msgspec
import openai

import perdure
from examples.agent import agent
from perdure import library
from perdure.core.engine import Engine
from perdure.engines import open_engine
from perdure.engines.failing import Edge, Failing, Fault
from perdure.engines.files import FilesEngine

PATIENCE_S = 30
OPENAI, NOTEBOOK = openai.OpenAI, agent.notebook


class Life:
    """Counts the events of this process, and kills it at number `at`."""

    def __init__(self, at: int, upstream: str, log: Path) -> None:
        self._at = at
        self._upstream = upstream
        self.log = log
        self._seen = 0

    def reach(self, event: str) -> None:
        self._seen += 1
        if self._seen == self._at:
            self.log.write_text(event)
            os.kill(os.getpid(), signal.SIGKILL)

    async def open(self, url: str, layouts: Any, **options: Any) -> Engine:
        async def before() -> None:
            self.reach("before a commit")

        async def after() -> None:
            self.reach("after a commit")

        engine = await open_engine(url, layouts, **options)
        return Failing(engine, [Fault(Edge.BEFORE, before), Fault(Edge.AFTER, after)])

    def notebook(self, path: Path) -> agent.Tool:
        note = NOTEBOOK(path)

        def called(operation: str, text: str) -> str:
            self.reach("before the tool")
            with path.open("a"):
                self.reach("in the tool, before its effect")
            output = note(operation, text=text)
            self.reach("in the tool, after its effect")
            return output

        return called

    def ask(self, request: httpx.Request, send: Callable[[], httpx.Response]) -> httpx.Response:
        self.reach("before the model is asked")
        if self._seen + 1 == self._at:
            before = self._asked(0)
            threading.Thread(target=send, daemon=True).start()
            self._asked(before + 1)
        self.reach("while the model answers")
        answer = send()
        answer.read()
        self.reach("with the model's answer")
        return answer

    def _asked(self, at_least: int) -> int:
        """How many requests the model has been sent, once they are so many."""
        wanted = {"requests": at_least, "timeout_s": PATIENCE_S}
        told = httpx.get(f"{self._upstream}/received", params=wanted, timeout=2 * PATIENCE_S)
        return len(told.json()["requests"])


class Asking(httpx.HTTPTransport):
    """The way to the gateway, under the eyes of a life."""

    def __init__(self, life: Life) -> None:
        super().__init__()
        self._life = life

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        send = super().handle_request
        return self._life.ask(request, lambda: send(request))


def live(directory: Path, gateway: str, life: Life) -> None:
    """Run the example as a shell does, with `life` between it and the world."""

    def sdk(**options: Any) -> openai.OpenAI:
        return OPENAI(**options, http_client=httpx.Client(transport=Asking(life)), max_retries=0)

    replaced: tuple[tuple[Any, str, Any], ...] = (
        (library, "open_engine", life.open),
        (agent, "notebook", life.notebook),
        (openai, "OpenAI", sdk),
    )
    for home, name, ours in replaced:
        setattr(home, name, ours)
    given = ('tool note {"text": "the kettle is on"}', "--submission", "s1")
    sys.argv = ["agent.py", str(directory), *given, "--gateway", gateway]
    agent.main()


def live_and_tell(directory: Path, gateway: str, number: int, life: Life) -> None:
    """Print what the lives of a case have left."""
    live(directory, gateway, life)
    library.open_engine = open_engine
    with perdure.blocking(f"file:///{directory / 'state'}") as state:
        left = {
            "case": number,
            "event": life.log.read_text() if life.log.exists() else None,
            "transcript": state.workers.transcript(*agent.AT).data,
            "overview": state.workers.overview(*agent.AT),
            "notes": (directory / "notes.jsonl").read_text().splitlines(),
        }
    print(msgspec.json.encode(left).decode(), flush=True)


def forked(work: Callable[[], None]) -> int:
    """Do it in a process of its own; its exit code, negative for the signal that killed it."""
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    try:
        work()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def main() -> None:
    root, gateway, upstream = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    # What is slow to import and to build is there before the first fork.
    warm = OPENAI(base_url=gateway, api_key="none").responses.create
    assert FilesEngine
    assert warm(model="any", input="tool warm").output
    for number in itertools.count():
        directory, log = root / f"case{number}", root / f"event{number}"
        directory.mkdir()
        lives = partial(live_and_tell, directory, gateway, number)
        code = forked(partial(lives, Life(number, upstream, log)))
        if code == -signal.SIGKILL:
            code = forked(partial(lives, Life(0, upstream, log)))
        if code or (number and not log.exists()):
            return


if __name__ == "__main__":
    main()
