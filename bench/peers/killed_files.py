"""A store of plain files that is opened, timed, written to and killed; and what reading the same
entries costs that stand in one file, a JSON document a line.

`open` prints the milliseconds that opening took, then what it read and did; it appends until the
journal is nearly as large as it gets, prints how many entries that has, and kills itself.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from pathlib import Path

import msgspec

from bench.peers.perdure_engine import VALUE, Document
from bench.peers.perdure_logs import SESSIONS, session
from perdure.core.batch import append
from perdure.engines import open_engine
from perdure.engines.files_commit import JOURNAL_BYTES

STREAMS = 64
_TOGETHER = 500


async def reopened(directory: Path, entries: int) -> None:
    """Open a store, bring it to so many entries, write on until its journal is nearly full, and
    die of it."""
    began_s = time.perf_counter()
    store = await open_engine(f"file:///{directory}", (SESSIONS,))
    opened_s = time.perf_counter() - began_s
    last = (await store.tip(SESSIONS, session(0))).last

    async def fill(writer: int) -> None:
        for _ in range(last, entries // STREAMS, _TOGETHER):
            await store.commit(append(SESSIONS, session(writer), [VALUE] * _TOGETHER))

    if last < entries // STREAMS:
        await asyncio.gather(*(fill(writer) for writer in range(STREAMS)))
        await store.close()
        return
    done = 0
    while store.stats.log_size_bytes < JOURNAL_BYTES * 7 // 8:
        batches = (append(SESSIONS, session(writer), [VALUE]) for writer in range(STREAMS))
        await asyncio.gather(*map(store.commit, batches))
        done += STREAMS
    told = {"opened_s": opened_s, "frames": store.recovered.replayed, "left": done}
    print(json.dumps(told), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def decoded(path: Path, entries: int) -> None:
    """Read a file of entries, decoded as the engine decodes them."""
    if not path.exists():
        line = msgspec.json.encode(VALUE) + b"\n"
        with path.open("wb") as file:
            for _ in range(entries):
                file.write(line)
    decoder = msgspec.json.Decoder(Document)
    count = 0
    began_s = time.perf_counter()
    with path.open("rb") as file:
        for line in file:
            decoder.decode(line)
            count += 1
    print(json.dumps({"opened_s": time.perf_counter() - began_s, "read": count}))


if __name__ == "__main__":
    which, path, entries = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    if which == "decode":
        decoded(path, entries)
    else:
        asyncio.run(reopened(path, entries))
