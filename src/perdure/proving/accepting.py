"""A program that accepts one input of a worker, again and again, and is killed in the midst of it.

`python -m perdure.proving.accepting` reads lines of a number and the URL of a store, in which the
worker is, and answers each with what became of a process that accepted an input there and was
killed at that of its system calls (0: at none), as `Stepped`. What it said is `acknowledged`, or
nothing.
"""

from __future__ import annotations

import asyncio
import os
import sys
from functools import partial

import msgspec

import perdure
from perdure.proving.stepped import marker, stepped

AT = ("lab", "scout")
INPUT = {"content": {"say": "hi"}, "submission_id": "s1"}


async def accept(url: str, told: int) -> None:
    """Open, accept and close. What is counted ends with the closing."""
    async with perdure.open(url) as state:
        marker()
        await state.workers.input(*AT, INPUT)
        os.write(told, b"acknowledged")
    marker()


def work(url: str, told: int) -> None:
    asyncio.run(accept(url, told))


def main() -> None:
    """See the head of this file."""
    for line in sys.stdin:
        number, _, url = line.strip().partition(" ")
        found = stepped(partial(work, url), int(number))
        os.write(1, msgspec.json.encode(found) + b"\n")


if __name__ == "__main__":
    main()
