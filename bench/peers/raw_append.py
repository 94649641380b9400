"""The floor under every log of files: one line of 1 KiB a write to one open file, and one fsync for
all that wait. No checksum, no order of streams, nothing to look up."""

from __future__ import annotations

import asyncio
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench.load import DOCUMENT, closed_loop, main

LINE = json.dumps(DOCUMENT).encode() + b"\n"


class GroupAppend:
    """A file whose appends share their syncs."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._waiting: list[tuple[bytes, asyncio.Future[None]]] = []
        self._called = asyncio.Event()
        self._thread = ThreadPoolExecutor(1)
        self._task = asyncio.create_task(self._sync_all())

    async def append(self, line: bytes) -> None:
        """Return when the line is durable."""
        durable: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((line, durable))
        self._called.set()
        await durable

    def close(self) -> None:
        self._task.cancel()
        self._thread.shutdown()
        os.close(self._fd)

    async def _sync_all(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._called.wait()
            self._called.clear()
            while self._waiting:
                group, self._waiting = self._waiting, []
                data = b"".join(line for line, _ in group)
                await loop.run_in_executor(self._thread, self._write, data)
                for _, durable in group:
                    durable.set_result(None)

    def _write(self, data: bytes) -> None:
        os.write(self._fd, data)
        os.fdatasync(self._fd)


def append(directory: Path, writers: int, duration_s: float) -> dict[str, float]:
    async def within() -> dict[str, float]:
        log = GroupAppend(directory / "log")
        try:
            return await closed_loop(lambda writer, n: log.append(LINE), writers, duration_s)
        finally:
            log.close()

    return asyncio.run(within())


if __name__ == "__main__":
    main({"append": append})
