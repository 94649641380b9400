"""Several servers behind one port: a parent that starts them, and starts again whoever dies.

The parent opens the port, serves nothing and knows no store. Its children are ordinary servers that
inherit the listening socket: whoever is free takes a connection, and one that arrives while a child
dies is taken by another. Each child has one end of a pair of sockets, by which it says that it is
ready and learns that its parent is gone, however that ended; then it stops as if it were asked to,
so that nobody is left behind.

SIGTERM is passed on to all at once, and a second one too. SIGHUP replaces them one after another,
each once the one before is ready, so that the port is served all the while.
"""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress

import structlog

from perdure.core.clock import Clock, SystemClock
from perdure.core.errors import Unavailable
from perdure.frontends.http.server import Stop

READY = b"r"
"""What a child says to its parent, once."""

_PAUSE_MIN_S, _PAUSE_MAX_S = 0.5, 30.0
_SETTLED_S = 60.0
"""Who lived for so long died of something new, and is started again without a long pause."""

_log = structlog.get_logger("perdure.crew")


class Child:
    """One server process; `ended` is done when it is gone."""

    def __init__(self, process: asyncio.subprocess.Process, told: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        self.pid = process.pid
        self.ready = asyncio.Event()
        self.successor: asyncio.Future[Child] = loop.create_future()
        self.replaced = False
        """Whether it was asked to make room for its successor."""
        self._process = process
        self._told = told
        self.ended = asyncio.create_task(self._live())

    async def settled(self) -> bool:
        """Whether it became ready, once it has or is gone."""
        ready = asyncio.create_task(self.ready.wait())
        await asyncio.wait((ready, self.ended), return_when=asyncio.FIRST_COMPLETED)
        ready.cancel()
        return self.ready.is_set()

    def ask(self) -> None:
        """Ask it to stop, or to hurry."""
        with suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM)

    async def _live(self) -> int:
        """The code to end with because of how it ended: 1 where a signal killed it."""
        with self._told:
            if await asyncio.get_running_loop().sock_recv(self._told, 1) == READY:
                self.ready.set()
            code = await self._process.wait()
        return code if code >= 0 else 1


class Crew:
    """`command` starts a server that inherits two sockets; `started` is told the processes once all
    are ready."""

    def __init__(
        self,
        command: Sequence[str],
        listening: socket.socket,
        size: int,
        started: Callable[[Sequence[int]], Coroutine[None, None, None]],
        clock: Clock | None = None,
    ) -> None:
        self._command = command
        self._listening = listening
        self._size = size
        self._started = started
        self._clock = clock or SystemClock()
        self._children: list[Child] = []
        self._renew = asyncio.Event()

    async def run(self) -> int:
        """Serve until a signal asks to stop, or a child cannot even start; the code to end with."""
        stop = Stop()
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._renew.set)
        serving = asyncio.create_task(self._serve())
        asked = asyncio.create_task(stop.asked.wait())
        hurried = asyncio.create_task(self._hurry(stop))
        await asyncio.wait((serving, asked), return_when=asyncio.FIRST_COMPLETED)
        failed = serving.result() if serving.done() else 0
        for task in (serving, asked):
            task.cancel()
        await asyncio.wait((serving, asked))
        self._listening.close()  # nobody is to wait for an answer that does not come
        for child in self._children:
            child.ask()
        codes = await asyncio.gather(*(child.ended for child in self._children))
        hurried.cancel()
        return next(filter(None, (failed, *codes)), 0)

    async def _hurry(self, stop: Stop) -> None:
        await stop.hurried.wait()
        for child in self._children:
            child.ask()

    async def _serve(self) -> int:
        """Start all, the first alone: it may have a store to make. Then keep them, for ever. The
        code of one that could not start, where that is how it ends."""
        for place in range(self._size):
            self._children.append(await self._start())
            if place == 0 and not await self._children[0].settled():
                return await self._children[0].ended or 1
        for child in self._children:
            if not await child.settled():
                return await child.ended or 1
        await self._started([child.pid for child in self._children])
        async with asyncio.TaskGroup() as group:
            for place in range(self._size):
                group.create_task(self._keep(place))
            group.create_task(self._replace())
        raise AssertionError("they are kept until this is cancelled")

    async def _start(self) -> Child:
        """Raises `Unavailable` where the system starts no more processes."""
        told, theirs = socket.socketpair()
        told.setblocking(False)
        inherited = (self._listening.fileno(), theirs.fileno())
        try:
            process = await asyncio.create_subprocess_exec(
                *(*self._command, "--inherited", *map(str, inherited)),
                pass_fds=inherited,
                process_group=0,  # a terminal's signals are for the parent, which passes them on
            )
        except OSError as error:
            told.close()
            raise Unavailable(f"a worker cannot be started: {error}.") from error
        finally:
            theirs.close()
        return Child(process, told)

    async def _keep(self, place: int) -> None:
        """Start a child again whenever it has ended, more rarely where that happens often."""
        pause_s = _PAUSE_MIN_S
        while True:
            child, began_s = self._children[place], self._clock.monotonic_s()
            code = await asyncio.shield(child.ended)
            if child.replaced or self._clock.monotonic_s() - began_s > _SETTLED_S:
                pause_s = _PAUSE_MIN_S
            if not child.replaced:
                _log.error(
                    "a worker ended, and is started again", pid=child.pid, code=code, in_s=pause_s
                )
                await self._clock.sleep(pause_s)
                pause_s = min(2 * pause_s, _PAUSE_MAX_S)
            try:
                self._children[place] = await self._start()
            except Unavailable as error:
                _log.error("no worker can be started", error=str(error))
                continue
            child.successor.set_result(self._children[place])

    async def _replace(self) -> None:
        """Whenever it is asked for, replace one child after another, as long as that works."""
        while True:
            await self._renew.wait()
            self._renew.clear()
            for old in tuple(self._children):
                old.replaced = True
                old.ask()
                new = await asyncio.shield(old.successor)
                if not await new.settled():
                    _log.error("a worker could not be replaced, and the others stay", pid=old.pid)
                    break
            else:
                _log.warning("every worker was replaced")
