"""Histories of clients over HTTP: the model knows what cannot be, and the drill brings it about."""

from __future__ import annotations

from pathlib import Path

import pytest

from perdure.proving.drills.drill import Trial
from perdure.proving.drills.requests import ContendingRequests
from perdure.proving.linear import linearizable
from perdure.proving.talk import Request, Talk


def did(verb: str, text: str, called: int, returned: int, key: str | None = None) -> Request:
    return Request(verb=verb, told="done", text=text, key=key, called=called, returned=returned)


def lost(verb: str, text: str, called: int, key: str | None = None) -> Request:
    return Request(verb=verb, text=text, key=key, called=called)


def saw(verb: str, called: int, returned: int, *found: str) -> Request:
    return Request(verb=verb, told="done", found=found, called=called, returned=returned)


def absent(text: str, called: int, returned: int) -> Request:
    return Request(verb="remove", told="absent", text=text, called=called, returned=returned)


EXPLAINED = {
    "one after another": [
        did("add", "a", 1, 2),
        did("describe", "x", 3, 4),
        saw("items", 5, 6, "a"),
    ],
    "two at once, in either order": [
        did("add", "a", 1, 4),
        did("add", "b", 2, 3),
        saw("items", 5, 6, "b", "a"),
    ],
    "a key that is sent twice": [
        did("add", "a", 1, 2, "k"),
        did("add", "a", 3, 4, "k"),
        saw("items", 5, 6, "a"),
    ],
    "a lost answer, and the repeat": [
        lost("add", "a", 1, "k"),
        saw("items", 2, 3, "a"),
        did("add", "a", 4, 5, "k"),
        saw("items", 6, 7, "a"),
    ],
    "a removal, and one that comes late": [
        did("add", "a", 1, 2),
        did("remove", "a", 3, 4),
        absent("a", 5, 6),
        saw("items", 7, 8),
    ],
}
UNEXPLAINED = {
    "a lost description": [
        did("describe", "x", 1, 2),
        did("add", "a", 3, 4),
        saw("metadata", 5, 6, ""),
    ],
    "a lost item": [did("add", "a", 1, 2), did("describe", "x", 3, 4), saw("items", 5, 6)],
    "an item that changes its place": [
        did("add", "a", 1, 4),
        did("add", "b", 2, 3),
        saw("items", 5, 6, "a", "b"),
        saw("items", 7, 8, "b", "a"),
    ],
    "a key with two effects": [
        lost("add", "a", 1, "k"),
        did("add", "a", 2, 3, "k"),
        saw("items", 4, 5, "a", "a"),
    ],
    "a removed item that comes back": [
        did("add", "a", 1, 2),
        did("remove", "a", 3, 4),
        saw("items", 5, 6, "a"),
    ],
    "two removals of one item": [
        did("add", "a", 1, 2),
        did("remove", "a", 3, 6),
        did("remove", "a", 4, 5),
    ],
}


@pytest.mark.parametrize("told", EXPLAINED.values(), ids=EXPLAINED)
def test_requests_with_an_order_are_explained(told: list[Request]) -> None:
    assert linearizable(told, Talk())


@pytest.mark.parametrize("told", UNEXPLAINED.values(), ids=UNEXPLAINED)
def test_requests_without_an_order_are_not(told: list[Request]) -> None:
    assert not linearizable(told, Talk())


async def test_a_server_that_is_wrong_is_caught(tmp_path: Path) -> None:
    trial = Trial(tmp_path, "1", seconds=120, wrong_max=1)
    await ContendingRequests("writes-over").run(trial)
    assert trial.violations  # no order explains it, or what is mixed up is refused for good
