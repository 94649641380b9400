"""The locks hold what pyproject.toml asks for, agree with each other, and name no registry."""

from __future__ import annotations

import json
import re
import tomllib

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.tidy.tree import ROOT

PINNED = re.compile(r"^([\w.-]+)==(\S+?)(?: ; .*)? \\$", re.MULTILINE)
RUNTIME = (ROOT / "requirements.lock").read_text()
DEVELOPMENT = (ROOT / "requirements-dev.lock").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def pins(lock: str) -> dict[str, str]:
    return {canonicalize_name(name): version for name, version in PINNED.findall(lock)}


def unmet(wanted: list[str], lock: str) -> list[str]:
    """Requirements that a lock does not meet."""
    held = pins(lock)
    return [
        f"{text} is not met by the lock: run `make lock`."
        for text in wanted
        for need in [Requirement(text)]
        if not need.specifier.contains(held.get(canonicalize_name(need.name), "0"))
    ]


def unhashed(lock: str) -> list[str]:
    """Requirements without a hash, and anything that says where packages come from."""
    entries = re.split(r"\n(?=\w)", "\n" + re.sub(r"(?m)^ *#.*\n?", "", lock))
    found = [entry for entry in entries if entry.strip() and "--hash=sha256:" not in entry]
    return found + re.findall(r".*(?:://|--index|--find-links).*", lock)


def test_the_locks_meet_the_requirements() -> None:
    runtime = PROJECT["project"]["dependencies"]
    assert unmet(runtime, RUNTIME) == []
    assert unmet(runtime + PROJECT["dependency-groups"]["dev"], DEVELOPMENT) == []


def test_the_locks_agree() -> None:
    development = pins(DEVELOPMENT)
    assert {
        name: version for name, version in pins(RUNTIME).items() if development[name] != version
    } == {}


def test_the_locks_hash_everything_and_name_no_registry() -> None:
    assert unhashed(RUNTIME) + unhashed(DEVELOPMENT) == []


def test_the_lock_of_the_judges_from_npm_is_such_a_lock_too() -> None:
    text = (ROOT / "tests/e2e/node/package-lock.json").read_text()
    packages = {name: pin for name, pin in json.loads(text)["packages"].items() if name}
    assert packages
    assert [name for name, pin in packages.items() if "integrity" not in pin] == []
    assert "://" not in text


def test_a_planted_lock_is_refused() -> None:
    lock = "apsw==3.0 \\\n    --hash=sha256:00\nhttpx==1.0\n"
    assert len(unmet(["apsw>=3.50", "msgspec>=0.19"], lock)) == 2
    assert unhashed(lock) == ["httpx==1.0\n"]
    assert len(unhashed("--index-url somewhere://else\n")) == 2
