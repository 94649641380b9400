"""In a network of its own, a PostgreSQL and an engine between which a packet filter drops what goes
one way, for longer than an answer is waited for; says what is wrong then, line by line."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

from perdure.core.clock import SystemClock
from perdure.engines import open_engine, postgres_commit
from perdure.engines.postgres_commit import Committer
from perdure.proving.drills.database import Writing
from perdure.proving.postgres import Server
from perdure.proving.steps import LAYOUTS, troubles

PORT = "5432"
AWAY_S = 1.2
ANSWER_S = 0.5
ALL: tuple[str, ...] = ()
COMMIT = ("-m", "string", "--algo", "bm", "--string", "COMMIT")
DROPPED = (("--dport", ALL), ("--dport", COMMIT), ("--sport", COMMIT))
"""All that goes to the server, a COMMIT alone, and its answer alone. What did not arrive is sent
again by the system when it can, also where who sent it has given it up."""


def filtered(change: str, way: str, what: tuple[str, ...]) -> None:
    rule = ("INPUT", "-p", "tcp", way, PORT, *what, "-j", "DROP")
    subprocess.run(("iptables", change, *rule), check=True)


async def guess(committer: Committer, number: int, lost: BaseException) -> bool:
    return False


async def main(directory: str, *plant: str) -> None:
    vars(postgres_commit)["ANSWER_S"] = ANSWER_S
    server = Server(Path(directory))
    server.start(listen_addresses="127.0.0.1", port=PORT)
    url = f"postgresql://perdure@127.0.0.1:{PORT}/postgres?schema=partitioned"
    engine = await open_engine(url, LAYOUTS, clock=SystemClock())
    if plant:
        Committer._took_place = guess  # type: ignore[method-assign]
    writing = Writing(engine)
    for way, what in DROPPED[-1:] if plant else DROPPED:
        await writing.reach(5)
        filtered("-I", way, what)
        await SystemClock().sleep(AWAY_S / 2)
        before = dict(writing.acknowledged)
        await SystemClock().sleep(AWAY_S / 2)
        if what is ALL and writing.acknowledged != before:
            print(f"{way}: acknowledged across a network that carries nothing")
        filtered("-D", way, what)
    await writing.reach(5)
    wrong = await writing.stop()
    wrong += await troubles(engine, writing.acknowledged, writing.begun)
    print(*wrong, sep="\n")
    print(f"{sum(writing.acknowledged.values())} steps")
    await engine.close()
    server.remove()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
